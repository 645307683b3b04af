"""What a solver claims about a case, held against the true spectrum."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.solution import cluster_bounds
from eigenfunc.testing.problems import Case, Problem, ends
from eigenfunc.tree import Tree


class Claim(NamedTuple):
    """What a solver says it has found; an `eigenfunc.Solution` is read likewise, as is anything with these names.

    values     (k,) tensor or array, ordered as `which` says: LM by falling magnitude, LA and BE falling, SA rising
    vectors    (k, *leaf), or (k, n) in the order of `eigenfunc.tree.ravel`
    converged  (k,) bool: which pairs it vouches for
    bounds     (k,) how far a value may be from the eigenvalue of its rank; without it, what follows from the residuals
    residuals  (k,) norms ‖A v − λ v‖, if it tells them
    noise      of the products, if it has measured it: no residual is asked to be smaller
    """

    values: Any
    vectors: Tree
    converged: Any
    bounds: Any = None
    residuals: Any = None
    noise: float | None = None


class SolverFault(AssertionError):
    """A solver vouches for what is not so; `case` reproduces it, `faults` says what is wrong."""

    def __init__(self, message: str, case: Case, faults: list[str]) -> None:
        super().__init__(message)
        self.case = case
        self.faults = faults


class Found(NamedTuple):
    """A claim in units of ‖A‖, on the CPU, in float64."""

    values: Tensor  # (k,)
    vectors: Tensor  # (k, n), of unit length
    converged: Tensor  # (k,) bool
    bounds: Tensor  # (k,)
    residuals: Tensor | None  # (k,) as claimed
    true_residuals: Tensor  # (k,)
    noise: float
    kahan: Tensor  # (k,) bounds that follow from the true residuals


def roundoff(problem: Problem) -> float:
    """Relative to ‖A‖: what products in `dtype` and the true eigenvalues may be off by."""
    return 8 * problem.eps + 32 * torch.finfo(torch.float64).eps


def read(case: Case, claim: Any) -> Found | str:
    """The claim in units of ‖A‖, or what is wrong with its shape."""
    problem, k = case.problem, sum(ends(case.k, case.which))

    def array(x: Any) -> Tensor:
        return torch.as_tensor(x).detach().cpu()

    values, converged = array(claim.values).double() / problem.unit, array(claim.converged)
    if values.shape != (k,) or converged.shape != (k,) or converged.dtype != torch.bool:
        return (
            f"{k} values and verdicts are due, not values {tuple(values.shape)} and converged {tuple(converged.shape)}"
        )
    bare = hasattr(claim.vectors, "shape")
    vectors = array(claim.vectors).reshape(k, -1) if bare else tree.ravel(claim.vectors, problem.like).cpu()
    if vectors.shape != (k, problem.n):
        return f"vectors are of shape {tuple(vectors.shape)}, not {(k, problem.n)}"
    x = vectors.double()
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    x = x / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    true = torch.linalg.vector_norm(problem.image(x) - values[:, None] * x, dim=1)
    told = getattr(claim, "noise", None)
    noise = roundoff(problem) + (0.0 if told is None else min(told / problem.unit, 1_000 * problem.eps))
    kahan = (
        cluster_bounds(values, true, noise) if bool(torch.isfinite(true).all()) else torch.full_like(true, torch.inf)
    )
    bounds, residuals = getattr(claim, "bounds", None), getattr(claim, "residuals", None)
    return Found(
        values,
        vectors.double(),
        converged,
        kahan if bounds is None else array(bounds).double() / problem.unit,
        None if residuals is None else array(residuals).double() / problem.unit,
        true,
        noise,
        kahan,
    )


def faults(case: Case, claim: Any) -> list[str]:
    """Everything that a solver vouches for in vain, in words; empty if all its claims hold.

    A pair marked converged must have a value within its bound of the wanted eigenvalue of its rank, counted with
    multiplicity (for LM: in magnitude), and a true residual of at most max(tol·|λ|, noise) and no more than claimed;
    such pairs are orthonormal, and all pairs ordered as `which` says. Pairs not marked are free of any claim but the
    order. Rounding, of `roundoff(case.problem)` times ‖A‖, is allowed everywhere.
    """
    found = read(case, claim)
    if isinstance(found, str):
        return [found]
    wrong = _disorder(case, found)
    sure = found.converged
    if not bool(sure.any()):
        return wrong
    unit, slack = case.problem.unit, roundoff(case.problem)
    truth = case.wanted / unit
    off = found.values.abs() - truth.abs() if case.which == "LM" else found.values - truth
    for i in torch.nonzero(sure)[:, 0].tolist():
        rank, value, bound = f"pair {i + 1}", float(found.values[i]) * unit, float(found.bounds[i])
        if not float(off[i].abs()) <= bound + slack:
            wrong.append(
                f"{rank} is called converged at {value:.9g}, {abs(float(off[i])) * unit:.2g} from the wanted "
                f"eigenvalue of that rank, {float(truth[i]) * unit:.9g}: its bound is {bound * unit:.2g}, tol·|λ| "
                f"{case.tol * abs(value):.2g}"
            )
        if bound > max(10 * (float(found.kahan[i]) + found.noise), 1.01 * case.tol * abs(value) / unit):
            wrong.append(f"{rank} has a bound of {bound * unit:.2g}, idle beside its residual")
        residual = float(found.true_residuals[i])
        allowed = max(case.tol * abs(float(found.values[i])), found.noise)
        if not residual <= 2 * allowed:
            wrong.append(f"{rank} is called converged with a residual of {residual * unit:.2g} > {allowed * unit:.2g}")
        if found.residuals is not None and not residual <= 1.01 * float(found.residuals[i]) + found.noise:
            wrong.append(f"{rank} has a residual of {residual * unit:.2g}, not {float(found.residuals[i]) * unit:.2g}")
    x = found.vectors[sure]
    skew = float((x @ x.mT - torch.eye(len(x), dtype=torch.float64)).abs().max())
    if not skew <= 100 * case.problem.eps:
        wrong.append(f"vectors called converged are not orthonormal: |XᵀX − I| = {skew:.2g}")
    return wrong


def _disorder(case: Case, found: Found) -> list[str]:
    keys = {"LM": -found.values.abs(), "SA": found.values}.get(case.which, -found.values)
    if bool((keys.diff() >= -roundoff(case.problem)).all()):
        return []
    return [f"values are not in the order of {case.which}: {(found.values * case.problem.unit).tolist()}"]


def explain(case: Case, claim: Any, wrong: list[str]) -> str:
    """A counterexample for people: what is wrong, how to have it again, what was found and what is true."""

    def shown(x: Any) -> str:
        return "not told" if x is None else "[" + ", ".join(f"{v:.10g}" for v in torch.as_tensor(x).tolist()) + "]"

    return "\n".join(
        [
            *wrong,
            f"case:      {case!r}",
            f"found:     {shown(claim.values)}",
            f"wanted:    {shown(case.wanted)}",
            f"converged: {torch.as_tensor(claim.converged).tolist()}",
            f"bounds:    {shown(getattr(claim, 'bounds', None))}",
        ]
    )
