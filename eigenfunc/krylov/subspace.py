"""Subspace (simultaneous, block power) iteration with Rayleigh–Ritz, as pure functions over a state of tensors.

No host read and no branch on values, so that `vmap` and `torch.compile` go through a step. Derivatives do not: those
of `eigh` are infinite where values coincide.

F. Bauer, Z. Angew. Math. Phys. 8 (1957); H. Rutishauser, Numer. Math. 13 (1969).
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


class SubspaceState(NamedTuple):
    block: Tree  # (b, *leaf), orthonormal: what is multiplied next
    vectors: Tree  # (b, *leaf), orthonormal: Ritz vectors of what was multiplied last
    values: Tensor  # (b,) float64: their Ritz values, by falling magnitude
    residuals: Tensor  # (b,) float64: ‖A v − λ v‖
    anorm: Tensor  # () float64: largest ‖A q‖ seen, a lower bound of ‖A‖
    asym: Tensor  # () float64: largest |⟨u, A v⟩ − ⟨v, A u⟩| seen
    finite: Tensor  # () bool: no product so far held NaN or infinity


def init(block: Tree, matmat: MatMat) -> SubspaceState:
    """State for a start block (b, *leaf) of independent vectors, after the first step."""
    block = span.orthonormal(block)
    none = tree.norms(block) * 0
    return step(SubspaceState(block, block, none, none, none.sum(), none.sum(), none.sum() == 0), matmat)


def step(state: SubspaceState, matmat: MatMat) -> SubspaceState:
    """One product with the block, Rayleigh–Ritz in it, and the orthonormalised images as the next block.

    Directions that A maps to nothing new stay as they are, so the block never loses rank.
    """
    product = matmat(state.block)
    image = span.cleaned(product)
    g = tree.exact_gram(state.block, image)
    values, u = torch.linalg.eigh((g + g.mT) / 2)
    order = torch.argsort(values.abs(), descending=True, stable=True)
    values, turn = values[order], u[:, order].mT
    vectors, image = tree.combine(turn, state.block), tree.combine(turn, image)
    return SubspaceState(
        span.completed(span.orthonormal(image), vectors),
        vectors,
        values,
        tree.norms(tree.sub(image, span.weighted(values, vectors))),
        torch.maximum(state.anorm, tree.norms(image).amax()),
        torch.maximum(state.asym, (g - g.mT).abs().amax()),
        state.finite & tree.all_finite(product),
    )


def extract(state: SubspaceState, k: int) -> RitzPairs:
    """The k ≤ b pairs largest in magnitude, of the block that was multiplied last."""
    return RitzPairs(state.values[:k], tree.rows(state.vectors, 0, k), state.residuals[:k])
