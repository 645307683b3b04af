"""Spectra that break solvers, as functions of their size: each family returns its eigenvalues in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Family(NamedTuple):
    """A way of making n eigenvalues.

    make     (n, generator) -> (n,) float64, in no particular order, of magnitude about one
    sizes    those at which the family is known to be hard; any other does as well
    largest  the most that it can make
    """

    make: Callable[[int, Generator], Tensor]
    sizes: tuple[int, ...] = ()
    largest: int = 10**7


def drawn_count(low: int, high: int, g: Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=g))


def _uniform(n: int, g: Generator) -> Tensor:
    return torch.rand(n, generator=g, dtype=torch.float64)


def _gauss(n: int, g: Generator) -> Tensor:
    return torch.randn(n, generator=g, dtype=torch.float64)


def _tridiagonal(diagonal: Tensor, off: Tensor) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    return values


def _wilkinson(n: int, g: Generator) -> Tensor:
    """Pairs that agree to more and more digits (J. H. Wilkinson, The Algebraic Eigenvalue Problem, 1965)."""
    return _tridiagonal((torch.arange(n).double() - (n - 1) / 2).abs(), torch.ones(n - 1).double())


def _glued(glue: float) -> Callable[[int, Generator], Tensor]:
    """Copies of W21 coupled by `glue`: clusters as tight as that (B. N. Parlett and C. Vömel, 2009)."""

    def make(n: int, g: Generator) -> Tensor:
        place = torch.arange(n) % 21
        return _tridiagonal((place - 10).abs().double(), torch.where(place[:-1] == 20, glue, 1.0).double())

    return make


def _clement(n: int, g: Generator) -> Tensor:
    return torch.arange(n - 1, -n, -2).double()


def _hilbert(n: int, g: Generator) -> Tensor:
    i = torch.arange(n).double()
    values: Tensor = torch.linalg.eigvalsh(1 / (i[:, None] + i[None] + 1))
    return values


def _cluster(spacing: float) -> Callable[[int, Generator], Tensor]:
    """2 to 8 values 1 − spacing·i above a bulk."""

    def make(n: int, g: Generator) -> Tensor:
        top = 1 - spacing * torch.arange(drawn_count(2, 8, g)).double()
        return torch.cat([top, 0.9 * _uniform(n, g)])[:n]

    return make


def _multiple(n: int, g: Generator) -> Tensor:
    """1 to 9 copies of the top, then of the second value: above, at and below usual block sizes."""
    top, second = torch.ones(drawn_count(1, 9, g)), torch.full((drawn_count(1, 9, g),), 0.9)
    return torch.cat([top.double(), second.double(), 0.8 * _uniform(n, g)])[:n]


def _pairs(n: int, g: Generator) -> Tensor:
    i = torch.arange(1, n // 2 + 1).double() / n
    return torch.cat([i, -i, torch.zeros(n % 2).double()])


def _outliers(n: int, g: Generator) -> Tensor:
    """1, 1/2, 1/3, … over a bulk below 0.01 with a negative edge: what the Hessians of networks look like."""
    out = 1 / torch.arange(1, drawn_count(1, 12, g) + 1).double()
    return torch.cat([out, torch.where(_uniform(n, g) < 0.9, 0.01, -0.03) * _uniform(n, g) ** 2])[:n]


def _low_rank(n: int, g: Generator) -> Tensor:
    return torch.cat([_gauss(drawn_count(1, 6, g), g), torch.zeros(n).double()])[:n]


FAMILIES: dict[str, Family] = {
    "uniform": Family(_uniform),
    "gauss": Family(_gauss),
    "identity": Family(lambda n, g: torch.ones(n).double()),
    "zero": Family(lambda n, g: torch.zeros(n).double()),
    "rank one": Family(lambda n, g: torch.where(torch.arange(n) == 0, n, 0).double()),
    "low rank": Family(_low_rank),
    "multiple": Family(_multiple),
    "integers": Family(lambda n, g: torch.randint(-3, 4, (n,), generator=g).double()),
    "pairs": Family(_pairs),
    "outliers": Family(_outliers),
    "cluster 1e-4": Family(_cluster(1e-4)),
    "cluster 1e-6": Family(_cluster(1e-6)),
    "cluster 1e-12": Family(_cluster(1e-12)),
    "geometric": Family(lambda n, g: 10.0 ** torch.linspace(0, -16, n).double()),
    "Clement": Family(_clement),
    "Hilbert": Family(_hilbert, largest=2_000),
    "Wilkinson": Family(_wilkinson, sizes=(21, 201), largest=2_000),
    "glued Wilkinson 1e-8": Family(_glued(1e-8), sizes=(42, 63, 210), largest=2_000),
    "glued Wilkinson 1e-14": Family(_glued(1e-14), sizes=(42, 63, 210), largest=2_000),
}


def spectrum(family: str, n: int, seed: int = 0) -> Tensor:
    """(n,) float64 eigenvalues of a family of `FAMILIES`, the same for the same seed."""
    return FAMILIES[family].make(n, torch.Generator().manual_seed(seed))
