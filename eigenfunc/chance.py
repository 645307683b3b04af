"""The chances behind a proof by random vectors: what one of them misses, and what several say together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def escape(share: Any, count: int, size: int) -> Any:
    """A bound of the chance that a unit vector in `size` dimensions N has no more than a share δ in c random ones.

    The inner products with unit vectors uniform on the sphere have a density of at most (N/2π)^½ each, so that the
    chance of a sum of squares below c δ² is at most that to the power c times the volume of a ball in c dimensions:
    (c N δ²/2)^(c/2) / Γ(c/2 + 1), which is δ √(2N/π) for one vector.
    """
    return (share * math.sqrt(count * size / 2)) ** count / math.gamma(count / 2 + 1)


def together(product: Tensor, count: int) -> Tensor:
    """The chance that `count` independent chances, each uniform at worst, have a product as small.

    R. Fisher, Statistical Methods for Research Workers (1932), section 21.1.
    """
    surprise = -torch.log(product.clamp_min(1e-300))
    total = term = torch.ones_like(product)
    for i in range(1, count):
        term = term * surprise / i
        total = total + term
    return product * total
