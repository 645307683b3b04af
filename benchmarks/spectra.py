"""Synthetic spectra shaped like those of trained networks, as diagonal operators of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eigenfunc import LinearOperator, aslinearoperator


def hess(n: int) -> Tensor:
    """Outliers 1, 1/2, 1/3, … down to a Marchenko–Pastur bulk below 0.008, and a negative edge at −0.03."""
    outliers = 1 / torch.arange(1, 126, dtype=torch.float64)
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
