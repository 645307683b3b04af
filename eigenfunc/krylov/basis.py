"""Orthonormal bases as stacks of vectors: writing, projecting, orthonormalising, rotating.

A row that had to be given up (the Krylov space was exhausted) is zero: it takes part in no projection, so no
branch is needed, and whoever drives the iteration can put a random vector in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.tree import Tree

_SLICE = 1_048_576  # columns rotated at a time: bounds the scratch memory of a restart


def allocate(block: Tree, num_rows: int) -> Tree:
    """A zero stack (num_rows, *leaf) shaped after the stack `block`.

    Taken from `block.new_zeros`, so that under vmap the memory carries the batch dimension too.
    """
    return tree.tree_map(lambda leaf: leaf.new_zeros((num_rows, *leaf.shape[1:])), block)


def write(target: Tree, start: int, block: Tree) -> Tree:
    """`target` with rows start, start+1, … replaced by `block`.

    In place where nobody can notice, since copying the basis would cost more than all the rest of a step;
    out of place where reverse-mode differentiation has to remember the old rows.
    """

    def one(leaf: Tensor, rows: Tensor) -> Tensor:
        stop = start + rows.shape[0]
        if _tracked(rows) or _tracked(leaf):
            return torch.cat([leaf[:start], rows, leaf[stop:]])
        leaf[start:stop] = rows
        return leaf

    return tree.tree_map(one, target, block)


def _tracked(x: Tensor) -> bool:
    """Whether reverse-mode AD records x, at any level of nested torch.func transforms."""
    functorch: Any = torch._C._functorch
    while True:
        if x.requires_grad:
            return True
        if not functorch.is_functorch_wrapped_tensor(x):
            return False
        x = functorch.get_unwrapped(x)


def subtract(block: Tree, coefficients: Tensor, basis: Tree) -> Tree:
    """block (b, *leaf) − coefficientsᵀ basis, for coefficients (p, b) and a basis (p, *leaf)."""

    def one(w: Tensor, v: Tensor) -> Tensor:
        flat = torch.addmm(
            w.reshape(w.shape[0], -1), coefficients.mT.to(w.dtype), v.reshape(v.shape[0], -1), alpha=-1
        )
        return flat.reshape(w.shape)

    return tree.tree_map(one, block, basis)


def orthonormalise(block: Tree, floor: Tensor) -> tuple[Tree, Tensor, Tensor]:
    """Q (b, *leaf), R (b, b) and `alive` (b,) with block = Rᵀ Q and the rows of Q orthonormal or zero.

    Directions of length at most `floor` are given up: their rows of Q and R are zero and `alive` is 0.
    A single vector is divided by its norm. A block goes twice through its float64 Gram matrix, scaled by its
    diagonal (SVQB of Stathopoulos & Wu, SIAM J. Sci. Comput. 23, 2002), which, unlike Cholesky, takes
    dependent rows.
    """
    if tree.leaves(block)[0].shape[0] == 1:
        length = torch.sqrt(tree.gram(block, block))
        alive = (length > floor).to(length.dtype)
        q = tree.combine(alive / torch.where(alive > 0, length, 1.0), block)
        return q, alive * length, alive[0]
    q, r = _svqb(block, floor)
    q, again = _svqb(q, torch.zeros_like(floor))
    r = again @ r
    alive = (torch.linalg.vector_norm(r, dim=1) > floor).to(r.dtype)
    return tree.combine(torch.diag_embed(alive), q), alive[:, None] * r, alive


def _svqb(block: Tree, floor: Tensor) -> tuple[Tree, Tensor]:
    g = tree.gram(block, block)
    lengths = torch.sqrt(torch.diagonal(g))
    usable = lengths > floor
    inverse = usable / torch.where(usable, lengths, 1.0)
    values, vectors = torch.linalg.eigh(inverse[:, None] * g * inverse[None, :])
    eps = torch.finfo(tree.leaves(block)[0].dtype).eps
    kept = values > 100 * eps
    root = torch.sqrt(torch.where(kept, values, 1.0))
    to_q = (kept / root)[:, None] * vectors.mT * inverse[None, :]
    to_r = (kept * root)[:, None] * vectors.mT * lengths[None, :]
    return tree.combine(to_q, block), to_r


def orthogonal_to(vector: Tree, basis: Tree) -> Tree:
    """`vector` (1, *leaf) made orthogonal to the rows of `basis`, three times over, and of norm one."""
    for _ in range(3):
        length = tree.norms(vector)
        vector = tree.combine(torch.diag_embed(1 / torch.where(length > 0, length, 1.0)), vector)
        vector = subtract(vector, tree.gram(basis, vector), basis)
    length = tree.norms(vector)
    return tree.combine(torch.diag_embed(1 / torch.where(length > 0, length, 1.0)), vector)


def rotate(basis: Tree, s: Tensor, tail: int) -> Tree:
    """Rows [0, p) become sᵀ basis[:j] for s (j, p), rows [p, p+tail) the old rows [j, j+tail); in place.

    Works on slices of columns, so that no second basis is ever in memory.
    """
    j, p = s.shape

    def one(leaf: Tensor) -> Tensor:
        flat = leaf.reshape(leaf.shape[0], -1)
        weights = s.mT.to(leaf.dtype)
        for start in range(0, flat.shape[1], _SLICE):
            columns = flat[:, start : start + _SLICE]
            columns[:p] = weights @ columns[:j]
            columns[p : p + tail] = columns[j : j + tail].clone()
        return leaf

    return tree.tree_map(one, basis)
