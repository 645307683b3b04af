"""Traces of functions of A: Lanczos quadrature for random probes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eigenfunc import scope, tree
from eigenfunc.certificate import Products, non_finite, seeded, whole
from eigenfunc.errors import InputError, NonFiniteError
from eigenfunc.krylov import lanczos as kernel
from eigenfunc.krylov.quadrature import Quadrature, gauss
from eigenfunc.stochastic.estimate import Estimate, concluded, spread
from eigenfunc.stochastic.probes import blocks, budget, grain, multiplied, sphere, units

Function = Callable[[Tensor], Tensor]
Check = Callable[[float, float], None]  # of the smallest Ritz value and its rounding error

_LEAST = 4  # steps of which half are worth comparing with


def logdet(
    A: Any, *, delta: float = 0.0, num_probes: int = 32, num_steps: int = 32, seed: int | None = None
) -> Estimate[float]:
    """log det(A + delta I) = tr log(A + delta I), by num_probes · num_steps products with random vectors.

    A           `LinearOperator`, or what `aslinearoperator` takes
    delta       in units of A; A + delta I has to be positive definite
    num_probes  vectors on the sphere, whose samples make the standard error; from n on there are n, and nothing is
                random
    num_steps   of Lanczos with full reorthogonalisation for each probe; the change since half of them, no smaller
                as a rule than the error of the quadrature, is part of the standard error
    seed        of the probes; default: a fresh one, told in the estimate

    Memory: num_steps vectors for each probe of a block, 32 at most and about 2²⁶ entries.

    Raises `InputError` where a Ritz value of A + delta I is not positive, which shows that the matrix is not
    positive definite (that none does proves nothing); else as `trace` does.

    S. Ubaru, J. Chen and Y. Saad, SIAM J. Matrix Anal. Appl. 38 (2017).
    """
    delta = _number(delta, "delta")

    def check(smallest: float, noise: float) -> None:
        if smallest + delta <= noise:
            raise InputError(
                f"A + delta I has the Ritz value {smallest + delta:.6g} ≤ 0 within rounding, so it is not positive "
                f"definite: delta has to be over {-smallest:.6g}, which is the smallest value of A seen, negated"
            )

    return _trace_of(A, lambda x: torch.log(x + delta), check, num_probes, num_steps, seed)


def effective_dimension(
    A: Any, *, delta: float, num_probes: int = 32, num_steps: int = 32, seed: int | None = None
) -> Estimate[float]:
    """tr A (A + delta I)⁻¹ = Σ λ_i/(λ_i + delta) for a positive semidefinite A, by num_probes · num_steps products.

    The number of directions whose curvature exceeds delta, softly counted (D. MacKay, Neural Comput. 4, 1992).
    Arguments, memory and method as for `logdet`; delta > 0.

    Raises `InputError` where A has a Ritz value below zero by more than rounding, so that some terms would be
    negative or unbounded: take a GGN or Fisher matrix; else as `trace` does.
    """
    delta = _number(delta, "delta")
    if delta <= 0:
        raise InputError(f"delta must be positive, got {delta!r}: without it the effective dimension is the rank")

    def check(smallest: float, noise: float) -> None:
        if smallest < -noise:
            raise InputError(
                f"A has the Ritz value {smallest:.6g} < 0, so it is not positive semidefinite and has no effective "
                "dimension: use a GGN or Fisher matrix, or add at least that much to A (A.shift)"
            )

    return _trace_of(A, lambda x: x.clamp_min(0.0) / (x.clamp_min(0.0) + delta), check, num_probes, num_steps, seed)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{what} must be a finite number, got {value!r}")
    return float(value)


def _trace_of(A: Any, f: Function, check: Check, num_probes: int, num_steps: int, seed: int | None) -> Estimate[float]:
    products = Products(A)
    n = products.size
    count = budget(num_probes, 2, n, "one sample has no standard error", "num_probes")
    steps = min(whole(num_steps, "num_steps", _LEAST), n)
    generator, seed = seeded(seed)
    samples, earlier = [], []
    with scope.full_precision(products.device), torch.no_grad():
        for start, size in blocks(count, products, room=steps + 1):
            drawn = units(start, size, products) if count == n else sphere(size, products, generator) / math.sqrt(n)
            state = _chains(products, drawn, steps)
            noise = grain(products) * float(state.anorm.max()) + products.declared
            full, half = _rule(state, steps), _rule(state, max(steps // 2, 1))
            check(float(full.nodes.min()) * products.scale, noise * products.scale)
            samples.append(_integral(f, full, products.scale))
            earlier.append(_integral(f, half, products.scale))
    values, shorter = torch.cat(samples), torch.cat(earlier)
    if not bool(torch.isfinite(shorter).all()):
        shorter = torch.zeros_like(values)
    quadrature = 0.0 if steps == n else float((values - shorter).mean())
    variance, dof = (0.0, math.inf) if count == n else (float(spread(n * values)), count - 1.0)
    value = n * float(values.mean())
    slope = float(
        (_integral(f, full._replace(nodes=full.nodes + noise), products.scale) - samples[-1]).abs().mean()
    )  # what an error of the nodes makes of it
    rounding = math.hypot(n * quadrature, n * slope + grain(products) * n * float(values.abs().mean()))
    return Estimate(value, math.sqrt(variance + rounding**2), dof, products.matvecs, seed)
