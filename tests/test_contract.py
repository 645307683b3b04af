"""The contract of an eigensolver: right solvers keep it, each wrong one is caught and told for what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg as arpack
import torch
from torch import Tensor

from benchmarks import fuzz_solver
from eigenfunc import LinearOperator, eigsh, tree
from eigenfunc.errors import InputError
from eigenfunc.testing import FAMILIES, Case, Claim, Problem, SolverFault, check_eigensolver, faults
from eigenfunc.testing.problems import select
from eigenfunc.testing.relations import RELATIONS, related
from tests.helpers import vector

SIMPLE = ("uniform", "gauss", "outliers")  # no eigenvalue twice
REPEATED = ("identity", "multiple", "integers")


def dense(A: LinearOperator, k: int, which: str, tol: float, seed: int) -> Claim:
    """All of the truth by LAPACK."""
    M = A.to_dense().double().numpy()
    size = np.abs(M).max() or 1.0
    values, x = np.linalg.eigh(M / size)
    index = select(torch.from_numpy(values), k, which).numpy()
    return Claim(values[index] * size, x[:, index].T, np.ones(k, dtype=bool))


def lanczos(
    A: LinearOperator, k: int, which: str, tol: float, seed: int, *, steps: int, again: bool, fresh: bool = False
) -> Claim:
    """Textbook Lanczos from one vector; `again` reorthogonalises, `fresh` forms residuals from new products.

    Otherwise |β s| is taken for the residual, and the residual for a bound.
    """
    n = A.size

    def product(v: Tensor) -> Tensor:
        return tree.ravel(A(tree.unravel(v, A.like)), A.like).double()

    q = vector(n, seed)
    basis, alphas, betas = [q / q.norm()], [], []
    size = float(product(basis[0]).norm()) or 1.0
    for step in range(steps):
        w = product(basis[-1]) / size
        alphas.append(float(w @ basis[-1]))
        w = w - alphas[-1] * basis[-1] - (betas[-1] * basis[-2] if betas else 0.0)
        for _ in range(2 if again else 0):
            w = w - torch.stack(basis).mT @ (torch.stack(basis) @ w)
        betas.append(float(w.norm()))
        if betas[-1] < 1e-14 or step == steps - 1:
            break
        basis.append(w / betas[-1])
    T = torch.diag(torch.tensor(alphas).double())
    T += torch.diag(torch.tensor(betas[:-1]).double(), 1) + torch.diag(torch.tensor(betas[:-1]).double(), -1)
    theta, s = torch.linalg.eigh(T)
    if len(theta) < k:
        raise InputError("an invariant subspace too small")
    index = select(theta, k, which)
    theta, s = theta[index], s[:, index]
    x = s.mT @ torch.stack(basis)
    residuals = betas[-1] * s[-1].abs()
    if fresh:
        images = torch.stack([product(v) / size for v in x])
        residuals = (images - theta[:, None] * x).norm(dim=1)
    floor = 8 * torch.finfo(tree.work_dtype(A.like)).eps * theta.abs().max()
    converged = residuals <= (tol * theta.abs()).clamp_min(floor)
    return Claim(theta * size, x, converged, bounds=(residuals + floor) * size, residuals=residuals * size)


def scipy_eigsh(A: LinearOperator, k: int, which: str, tol: float, seed: int) -> Claim:
    if k >= A.size:
        raise InputError("ARPACK takes k < n only")
    shape, dtype = A.shape, np.float64
    v0 = np.random.default_rng(seed).standard_normal(A.size)

    def product(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return tree.ravel(A(tree.unravel(torch.from_numpy(v.ravel()), A.like)), A.like).double().numpy()

    try:
        values, x = arpack.eigsh(arpack.LinearOperator(shape, product, dtype=dtype), k, which=which, tol=tol, v0=v0)
    except arpack.ArpackError as error:
        raise InputError(str(error)) from error
    order = select(torch.from_numpy(np.sort(values)), k, which).numpy()
    order = np.argsort(values)[order]
    return Claim(values[order], x[:, order].T, np.ones(k, dtype=bool))


def test_eigsh_keeps_its_word() -> None:
    tally = check_eigensolver(
        lambda A, k, which, tol, seed: eigsh(A, k, which=which, tol=tol, seed=seed), max_examples=300
    )
    assert tally.runs > 300
    assert tally.converged >= 0.97 * tally.runs


def test_a_dense_solver_keeps_its_word() -> None:
    tally = check_eigensolver(dense, max_examples=200)
    assert tally.converged == tally.runs > 200
    assert tally.refused == 0


def without_reorthogonalisation(A: LinearOperator, k: int, which: str, tol: float, seed: int) -> Claim:
    return lanczos(A, k, which, tol, seed, steps=3 * A.size + 10, again=False, fresh=True)


def trusting_the_recurrence(A: LinearOperator, k: int, which: str, tol: float, seed: int) -> Claim:
    return lanczos(A, k, which, tol, seed, steps=3 * A.size + 10, again=False)


def without_a_probe(A: LinearOperator, k: int, which: str, tol: float, seed: int) -> Claim:
    return lanczos(A, k, which, tol, seed, steps=min(A.size, 2 * k + 20), again=True, fresh=True)


BROKEN: dict[str, tuple[Callable[..., Claim], tuple[str, ...], str]] = {
    "Lanczos whose copies are ghosts": (without_reorthogonalisation, SIMPLE, "orthonormal|of that rank"),
    "Lanczos that takes |βs| for the residual": (trusting_the_recurrence, SIMPLE, "residual|orthonormal|of that rank"),
    "Lanczos from one vector": (without_a_probe, REPEATED, "from the wanted eigenvalue of that rank"),
    "ARPACK": (scipy_eigsh, REPEATED, "from the wanted eigenvalue of that rank"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_solvers_known_to_be_wrong_are_caught(name: str) -> None:
    solver, families, told = BROKEN[name]
    with pytest.raises(SolverFault, match=told) as caught:
        check_eigensolver(solver, families=families, dtypes=["float64"], scaled=False, max_examples=500, patience=5)
    case = caught.value.case
    assert f"case:      {case!r}" in str(caught.value)
    again = eval(repr(case), {"Case": Case, "Problem": Problem})
    assert again == case
    assert faults(again, solver(again.problem.operator(), again.k, again.which, again.tol, again.seed))


def test_a_counterexample_is_small() -> None:
    with pytest.raises(SolverFault) as caught:
        check_eigensolver(without_a_probe, families=REPEATED, max_examples=500)
    assert caught.value.case.problem.n <= 10
    assert caught.value.case.problem.dtype == "float64"


def backwards(claim: Claim) -> Claim:
    return claim._replace(values=claim.values[::-1].copy(), vectors=claim.vectors[::-1].copy())


def flipped(claim: Claim) -> Claim:
    return claim._replace(values=-claim.values)


def stretched(claim: Claim) -> Claim:
    return claim._replace(vectors=2 * claim.vectors)


def repeated(claim: Claim) -> Claim:
    return claim._replace(vectors=claim.vectors[[0, *range(len(claim.vectors) - 1)]])


def idle(claim: Claim) -> Claim:
    return claim._replace(bounds=np.abs(claim.values) + 1)


def boastful(claim: Claim) -> Claim:
    x = claim.vectors + 1e-5 * np.roll(claim.vectors, 1, axis=1)
    return claim._replace(vectors=x / np.linalg.norm(x, axis=1, keepdims=True), residuals=0 * claim.values)


def absolute(claim: Claim) -> Claim:
    """Takes what is small in absolute terms for zero."""
    return claim._replace(values=np.where(np.abs(claim.values) < 1e-12, 0.0, claim.values), bounds=1e-12 * claim.values)


def short(claim: Claim) -> Claim:
    return claim._replace(values=claim.values[:-1])


def undefined(claim: Claim) -> Claim:
    return claim._replace(values=claim.values * np.nan)


def crashing(claim: Claim) -> Claim:
    raise ZeroDivisionError("β = 0")


SPOILT: dict[Callable[[Claim], Claim], str] = {
    backwards: "not in the order of",
    flipped: "residual",
    stretched: "orthonormal",
    repeated: "orthonormal|residual",
    idle: "idle",
    boastful: "residual",
    absolute: "of that rank|residual",
    short: "are due",
    undefined: "of that rank",
    crashing: "ZeroDivisionError",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_every_broken_promise_is_told_for_what_it_is(spoil: Callable[[Claim], Claim]) -> None:
    with pytest.raises(SolverFault, match=SPOILT[spoil]) as caught:
        check_eigensolver(lambda *asked: spoil(dense(*asked)), max_examples=300, max_n=30, patience=3)
    assert caught.value.faults


def test_pairs_that_are_not_called_converged_break_no_promise() -> None:
    def modest(*asked: Any) -> Claim:
        claim = dense(*asked)
        return claim._replace(values=claim.values + 1, converged=np.zeros(len(claim.values), dtype=bool))

    tally = check_eigensolver(modest, max_examples=50, max_n=30)
    assert tally.converged == 0
    assert tally.runs >= 50


def test_refusals_are_counted_and_other_errors_are_faults() -> None:
    def refusing(*asked: Any) -> Claim:
        raise InputError("not today")

    tally = check_eigensolver(refusing, max_examples=20)
    assert tally.refused == tally.runs >= 20
    with pytest.raises(SolverFault, match="crashes with InputError"):
        check_eigensolver(refusing, max_examples=20, refusals=())


def test_a_solver_that_is_wrong_by_chance_is_caught() -> None:
    calls = iter(range(10**6))

    def moody(*asked: Any) -> Claim:
        return (flipped if next(calls) % 3 == 2 else lambda claim: claim)(dense(*asked))

    with pytest.raises(SolverFault, match="residual"):
        check_eigensolver(moody, max_examples=100, max_n=20, patience=3)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_a_related_case_has_the_related_answer(relation: str, which: str) -> None:
    case = Case(Problem("gauss", 30, seed=4, scale=-2.5), 4, which)
    other = related(case, relation)
    if other is None:
        assert (relation, which) == ("shifted", "LM")
        return
    expected = {
        "scaled": 3.7 * case.wanted,
        "shifted": case.wanted - 2.5 * 1.5,
        "turned": case.wanted,
        "negated": -case.wanted.flip(0) if which == "BE" else -case.wanted,
        "nested": case.wanted,
    }[relation]
    found = other.wanted
    if relation == "nested":
        found = torch.cat([found[:2], found[-2:]]) if which == "BE" else found[:4]
    assert (found - expected).abs().max() < 1e-12
    turned = not torch.equal(other.problem.image(torch.eye(30)), case.problem.image(torch.eye(30)))
    assert turned is (relation != "nested")


def test_changes_that_have_no_counterpart_are_left_out() -> None:
    case = Case(Problem("gauss", 3), 3, "BE")
    assert related(case, "negated") is None
    assert related(case, "nested") is None
    ends = related(replace(case, k=(2, 0)), "negated")
    assert ends is not None
    assert ends.k == (0, 2)
    assert set(SIMPLE + REPEATED) <= set(FAMILIES)


def test_the_fuzzer_counts_and_lists_false_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    families = ("gauss", "identity")
    right = fuzz_solver.judge_all(0, range(6), families)
    assert [outcome.verdict for outcome in right] == ["right"] * 6

    def off(A: LinearOperator, k: Any, **asked: Any) -> Any:
        solution = eigsh(A, k, **asked)
        return replace(solution, values=solution.values * 1.1)

    def refusing(*_: Any, **__: Any) -> None:
        raise InputError("not today")

    monkeypatch.setattr(fuzz_solver, "eigsh", off)
    wrong = fuzz_solver.judge_all(0, range(6), families)
    assert [outcome.verdict for outcome in wrong] == ["WRONG"] * 6
    assert all(outcome.faults for outcome in wrong)
    assert [outcome.line for outcome in wrong] == [outcome.line for outcome in right]
    monkeypatch.setattr(fuzz_solver, "eigsh", refusing)
    refused = fuzz_solver.judge_all(0, range(6), families)
    last = fuzz_solver.table([*right, *wrong, *refused]).splitlines()[-1]
    assert last.startswith("| all | 18 | 6 | 6 | 0 | 6 refused: InputError |")
