"""Linear systems with a symmetric operator, judged by their true residual."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.certificate import Products, binary_vector, check_tolerance, whole
from eigenfunc.errors import InputError, NotConverged
from eigenfunc.krylov import conjugate, minres
from eigenfunc.tree import Tree

SolveMethod = Literal["cg", "minres"]


@dataclass(frozen=True, eq=False)
class LinearSolution:
    """An approximate solution of (A + shift I) x = b.

    x          shaped as b
    residual   ‖b − (A + shift I) x‖, from a fresh product
    converged  residual ≤ tol ‖b‖
    matvecs    products spent
    message    how it ended, with the remedy
    """

    x: Tree
    residual: float
    converged: bool
    matvecs: int
    message: str


class _Outcome(NamedTuple):
    """A run of a method for one right-hand side: x (1, n), and why it cannot go on, if so."""

    x: Tensor
    obstacle: str


def solve(
    A: Any,
    b: Tree,
    *,
    shift: float = 0.0,
    tol: float = 1e-5,
    method: SolveMethod = "minres",
    max_matvecs: int = 1000,
    throw: bool = True,
) -> LinearSolution:
    """x with (A + shift I) x = b, by MINRES or conjugate gradients, from products alone.

    A            `LinearOperator`, or what `aslinearoperator` takes
    b            shaped as `A.like`
    tol          converged means ‖b − (A + shift I) x‖ ≤ tol ‖b‖, the residual from a fresh product
    method       "minres": for any symmetric matrix, definite or not; no method of products needs fewer of them to
                 bring the residual down (C. Paige and M. Saunders, SIAM J. Numer. Anal. 12, 1975). "cg": for positive
                 definite ones, where it makes the error in the norm of A smallest (M. Hestenes and E. Stiefel, J. Res.
                 Nat. Bur. Stand. 49, 1952); a direction without positive curvature ends it
    max_matvecs  products to spend at most
    throw        raise `NotConverged`, which carries the solution, unless it converged

    When the recurrence's residual says so, or its accuracy is used up, the true residual is formed, and the rest
    solved for if it is too large. A singular system is solved where b lies in the range of A; where it does not,
    MINRES says so and x makes the residual smallest. Memory: about ten vectors.

    Raises `InputError` for arguments out of range, `TreeError` for a b of another structure, `NonFiniteError` for a
    product with NaN, `TransformError` inside a torch.func transform, and `NotConverged`.
    """
    if method not in _METHODS:
        raise InputError(f"method must be 'minres' or 'cg', got {method!r}")
    check_tolerance(tol, "the length of b")
    if not math.isfinite(shift):
        raise InputError(f"shift must be finite, got {shift!r}")
    spend = whole(max_matvecs, "max_matvecs", 2)
    products = Products(A)
    if shift:
        products = Products(products.A.shift(shift))
    right, power = binary_vector(products, b, "b")
    with products.at_work():
        if power == 0:
            return LinearSolution(tree.zeros_like(b), 0.0, True, 0, "b is zero")
        x, residual, message = _refine(products, right, float(tol), spend, _METHODS[method])
        shaped = tree.unravel(x.double() * (power / products.scale), products.A.like)
        residual, message = _as_returned(products, right, shaped, x, power / products.scale, residual, message)
    converged = residual <= tol
    length = float(tree.norm(right)) * power
    solution = LinearSolution(tree.row(shaped, 0), residual * length, converged, products.matvecs, message)
    if throw and not converged:
        raise NotConverged(f"residual {residual:.2g} ‖b‖ after {products.matvecs} products: {message}", solution)
    return solution


def _as_returned(
    products: Products, b: Tensor, shaped: Tree, x: Tensor, unit: float, residual: float, message: str
) -> tuple[float, str]:
    """The residual of what is returned, which differs from x · unit where that leaves the range of the leaves."""
    given = (tree.ravel(shaped, products.A.like).double() / unit).to(x.dtype)
    if torch.equal(given, tree.ravel(tree.unravel(x, products.A.like), products.A.like)):
        return residual, message
    left = float(tree.norm(b - products(given))) / float(tree.norm(b)) if bool(given.isfinite().all()) else math.inf
    return left, f"residual {left:.2g} ‖b‖, x being out of the range of its dtype: scale b, or use a wider dtype"


def _refine(
    products: Products, b: Tensor, tol: float, spend: int, run: Callable[..., _Outcome]
) -> tuple[Tensor, float, str]:
    """Solve, form the true residual, and solve for what is left while that helps."""
    x, rest, size, length = torch.zeros_like(b), b, 1.0, float(tree.norm(b))
    while True:
        outcome = run(products, rest / (size * length), 0.5 * tol / size, spend - 1)
        trial = x + size * length * outcome.x
        left = b - products(trial)
        before, now = size, float(tree.norm(left)) / length
        products.check_finite(math.isfinite(now))
        if now < before:
            x, rest, size = trial, left, now
        if size <= tol:
            return x, size, f"residual {size:.2g} ‖b‖"
        if outcome.obstacle:
            return x, size, outcome.obstacle
        if products.matvecs >= spend - 2:
            return x, size, f"raise max_matvecs (now {spend}), shift or tol"
        if now > 0.5 * before:
            return x, size, _stagnant(size)


def _image(products: Products, v: Tensor) -> Tensor:
    return products.first(v) if products.passes == 0 else products(v)


def _cadence(taken: int) -> int:
    """Steps to the next look at the device: rarer as the run grows longer."""
    return max(1, taken // 32)


def _cg(products: Products, b: Tensor, tol: float, stop: int) -> _Outcome:
    state = conjugate.init(b)
    done, floor = state.rr * tol**2, torch.zeros((), dtype=torch.float64, device=b.device)
    taken = 0
    while products.matvecs < stop:
        for _ in range(min(_cadence(taken), stop - products.matvecs)):
            image = _image(products, state.p)
            if taken == 0:
                floor = 10 * products.eps * tree.norm(image) / tree.norm(state.p)
            state = conjugate.step(state, image, done, floor)
            taken += 1
        rr, curvature, least = torch.stack([state.rr[0], state.curvature[0], floor]).tolist()
        products.check_finite(math.isfinite(rr))
        if curvature <= least:
            return _Outcome(state.x, _not_definite(curvature, least, products.scale))
        if rr <= float(done[0]):
            break
    return _Outcome(state.x, "")


def _minres(products: Products, b: Tensor, tol: float, stop: int) -> _Outcome:
    """Goes on until the rounding in A x is as large as the residual. Where b lies partly outside of the range, x grows
    to that without bound; before, ‖A r‖/‖r‖ has all but vanished, and x at its least is the one to keep."""
    state = minres.init(b)
    x = before = state.x
    taken, least, then = 0, math.inf, math.inf
    while products.matvecs < stop:
        for _ in range(min(_cadence(taken), stop - products.matvecs)):
            before = state.x
            state = minres.step(state, _image(products, state.v))
            taken += 1
        figures = [state.rest.abs(), state.normal, state.anorm, tree.norm(state.v), tree.norm(state.x)]
        rest, normal, anorm, alive, size = torch.stack(figures).tolist()
        products.check_finite(math.isfinite(rest))
        if rest <= tol:
            break
        if alive == 0 or normal < least:
            x, least, then = before, normal, rest
        if alive == 0 or products.eps * anorm * size >= rest:
            if least <= 10 * products.eps**0.5 * anorm and rest > 0.5 * then:
                return _Outcome(x, _unsolvable(products, b - products(x), anorm))
            break
    return _Outcome(state.x, "")


def _not_definite(curvature: float, least: float, scale: float) -> str:
    verdict = "so the matrix is not positive definite" if curvature < -least else "which is zero to within rounding"
    return (
        f"the curvature ⟨p, A p⟩/⟨p, p⟩ along a direction p of the method is {curvature * scale:.2g}, {verdict}; "
        "use method='minres', or a larger shift"
    )


def _unsolvable(products: Products, rest: Tensor, anorm: float) -> str:
    """What to say where A r all but vanishes for the residual r (1, n); nothing, if a fresh product does not."""
    size = float(tree.norm(rest))
    ratio = float(tree.norm(products(rest))) / (anorm * size) if anorm * size > 0 else 0.0
    if ratio > 100 * products.eps**0.5:
        return ""
    return (
        f"what is left of b, {size:.2g} of its length, lies where the matrix vanishes (‖A r‖ = {ratio:.1g} ‖A‖ ‖r‖): "
        "x is a least-squares solution for a matrix as close to it as that; take that part out of b, use a shift, "
        "or float64 where that is missing"
    )


def _stagnant(size: float) -> str:
    return (
        f"the residual stagnates at {size:.2g} ‖b‖, by rounding or because the matrix is singular: raise tol, or use "
        "float64 or a shift"
    )


_METHODS: dict[str, Callable[..., _Outcome]] = {"cg": _cg, "minres": _minres}
