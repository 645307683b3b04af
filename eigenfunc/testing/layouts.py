"""Parameter trees of every make: n entries cut into leaves of random shapes and put into containers."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc.tree import Tree


class Layer(NamedTuple):
    """A container that is a named tuple."""

    weight: Tree
    bias: Tree


LAYOUTS = ("bare", "dict", "list", "tuple", "named tuple", "nested")


def parameter_tree(n: int, layout: str = "bare", seed: int = 0, dtype: torch.dtype = torch.float64) -> Tree:
    """A pytree of zeros with n entries in all, in leaves of random shapes, some without a dimension, some empty.

    layout  one of `LAYOUTS`: the container, or "bare" for a single tensor
    """
    rng = random.Random(seed)
    if layout == "bare":
        return torch.zeros(_shape(n, rng), dtype=dtype)
    cuts = sorted(rng.choices(range(n + 1), k=rng.randrange(1, 6)))
    leaves = [
        torch.zeros(_shape(stop - start, rng), dtype=dtype)
        for start, stop in zip([0, *cuts], [*cuts, n], strict=True)
        if stop > start or rng.random() < 0.2
    ]
    return _contained(leaves, layout, rng)


def _shape(n: int, rng: random.Random) -> tuple[int, ...]:
    if n == 0:
        return rng.choice([(0,), (0, 2)])
    if n == 1:
        return rng.choice([(), (1,), (1, 1)])
    divisor = rng.choice([d for d in range(1, min(n, 64) + 1) if n % d == 0])
    return rng.choice([(n,), (divisor, n // divisor)])


def _contained(leaves: list[Tensor], layout: str, rng: random.Random) -> Tree:
    if layout == "dict":
        labels = rng.sample([*"abcdefgh", "0.weight", "0.bias"], len(leaves))
        return dict(zip(labels, leaves, strict=True))
    if layout == "list":
        return leaves
    if layout == "tuple":
        return tuple(leaves)
    if layout == "named tuple":
        return Layer(leaves[:1], leaves[1:])
    half = rng.randrange(len(leaves) + 1)
    outer = _contained(leaves[:half], rng.choice(LAYOUTS[1:5]), rng)
    return {"z": outer, "a": Layer({"inner": leaves[half:]}, ())}
