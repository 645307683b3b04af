"""Functions of a symmetric operator, applied to a vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.certificate import Products, check_tolerance, unit_vector, whole
from eigenfunc.errors import InputError, NotConverged
from eigenfunc.krylov import lanczos as kernel
from eigenfunc.tree import Tree

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FunctionProduct:
    """f(A) v, approximately.

    value      shaped as v
    error      estimate of ‖value − f(A) v‖: the change since half of the steps, and what the rounding of the products
               does to it; as a rule far above the error, but no bound
    converged  error ≤ tol ‖value‖
    matvecs    products spent
    """

    value: Tree
    error: float
    converged: bool
    matvecs: int


def funm_multiply(
    A: Any, f: Function, v: Tree, *, tol: float = 1e-6, num_steps: int = 200, throw: bool = True
) -> FunctionProduct:
    """f(A) v = Σ f(λ_i) u_i ⟨u_i, v⟩ by Lanczos with full reorthogonalisation: ‖v‖ Vᵀ f(T) e₁.

    A          `LinearOperator`, or what `aslinearoperator` takes
    f          on a float64 tensor of numbers, torch.exp or `lambda x: x.rsqrt()`, say; it has to be defined wherever
               A has eigenvalues, and is called at Ritz values, which lie between the smallest and the largest
    v          shaped as `A.like`
    tol        stop when the estimated error is at most tol ‖f(A) v‖
    num_steps  products to spend at most; memory for as many vectors
    throw      raise `NotConverged`, which carries the result, unless it converged

    A Krylov space that is exhausted ends the run: then only rounding is left. Ritz values within rounding of zero
    count as zero where f is undefined at them, such as √x for a semidefinite A.

    Raises `InputError` for arguments out of range and for an f that is NaN or infinite at a Ritz value, naming it;
    `TreeError`, `NonFiniteError`, `TransformError` as `solve` does; `NotConverged`.

    V. Druskin and L. Knizhnerman, USSR Comput. Math. Math. Phys. 29 (1989); Y. Saad, SIAM J. Numer. Anal. 29 (1992).
    """
    check_tolerance(tol, "the length of f(A) v")
    products = Products(A)
    most = min(whole(num_steps, "num_steps", 1), products.size)
    start, length = unit_vector(products, v, "v")
    with products.at_work():
        if length == 0:
            return FunctionProduct(tree.zeros_like(v), 0.0, True, 0)
        image = products.first(start)
        state = kernel.absorb(kernel.init(start, image, most + 1), image, 0)
        looks: list[Tensor] = []
        for j in range(1, most + 1):
            if j % max(1, j // 32) == 0 or j == most:
                coefficients, rounding, exhausted = _look(state, f, j, products)
                exhausted = exhausted or j == products.size
                change = 0.0 if exhausted else _change(coefficients, looks)
                looks.append(coefficients)
                error, size = math.hypot(change, rounding), float(torch.linalg.vector_norm(coefficients))
                if exhausted or error <= tol * size:
                    break
            if j < most:
                state = kernel.step(state, products, j)
        flat = tree.combine(coefficients[None].to(start.device), tree.rows(state.basis, 0, len(coefficients)))
    value = tree.row(tree.unravel(flat * length, products.A.like), 0)
    error = error if bool(tree.all_finite(value)) else math.inf
    result = FunctionProduct(value, error * length, error <= tol * size, products.matvecs)
    if throw and not result.converged:
        raise NotConverged(
            f"after {j} steps f(A) v, of length {size * length:.2g}, still changes by {change * length:.2g}, and "
            f"rounding leaves {rounding * length:.2g} open: raise num_steps (now {num_steps}) or tol, or use float64"
            + (", for the result is beyond the dtype of v" if math.isinf(error) else ""),
            result,
        )
    return result


def _look(state: kernel.State, f: Function, j: int, products: Products) -> tuple[Tensor, float, bool]:
    """f(T) e₁ (j,) of j steps, the error that rounding makes of it, and whether the Krylov space is exhausted."""
    figures = torch.cat([torch.stack([state.anorm, state.finite.double(), state.alive[j]]), state.t[:j, :j].flatten()])
    host = figures.cpu()
    anorm, finite, alive = host[:3].tolist()
    products.check_finite(bool(finite))
    theta, s = torch.linalg.eigh(host[3:].reshape(j, j))
    noise = max(8 * products.eps, 4 * tree.coarsest_eps(products.A.like)) * anorm + products.declared
    values = evaluated(f, theta, noise, products.scale)
    weights = s[0]
    moved = [_defined(f, (theta + side * noise) * products.scale) - values for side in (-1, 1)]
    sensitivity = torch.stack([torch.where(torch.isfinite(m), m, 0.0).abs() for m in moved]).amax(0)
    largest = float((values.abs() * weights.abs()).max())
    rounding = float(torch.linalg.vector_norm(sensitivity * weights)) + 8 * products.eps * largest
    coefficients = s @ (values * weights)
    length = float(torch.linalg.vector_norm(coefficients))
    narrowed = tree.coarsest_eps(products.A.like) * length  # to the leaves' dtype
    return coefficients, rounding + narrowed, alive == 0


def _defined(f: Function, x: Tensor) -> Tensor:
    out = f(x)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        raise InputError("f must map a tensor of numbers to one of the same shape, entry by entry")
    return out.double()


def evaluated(f: Function, theta: Tensor, noise: float, scale: float) -> Tensor:
    """f at the Ritz values theta · scale; `InputError` names one at which it is undefined. Those that rounding, of
    size `noise`, cannot tell from zero are taken as zero where f is undefined at them."""
    values = _defined(f, theta * scale)
    bad = ~torch.isfinite(values)
    if bool((bad & (theta.abs() <= noise)).any()):
        values = torch.where(bad & (theta.abs() <= noise), _defined(f, torch.zeros_like(theta)), values)
        bad = ~torch.isfinite(values)
    if bool(bad.any()):
        worst = float(theta[bad].min()) * scale
        raise InputError(
            f"f is {float(values[bad][0])} at the Ritz value {worst:.6g}, which lies between the smallest and the "
            "largest eigenvalue of A: choose an f that is defined there, or shift A (A.shift)"
        )
    return values


def _change(coefficients: Tensor, looks: list[Tensor]) -> float:
    """The distance to the last result of at most half of the steps, and three steps fewer at least."""
    j = len(coefficients)
    before = [look for look in looks if len(look) <= min(j // 2, j - 3)]
    change = coefficients.clone()
    if before:
        change[: len(before[-1])] -= before[-1]
    return float(torch.linalg.vector_norm(change))
