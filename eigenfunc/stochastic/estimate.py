"""An estimate from random probes, and how far it may be off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.certificate import Products
from eigenfunc.errors import InputError

Value = TypeVar("Value")

_SKEW = 2.16  # (z⁴ + 2z² − 3)/9 at z = 1.96
_FEW = 16.0  # samples below which they hardly show how skew they are: 90% of the intervals hold for χ² of one degree
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True, eq=False)
class Estimate(Generic[Value]):
    """A number, or a tree of them, estimated without bias (a square root of such: see `frobenius_norm`).

    value    in the units of what is estimated
    stderr   its standard error in the same units: what the samples say, widened by their skewness (P. Hall, The
             Bootstrap and Edgeworth Expansion, 1992, section 2.4), and rounding, with what products lose where
             larger numbers cancel inside of them; no more than rounding where the estimate is exact
    dof      degrees of freedom of `stderr`; infinite where nothing is random
    matvecs  products spent, two of them to measure their noise
    seed     of the probes
    """

    value: Value
    stderr: Value
    dof: float
    matvecs: int
    seed: int

    def interval(self, level: float = 0.95) -> tuple[Value, Value]:
        """Lower and upper end of the interval that holds the truth at this level, by Student's t."""
        reach = quantile(self.dof, level)
        low: Value = tree.tree_map(lambda value, stderr: value - reach * stderr, self.value, self.stderr)
        high: Value = tree.tree_map(lambda value, stderr: value + reach * stderr, self.value, self.stderr)
        return low, high


def quantile(dof: float, level: float) -> float:
    """t with P(|T| ≤ t) = level for Student's T.

    With t = √dof sinh u the density is that of cosh^(−dof), which Gauss and Legendre integrate to all digits over
    the range that matters, and so the range is doubled from below until it holds enough.
    """
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level!r}")
    if dof > 1e6:
        return NormalDist().inv_cdf((1 + level) / 2)
    constant = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(math.pi)

    def inside(reach: float) -> float:
        return constant * reach * float(_WEIGHTS @ np.cosh(reach / 2 * (_NODES + 1)) ** -dof)

    high = 1 / math.sqrt(dof)
    while inside(high) < level and high < 64:
        high *= 2
    low = 0.0
    for _ in range(60):
        reach = (low + high) / 2
        low, high = (reach, high) if inside(reach) < level else (low, reach)
    return math.sqrt(dof) * math.sinh((low + high) / 2)


def spread(samples: Tensor) -> Tensor:
    """The variance (...) of the mean of independent samples (m, ...), m ≥ 2, widened by their skewness so that
    Student's t holds 95% as it says.

    Of a few samples of a skew law most look less skew than it is, so that what they show counts 1 + 16/m times. For
    the squares of normal numbers, the most skew that a matrix of rank one makes them, and for normal ones, the share of
    intervals that hold is then 90% and 98% for m = 4, 91% and 97% for 8, 93% and 95% for 24. Two samples show nothing:
    85% and 95%.
    """
    m = samples.shape[0]
    d = samples - samples.mean(0)
    second = (d**2).mean(0)
    variance = second / (m - 1)
    if m < 3:
        return variance
    safe = torch.where(second > 0, second, 1.0)
    skewness = (d**3).mean(0) / safe**1.5 * math.sqrt(m * (m - 1)) / (m - 2)
    widened: Tensor = variance * (1 + _SKEW * (1 + _FEW / m) * skewness**2 / m)
    return widened


def concluded(
    products: Products, value: float, variance: float, rounding: float, dof: float, seed: int
) -> Estimate[float]:
    """The estimate in the user's units; `variance` is that of the value, `rounding` the error of the arithmetic."""
    stderr = math.hypot(math.sqrt(max(variance, 0.0)), rounding)
    return Estimate(value * products.scale, stderr * products.scale, dof, products.matvecs, seed)
