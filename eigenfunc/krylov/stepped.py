"""Lanczos by one compiled step in a loop: compiled once, whatever the number of steps.

The compiled part is pure. It sees the finished rows of the basis as an input of dynamic length, behind a row of zeros
so that the couplings are its last entries, and returns the new row, which the loop writes in place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenfunc import scope, tree
from eigenfunc.errors import TransformError
from eigenfunc.krylov import basis as vectors
from eigenfunc.krylov.lanczos import MatVec, Tridiagonal
from eigenfunc.tree import Tree

_SHAPES = 256  # how many matrices and shapes one process may compile the step for


class Row(NamedTuple):
    q: Tree  # (1, *leaf): the next basis row, zero where it had to be given up
    alpha: Tensor  # () float64
    beta: Tensor  # () float64
    alive: Tensor  # () float64: 0 where `q` was given up
    anorm: Tensor  # () float64: largest ‖A q‖ seen, a lower bound of ‖A‖


def advance(matvec: MatVec, seen: Tree, anorm: Tensor) -> Row:
    """One product with the last row of `seen` (rows, *leaf), made orthogonal to all of them by two passes of classical
    Gram–Schmidt. L. Giraud, J. Langou and M. Rozložník, Comput. Math. Appl. 50 (2005)."""
    first, *others = tree.leaves(seen)
    check: Any = torch._check
    for leaf in others:
        check(leaf.shape[0] == first.shape[0])  # which the compiler, to whom both are unknown, cannot see
    product = tree.tree_map(lambda leaf, row: leaf[None].to(row), matvec(tree.row(seen, -1)), tree.row(seen, -1))
    c = tree.gram(seen, product)
    rest = vectors.subtract(product, c, seen)
    length = torch.sqrt((c * c).sum() + tree.norms(rest)[0] ** 2)
    anorm = torch.maximum(anorm, torch.where(torch.isfinite(length), length, 0.0))
    floor = 10 * torch.finfo(tree.leaves(product)[0].dtype).eps * anorm
    q, r, _ = vectors.normalised(rest, floor)
    more = tree.gram(seen, q)
    floor = floor / torch.where(r > 0, r, 1.0)[0, 0]
    q, turn, alive = vectors.normalised(vectors.subtract(q, more, seen), floor)
    alpha, beta = (c + more * r)[-1, 0], (turn * r)[0, 0]
    return Row(tree.tree_map(torch.detach, q), alpha.detach(), beta.detach(), alive[0].detach(), anorm.detach())


def run(
    matvec: MatVec, v0: Tree, num_steps: int, *, compile: bool = True, backend: str | Callable[..., Any] = "inductor"
) -> Tridiagonal:
    """What `lanczos` returns, by a step that is compiled once for any number of steps.

    `matvec` must trace without graph breaks, as `hvp` does, and is compiled along with the rest; its vectors are in
    the dtypes of `v0`. Writes in place and so is constant to `backward()`; raises `TransformError` inside torch.func
    transforms that differentiate, where `lanczos` serves.
    """
    if scope.derivative_levels() > 0:
        raise TransformError("run has no derivatives, because it writes in place: use eigenfunc.lanczos here")
    step, room = (_compiled(backend), _roomy()) if compile else (advance, nullcontext())
    start = tree.tree_map(lambda leaf: leaf.detach()[None], v0)
    anorm = torch.zeros_like(tree.norms(start)[0])
    q, _, alive = vectors.normalised(start, anorm)
    basis = vectors.write(vectors.allocate(q, num_steps + 2), 1, q)
    leaves, rebuild = tree.flatten(basis)
    alphas, betas, lives = [], [], [alive[0]]
    with room:
        for j in range(num_steps):
            seen = [leaf[: j + 2] for leaf in leaves]
            row = step(matvec, rebuild(_growing(seen) if compile else seen), anorm)
            for leaf, new in zip(leaves, tree.leaves(row.q), strict=True):
                leaf[j + 2 : j + 3] = new
            anorm = row.anorm
            alphas.append(row.alpha)
            betas.append(row.beta)
            lives.append(row.alive)
    return Tridiagonal(
        torch.stack(alphas),
        torch.stack(betas),
        tree.rows(basis, 1, num_steps + 1),
        tree.row(basis, num_steps + 1),
        torch.stack(lives[:num_steps]) > 0,
    )


@cache
def _compiled(backend: str | Callable[..., Any]) -> Callable[[MatVec, Tree, Tensor], Row]:
    """To ask torch for it takes as long as some steps."""
    return torch.compile(advance, fullgraph=True, backend=backend)


def _growing(seen: list[Tensor]) -> list[Tensor]:
    """`seen` with a number of rows that the compiler takes as unknown: no size is special."""
    decorators: Any = torch._dynamo.decorators
    for leaf in seen:
        decorators.mark_unbacked(leaf, 0)
    return seen


def _roomy() -> AbstractContextManager[Any]:
    """Each matrix is compiled anew, and the compiler gives up at the ninth unless told otherwise."""
    config: Any = torch._dynamo.config
    room: AbstractContextManager[Any] = config.patch(recompile_limit=_SHAPES)
    return room
