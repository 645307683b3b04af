"""LOBPCG, the block method that can use a preconditioner, certified like everything else."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eigenfunc import blocks, endgame, scope, tree
from eigenfunc.certificate import Products, seeded, whole
from eigenfunc.errors import InputError
from eigenfunc.krylov import lobpcg as kernel
from eigenfunc.operator import MatVec, aslinearoperator
from eigenfunc.solution import Solution
from eigenfunc.thick_restart import ROUNDS, Run, plan_for
from eigenfunc.tree import Tree


def lobpcg(
    A: Any,
    k: int = 6,
    *,
    which: Literal["LA", "SA"] = "LA",
    preconditioner: MatVec | None = None,
    block_size: int | None = None,
    tol: float = 1e-4,
    max_steps: int = 1000,
    v0: Tree | None = None,
    seed: int | None = None,
    progress: bool = False,
    throw: bool = True,
) -> Solution:
    """The k largest (LA) or smallest (SA) eigenpairs by LOBPCG, all at once.

    The solver to take where a good preconditioner is at hand, and for warm starts from a block of old eigenvectors;
    without either `eigsh` needs fewer products.

    preconditioner  maps one vector to one vector; linear, symmetric and positive definite, an approximate inverse of
                    A − σ with σ just beyond the wanted end, or of |A|. Its scale does not matter
    block_size      vectors b ≥ k that are iterated; default a quarter more than k, at least k+2; never more than n
    tol             stop when every ‖A v − λ v‖ ≤ max(tol·|λ|, noise)
    max_steps       steps, of b products each
    v0              one start vector, shaped as `A.like`, or up to b of them as a stack (p, *leaf); the rest are random
    seed            of all random numbers; default: a fresh one, told in `stats.seed`
    throw           raise `NotConverged`, which carries the solution, unless every pair converged

    Memory: about 14 b vectors. Verdict, residuals and completeness are as in `eigsh`: k fresh products, and a random
    probe, which the preconditioner does not help. Raises what `eigsh` raises, and `InputError` for a preconditioner
    that is seen not to be positive definite.

    A. Knyazev, Toward the optimal preconditioned eigensolver, SIAM J. Sci. Comput. 23 (2001).
    """
    begun = time.perf_counter()
    if which not in ("LA", "SA"):
        raise InputError(f"which must be 'LA' or 'SA', got {which!r}; for both ends or the largest in magnitude: eigsh")
    products = Products(aslinearoperator(A))
    plan = plan_for(k, which, tol, products.size, None, None)
    size = blocks.sized(block_size, plan.k, max(plan.k // 4, 2), plan.n)
    max_steps = whole(max_steps, "max_steps", 1)
    generator, seed = seeded(seed)
    start = blocks.start_block(v0, size, products, generator)
    sign = 1.0 if which == "LA" else -1.0

    def matmat(block: Tensor) -> Tensor:
        return sign * products(block)

    with (
        scope.full_precision(products.device),
        torch.no_grad(),
        tqdm(disable=not progress, desc=f"lobpcg {which}", unit=" products", leave=False) as bar,
    ):
        precondition = None if preconditioner is None else _mapped(preconditioner, products, generator)
        products.calibrate(generator)
        run = Run(plan, products, generator, None)
        every = 1 if products.device.type == "cpu" else 8
        state = kernel.init(start, matmat)
        rounds = 0
        for step in range(max_steps + 1):
            last = step == max_steps
            if last or (step % every == 0 and blocks.settled(run, state, bar)):
                certified = endgame.certificate(run, kernel.extract(state, plan.k).vectors)
                rounds += 1
                if last or rounds == ROUNDS or bool((certified.residuals <= run.target(certified.values)).all()):
                    break
                state = kernel.init(state.vectors, matmat)
            state = kernel.step(state, matmat, precondition)
        remedy = f"raise max_steps (now {max_steps}) or block_size (now {size}), precondition, or use eigsh"
        return endgame.finish(run, certified, rounds=rounds, seed=seed, begun=begun, remedy=remedy, throw=throw)


def _mapped(preconditioner: MatVec, products: Products, generator: torch.Generator) -> kernel.MatMat:
    """The preconditioner on flat stacks (b, n), each row of its result at a size that can be squared.

    Tried on one random vector first: `TreeError` for a result of another structure, `InputError` for one that no
    positive definite matrix gives.
    """
    like = products.A.like

    def one(row: Tensor) -> Tensor:
        flat = tree.ravel(preconditioner(tree.unravel(row, like)), like)
        largest = flat.abs().max()
        return flat / torch.where(largest > 0, largest, 1.0)

    sample = products.random(generator)[0]
    tree.check_like(preconditioner(tree.unravel(sample, like)), like, "the preconditioner's result")
    if not bool(torch.dot(sample, one(sample)) > 0):
        raise InputError("the preconditioner is not positive definite: ⟨v, T v⟩ is not above zero for a random v")
    return lambda block: torch.stack([one(row) for row in block])
