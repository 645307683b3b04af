"""What the block solvers share: their start block, and the look at a state that says when to stop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.certificate import Products, non_finite, start_vector, whole
from eigenfunc.errors import InputError, NonFiniteError
from eigenfunc.krylov import basis, span
from eigenfunc.krylov.lobpcg import LobpcgState
from eigenfunc.krylov.subspace import SubspaceState
from eigenfunc.thick_restart import Run
from eigenfunc.tree import Tree


def sized(block_size: int | None, k: int, guards: int, n: int) -> int:
    """The number of vectors to iterate: k and some guards, unless it is given; `InputError` for less than k."""
    return min(k + guards if block_size is None else whole(block_size, "block_size", k), n)


def start_block(v0: Tree | None, size: int, products: Products, generator: torch.Generator) -> Tensor:
    """Orthonormal rows (size, n): those of `v0`, one vector or a stack of them, and random ones for what it lacks."""
    block = _given(v0, size, products, generator)
    while len(block) < size:
        block = torch.cat([block, basis.orthogonal_to(products.random(generator), block)])
    return block


def _given(v0: Tree | None, size: int, products: Products, generator: torch.Generator) -> Tensor:
    like = products.A.like
    pairs = zip(tree.leaves(v0), tree.leaves(like), strict=False)
    if v0 is None or not any(getattr(leaf, "ndim", 0) > ref.ndim for leaf, ref in pairs):
        return start_vector(v0, products, generator)
    tree.check_like(v0, like, "v0", stacked=True)
    flat = tree.ravel(tree.tree_map(lambda leaf: leaf.detach(), v0), like)
    if len(flat) > size:
        raise InputError(f"v0 holds {len(flat)} vectors, more than block_size = {size}: raise it, or give fewer")
    for i, largest in enumerate(flat.abs().amax(1).tolist()):
        if largest == 0 or not math.isfinite(largest):
            raise InputError(f"v0: vector {i} " + ("is zero" if largest == 0 else "holds NaN or infinity"))
    block: Tensor = span.orthonormal(flat / flat.abs().amax(1, keepdim=True))
    return block[tree.norms(block) > 0]


def look(run: Run, state: SubspaceState | LobpcgState) -> tuple[Tensor, Tensor]:
    """Values and residuals (b,) on the CPU, by one read of the state; raises `NonFiniteError`."""
    b = len(state.values)
    figures = torch.stack([state.anorm, state.asym, state.finite.double()])
    host = torch.cat([state.values, state.residuals, figures]).cpu()
    anorm, asym, finite = host[2 * b :].tolist()
    if not finite:
        raise NonFiniteError(non_finite(run.products.matvecs))
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
