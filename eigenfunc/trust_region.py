"""The largest value of a quadratic over a ball, between a value that is taken and a dual bound."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.certificate import Products, certify, seeded, unit_vector
from eigenfunc.krylov import basis
from eigenfunc.krylov.lanczos import lanczos
from eigenfunc.tree import Tree


class Peak(NamedTuple):
    """max ⟨g, δ⟩ + ½ ⟨δ, A δ⟩ over ‖δ‖ ≤ rho.

    low     a value that is taken at `offset`, less the rounding of its parts
    high    an upper bound, by Lagrange's dual
    offset  (n,), a displacement inside the ball, in the order of `tree.ravel`
    """

    low: float
    high: float
    offset: Tensor


def peak(A: Any, g: Tree, rho: float, *, top: float, top_vector: Tree, num_steps: int = 12, seed: int = 0) -> Peak:
    """The trust-region problem in the span of a Krylov space of g and of the top eigenvector, and a bound beyond it.

    A, g, rho   the matrix, the slope, shaped as `A.like`, and the radius
    top         an upper bound of the largest eigenvalue of A: the bound holds if this one does
    top_vector  about its eigenvector (*leaf)
    num_steps   of Lanczos from g; as many products again and three more

    For every mu ≥ 0 over the largest eigenvalue, and every δ in the ball, with r = g + A δ − mu δ, the maximum is at
    most the value at δ, plus ½ mu (rho² − ‖δ‖²), plus ‖r‖²/(2 (mu − top)): complete the square in the dual function
    ½ ⟨g, (mu − A)⁻¹ g⟩ + ½ mu rho². The Krylov space: N. Gould, S. Lucidi, M. Roma and P. Toint, Solving the
    trust-region subproblem using the Lanczos method, SIAM J. Optim. 9 (1999).
    """
    products = Products(A)
    generator, _ = seeded(seed)
    with products.at_work():
        products.calibrate(generator)
        unit, length = unit_vector(products, g, "the gradient")
        ravelled = tree.ravel(tree.lifted(top_vector), products.A.like)
        if length > 0:
            steps = min(num_steps, products.size)
            chain = lanczos(lambda v: products(v[None])[0], unit[0], steps)
            rows = torch.cat([chain.basis[chain.alive], ravelled])
        else:
            rows = ravelled
        floors = torch.full((len(rows),), 1e3 * products.eps, dtype=torch.float64, device=products.device)
        rows, _, alive = basis.independent(rows, floors)
        found = certify(products, rows[alive > 0])
        values, x = found.values * products.scale, found.vectors
        c = length * tree.exact_gram(x, unit)[:, 0].cpu()
        y = maximiser(values, c, rho)[None].to(x.device)
        offset = (y @ x.double())[0]
        image = (y @ found.images.double())[0] * products.scale
        excess = float(torch.linalg.vector_norm(offset)) / rho
        if excess > 1:
            offset, image = offset / excess, image / excess
        slope = length * unit[0].double()
        errors = (
            2 * products.rounding(float(tree.norms(found.images).max())) * products.scale * rho,
            2 * products.eps * length,
        )
        value = float(slope @ offset) + float(offset @ image) / 2
        slack = rho * sum(errors)
        high = value + slack + _gap(slope + image, offset, sum(errors), top, rho)
    return Peak(value - slack, high, offset)


def _gap(pull: Tensor, offset: Tensor, error: float, top: float, rho: float) -> float:
    """The least of the dual bounds over many multipliers, above the value at `offset`; `pull` is g + A δ."""
    square = float(offset @ offset)
    edge = max(top, 0.0)
    begin = max(float(pull @ offset) / square, edge) if square > 0 else edge
    rest = pull - begin * offset
    unit = max(float(torch.linalg.vector_norm(pull)) / rho, abs(top), 1e-300)
    more = unit * torch.logspace(-15, 4, 400, dtype=torch.float64)
    mu = torch.cat([edge + more, begin + more])
    beyond = mu - begin
    squares = float(rest @ rest) - 2 * beyond * float(rest @ offset) + beyond**2 * square
    lengths = torch.sqrt(squares.clamp_min(0.0)) + error
    gaps = mu * max(rho**2 - square, 0.0) / 2 + lengths**2 / (2 * (mu - top))
    return float(gaps.min())


def maximiser(values: Tensor, c: Tensor, rho: float) -> Tensor:
    """y (k,) with the largest ⟨c, y⟩ + ½ Σ values_i y_i² over ‖y‖ ≤ rho, for values and c (k,) in float64.

    By bisection of the secular equation ‖(mu − values)⁻¹ c‖ = rho (J. Moré and D. Sorensen, SIAM J. Sci. Stat.
    Comput. 4, 1983); in their hard case the eigenvector of the largest value fills up the length.
    """
    unit = max(float(values.abs().max()) * rho, float(c.abs().max()))
    if unit == 0:
        return torch.zeros_like(c)
    values, c = values / unit, torch.where(c.abs() > 1e-50 * unit, c / unit, 0.0)
    top = max(float(values.max()), 0.0)
    gaps = top - values

    def at(extra: float) -> Tensor:
        divisor = gaps + extra
        return torch.where(c == 0, 0.0, c / torch.where(divisor > 0, divisor, 1e-300))

    def length(extra: float) -> float:
        return float(torch.linalg.vector_norm(at(extra)))

    low, high = 0.0, float(torch.linalg.vector_norm(c)) / rho
    if length(0.0) > rho:
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if length(middle) > rho else (low, middle)
        return at(high)
    y = at(0.0)
    if top > 0:
        i = int(torch.argmax(values))
        free = math.sqrt(max(rho**2 - float(y @ y) + float(y[i]) ** 2, 0.0))
        y[i] = math.copysign(free, float(c[i]))
    return y
