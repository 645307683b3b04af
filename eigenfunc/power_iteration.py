"""Power iteration with deflation, plain, with momentum, or over mini-batches; certified like everything else."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eigenfunc import endgame
from eigenfunc.certificate import Products, seeded, start_block, whole
from eigenfunc.errors import InputError
from eigenfunc.krylov import basis, power
from eigenfunc.operator import MatVec
from eigenfunc.plan import plan_for
from eigenfunc.solution import Solution
from eigenfunc.thick_restart import Run
from eigenfunc.tree import Tree
from eigenfunc.verdict import conclude


def power_iteration(
    A: Any,
    k: int = 1,
    *,
    momentum: float = 0.0,
    tol: float = 1e-4,
    max_steps: int = 1000,
    v0: Tree | None = None,
    seed: int | None = None,
    stochastic: bool = False,
    progress: bool = False,
    throw: bool = True,
) -> Solution:
    """The k eigenpairs largest in magnitude, one after the other, by power iteration.

    Offered for teaching, for comparison and for streams of mini-batches; `eigsh` needs far fewer products.

    momentum    β of the heavy-ball recurrence A u − β u₋, in units of λ²; about λ_{k+1}²/4 is best. Eigenvalue and
                residual are those of A, not of the recurrence
    tol         stop an eigenpair when ‖A v − λ v‖ ≤ max(tol·|λ|, noise)
    max_steps   products for each eigenpair
    v0, seed    start vector of the first pair, and seed of the others (and of the first without v0)
    stochastic  a fresh mini-batch of the operator's data at each of `max_steps` steps, and the average of the
                iterates, later ones weighing more; only the certificate sees all the data
    throw       raise `NotConverged`, which carries the solution, unless every pair converged

    Verdict, residuals and completeness are as in `eigsh`: k fresh products of the whole matrix, and a random probe.
    Raises what `eigsh` raises, and `InputError` for `stochastic` on an operator without mini-batches.

    Momentum: C. De Sa et al., Accelerated Stochastic Power Iteration, AISTATS 2018.
    """
    begun = time.perf_counter()
    products = Products(A)
    plan = plan_for(k, "LM", tol, products.size)
    max_steps = whole(max_steps, "max_steps", 1)
    if not (isinstance(momentum, (int, float)) and 0 <= momentum < float("inf")):
        raise InputError(f"momentum must be a finite number, not negative, got {momentum!r}")
    if stochastic and products.A.minibatches is None:
        raise InputError("stochastic=True needs an operator over Batches or a DataLoader, such as hessian(...) makes")
    generator, seed = seeded(seed)
    first = start_block(v0, 1, products, generator)
    with products.at_work("power iteration", progress) as bar:
        products.calibrate(generator)
        run = Run(plan, products, generator, None)
        found = first[:0]
        for i in range(plan.k):
            start = first if i == 0 else products.random(generator)
            start = basis.orthogonal_to(start, found)
            if stochastic:
                vector = _averaged(run, found, start, momentum, max_steps, bar)
            else:
                vector = _iterated(run, found, start, momentum, max_steps, bar)
            found = torch.cat([found, basis.orthogonal_to(vector, found)])
        remedy = f"raise max_steps (now {max_steps}), or use eigsh, which needs far fewer products"
        proof = endgame.prove(run, found)
        return conclude(
            run, proof.certified, proof.limits, rounds=1, seed=seed, begun=begun, remedy=remedy, throw=throw
        )


def _iterated(run: Run, found: Tensor, start: Tensor, momentum: float, max_steps: int, bar: Any) -> Tensor:
    """One eigenvector orthogonal to the rows of `found`, read once a step on the CPU and every eighth elsewhere."""
    products = run.products
    every = 1 if products.device.type == "cpu" else 8
    beta = momentum / products.scale / products.scale
    state = power.init(start[0])
    vector = state.vector
    for step in range(1, max_steps + 1):
        vector = state.vector
        state = power.step(state, lambda v: products(v[None])[0], beta, found)
        bar.update(1)
        if step % every == 0 or step == max_steps:
            value, residual = torch.stack([state.value, state.residual]).tolist()
            products.check_finite(math.isfinite(residual))
            run.anorm = max(run.anorm, abs(value) + residual)
            if residual <= max(0.9 * run.plan.tol * abs(value), run.floor()):
                break
    return _or_start(vector, start)


def _averaged(run: Run, found: Tensor, start: Tensor, momentum: float, max_steps: int, bar: Any) -> Tensor:
    """The weighted mean of the iterates over a stream of mini-batches, each turned to the side of the mean so far."""
    products = run.products
    assert products.A.minibatches is not None
    stream: Iterator[MatVec] = products.A.minibatches()
    state = power.init(start[0])
    mean = torch.zeros_like(start[0])
    for step in range(1, max_steps + 1):
        state = power.step(
            state, partial(products.minibatch, next(stream)), momentum / products.scale / products.scale, found
        )
        side = torch.where(torch.dot(mean, state.vector) < 0, -1.0, 1.0).to(mean)
        mean = mean + (2.0 / (step + 1)) * (side * state.vector - mean)
        bar.update(1)
    return _or_start(mean, start)


def _or_start(vector: Tensor, start: Tensor) -> Tensor:
    """`vector` as a row; the start vector where A maps everything left to zero, for then any vector will do."""
    return torch.where(torch.linalg.vector_norm(vector) > 0, vector, start[0])[None]
