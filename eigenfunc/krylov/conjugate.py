"""Conjugate gradients as a pure step, for a stack of systems with right-hand sides of their own.

M. Hestenes and E. Stiefel, J. Res. Nat. Bur. Stand. 49 (1952).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.krylov.span import weighted
from eigenfunc.tree import Tree


class State(NamedTuple):
    x: Tree  # (b, *leaf)
    r: Tree  # (b, *leaf): right-hand side − A x, by the recurrence
    p: Tree  # (b, *leaf): the next directions to multiply
    rr: Tensor  # (b,) float64: ⟨r, r⟩, zero once a row is frozen
    curvature: Tensor  # (b,) float64: the smallest ⟨p, A p⟩ / ⟨p, p⟩ met before a row was frozen


def init(right: Tree) -> State:
    """From x = 0, for right-hand sides (b, *leaf)."""
    rr = tree.dots(right, right)
    return State(tree.zeros_like(right), right, right, rr, torch.full_like(rr, torch.inf))


def step(state: State, image: Tree, done: Tensor, floor: Tensor) -> State:
    """Take in the products `image` of A with `state.p`. A row is frozen where ⟨r, r⟩ ≤ done (b,), or where the
    curvature along its direction is at most `floor`, for then A is not positive definite."""
    x, r, p, rr, curvature = state
    pap, pp = tree.dots(p, image), tree.dots(p, p)
    open_ = rr > done
    live = open_ & (pap > floor * pp)
    alpha = torch.where(live, rr / torch.where(live, pap, 1.0), 0.0)
    x = tree.add(x, weighted(alpha, p))
    r = tree.sub(r, weighted(alpha, image))
    new = torch.where(live, tree.dots(r, r), rr)
    beta = torch.where(live, new / torch.where(live, rr, 1.0), 0.0)
    quotient = torch.where(open_, pap / torch.where(open_, pp, 1.0), torch.inf)
    return State(x, r, tree.add(r, weighted(beta, p)), torch.where(live, new, 0.0), torch.minimum(curvature, quotient))
