"""LOBPCG for the largest eigenvalues, as pure functions over a state of tensors.

Each step is Rayleigh–Ritz in the span of the block, its preconditioned residuals and the directions of the last step.
These three are kept orthonormal, with zero rows for what is dependent, and their images under A are carried along, so
that a step costs one product with b vectors, whatever b is. No host read and no branch on values, so that `vmap` and
`torch.compile` go through a step; derivatives do not: those of `eigh` are infinite where values coincide.

A. Knyazev, SIAM J. Sci. Comput. 23 (2001); the basis as in U. Hetmaniuk and R. Lehoucq, J. Comput. Phys. 218 (2006),
and J. Duersch, M. Shao, C. Yang and M. Gu, SIAM J. Sci. Comput. 40 (2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.krylov import span
from eigenfunc.krylov.span import RitzPairs
from eigenfunc.tree import Tree

MatMat = Callable[[Tree], Tree]


class LobpcgState(NamedTuple):
    vectors: Tree  # (b, *leaf), orthonormal Ritz vectors
    images: Tree  # (b, *leaf): A times `vectors`, carried along
    directions: Tree  # (b, *leaf): where the last step moved, orthonormal, orthogonal to `vectors`, or zero
    shifts: Tree  # (b, *leaf): A times `directions`, carried along
    values: Tensor  # (b,) float64: Ritz values, falling
    residuals: Tensor  # (b,) float64: ‖A v − λ v‖ by the carried images
    anorm: Tensor  # () float64: largest ‖A q‖ seen, a lower bound of ‖A‖
    asym: Tensor  # () float64: largest |⟨u, A v⟩ − ⟨v, A u⟩| seen
    finite: Tensor  # () bool: no product so far held NaN or infinity


def init(block: Tree, matmat: MatMat) -> LobpcgState:
    """State for a start block (b, *leaf) of independent vectors: one product with it, and Rayleigh–Ritz."""
    block = span.orthonormal(block)
    product = matmat(block)
    image = span.cleaned(product)
    none = tree.norms(block) * 0
    return _ritz(block, image, len(none), tree.norms(image).amax(), none.sum(), tree.all_finite(product))


def step(
    state: LobpcgState, matmat: MatMat, precondition: MatMat | None = None, target: Tensor | None = None
) -> LobpcgState:
    """One product with b new vectors: the residuals, put through `precondition`, less what is known already.

    `precondition` maps a stack (b, *leaf) to a stack and approximates a positive definite inverse, of A − σ or of |A|.
    Where a residual meets `target` (b,) no vector is spent on it, and one more row that `matmat` is given is zero.
    """
    rest = span.unit(tree.sub(state.images, span.weighted(state.values, state.vectors)))
    if target is not None:
        rest = span.weighted((state.residuals > target).to(state.residuals), rest)
    if precondition is not None:
        rest = span.cleaned(precondition(rest))
    known = span.stacked(state.vectors, state.directions)
    fresh = span.outside(rest, known)
    product = matmat(fresh)
    image = span.cleaned(product)
    return _ritz(
        span.stacked(known, fresh),
        span.stacked(state.images, state.shifts, image),
        len(state.values),
        torch.maximum(state.anorm, tree.norms(image).amax()),
        state.asym,
        state.finite & tree.all_finite(product),
    )


def _ritz(basis: Tree, images: Tree, b: int, anorm: Tensor, asym: Tensor, finite: Tensor) -> LobpcgState:
    """Rayleigh–Ritz in the span of the rows of `basis`, the first b of which are the old vectors.

    The state is made anew, as the compiler of torch 2.11 mistakes what `_replace` returns.
    """
    eps = tree.coarsest_eps(basis)
    overlap, g = tree.exact_gram(basis, basis), tree.exact_gram(basis, images)
    whiten = span.whitening(overlap, eps)
    t = whiten @ ((g + g.mT) / 2) @ whiten.mT
    lost = (whiten == 0).all(1)
    below = 2 * torch.linalg.matrix_norm(t) + 1
    values, u = torch.linalg.eigh(t - torch.diag(torch.where(lost, below, 0.0)))
    values, turn = values.flip(0)[:b], u.flip(1)[:, :b].mT

    c = turn @ whiten
    moves = torch.cat([torch.zeros_like(c[:, :b]), c[:, b:]], dim=1)
    d = moves @ overlap @ whiten.mT  # in the orthonormal coordinates, as `turn` is
    for _ in range(2):
        d = d - d @ turn.mT @ turn
        d = torch.where((torch.linalg.vector_norm(d, dim=1) > 10 * eps)[:, None], d, 0.0)
        d = span.whitening(d @ d.mT, eps) @ d
    d = d @ whiten

    vectors, moved = tree.combine(c, basis), tree.combine(c, images)
    return LobpcgState(
        vectors=vectors,
        images=moved,
        directions=tree.combine(d, basis),
        shifts=tree.combine(d, images),
        values=values,
        residuals=tree.norms(tree.sub(moved, span.weighted(values, vectors))),
        anorm=anorm,
        asym=torch.maximum(asym, (g - g.mT).abs().amax()),
        finite=finite,
    )


def extract(state: LobpcgState, k: int) -> RitzPairs:
    """The k ≤ b pairs with the largest values; residuals by the carried images."""
    return RitzPairs(state.values[:k], tree.rows(state.vectors, 0, k), state.residuals[:k])
