"""What the block solvers share: their start block, the loop, and the look at a state that says when to stop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.certificate import Products, whole
from eigenfunc.endgame import Probe, Proof, prove
from eigenfunc.krylov import basis, span
from eigenfunc.krylov.lobpcg import LobpcgState
from eigenfunc.krylov.subspace import SubspaceState
from eigenfunc.thick_restart import ROUNDS, Run

S = TypeVar("S", SubspaceState, LobpcgState)


def sized(block_size: int | None, k: int, guards: int, n: int) -> int:
    """The number of vectors to iterate: k and some guards, unless it is given; `InputError` for less than k."""
    return min(k + guards if block_size is None else whole(block_size, "block_size", k), n)


def _filled(block: Tensor, size: int, products: Products, generator: torch.Generator) -> Tensor:
    while len(block) < size:
        block = torch.cat([block, basis.orthogonal_to(products.random(generator), block)])
    return block


def _independent(rows: Tensor) -> Tensor:
    block: Tensor = span.orthonormal(rows)
    return block[tree.norms(block) > 0]


def drive(
    run: Run,
    start: Tensor,
    init: Callable[[Tensor], S],
    advance: Callable[[S], S],
    max_steps: int,
    bar: Any,
    probe: Probe | None = None,
) -> tuple[Proof, int]:
    """Step until the k leading pairs of the block are settled and proved, going on from what a failed proof found.

    The state is read after every step on the CPU and after every eighth elsewhere. Returns the last proof, and the
    number of proofs tried.
    """
    k, size = run.plan.k, len(start)
    every = 1 if run.products.device.type == "cpu" else 8
    state, rounds = init(start), 0
    for step in itertools.count(1):
        last = step == max_steps
        if (last or step % every == 0) and (settled(run, state, bar) or last):
            proof = prove(run, state.vectors[:k], probe)
            rounds += 1
            if proof.complete or last or rounds == ROUNDS:
                break
            found = proof.certified.vectors
            found = found if proof.direction is None else torch.cat([proof.direction, found])
            rows = _independent(torch.cat([found, state.vectors])[:size])
            state = init(_filled(rows, size, run.products, run.generator))
        state = advance(state)
    return proof, rounds


def look(run: Run, state: SubspaceState | LobpcgState) -> tuple[Tensor, Tensor]:
    """Values and residuals (b,) on the CPU, by one read of the state; raises `NonFiniteError`."""
    b = len(state.values)
    figures = torch.stack([state.anorm, state.asym, state.finite.double()])
    host = torch.cat([state.values, state.residuals, figures]).cpu()
    anorm, asym, finite = host[2 * b :].tolist()
    run.products.check_finite(bool(finite))
    run.anorm, run.asym = max(run.anorm, anorm), max(run.asym, asym)
    return host[:b], host[b : 2 * b]


def settled(run: Run, state: SubspaceState | LobpcgState, bar: Any) -> bool:
    """Whether the k leading residuals meet the tolerance, and no other Ritz value, with its residual, reaches in among
    theirs."""
    k = run.plan.k
    values, residuals = look(run, state)
    target = aims(run, values)
    bar.update(run.products.matvecs - bar.n)
    rank = values.abs() if run.plan.which == "LM" else values
    intruded = (rank + residuals)[k:] > (rank + target)[k - 1]
    return bool((residuals <= target)[:k].all()) and not bool(intruded.any())


def aims(run: Run, values: Tensor) -> Tensor:
    """The residual to reach for each Ritz value: a little below what the certificate will ask."""
    return (0.9 * run.plan.tol * values.abs()).clamp_min(run.floor())
