"""LOBPCG, the block method that can use a preconditioner, certified like everything else."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from eigenfunc import block_loop, tree
from eigenfunc.certificate import Certified, Products, seeded, start_block, whole
from eigenfunc.completeness import Finding, Limits
from eigenfunc.errors import InputError
from eigenfunc.krylov import basis, lobpcg as kernel, span
from eigenfunc.operator import MatVec
from eigenfunc.plan import PROBE, plan_for
from eigenfunc.solution import Solution
from eigenfunc.thick_restart import Run
from eigenfunc.tree import Tree
from eigenfunc.verdict import conclude

_CAUTION = 3.0  # residuals that the probe's Ritz value must keep away by, being far from converged
_LEAST_BUDGET = 100  # products that the probe may take at least


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
    v0              start vector, shaped as `A.like`, or a stack of them (p, *leaf), summed into b rows where there are
                    more; random ones are added where there are fewer
    seed            of all random numbers; default: a fresh one, told in `stats.seed`
    throw           raise `NotConverged`, which carries the solution, unless every pair converged

    Memory: about 20 b vectors at the peak, 4 b between steps. Verdict, residuals and completeness are as in `eigsh`: k
    fresh products, and a random probe. If the run is preconditioned so is the probe, and then it judges by Ritz values
    and their residuals, without the stated chance of `eigsh`. Raises what `eigsh` raises, and `InputError` for a
    preconditioner that is seen not to be positive definite.

    A. Knyazev, Toward the optimal preconditioned eigensolver, SIAM J. Sci. Comput. 23 (2001).
    """
    begun = time.perf_counter()
    if which not in ("LA", "SA"):
        raise InputError(f"which must be 'LA' or 'SA', got {which!r}; for both ends or the largest in magnitude: eigsh")
    products = Products(A)
    plan = plan_for(k, which, tol, products.size)
    size = block_loop.sized(block_size, plan.k, max(plan.k // 4, 2), plan.n)
    max_steps = whole(max_steps, "max_steps", 1)
    generator, seed = seeded(seed)
    start = start_block(v0, size, products, generator)
    sign = 1.0 if which == "LA" else -1.0

    matmat = _sparing(lambda block: sign * products(block))

    with products.at_work(f"lobpcg {which}", progress) as bar:
        precondition = None if preconditioner is None else _mapped(preconditioner, products, generator)
        products.calibrate(generator)
        run = Run(plan, products, generator, None)

        def advance(state: kernel.LobpcgState) -> kernel.LobpcgState:
            return kernel.step(state, matmat, precondition, block_loop.aims(run, state.values))

        probe = None if precondition is None else partial(_probe, run, sign, matmat, precondition)
        proof, rounds = block_loop.drive(run, start, lambda x: kernel.init(x, matmat), advance, max_steps, bar, probe)
        remedy = f"raise max_steps (now {max_steps}) or block_size (now {size}), precondition, or use eigsh"
        return conclude(
            run, proof.certified, proof.limits, rounds=rounds, seed=seed, begun=begun, remedy=remedy, throw=throw
        )


def _probe(run: Run, sign: float, matmat: kernel.MatMat, precondition: kernel.MatMat, certified: Certified) -> Finding:
    """Look for missed eigenvalues by LOBPCG with a random vector, orthogonal to all that was found.

    At least eight steps, and on until the new value, with thrice its residual, stays behind, or is beyond for sure. An
    ill-conditioned matrix asks for the preconditioner here as much as in the solving.
    """
    plan, products, found = run.plan, run.products, certified.vectors

    def deflated(block: Tensor) -> Tensor:
        image = matmat(block)
        rest: Tensor = basis.subtract(image, tree.gram(found, image), found)
        return rest

    def direction(block: Tensor) -> Tensor:
        fresh: Tensor = span.outside(precondition(block), found)
        return fresh

    order = plan.reported(certified.values)
    edges = sign * certified.values[order] + certified.residuals[order].clamp_min(run.floor())
    state = kernel.init(basis.orthogonal_to(products.random(run.generator), found), deflated)
    for step in range(max(_LEAST_BUDGET, run.spent)):
        values, residuals = block_loop.look(run, state)
        reach = float(values + torch.where(residuals > run.floor(), _CAUTION * residuals, 0.0))
        missed = (values - residuals > edges[-1]) & (residuals <= block_loop.aims(run, values))
        if step >= PROBE and (reach <= float(edges.min()) or bool(missed)):
            break
        state = kernel.step(state, deflated, direction, torch.full_like(state.values, run.floor()))
    clear = edges[edges >= reach]
    beyond = float(clear.min()) if len(clear) else float("inf")
    limits = Limits({int(sign): beyond}, len(clear) == len(edges))
    return Finding(limits, None if limits.proven else state.vectors)


def _sparing(f: kernel.MatMat) -> kernel.MatMat:
    """f for blocks (b, n) some rows of which may be zero: those are not passed on."""

    def some(block: Tensor) -> Tensor:
        alive = tree.norms(block) > 0
        out = torch.zeros_like(block)
        if bool(alive.any()):
            out[alive] = f(block[alive])
        return out

    return some


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
    return _sparing(lambda block: torch.stack([one(row) for row in block]))
