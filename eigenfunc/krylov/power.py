"""Power iteration, plain and with momentum, as a pure step over a state of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.krylov import basis as vectors
from eigenfunc.krylov.lanczos import MatVec
from eigenfunc.tree import Tree


class PowerState(NamedTuple):
    vector: Tree  # unit vector (or zero, once A maps it to zero)
    previous: Tree  # the vector before, in the same scale
    value: Tensor  # () float64: Rayleigh quotient ⟨u, A u⟩ of the unit vector u that was multiplied last
    residual: Tensor  # () float64: ‖A u − value·u‖ of that same vector
    product: Tree  # A u


def init(v0: Tree) -> PowerState:
    zero = tree.norm(v0) * 0
    unit = _scaled(v0, tree.norm(v0))
    return PowerState(unit, tree.zeros_like(unit), zero, zero, tree.zeros_like(unit))


def _scaled(x: Tree, length: Tensor) -> Tree:
    return tree.scale(torch.where(length > 0, 1 / torch.where(length > 0, length, 1.0), 0.0), x)


def step(state: PowerState, matvec: MatVec, momentum: float | Tensor = 0.0, found: Tree | None = None) -> PowerState:
    """One product: u₊ ∝ A u − β u₋, kept orthogonal to the rows of `found` (p, *leaf).

    The Rayleigh quotient and the residual belong to A itself, formed before momentum enters, so β biases neither.
    C. De Sa et al., Accelerated Stochastic Power Iteration, AISTATS 2018 (β in units of λ²; best near λ₂²/4).
    """
    product = matvec(state.vector)
    if found is not None:
        product = _without(product, found)
    value = tree.dot(state.vector, product)
    residual = tree.norm(tree.sub(product, tree.scale(value, state.vector)))
    following = tree.sub(product, tree.scale(momentum, state.previous))
    if found is not None:
        following = _without(following, found)
    length = tree.norm(following)
    return PowerState(_scaled(following, length), _scaled(state.vector, length), value, residual, product)


def _without(x: Tree, found: Tree) -> Tree:
    block = tree.lifted(x)
    return tree.row(vectors.subtract(block, tree.gram(found, block), found), 0)


def power(matvec: MatVec, v0: Tree, num_steps: int, *, momentum: float | Tensor = 0.0) -> PowerState:
    """`num_steps` steps of power iteration from `v0`; pure, as `lanczos` is."""
    state = init(v0)
    for _ in range(num_steps):
        state = step(state, matvec, momentum)
    return state
