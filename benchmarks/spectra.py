"""Synthetic spectra shaped like those of trained networks, as diagonal operators of any size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from eigenfunc import LinearOperator, aslinearoperator


def hess(n: int) -> Tensor:
    """Outliers 1, 1/2, 1/3, … above the bulk and the negative edge."""
    return _above_bulk(1 / torch.arange(1, 126, dtype=torch.float64), n)


def slow(n: int) -> Tensor:
    """Outliers that fall as slowly as i^(−1/2), down to 0.09."""
    return _above_bulk(torch.arange(1, 126, dtype=torch.float64) ** -0.5, n)


def cluster(n: int) -> Tensor:
    """Groups of five outliers a thousandth apart, at 1, 1/2, 1/3, … down to 1/25."""
    centres = 1 / torch.arange(1, 26, dtype=torch.float64)
    return _above_bulk((centres[:, None] * (1 - 1e-3 * torch.arange(5, dtype=torch.float64))).flatten(), n)


SPECTRA: dict[str, Callable[[int], Tensor]] = {"hess": hess, "slow": slow, "cluster": cluster}


def _above_bulk(outliers: Tensor, n: int) -> Tensor:
    """n values: outliers, a Marchenko–Pastur bulk below 0.008, and a negative edge at −0.03."""
    edge = -0.03 * torch.linspace(0, 1, n // 20, dtype=torch.float64) ** 2
    count = n - len(outliers) - len(edge)
    low, high = (1 - math.sqrt(0.5)) ** 2, (1 + math.sqrt(0.5)) ** 2
    x = torch.linspace(low, high, 20_001, dtype=torch.float64)
    density = torch.sqrt(((high - x) * (x - low)).clamp_min(0)) / x
    cumulative = density.cumsum(0) / density.sum()
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    bulk = x[torch.searchsorted(cumulative, quantiles)] / high * 0.008
    return torch.cat([outliers, bulk, edge])


def diagonal(values: Tensor) -> LinearOperator:
    """The operator with these eigenvalues, in random order so that no vector is special."""
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    return aslinearoperator(lambda v: shuffled * v, shuffled)
