"""Changes of a case that change its answer in a known way.

A solver whose two answers are both within their bounds of the truth cannot contradict itself by more than those bounds,
so that holding both to the truth is all there is to check.
"""

from __future__ import annotations

from dataclasses import replace

from eigenfunc.testing.problems import Case

RELATIONS = ("scaled", "shifted", "turned", "negated", "nested")


def related(case: Case, relation: str) -> Case | None:
    """The changed case: A → sA, A + cI, QAQᵀ, −A (LA ↔ SA), or k → k + 1; None where that changes the question."""
    problem, k = case.problem, case.k
    if relation == "scaled":
        return replace(case, problem=replace(problem, scale=3.7 * problem.scale))
    if relation == "shifted":
        return None if case.which == "LM" else replace(case, problem=replace(problem, shift=problem.shift + 1.5))
    if relation == "turned":
        return replace(case, problem=replace(problem, turn=problem.turn + 1))
    if relation == "negated":
        if case.which == "BE":
            if not isinstance(k, tuple) and k % 2:
                return None
            k = k[::-1] if isinstance(k, tuple) else k
        which = {"LA": "SA", "SA": "LA"}.get(case.which, case.which)
        return replace(case, problem=replace(problem, scale=-problem.scale), which=which, k=k)
    if isinstance(k, tuple) or k == problem.n:
        return None
    return replace(case, k=k + 1)
