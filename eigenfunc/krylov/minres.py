"""MINRES as a pure step: the least residual over the Krylov space of a symmetric matrix, definite or not.

C. Paige and M. Saunders, SIAM J. Numer. Anal. 12 (1975); the residual of the normal equations, by which singular
systems are told: S.-C. Choi, C. Paige and M. Saunders, SIAM J. Sci. Comput. 33 (2011).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.krylov.basis import normalised
from eigenfunc.tree import Tree


class State(NamedTuple):
    x: Tree  # (1, *leaf)
    v: Tree  # (1, *leaf): the next Lanczos vector, zero once the Krylov space is exhausted
    before: Tree  # (1, *leaf): the one before
    w: Tree  # (1, *leaf): the last direction of x, and the one before
    w_before: Tree
    beta: Tensor  # () float64: couples v to the one before
    turn: Tensor  # (2,) float64: cosine and sine of the last rotation, and of the one before
    turn_before: Tensor
    rest: Tensor  # () float64: ± ‖b − A x‖, by the recurrence
    normal: Tensor  # () float64: ‖A r‖ / ‖r‖ for the residual r one step earlier
    anorm: Tensor  # () float64: largest ‖A v‖ seen


def init(right: Tree) -> State:
    """From x = 0, for a right-hand side (1, *leaf)."""
    zero = tree.zeros_like(right)
    v, length, _ = normalised(right, tree.norms(right)[0] * 0)
    none = length[0, 0] * 0
    turn = torch.stack([none + 1, none])
    return State(zero, v, zero, zero, zero, none, turn, turn, length[0, 0], none + torch.inf, none)


def step(state: State, image: Tree) -> State:
    """Take in the product `image` of A with `state.v`; leaves x as it is where the space is exhausted."""
    x, v, before, w, w_before, beta, turn, turn_before, rest, _, anorm = state
    alpha = tree.dots(v, image)[0]
    u = tree.sub(tree.sub(image, tree.scale(alpha, v)), tree.scale(beta, before))
    anorm = torch.maximum(anorm, tree.norms(image)[0])
    floor = 10 * torch.finfo(tree.leaves(image)[0].dtype).eps * anorm
    following, length, _ = normalised(u, floor)
    coupling = length[0, 0]
    outer, upper = turn_before[1] * beta, turn_before[0] * beta
    above = turn[0] * upper + turn[1] * alpha
    inner = turn[0] * alpha - turn[1] * upper
    size = torch.hypot(inner, coupling)
    live = size > floor
    inverse = torch.where(live, 1 / torch.where(live, size, 1.0), 0.0)
    direction = tree.sub(tree.sub(v, tree.scale(above, w)), tree.scale(outer, w_before))
    direction = tree.scale(inverse, direction)
    c, s = inner * inverse, torch.where(live, coupling * inverse, 1.0)
    return State(
        tree.add(x, tree.scale(c * rest, direction)),
        following,
        v,
        direction,
        w,
        coupling,
        torch.stack([c, s]),
        turn,
        -s * rest,
        torch.hypot(inner, turn[0] * coupling),
        anorm,
    )
