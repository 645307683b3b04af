"""From certified pairs to a `Solution`: the verdict on each pair, and on the run the remedy."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from eigenfunc import storage, tree
from eigenfunc.certificate import Certified, not_symmetric
from eigenfunc.completeness import Limits
from eigenfunc.errors import NotConverged
from eigenfunc.solution import Solution, Stats, Status, cluster_bounds, gaps
from eigenfunc.thick_restart import ROUNDS, Run


def conclude(
    run: Run, certified: Certified, limits: Limits, *, rounds: int, seed: int, begun: float, remedy: str, throw: bool
) -> Solution:
    """The solution in the operator's own units and structure, with its verdict; raises `NotConverged` on demand."""
    plan, products = run.plan, run.products
    order = plan.reported(certified.values)
    values, residuals = certified.values[order], certified.residuals[order]
    met = residuals <= run.target(values)
    within = _reach(run, limits, values)
    passed = within <= run.room(values) + run.floor()
    skew = max(run.asym, certified.asymmetry) / run.anorm if run.anorm > 0 else 0.0
    explained = products.explained(run.anorm)
    converged = met & passed & torch.tensor(skew <= explained)
    bounds = cluster_bounds(values, residuals, run.floor())
    bounds = torch.where(passed, bounds.maximum(within), bounds)
    gap = torch.where(passed, gaps(values, bounds, -within), 0.0)
    error = residuals + run.floor()
    stats = Stats(
        matvecs=products.matvecs,
        verification=run.verification,
        passes=products.passes,
        restarts=run.restarts,
        seconds=time.perf_counter() - begun,
        basis_size=plan.basis_size,
        basis_bytes=(plan.basis_size + plan.block_size) * products.width * run.basis_dtype.itemsize,
        orthogonality=certified.orthogonality,
        asymmetry=skew,
        norm=run.anorm * products.scale,
        seed=seed,
    )
    status, message = _verdict(run, residuals / values.abs(), met, converged, skew, explained, rounds, remedy)
    vectors = products.whole(storage.rows_of(certified.vectors, order.to(products.device)))
    solution = Solution(
        values=values * products.scale,
        vectors=tree.unravel(vectors, products.A.like, narrow=False),
        residuals=residuals * products.scale,
        bounds=bounds * products.scale,
        sharp=torch.where(gap > 0, bounds.minimum(error * error / gap + run.floor()), bounds) * products.scale,
        angles=torch.where(gap > error, error / gap, 1.0),
        converged=converged,
        noise=run.floor() * products.scale,
        which=plan.which,
        tol=plan.tol,
        status=status,
        message=message,
        stats=stats,
    )
    if throw and not solution.success:
        raise NotConverged(f"{status}: {message}", solution)
    return solution


def _reach(run: Run, limits: Limits, values: Tensor) -> Tensor:
    """(k,) how far beyond each value an eigenvalue may have been missed."""
    plan = run.plan
    reach = torch.full_like(values, -torch.inf)
    for sign, order in plan.sides():
        reach[order] = reach[order].maximum(limits.beyond[sign] - plan.outward(values, sign)[order])
    return reach


def _verdict(
    run: Run,
    relative: Tensor,
    met: Tensor,
    converged: Tensor,
    skew: float,
    explained: float,
    rounds: int,
    remedy: str,
) -> tuple[Status, str]:
    tol, products = run.plan.tol, run.products
    if bool(converged.all()):
        return Status.CONVERGED, f"all {run.plan.k} pairs certified at tol {tol:g}"
    missing = f"{int((~converged).sum())} of {run.plan.k} pairs"
    above = f"{missing} are above tol {tol:g}, the worst relative residual being {float(relative.max()):.1e}"
    if skew > explained:
        return Status.NOT_SYMMETRIC, not_symmetric(skew, explained)
    smallest = max(torch.finfo(leaf.dtype).tiny for leaf in tree.leaves(products.A.like))
    norm = run.anorm * products.scale
    if products.noise > products.roundoff and norm < 1e3 * products.size**0.5 * smallest:
        return Status.NOT_CONVERGED, (
            f"{above}; products of norm {norm:.1e} hold few digits, as their dtype has none of full precision below "
            f"{smallest:.1e}. Multiply the loss by a large number, and divide the eigenvalues by it"
        )
    if products.noise > products.roundoff:
        return Status.NONDETERMINISTIC, (
            f"{above}; the same product formed twice differs by {products.noise:.1e}, relative, which rounding does "
            f"not explain. Freeze the data and the masks, or ask for a tol above {10 * products.noise:.0e}"
        )
    if bool(met.all()):
        return Status.INCOMPLETE, (
            f"{missing} have small residuals, but eigenvalues beyond them may have been missed; {remedy}"
        )
    if rounds == ROUNDS:
        return Status.STAGNATED, (
            f"{above} after {rounds} certificates; products in {products.dtype} with noise {products.noise:.1e} give "
            "no more. Use float64, or a larger tol"
        )
    return Status.NOT_CONVERGED, f"{above}; {remedy}"
