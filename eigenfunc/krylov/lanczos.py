"""Lanczos with full reorthogonalisation and thick restart, as pure functions over a state of tensors.

The state holds the basis V, whose first j rows are orthonormal and multiplied, and behind them the coming rows: the
residual directions of what has been multiplied, as many as the run is wide. A step multiplies the first b of them at
once: all of them in block Lanczos (G. Golub and R. Underwood, Mathematical Software III, 1977), fewer in a band (A.
Ruhe, Math. Comp. 33, 1979). The projected matrix T = V A Vᵀ is measured and not assumed. Its rows below the finished
part hold what symmetry predicts for the coming columns; the difference to what is then measured is a free test of
symmetry.

The functions know neither tolerance nor the number of wanted pairs: a driver does, and `lanczos` runs a fixed number
of steps. C. Lanczos, J. Res. Nat. Bur. Stand. 45 (1950); thick restart: K. Wu and H. Simon, SIAM J. Matrix Anal.
Appl. 22 (2000).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc import storage, tree
from eigenfunc.krylov import basis as vectors
from eigenfunc.tree import Tree

MatVec = Callable[[Tree], Tree]
Again = Callable[[Tensor], bool]


class State(NamedTuple):
    basis: Tree  # (rows, *leaf)
    t: Tensor  # (rows, rows) float64: the projected matrix, and the predicted coupling below it
    alive: Tensor  # (rows,) float64: 0 where a basis row was given up at a breakdown
    anorm: Tensor  # () float64: largest ‖A q‖ seen, a lower bound of ‖A‖
    asym: Tensor  # () float64: largest departure from symmetry seen, in units of A
    finite: Tensor  # () bool: no product so far held NaN or infinity


def _always(large: Tensor) -> bool:
    return True


def init(q: Tree, product: Tree, num_rows: int, dtype: torch.dtype | None = None, place: storage.Place = None) -> State:
    """State whose first coming rows are the orthonormal q (b, *leaf); their image only lends dtype and batching.

    The basis can be stored in another dtype, a shorter one, and at a place of its own; sums are carried in the dtype of
    the products.
    """
    like = tree.add(q, product)
    basis = vectors.write(vectors.allocate(like, num_rows, dtype, place), 0, q)
    g = tree.gram(like, like)
    zero = g.new_zeros(())
    alive = vectors.write(g.new_zeros(num_rows), 0, g.new_ones(g.shape[0]))
    return State(basis, g.new_zeros(num_rows, num_rows), alive, zero, zero, zero == 0)


def absorb(state: State, product: Tree, j: int, width: int = 1, *, again: Again = _always) -> State:
    """Take in the products (b, *leaf) of A with rows j, …, j+b−1, the first of `width` coming ones; the new rows go to
    j+width, ….

    The terms of the recurrence go first, then one classical Gram–Schmidt pass over the whole basis, which sees only
    what they left over; `again` says whether a second pass is due, for its coefficients were large (over 5% of what
    remains). Without it the second pass is always made, and nothing is read.
    """
    basis, t = state.basis, state.t
    count = tree.leaves(product)[0].shape[0]
    last, done = j + width, j + count
    near = max(j - width, 0)
    local = tree.gram(tree.rows(basis, near, last), product)
    rest = vectors.subtract(product, local, tree.rows(basis, near, last))
    seen = tree.rows(basis, 0, last)
    far = tree.gram(seen, rest)
    rest = vectors.subtract(rest, far, seen)
    c = torch.cat([far[:near], far[near:] + local])

    left = tree.norms(rest)
    length = torch.sqrt((c * c).sum(0) + left**2).amax()
    finite = state.finite & torch.isfinite(length)
    anorm = torch.maximum(state.anorm, torch.where(finite, length, 0.0))
    floor = 10 * torch.finfo(tree.leaves(product)[0].dtype).eps * anorm
    q, r, alive = vectors.independent(rest, floor.expand(count))
    del rest, product  # a vector may be a large part of the memory
    if count > 1 or again((torch.linalg.vector_norm(far, dim=0) > 0.05 * left).any()):
        far = tree.gram(seen, q)
        shrunk = torch.diagonal(r)
        floors = floor / torch.where(shrunk > 0, shrunk, 1.0)
        q, turn, alive = vectors.independent(vectors.subtract(q, far, seen), floors)
        c, r = c + far @ r, turn @ r

    inner = c[j:done]
    skews = [(inner - inner.mT).abs().flatten()]
    if j > 0:
        skews.append((c[:j] - t[j:done, :j].mT).abs().flatten())
    skew = torch.cat(skews).amax()
    c = torch.cat([c[:j], (inner + inner.mT) / 2, c[done:]])
    columns = torch.cat([c, r, c.new_zeros(t.shape[0] - last - count, count)])
    rows = torch.cat([c[:done].mT, c.new_zeros(count, t.shape[1] - done)], dim=1)
    t = vectors.write(t, j, rows)
    t = vectors.write(t.mT, j, columns.mT).mT
    return State(
        vectors.write(basis, last, q),
        t,
        vectors.write(state.alive, last, alive),
        anorm,
        torch.maximum(state.asym, torch.where(finite, skew, 0.0)),
        finite,
    )


def step(state: State, matmat: MatVec, j: int, width: int = 1, count: int = 1, *, again: Again = _always) -> State:
    """Products with rows j, …, j+count−1, taken in by `absorb`."""
    return absorb(state, matmat(tree.rows(state.basis, j, j + count)), j, width, again=again)


def restart(state: State, values: Tensor, s: Tensor, width: int = 1) -> State:
    """Keep p Ritz pairs, `values` (p,) with coefficients s (j, p), and the coming rows behind them; in place."""
    j, p = s.shape
    t = torch.zeros_like(state.t)
    t[:p, :p] = torch.diag(values)
    t[p : p + width, :p] = state.t[j : j + width, :j] @ s
    alive = torch.zeros_like(state.alive)
    alive[:p] = 1
    alive[p : p + width] = state.alive[j : j + width]
    return state._replace(basis=vectors.rotate(state.basis, s, width), t=t, alive=alive)


def inject(state: State, row: int, vector: Tree, *, stop: int) -> State:
    """Put `vector` (1, *leaf), made orthogonal to rows [0, stop), in place of the coming row `row` < stop.

    For vectors that A does not couple to what has been multiplied: those orthogonal to all coming rows, too.
    """
    cleared = vectors.write(state.basis, row, tree.zeros_like(vector))
    fresh = vectors.orthogonal_to(vector, tree.rows(cleared, 0, stop))
    t, alive = state.t.clone(), state.alive.clone()
    t[row] = 0.0
    alive[row] = 1
    return state._replace(basis=vectors.write(cleared, row, fresh), t=t, alive=alive)


def swap(state: State, i: int, k: int) -> State:
    """Exchange two coming rows; in place."""
    for leaf in (*map(tree.matrix, tree.leaves(state.basis)), state.t, state.alive[:, None]):
        for columns in storage.pieces(leaf):
            leaf[[i, k], columns] = leaf[[k, i], columns]
    return state


class Tridiagonal(NamedTuple):
    """m steps of Lanczos: A Vᵀ = Vᵀ T + β_m q e_mᵀ with T = tridiag(betas[:-1], alphas, betas[:-1])."""

    alphas: Tensor  # (m,) float64
    betas: Tensor  # (m,) float64; betas[-1] couples to `residual`
    basis: Tree  # (m, *leaf), orthonormal rows, zero after a breakdown
    residual: Tree  # the unit vector q, or zero after a breakdown
    alive: Tensor  # (m,) bool: False for the rows after a breakdown


def lanczos(matvec: MatVec, v0: Tree, num_steps: int) -> Tridiagonal:
    """`num_steps` Lanczos steps from `v0`, fully reorthogonalised, on any pytree.

    Pure: no host read, no branch on values; under `vmap` (over start vectors or over what `matvec` closes over),
    `grad`, `jvp` and `torch.compile`. When the Krylov space is exhausted the remaining alphas, betas and basis
    rows are zero and `alive` is False, so T keeps a zero block there, which is no information on A.

    C. Lanczos, J. Res. Nat. Bur. Stand. 45 (1950), 255–282; full reorthogonalisation: B. Parlett, The Symmetric
    Eigenvalue Problem (1998), ch. 13.
    """
    start = tree.lifted(v0)
    q, _, _ = vectors.normalised(start, torch.zeros_like(tree.norms(start)[0]))

    def matmat(block: Tree) -> Tree:
        return tree.lifted(matvec(tree.row(block, 0)))

    product = matmat(q)
    state = absorb(init(q, product, num_steps + 1), product, 0)
    for j in range(1, num_steps):
        state = step(state, matmat, j)
    diagonal = torch.diagonal(state.t)
    below = torch.diagonal(state.t, offset=-1)
    return Tridiagonal(
        diagonal[:num_steps],
        below[:num_steps],
        tree.rows(state.basis, 0, num_steps),
        tree.row(state.basis, num_steps),
        state.alive[:num_steps] > 0,
    )
