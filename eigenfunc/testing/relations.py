"""Changes of a case that change its answer in a known way."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from eigenfunc.testing.problems import Case, Count, ends
from eigenfunc.testing.verdicts import read, roundoff

RELATIONS = ("scaled", "shifted", "turned", "negated", "nested")
_FACTOR, _SHIFT = 3.7, 1.5


def related(case: Case, relation: str) -> Case | None:
    """The changed case: A → sA, A + cI, QAQᵀ, −A (LA ↔ SA), or k → k + 1; None where that changes the question."""
    problem, k = case.problem, case.k
    if relation == "scaled":
        return replace(case, problem=replace(problem, scale=_FACTOR * problem.scale))
    if relation == "shifted":
        return None if case.which == "LM" else replace(case, problem=replace(problem, shift=problem.shift + _SHIFT))
    if relation == "turned":
        return replace(case, problem=replace(problem, turn=problem.turn + 1))
    if relation == "negated":
        which = {"LA": "SA", "SA": "LA"}.get(case.which, case.which)
        turned: Count = ends(k, "BE")[::-1] if case.which == "BE" else k
        return replace(case, problem=replace(problem, scale=-problem.scale), which=which, k=turned)
    if isinstance(k, tuple) or k == problem.n:
        return None
    return replace(case, k=k + 1)


def discord(case: Case, claim: object, relation: str, other: Case, other_claim: object) -> list[str]:
    """How two answers, of a case and of its relative, disagree where both are called converged; empty if they don't."""
    mine, theirs = read(case, claim), read(other, other_claim)
    if isinstance(mine, str) or isinstance(theirs, str):
        return []
    unit, factor = case.problem.unit, other.problem.unit / case.problem.unit
    values, bounds, sure = theirs.values * factor, theirs.bounds * factor, theirs.converged
    expected, stretch = mine.values, 1.0
    if relation == "scaled":
        expected, stretch = _FACTOR * expected, _FACTOR
    elif relation == "shifted":
        expected = expected + _SHIFT * case.problem.scale / unit
    elif relation == "negated":
        expected = -expected
        if case.which == "BE":
            values, bounds, sure = values.flip(0), bounds.flip(0), sure.flip(0)
    elif relation == "nested":
        values, bounds, sure = (_first(case, other, x) for x in (values, bounds, sure))
    if case.which == "LM":
        expected, values = expected.abs(), values.abs()
    slack = stretch * (mine.bounds + roundoff(case.problem)) + bounds + factor * roundoff(other.problem)
    apart = ((values - expected).abs() > slack) & sure & mine.converged
    return [
        f"{relation}, {other!r}, pair {i + 1} is {float(values[i]) * unit:.9g}, not {float(expected[i]) * unit:.9g}"
        for i in torch.nonzero(apart)[:, 0].tolist()
    ]


def _first(case: Case, other: Case, x: Tensor) -> Tensor:
    """Those of the k + 1 entries that belong to the k."""
    top, bottom = ends(case.k, case.which)
    return x[:bottom] if case.which == "SA" else torch.cat([x[:top], x[len(x) - bottom :]])
