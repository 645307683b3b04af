"""Blocks of vectors that may be dependent: their span as orthonormal rows, the lost ones zero, in fixed shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.krylov import basis
from eigenfunc.tree import Tree

_EPS = torch.finfo(torch.float64).eps


class RitzPairs(NamedTuple):
    values: Tensor  # (k,) float64
    vectors: Tree  # (k, *leaf), orthonormal
    residuals: Tensor  # (k,) float64: ‖A v − λ v‖


def weighted(c: Tensor, block: Tree) -> Tree:
    """Each row of `block` (b, *leaf) times its entry of c (b,)."""
    return tree.tree_map(lambda leaf: leaf * c.to(leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1)), block)


def stacked(*blocks: Tree) -> Tree:
    """Several stacks as one."""
    return tree.tree_map(lambda *parts: torch.cat(parts), *blocks)


def cleaned(block: Tree) -> Tree:
    """`block` with zeros for NaN and infinity, which no small eigenproblem survives."""
    return tree.tree_map(lambda leaf: torch.nan_to_num(leaf, nan=0.0, posinf=0.0, neginf=0.0), block)


def unit(block: Tree, floor: float = 0.0) -> Tree:
    """The rows at length one; those no longer than `floor` as zero."""
    lengths = tree.norms(block)
    alive = lengths > floor
    return weighted(torch.where(alive, 1 / torch.where(alive, lengths, 1.0), 0.0), block)


def whitening(g: Tensor, eps: float) -> Tensor:
    """Coefficients (p, p) that make vectors of Gram matrix g (p, p) orthonormal; rows of zeros, which come first, for
    the directions lost to dependence at the precision `eps` of the vectors.

    The Gram matrix is scaled by its diagonal: SVQB of A. Stathopoulos and K. Wu, SIAM J. Sci. Comput. 23 (2002).
    """
    lengths = torch.sqrt(torch.diagonal(g).clamp_min(0.0))
    inverse = torch.where(lengths > 0, 1 / torch.where(lengths > 0, lengths, 1.0), 0.0)
    values, vectors = torch.linalg.eigh(g * inverse[:, None] * inverse[None, :])
    kept = values > len(g) * max(10 * _EPS, 100 * eps * eps)
    root = torch.where(kept, torch.rsqrt(torch.where(kept, values, 1.0)), 0.0)
    coefficients: Tensor = root[:, None] * vectors.mT * inverse[None, :]
    return coefficients


def orthonormal(block: Tree) -> Tree:
    """Orthonormal rows (b, *leaf) with the span of `block`; those that it lacks in rank come first and are zero."""
    for _ in range(2):
        block = tree.combine(whitening(tree.exact_gram(block, block), tree.coarsest_eps(block)), block)
    return block


def outside(block: Tree, known: Tree) -> Tree:
    """Orthonormal rows (b, *leaf) with the span of `block` less that of the orthonormal rows `known`, or zero."""
    block = unit(block)
    for _ in range(2):
        block = basis.subtract(block, tree.gram(known, block), known)
        block = unit(block, 100 * tree.coarsest_eps(block))
        block = tree.combine(whitening(tree.exact_gram(block, block), tree.coarsest_eps(block)), block)
    return block


def completed(block: Tree, spare: Tree) -> Tree:
    """`block` (b, *leaf), whose rows are orthonormal but for leading zeros, with those filled from the span of the
    orthonormal rows `spare` (b, *leaf).

    As many directions of `spare` as there are zeros lie wholly outside `block`: its leading singular directions there.
    """
    rest = basis.subtract(spare, tree.gram(block, spare), block)
    _, u = torch.linalg.eigh(tree.exact_gram(rest, rest))
    lost = (tree.norms(block) == 0).to(u.dtype)
    return tree.add(block, weighted(lost, unit(tree.combine(u.flip(1).mT, rest))))
