"""Eigenpairs of a Hessian as functions of what it is the Hessian at: derivatives without iterations.

    dλ_i = ⟨v_i, dH v_i⟩,    dv_i = (λ_i − H)⁺ dH v_i

J. Magnus, Econometric Theory 1 (1985), 179–191. The reduced resolvent (λ_i − H)⁺ is a sum over the other pairs that are
known and, on what is orthogonal to all of them, a system that conjugate gradients solve. Each of the three functions
here has its derivatives in terms of these same functions, so that they can be differentiated again. All tensors are
passed explicitly, because a custom function has no derivative by what it closes over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenfunc import scope, tree
from eigenfunc.curvature.mends import mended
from eigenfunc.curvature.products import Loss, hvp
from eigenfunc.curvature.thrice import Thrice
from eigenfunc.data import fresh
from eigenfunc.krylov import basis as vectors, conjugate
from eigenfunc.krylov.span import weighted
from eigenfunc.tree import Tree

Leaves = Sequence[Tensor]
Stack = list[Tensor]  # a stack of vectors, as the list of its leaves


def values_at(problem: Problem, values: Tensor, rows: Stack, theta: Leaves) -> Tensor:
    """The eigenvalues (k,) as a function of θ, for the pairs (k,), (k, *leaf) at θ.

    The compiler takes no custom function that has a forward derivative. It is given ⟨v, H(θ) v⟩ with v held fixed,
    whose first derivative is right; the second, which is not, is made NaN by the power 3/2 of zero.
    """
    if torch.compiler.is_compiling():
        form = tree.dots(rows, problem.products(theta, rows))
        change = form - form.detach()
        return values + change + torch.pow(change, 1.5)
    return _call(_Values(problem), values, *rows, *theta)[0]


def vectors_at(problem: Problem, values: Tensor, rows: Stack, theta: Leaves) -> Stack:
    """The eigenvectors (k, *leaf) as a function of θ; a constant one to the compiler."""
    return rows if torch.compiler.is_compiling() else _call(_Vectors(problem), values, *rows, *theta)


@dataclass(frozen=True, eq=False)
class Problem:
    """The loss as a function of one list of tensors: the leaves of the parameters, then all tensors of the batch."""

    loss: Loss
    rebuild: Callable[[Sequence[Any]], Tree]
    place: Callable[[Leaves], Any]
    count: int  # leaves of the parameters
    trips: int

    def products(self, theta: Leaves, rows: Stack) -> Stack:
        """H(θ) times each row of a stack (p, *leaf)."""

        def product(v: Stack) -> Stack:
            with Thrice():
                image: Stack = hvp(self._value, list(theta[: self.count]), list(theta[self.count :]), v)
            return image

        return _rowwise(product, rows)

    def slopes(self, theta: Leaves, a: Stack, b: Stack, asked: Sequence[bool]) -> list[Tensor | None]:
        """Derivative of Σ_i ⟨a_i, H(θ) b_i⟩ by each tensor of θ that is asked for, None for the others and integers.

        Three times in reverse, since torch does that in less time than it pulls back a product made forward over
        reverse."""
        moving = [i for i, x in enumerate(theta) if x.is_floating_point() and asked[i]]

        def image(floats: Stack) -> Stack:
            at = _with(theta, moving, floats)
            leaves, batch = at[: self.count], at[self.count :]

            def value(leaves: Stack) -> Tensor:
                return self._value(leaves, batch)

            pull = torch.func.vjp(torch.func.grad(value), leaves)[1]

            def product(v: Stack) -> Stack:
                pulled: Stack = pull(v)[0]
                return pulled

            return _rowwise(product, b)

        out: list[Tensor | None] = [None] * len(theta)
        if not moving:
            return out
        with scope.untouched(theta[0].device), mended(), Thrice():
            found: Stack = torch.func.vjp(image, [theta[i] for i in moving])[1](a)[0]
        for i, slope in zip(moving, found, strict=True):
            out[i] = slope
        return out

    def change(self, theta: Leaves, tangents: Sequence[Tensor | None], rows: Stack) -> Stack:
        """dH rows, for the change of H along the tangents of θ."""
        moving = [i for i, t in enumerate(tangents) if t is not None and theta[i].is_floating_point()]
        if not moving:
            return [torch.zeros_like(leaf) for leaf in rows]
        along = [t for i, t in enumerate(tangents) if i in moving and t is not None]

        def image(floats: Stack) -> Stack:
            return self.products(_with(theta, moving, floats), rows)

        with scope.untouched(theta[0].device), mended():
            changed: Stack = torch.func.jvp(image, ([theta[i] for i in moving],), (along,))[1]
        return changed

    def _value(self, leaves: Stack, batch: Stack) -> Tensor:
        return self.loss(self.rebuild(leaves), fresh(self.place(batch)))


def _rowwise(product: Callable[[Stack], Stack], rows: Stack) -> Stack:
    """`product` of each row of a stack."""
    if rows[0].shape[0] == 1:
        return [leaf[None] for leaf in product([leaf[0] for leaf in rows])]
    return list(torch.func.vmap(product, randomness="same")(rows))


def _with(theta: Leaves, places: Sequence[int], tensors: Leaves) -> Stack:
    out = list(theta)
    for i, x in zip(places, tensors, strict=True):
        out[i] = x
    return out


def over(loss: Loss, params: Tree, batch: Any, trips: int) -> tuple[Problem, list[Tensor]]:
    """The problem, and the point θ at which its Hessian is meant."""
    leaves, rebuild = tree.flatten(params)
    parts, refill = tree.flatten(batch)
    places = [i for i, part in enumerate(parts) if isinstance(part, Tensor)]
    constants = [None if isinstance(part, Tensor) else part for part in parts]

    def place(tensors: Leaves) -> Any:
        return refill(_with(constants, places, tensors))  # type: ignore[arg-type]

    theta: list[Tensor] = scope.usable([*leaves, *(parts[i] for i in places)])
    return Problem(loss, rebuild, place, len(leaves), trips), theta


class _Rule(ABC):
    """A function of a list of tensors whose derivatives are given, in terms of functions that have theirs."""

    has_right = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def split(self, inputs: Leaves) -> tuple[Tensor, Stack, Stack, Stack]:
        """Values (k,), vectors (k, *leaf), θ, and right-hand sides (k, *leaf) where there are any."""
        n = self.problem.count
        rest = list(inputs[1 + n :])
        cut = len(rest) - n * self.has_right
        return inputs[0], list(inputs[1 : 1 + n]), rest[:cut], rest[cut:]

    def pairs(self, inputs: Leaves) -> tuple[Tensor, Stack, Stack]:
        """Values, vectors and θ, the first two as functions of the last."""
        values, rows, theta, _ = self.split(inputs)
        return values_at(self.problem, values, rows, theta), vectors_at(self.problem, values, rows, theta), theta

    def complement(self, values: Tensor, rows: Stack, theta: Stack, right: Stack) -> Stack:
        return _call(_Complement(self.problem), values, *rows, *theta, *right)

    def resolvent(self, values: Tensor, rows: Stack, theta: Stack, right: Stack) -> Stack:
        """(λ_i − H)⁺ right_i; pairs of one cluster are left out."""
        gaps = values[:, None] - values[None, :]
        apart = gaps.abs() > _resolution(values, rows)
        weights = torch.where(apart, 1 / torch.where(apart, gaps, 1.0), 0.0)
        inside = tree.combine(weights * tree.gram(right, rows), rows)
        return list(tree.add(self.complement(values, rows, theta, right), inside))

    @abstractmethod
    def value(self, inputs: Leaves) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def pull(self, inputs: Leaves, slopes: Leaves, asked: Sequence[bool]) -> list[Tensor | None]: ...

    @abstractmethod
    def push(self, inputs: Leaves, tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]: ...


class _Implicit(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rule: _Rule, *inputs: Tensor) -> tuple[Tensor, ...]:
        return rule.value(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.rule = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        of_theta = ctx.needs_input_grad[2 + ctx.rule.problem.count :]
        return None, *ctx.rule.pull(ctx.saved_tensors, slopes, of_theta)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = ctx.rule.push(ctx.saved_tensors, tangents)
        return out


def _call(rule: _Rule, *inputs: Tensor) -> Stack:
    apply: Any = _Implicit.apply
    return list(apply(rule, *inputs))


class _Values(_Rule):
    """(λ, V, θ) -> λ, as a function of θ."""

    def value(self, inputs: Leaves) -> tuple[Tensor, ...]:
        return (inputs[0].clone(),)

    def pull(self, inputs: Leaves, slopes: Leaves, asked: Sequence[bool]) -> list[Tensor | None]:
        _, rows, theta = self.pairs(inputs)
        return [None] * (1 + len(rows)) + self.problem.slopes(theta, weighted(slopes[0], rows), rows, asked)

    def push(self, inputs: Leaves, tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        _, rows, theta = self.pairs(inputs)
        return (tree.dots(rows, self.problem.change(theta, tangents[1 + len(rows) :], rows)),)


class _Vectors(_Rule):
    """(λ, V, θ) -> V, as a function of θ."""

    def value(self, inputs: Leaves) -> tuple[Tensor, ...]:
        return tuple(leaf.clone() for leaf in self.split(inputs)[1])

    def pull(self, inputs: Leaves, slopes: Leaves, asked: Sequence[bool]) -> list[Tensor | None]:
        values, rows, theta = self.pairs(inputs)
        turned = self.resolvent(values, rows, theta, list(slopes))
        return [None] * (1 + len(rows)) + self.problem.slopes(theta, turned, rows, asked)

    def push(self, inputs: Leaves, tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        values, rows, theta = self.pairs(inputs)
        change = self.problem.change(theta, tangents[1 + len(rows) :], rows)
        return tuple(self.resolvent(values, rows, theta, change))


class _Complement(_Rule):
    """(λ, V, θ, w) -> x with x_i ⟂ V and P (λ_i − H) x_i = P w_i, P = 1 − Vᵀ V.

    Its derivative is that of the bordered system [[λ_i − H, Vᵀ], [V, 0]] [x; μ] = [w; 0], whose μ is V w.
    """

    has_right = True

    def value(self, inputs: Leaves) -> tuple[Tensor, ...]:
        values, rows, theta, right = self.split(inputs)
        return tuple(_conjugate_gradients(self.problem, values, rows, theta, right))

    def pull(self, inputs: Leaves, slopes: Leaves, asked: Sequence[bool]) -> list[Tensor | None]:
        values, rows, theta, right = self.split(inputs)
        gx = list(slopes)
        x = self.complement(values, rows, theta, right)
        p = self.complement(values, rows, theta, gx)
        mu, nu = tree.gram(right, rows), tree.gram(gx, rows)
        turned = tree.add(tree.combine(mu.mT, p), tree.combine(nu.mT, x))
        return [
            -tree.dots(p, x),
            *tree.scale(-1.0, turned),
            *self.problem.slopes(theta, p, x, asked),
            *p,
        ]

    def push(self, inputs: Leaves, tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        values, rows, theta, right = self.split(inputs)
        given = [torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)]
        dvalues, drows, dtheta, dright = self.split(given)
        x = self.complement(values, rows, theta, right)
        mu = tree.gram(right, rows)
        change = tree.sub(self.problem.change(theta, dtheta, x), weighted(dvalues, x))
        change = tree.sub(tree.add(dright, change), tree.combine(mu, drows))
        dx = self.complement(values, rows, theta, change)
        return tuple(tree.sub(dx, tree.combine(tree.gram(x, drows), rows)))


def _conjugate_gradients(problem: Problem, values: Tensor, rows: Stack, theta: Stack, right: Stack) -> Stack:
    """x_i ⟂ V with P (λ_i − H) x_i = P right_i, each row frozen once it is solved. For the largest λ the matrix is
    positive definite: where it proves not to be, V cuts a cluster or misses a larger value, and the row is NaN. M.
    Hestenes and E. Stiefel, J. Res. Nat. Bur. Stand. 49 (1952)."""

    def projected(y: Stack) -> Stack:
        return vectors.subtract(y, tree.gram(rows, y), rows)  # type: ignore[no-any-return]

    state = conjugate.init(projected(projected(right)))
    squares, floor = tree.dots(right, right), _resolution(values, rows)
    eps = torch.finfo(state.r[0].dtype).eps
    valid = torch.ones_like(squares)
    for _ in range(problem.trips):
        image: Stack = tree.sub(weighted(values, state.p), problem.products(theta, state.p))
        unsolved = state.rr > eps * squares
        state = conjugate.step(state, projected(image), eps**2 * squares, floor)
        valid = torch.where(unsolved & (state.curvature <= floor), torch.nan, valid)
    x: Stack = weighted(valid, projected(state.x))
    return x


def _resolution(values: Tensor, rows: Stack) -> Tensor:
    """Below this distance, eigenvalues cannot be told apart in the dtype of the vectors."""
    eps: float = tree.coarsest_eps(rows) ** 0.75
    return eps * values.detach().abs().amax()
