"""Extreme eigenpairs of a symmetric operator, with a certificate."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from eigenfunc import scope
from eigenfunc.certificate import Products, seeded, start_block
from eigenfunc.operator import aslinearoperator
from eigenfunc.plan import plan_for
from eigenfunc.solution import Solution
from eigenfunc.thick_restart import Run, search
from eigenfunc.tree import Tree
from eigenfunc.verdict import conclude

Which = Literal["LM", "LA", "SA", "BE"]


def eigsh(
    A: Any,
    k: int | tuple[int, int] = 6,
    *,
    which: Which = "LM",
    tol: float = 1e-4,
    v0: Tree | None = None,
    seed: int | None = None,
    basis_size: int | None = None,
    block_size: int = 1,
    max_matvecs: int | None = None,
    progress: bool = False,
    throw: bool = True,
) -> Solution:
    """The k extreme eigenpairs of a symmetric operator, by thick-restart Lanczos, with proof.

    A           `LinearOperator`, or what `aslinearoperator` takes
    k           how many; for BE also (number at the top, number at the bottom)
    which       LM largest in magnitude, LA largest, SA smallest, BE both ends (the odd one at the top)
    tol         relative to each eigenvalue: converged means ‖A v − λ v‖ ≤ max(tol·|λ|, noise)
    v0          start vector, shaped as `A.like`; default: random
    seed        of all random numbers; default: a fresh one, told in `stats.seed`
    basis_size  vectors kept; default 2k+10, at least k+20, for LM and LA; 4k+20, from 60 to 120, for SA and BE, where
                the edge of the spectrum is dense; n where that is at most twice as many
    max_matvecs products that may be spent on solving; those that verify (k fresh ones, the probe, the noise: about
                k + 10) come on top. Default max(1000, 50 k)
    throw       raise `NotConverged`, which carries the solution, unless every pair converged

    Memory: basis_size + 1 vectors, and 2k more at the end. Before a pair is called converged a random vector is
    sent through eight more steps, which must not bring up an eigenvalue that was missed (a further copy of a
    multiple one, or one that `v0` is orthogonal to). That proof is probabilistic: an eigenvalue that is barely
    beyond the k-th can escape it. Residuals come from fresh products.

    Raises `InputError` for arguments out of range, `TreeError` for a `v0` of another structure, `NonFiniteError`
    for a product with NaN, `TransformError` inside a torch.func transform, and `NotConverged`.

    K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix Anal.
    Appl. 22 (2000).
    """
    begun = time.perf_counter()
    products = Products(aslinearoperator(A))
    plan = plan_for(k, which, tol, products.size, basis_size=basis_size, block_size=block_size, max_matvecs=max_matvecs)
    generator, seed = seeded(seed)
    given = None if v0 is None else start_block(v0, plan.block_size, products, generator)
    with (
        scope.full_precision(products.device),
        torch.no_grad(),
        tqdm(disable=not progress, desc=f"eigsh {which}", unit=" products", leave=False) as bar,
    ):
        q, image = products.calibrate(generator)
        run = Run(plan, products, generator, bar if progress else None)
        if given is None and plan.block_size == 1:
            run.verification -= 1  # the random vector that was calibrated with serves as the start
            run.start(q, image)
        else:
            q = start_block(None, plan.block_size, products, generator) if given is None else given
            run.start(q, products(q))
        certified, limits, rounds = search(run)
        remedy = f"raise max_matvecs (now {plan.max_matvecs}) or basis_size (now {plan.basis_size})"
        return conclude(run, certified, limits, rounds=rounds, seed=seed, begun=begun, remedy=remedy, throw=throw)
