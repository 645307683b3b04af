"""Orthonormal bases as stacks of vectors: writing, projecting, orthonormalising, rotating.

A row that had to be given up (the Krylov space was exhausted) is zero: it takes part in no projection, so no
branch is needed, and whoever drives the iteration can put a random vector in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eigenfunc import storage, tree
from eigenfunc.tree import Tree


def allocate(block: Tree, num_rows: int, dtype: torch.dtype | None = None, place: storage.Place = None) -> Tree:
    """A zero stack (num_rows, *leaf) shaped after the stack `block`, in its dtypes or in another one; at a place, or
    else where the block is."""
    return tree.tree_map(lambda leaf: storage.allocate_like(leaf, num_rows, dtype, place), block)


def write(target: Tree, start: int, block: Tree) -> Tree:
    """`target` with rows start, start+1, … replaced by `block`.

    In place where nobody can notice, since copying the basis would cost more than all the rest of a step;
    out of place where reverse-mode differentiation has to remember the old rows, and where a compiler decides itself.
    """

    def one(leaf: Tensor, rows: Tensor) -> Tensor:
        stop = start + rows.shape[0]
        if torch.compiler.is_compiling() or _tracked(rows) or _tracked(leaf):
            return torch.cat([leaf[:start], rows, leaf[stop:]])
        if storage.folder_of(leaf):
            storage.copy(tree.matrix(leaf[start:stop]), tree.matrix(rows))
        else:
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
        flat, weights = tree.matrix(w), coefficients.mT.to(w.dtype)
        parts = (
            torch.addmm(flat[:, columns], weights, part, alpha=-1)
            for columns, part in tree.wide(tree.matrix(v), w.dtype, w.device)
        )
        return storage.joined(parts, flat.shape[1], flat).reshape(w.shape)

    return tree.tree_map(one, block, basis)


def orthonormalise(block: Tree) -> Tree:
    """An orthonormal stack (b, *leaf) with the span of `block`, whose rows must be independent.

    Goes twice through the float64 Gram matrix scaled by its diagonal, small eigenvalues lifted (SVQB of Stathopoulos
    & Wu, SIAM J. Sci. Comput. 23, 2002).
    """
    for _ in range(2):
        g = tree.exact_gram(block, block)
        lengths = torch.sqrt(torch.diagonal(g))
        values, vectors = torch.linalg.eigh(g / (lengths[:, None] * lengths[None, :]))
        eps = torch.finfo(tree.leaves(block)[0].dtype).eps
        root = torch.sqrt(values.clamp_min(len(lengths) * eps))
        block = tree.combine(vectors.mT / (root[:, None] * lengths[None, :]), block)
    return block


def normalised(vector: Tree, floor: Tensor) -> tuple[Tree, Tensor, Tensor]:
    """The row `vector` (1, *leaf) at length one, its length (1, 1), and `alive` (1,): 1, or 0 where the length is at
    most `floor` and the row is given up: then row and length come out as zero."""
    length = tree.norms(vector)[:, None]
    alive = (length > floor).to(length.dtype)
    factor = (alive / torch.where(alive > 0, length, 1.0))[0, 0]
    return tree.scale(factor, vector), alive * length, alive[0]


def independent(block: Tree, floors: Tensor) -> tuple[Tree, Tensor, Tensor]:
    """Orthonormal rows q (b, *leaf), r (b, b) with block_i = Σ_l r[l, i] q_l, and `alive` (b,), for a stack `block`.

    One row after the other, each projected twice; a row of which no more than its floor (b,) is left is given up.
    """
    count = floors.shape[0]
    if count == 1:
        return normalised(block, floors[0])
    q = allocate(block, count)
    r = floors.new_zeros(count, count)
    lives = []
    for i in range(count):
        vector, done = tree.rows(block, i, i + 1), tree.rows(q, 0, i)
        column = floors.new_zeros(i, 1)
        for _ in range(2 if i else 0):
            part = tree.gram(done, vector)
            vector, column = subtract(vector, part, done), column + part
        unit, length, alive = normalised(vector, floors[i])
        q = write(q, i, unit)
        r = write(r.mT, i, torch.cat([column, length, floors.new_zeros(count - i - 1, 1)]).mT).mT
        lives.append(alive)
    return q, r, torch.cat(lives)


def orthogonal_to(vector: Tree, basis: Tree) -> Tree:
    """`vector` (1, *leaf) made orthogonal to the rows of `basis`, three times over, and of norm one."""
    zero = torch.zeros_like(tree.norms(vector)[0])
    for _ in range(3):
        vector, _, _ = normalised(vector, zero)
        vector = subtract(vector, tree.gram(basis, vector), basis)
    return normalised(vector, zero)[0]


def rotate(basis: Tree, s: Tensor, tail: int) -> Tree:
    """Rows [0, p) become sᵀ basis[:j] for s (j, p), rows [p, p+tail) the old rows [j, j+tail); in place.

    Works on slices of columns, where s is, so that no second basis is ever in memory.
    """
    j, p = s.shape

    def one(leaf: Tensor) -> Tensor:
        flat = tree.matrix(leaf)
        exact = torch.promote_types(leaf.dtype, torch.float32)
        weights = s.mT.to(exact)
        for piece in storage.pieces(flat):
            columns = flat[:, piece]
            old = storage.near(columns[: j + tail], s.device)
            mixed, coming = weights @ old[:j].to(exact), old[j:].clone()
            storage.put(columns[:p], mixed)
            storage.put(columns[p : p + tail], coming)
        return leaf

    return tree.tree_map(one, basis)
