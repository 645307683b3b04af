"""The largest value of a quadratic in a ball: against its dual, which is as small (strong duality, by the S-lemma)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from eigenfunc import eigsh
from eigenfunc.trust_region import _gap, maximiser, peak
from tests.helpers import rotated, vector

ONE = torch.zeros(1)
Loss = Callable[[Any, Any], Tensor]


def quadratic(values: list[float], slope: float, seed: int = 0) -> tuple[Loss, Tensor, Tensor, Tensor]:
    """⟨g, p⟩ + ½ ⟨p, A p⟩ + 1, with its slope, of that length, and its matrix; the point is 0."""
    A = rotated(torch.tensor(values), seed)
    g = vector(len(A), seed)
    g = g * slope / g.norm()
    return lambda p, batch: g @ p + p @ A @ p / 2 + 1 + 0 * batch.sum(), torch.zeros(len(A)).double(), g, A


def highest(A: Tensor, g: Tensor, rho: float) -> float:
    """The maximum of ⟨g, δ⟩ + ½ ⟨δ, A δ⟩ in the ball, as the minimum of its dual (strong duality: S-lemma)."""
    values, vectors = torch.linalg.eigh(A)
    c, edge = (vectors.mT @ g).numpy(), max(float(values.max()), 0.0)
    gaps = edge - values.numpy()
    start = math.log(max(float(g.norm()) / rho, 1e-3 * edge, 1e-30))

    def dual(log: float) -> float:
        beyond = math.exp(log)
        return float((c**2 / (gaps + beyond)).sum()) / 2 + (edge + beyond) * rho**2 / 2

    best: float = minimize_scalar(dual, bounds=(start - 46, start + 2), method="bounded", options={"xatol": 1e-10}).fun
    return best


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.data())
@settings(max_examples=100, deadline=None)
def test_the_subspace_problem_is_solved_to_the_dual(values: list[float], data: st.DataObject) -> None:
    """Feasible, and no lower than what weak duality allows: so both are the maximum. Zeros make hard cases."""
    entry = st.one_of(st.just(0.0), st.floats(-3, 3), st.floats(-1e-9, 1e-9))
    c = torch.tensor(data.draw(st.lists(entry, min_size=len(values), max_size=len(values))), dtype=torch.float64)
    rho = data.draw(st.floats(1e-3, 1e2))
    theta = torch.tensor(values, dtype=torch.float64)
    y = maximiser(theta, c, rho)
    assert float(y.norm()) <= rho * (1 + 1e-12)
    value = float(c @ y + (theta * y * y).sum() / 2)
    size = rho * float(c.norm()) + rho**2 * float(theta.abs().max())
    assert value >= highest(torch.diag(theta), c, rho) - 1e-8 * size - 1e-25


SLOPES = st.sampled_from([0.0, 1e-9, 1e-2, 1.0, 1e3])


@given(st.integers(0, 10**6), SLOPES, st.sampled_from([1, 3, 12]), st.sampled_from([0.0, 0.0, -5.0]))
@settings(max_examples=40, deadline=None)
def test_the_bracket_of_the_model_holds_the_truth(seed: int, slope: float, num_steps: int, shift: float) -> None:
    g = torch.Generator().manual_seed(seed)
    values = (torch.randn(30, generator=g, dtype=torch.float64) + shift).tolist()
    _, _, direction, A = quadratic(values, slope, seed)
    solution = eigsh(A, 1, which="LA", tol=1e-2, seed=seed)
    top = float(solution.values[0] + solution.bounds[0])
    for rho in (1e-2, 1.0, 30.0):
        found = peak(A, direction, rho, top=top, top_vector=solution.vectors[0], num_steps=num_steps, seed=seed)
        truth = highest(A, direction, rho)
        assert found.low <= truth + 1e-9 * abs(truth)
        assert found.high >= truth - 1e-9 * abs(truth)
        assert float(found.offset.norm()) <= rho * (1 + 1e-12)
        taken = float(direction @ found.offset + found.offset @ A @ found.offset / 2)
        assert found.low <= taken + 1e-12 * abs(truth)
        if num_steps == 12:
            assert found.high - found.low <= 0.1 * truth + 1e-13 * float(A.norm()) * rho**2  # which is rounding


@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 1e2]), st.floats(0, 1), st.sampled_from([0.0, -5.0]))
@settings(max_examples=60, deadline=None)
def test_the_dual_bound_holds_from_any_point_of_the_ball(seed: int, slope: float, share: float, shift: float) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(8, generator=g, dtype=torch.float64) + shift
    _, _, direction, A = quadratic(values.tolist(), slope, seed)
    offset = torch.randn(8, generator=g, dtype=torch.float64)
    offset *= share * 0.7 / offset.norm()
    taken = float(direction @ offset + offset @ A @ offset / 2)
    truth = highest(A, direction, 0.7)
    gap = _gap(direction + A @ offset, offset, 0.0, float(values.max()) + 1e-9, 0.7)
    assert taken + gap >= truth - 1e-9 * max(abs(truth), abs(taken))
