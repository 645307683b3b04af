"""The contract of an eigensolver as a property of any function that claims to be one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, errors, given, seed as seeded, settings, strategies as st

from eigenfunc.errors import EigenfuncError
from eigenfunc.operator import LinearOperator
from eigenfunc.testing.problems import EXTREMES, WHICH, Case
from eigenfunc.testing.relations import RELATIONS, related
from eigenfunc.testing.spectra import FAMILIES
from eigenfunc.testing.strategies import cases
from eigenfunc.testing.verdicts import SolverFault, explain, faults

Solver = Callable[[LinearOperator, int, str, float, int], Any]


class Tally(NamedTuple):
    """What a solver did on the way: a solver that converges never breaks no promise."""

    runs: int
    converged: int  # runs in which every pair was called converged
    refused: int  # runs that ended in a typed error


class _Trial:
    """Runs of one solver; the last fault is the smallest that hypothesis has come to."""

    def __init__(self, solver: Solver, refusals: tuple[type[BaseException], ...], patience: float) -> None:
        self.solver = solver
        self.refusals = refusals
        self.patience = patience
        self.runs = self.converged = self.refused = 0
        self.fault: SolverFault | None = None
        self.example: tuple[Case, str | None] | None = None
        self.first = 0.0

    def judge(self, case: Case) -> bool:
        """Whether the solver answers; raises `SolverFault` unless its answer holds."""
        problem = case.problem
        self.runs += 1
        try:
            claim = self.solver(problem.operator(), case.k, case.which, case.tol, case.seed)  # type: ignore[arg-type]
        except self.refusals as refusal:
            claim = getattr(refusal, "solution", None)
            if claim is None:
                self.refused += 1
                return False
        except Exception as crash:
            told = f"the solver crashes with {type(crash).__name__}: {crash}"
            raise SolverFault(f"{told}\ncase:      {case!r}", case, [told]) from crash
        wrong = faults(case, claim)
        if wrong:
            raise SolverFault(explain(case, claim, wrong), case, wrong)
        self.converged += bool(torch.as_tensor(claim.converged).all())
        return True

    def __call__(self, case: Case, relation: str | None) -> None:
        late = self.fault is not None and time.monotonic() - self.first > self.patience
        if late and self.example != (case, relation):
            return
        try:
            other = related(case, relation) if self.judge(case) and relation is not None else None
            if other is not None:
                self.judge(other)
        except SolverFault as fault:
            self.first = self.first or time.monotonic()
            self.fault, self.example = fault, (case, relation)
            raise


def check_eigensolver(
    solver: Solver,
    *,
    max_examples: int = 200,
    families: Sequence[str] = tuple(FAMILIES),
    dtypes: Sequence[str] = tuple(EXTREMES),
    which: Sequence[str] = WHICH,
    tols: Sequence[float] | None = None,
    max_k: int = 8,
    max_n: int = 210,
    scaled: bool = True,
    relations: Sequence[str] = RELATIONS,
    refusals: tuple[type[BaseException], ...] = (EigenfuncError,),
    seed: int = 0,
    patience: float = 20.0,
) -> Tally:
    """Hold a symmetric eigensolver to its own word on spectra that break solvers.

    solver        called as solver(A, k, which, tol, seed) with a `LinearOperator` on some parameter tree; returns a
                  `Claim`, an `eigenfunc.Solution`, or anything with `values`, `vectors` and `converged`
    families      names from `eigenfunc.testing.FAMILIES`
    dtypes        "float64", "float32"; which, tols, max_k, max_n: what is asked; tols None: what suits the dtype
    scaled        with scales of 1e±200 (float32 1e±25) too
    relations     changes of a problem that must change its answer accordingly (A → sA, A + cI, QAQᵀ, −A, k → k + 1):
                  of most examples one is solved as well
    refusals      errors by which the solver may decline; one that carries a `solution` is judged by that
    seed          of the examples: the same examples for the same seed
    patience      seconds for making a counterexample smaller

    Pairs that are not called converged break no promise, so look at the `Tally` returned too. Raises `SolverFault`,
    an AssertionError, with the smallest counterexample found: what is wrong, the case as a line of Python, what was
    found and what is true. What is held against what: see `eigenfunc.testing.faults`.
    """
    trial = _Trial(solver, refusals, patience)
    drawn = cases(families=families, dtypes=dtypes, which=which, tols=tols, max_k=max_k, max_n=max_n, scaled=scaled)

    @seeded(seed)
    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(drawn, st.sampled_from([None, *relations]))
    def contract(case: Case, relation: str | None) -> None:
        trial(case, relation)

    try:
        contract()
    except (SolverFault, errors.FlakyFailure):
        assert trial.fault is not None
        raise trial.fault from trial.fault.__cause__
    return Tally(trial.runs, trial.converged, trial.refused)
