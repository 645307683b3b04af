"""Lanczos with full reorthogonalisation and thick restart, as pure functions over a state of tensors.

The state holds the basis V, whose first j rows are orthonormal and multiplied, and behind them the coming rows: the
residual directions of what has been multiplied, one as a rule, more in a band (A. Ruhe, Math. Comp. 33, 1979). The
projected matrix T = V A Vᵀ is measured and not assumed. Its rows below the finished part hold what symmetry predicts
for the coming columns; the difference to what is then measured is a free test of symmetry.

The functions know neither tolerance nor the number of wanted pairs: a driver does, and `lanczos` runs a fixed number
of steps. C. Lanczos, J. Res. Nat. Bur. Stand. 45 (1950); thick restart: K. Wu and H. Simon, SIAM J. Matrix Anal.
Appl. 22 (2000).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
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


def init(q: Tree, product: Tree, num_rows: int) -> State:
    """State for a unit vector q (1, *leaf); `product`, its image, only lends dtype and batching."""
    like = tree.add(q, product)
    basis = vectors.write(vectors.allocate(like, num_rows), 0, q)
    g = tree.gram(like, like)
    zero = g.new_zeros(())
    alive = vectors.write(g.new_zeros(num_rows), 0, g.new_ones(1))
    return State(basis, g.new_zeros(num_rows, num_rows), alive, zero, zero, zero == 0)


def absorb(state: State, product: Tree, j: int, width: int = 1, *, again: Again = _always) -> State:
    """Take in the product (1, *leaf) of A with row j, the first of `width` coming rows; the next one is row j+width.

    The terms of the three-term recurrence go first, then one classical Gram–Schmidt pass over the whole basis,
    which sees only what they left over; `again` says whether its coefficients were so large (over 5% of what
    remains) that a second pass is due. Without it the second pass is always made, and nothing is read.
    """
    basis, t = state.basis, state.t
    last = j + width
    near = max(j - 1, 0)
    local = tree.gram(tree.rows(basis, near, last), product)
    rest = vectors.subtract(product, local, tree.rows(basis, near, last))
    seen = tree.rows(basis, 0, last)
    far = tree.gram(seen, rest)
    rest = vectors.subtract(rest, far, seen)
    c = torch.cat([far[:near], far[near:] + local])
    if again(torch.linalg.vector_norm(far) > 0.05 * tree.norms(rest)[0]):
        far = tree.gram(seen, rest)
        rest = vectors.subtract(rest, far, seen)
        c = c + far

    finite = state.finite & tree.all_finite(product)
    length = torch.sqrt((c * c).sum() + tree.norms(rest)[0] ** 2)
    anorm = torch.maximum(state.anorm, torch.where(finite, length, 0.0))
    eps = torch.finfo(tree.leaves(product)[0].dtype).eps
    q, r, alive = vectors.normalised(rest, 10 * eps * anorm)
    predicted = t[j, :j]
    skew = torch.where(torch.isnan(predicted), 0.0, (c[:j, 0] - predicted).abs())
    skew = torch.cat([skew, skew.new_zeros(1)]).amax()

    column = torch.cat([c, r, c.new_zeros(t.shape[0] - last - 1, 1)])
    row = torch.cat([c[: j + 1].mT, c.new_zeros(1, t.shape[1] - j - 1)], dim=1)
    t = vectors.write(t, j, row)
    t = vectors.write(t.mT, j, column.mT).mT
    return State(
        vectors.write(basis, last, q),
        t,
        vectors.write(state.alive, last, alive),
        anorm,
        torch.maximum(state.asym, torch.where(finite, skew, 0.0)),
        finite,
    )


def step(state: State, matmat: MatVec, j: int, width: int = 1, *, again: Again = _always) -> State:
    """One product, with row j, taken in by `absorb`."""
    return absorb(state, matmat(tree.rows(state.basis, j, j + 1)), j, width, again=again)


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


def inject(state: State, row: int, vector: Tree, *, stop: int, known: bool = True) -> State:
    """Put `vector` (1, *leaf), made orthogonal to rows [0, stop), in place of basis row `row` < stop.

    With `known` the coupling of the new row to the rows before it is predicted to be zero, as after a breakdown;
    otherwise nothing is predicted and the next step measures it.
    """
    cleared = vectors.write(state.basis, row, tree.zeros_like(vector))
    fresh = vectors.orthogonal_to(vector, tree.rows(cleared, 0, stop))
    t = state.t.clone()
    t[row] = 0.0 if known else torch.nan
    alive = state.alive.clone()
    alive[row] = 1
    return state._replace(basis=vectors.write(cleared, row, fresh), t=t, alive=alive)


def mix(state: State, start: int, row: int, weights: Tensor) -> State:
    """Turn the coming rows from `start` on, by a reflection, so that `row` becomes their sum with the unit `weights`
    (w,); in place."""
    stop = start + weights.shape[0]
    u = weights.clone()
    u[row - start] -= 1
    length = (u * u).sum()
    turn = torch.eye(stop - start, dtype=u.dtype, device=u.device)
    turn = turn - torch.where(length > 0, 2 / torch.where(length > 0, length, 1.0), 0.0) * u[:, None] * u[None, :]
    rows = tree.combine(turn, tree.rows(state.basis, start, stop))
    t = state.t.clone()
    t[start:stop, :start] = turn.to(t) @ t[start:stop, :start]
    return state._replace(basis=vectors.write(state.basis, start, rows), t=t)


def swap(state: State, i: int, k: int) -> State:
    """Exchange two coming rows; in place."""
    for leaf in (*tree.leaves(state.basis), state.t, state.alive):
        leaf[[i, k]] = leaf[[k, i]]
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
