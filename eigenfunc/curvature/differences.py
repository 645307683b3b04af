"""Derivatives along a direction by central differences, with an error that is measured and not assumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eigenfunc import tree

Map = Callable[[Sequence[Tensor]], list[Tensor]]

_POWERS = (1 / 5, 1 / 4, 1 / 3.5, 1 / 3, 1 / 2.5, 1 / 2, 1 / 1.75)  # of the rounding unit: steps of differences


def estimate(
    values: Map, point: Sequence[Tensor], v: Sequence[Tensor], step: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The derivative of `values` at `point` along v, by differences at distances `step` and 2 `step` along v/‖v‖, and
    what it is off by, both shaped as the values.

    The error is what the second-order and the fourth-order formula differ by, which covers rounding, curvature and
    kinks alike.
    """
    length = tree.norm(list(v))
    if float(length) == 0:
        zeros = [torch.zeros_like(x) for x in values(point)]
        return zeros, zeros
    unit = tree.scale(1 / length, list(v))

    def moved(t: float) -> list[Tensor]:
        return values([x.detach() + t * u for x, u in zip(point, unit, strict=True)])

    def central(h: float) -> list[Tensor]:
        difference: list[Tensor] = tree.scale(length / (2 * h), tree.sub(moved(h), moved(-h)))
        return difference

    near, far = central(step), central(2 * step)
    best = [a + (a - b) / 3 for a, b in zip(near, far, strict=True)]
    return best, [(a - b) / 3 for a, b in zip(near, far, strict=True)]


def best_step(values: Map, point: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]) -> float:
    """The distance, among a few, at which differences along any of the directions have the smallest error."""
    eps, size = tree.coarsest_eps(list(point)), max(float(tree.norm(list(point))), 1e-3)

    def error(step: float) -> float:
        lengths = [float(tree.norm(list(v))) or 1.0 for v in directions]
        found = [
            float(tree.norm(estimate(values, point, v, step)[1])) / n for v, n in zip(directions, lengths, strict=True)
        ]
        return max(found) if all(map(math.isfinite, found)) else math.inf

    steps: list[float] = [size * eps**power for power in _POWERS]
    return min(steps, key=error)


def sizes(blocks: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm () of each block, in float64."""
    return [torch.linalg.vector_norm(block, dtype=torch.float64) for block in blocks]
