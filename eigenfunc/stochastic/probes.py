"""Random probes, and their products in blocks of bounded size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from eigenfunc import tree
from eigenfunc.certificate import Products, seeded, whole
from eigenfunc.errors import InputError

_BLOCK = 32  # probes multiplied at once at most
_NOISE = 5  # seed of the vector that noise is measured with
_ENTRIES = 2**26  # entries of a block of probes, unless it is a single one


def begun(
    A: Any, given: Any, least: int, seed: int | None, what: str = "num_matvecs"
) -> tuple[Products, int, Generator, int]:
    """The counted products, how many of them or of probes to spend, the generator and its seed.

    As many are spent as given, and n at most, for with those everything is known.
    """
    products = Products(A)
    count = whole(given, what, 1)
    if count < min(least, products.size):
        raise InputError(f"{what} must be at least {least}, got {count}: a single sample has no standard error")
    return products, min(count, products.size), *seeded(seed)


def least_of(method: str, known: Mapping[str, int]) -> int:
    """The fewest products that a method takes; `InputError` for an unknown one."""
    if method not in known:
        raise InputError(f"method must be one of {', '.join(map(repr, known))}, got {method!r}")
    return known[method]


def normal(count: int, products: Products, generator: Generator) -> Tensor:
    """Independent standard normal entries (count, n)."""
    return _drawn(count, products, lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64))


def sphere(count: int, products: Products, generator: Generator) -> Tensor:
    """Vectors (count, n) of length √n, uniform in direction."""

    def draw(shape: tuple[int, int]) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x *= math.sqrt(products.size) / torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return x

    return _drawn(count, products, draw)


def signs(count: int, products: Products, generator: Generator) -> Tensor:
    """Entries ±1 (count, n)."""
    return _drawn(count, products, lambda shape: 2 * torch.randint(0, 2, shape, generator=generator) - 1)


def _drawn(count: int, products: Products, draw: Callable[[tuple[int, int]], Tensor]) -> Tensor:
    """Drawn on the CPU, so that seeds carry over devices, and a block at a time, for their dtype is a wide one."""
    out = torch.empty(count, products.size, dtype=products.dtype, device=products.device)
    for start, size in blocks(count, products):
        out[start : start + size] = draw((size, products.size))
    return out


def units(start: int, count: int, products: Products) -> Tensor:
    """Rows start, …, start + count − 1 of the identity."""
    block = torch.zeros(count, products.size, dtype=products.dtype, device=products.device)
    block[torch.arange(count), start + torch.arange(count)] = 1
    return block


def blocks(count: int, products: Products, room: int = 1) -> Iterator[tuple[int, int]]:
    """(start, size) of the blocks in which `count` probes are multiplied, each with `room` vectors to keep."""
    size = min(max(_ENTRIES // (room * products.size), 1), _BLOCK)
    for start in range(0, count, size):
        yield start, min(size, count - start)


def multiplied(products: Products, block: Tensor) -> Tensor:
    """A z / scale for a stack of probes z (p, n); `NonFiniteError` where one is NaN or infinite. Before the first of
    them two products with a vector of its own measure their noise."""
    if products.passes == 0:
        products.calibrate(Generator().manual_seed(_NOISE))
    image = products(block)
    products.check_finite(bool(torch.isfinite(image).all()))
    return image


def all_multiplied(products: Products, rows: Tensor) -> Tensor:
    """As `multiplied`, for any number of rows."""
    out = torch.empty_like(rows)
    for start, size in blocks(len(rows), products):
        out[start : start + size] = multiplied(products, rows[start : start + size])
    return out


def grain(products: Products) -> float:
    """The relative error that rounding leaves in a product and an inner product with it, cancellation included."""
    return 4 * max(_eps(products), products.noise)


def spilt(products: Products) -> float:
    """The error of any entry of a product, relative to ‖A‖_F, where larger numbers have cancelled inside of it."""
    return 4 * products.noise if products.noise > 4 * _eps(products) else 0.0


def _eps(products: Products) -> float:
    return max(products.eps, tree.coarsest_eps(products.A.like))
