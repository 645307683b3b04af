"""Subspace iteration: the power method for a block of vectors, certified like everything else."""

from __future__ import annotations

import time
from typing import Any

from eigenfunc import block_loop
from eigenfunc.certificate import Products, seeded, start_block, whole
from eigenfunc.krylov import subspace as kernel
from eigenfunc.plan import plan_for
from eigenfunc.solution import Solution
from eigenfunc.thick_restart import Run
from eigenfunc.tree import Tree
from eigenfunc.verdict import conclude


def subspace_iteration(
    A: Any,
    k: int = 6,
    *,
    block_size: int | None = None,
    tol: float = 1e-4,
    max_steps: int = 1000,
    v0: Tree | None = None,
    seed: int | None = None,
    progress: bool = False,
    throw: bool = True,
) -> Solution:
    """The k eigenpairs largest in magnitude, all at once, by subspace (block power) iteration with Rayleigh–Ritz.

    For warm starts from a block of old eigenvectors, and for comparison; `eigsh` needs far fewer products.

    block_size  vectors b ≥ k that are multiplied together; the error of pair i falls by |λ_{b+1} / λ_i| a step, so
                that values of equal magnitude and both signs must all fit in. Default 2k, at least k+2 and at most
                k+8; never more than n
    tol         stop when every ‖A v − λ v‖ ≤ max(tol·|λ|, noise)
    max_steps   products with the whole block
    v0          start vector, shaped as `A.like`, or a stack of them (p, *leaf), summed into b rows where there are
                more; random ones are added where there are fewer
    seed        of all random numbers; default: a fresh one, told in `stats.seed`
    throw       raise `NotConverged`, which carries the solution, unless every pair converged

    Memory: about 8 b vectors at the peak. Verdict, residuals and completeness are as in `eigsh`: k fresh products, and
    a random probe. Raises what `eigsh` raises.

    F. Bauer, Z. Angew. Math. Phys. 8 (1957); H. Rutishauser, Numer. Math. 13 (1969).
    """
    begun = time.perf_counter()
    products = Products(A)
    plan = plan_for(k, "LM", tol, products.size)
    size = block_loop.sized(block_size, plan.k, min(max(plan.k, 2), 8), plan.n)
    max_steps = whole(max_steps, "max_steps", 1)
    generator, seed = seeded(seed)
    start = start_block(v0, size, products, generator)
    with products.at_work("subspace iteration", progress) as bar:
        products.calibrate(generator)
        run = Run(plan, products, generator, None)
        proof, rounds = block_loop.drive(
            run, start, lambda x: kernel.init(x, products), lambda state: kernel.step(state, products), max_steps, bar
        )
        remedy = f"raise max_steps (now {max_steps}) or block_size (now {size}), or use eigsh"
        return conclude(
            run, proof.certified, proof.limits, rounds=rounds, seed=seed, begun=begun, remedy=remedy, throw=throw
        )
