"""Traces of functions of A: Lanczos quadrature for random probes.

log(x + delta) and x/(x + delta) have derivatives of alternating sign, so that Gauss's rule lies above the integral and
Radau's, with a node left of the spectrum, below (G. Golub and G. Meurant, Matrices, Moments and Quadrature with
Applications, 2010, ch. 6): m steps give a bracket for each probe, and not merely a guess of the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.certificate import Products, whole
from eigenfunc.errors import InputError
from eigenfunc.krylov import lanczos as kernel
from eigenfunc.krylov.quadrature import Quadrature, gauss
from eigenfunc.stochastic.estimate import Estimate, spread
from eigenfunc.stochastic.probes import begun, blocks, grain, multiplied, sphere, units

Function = Callable[[Tensor], Tensor]
Check = Callable[[float, float], float]  # smallest Ritz value, its rounding error -> lower end of the spectrum


def logdet(
    A: Any, *, delta: float = 0.0, num_probes: int = 32, num_steps: int = 32, seed: int | None = None
) -> Estimate[float]:
    """log det(A + delta I) = tr log(A + delta I), by num_probes · num_steps products with random vectors.

    A           `LinearOperator`, or what `aslinearoperator` takes
    delta       in units of A; A + delta I has to be positive definite
    num_probes  vectors on the sphere, whose samples make the standard error; from n on there are n, and nothing is
                random
    num_steps   of Lanczos with full reorthogonalisation for each probe; half the width of the bracket that they
                leave is part of the standard error
    seed        of the probes; default: a fresh one, told in the estimate

    Memory: num_steps vectors for each probe of a block, 32 at most and about 2²⁶ entries.

    Raises `InputError` where a Ritz value of A + delta I is not positive, which shows that the matrix is not positive
    definite; that none does proves nothing. Where delta > 0 and no Ritz value of A is negative, the bracket takes A
    for semidefinite. Else as `trace` does.

    S. Ubaru, J. Chen and Y. Saad, SIAM J. Matrix Anal. Appl. 38 (2017).
    """
    delta = _number(delta, "delta")

    def check(smallest: float, noise: float) -> float:
        if smallest + delta <= 2 * noise:
            raise InputError(
                f"A + delta I has the Ritz value {smallest + delta:.6g} ≤ 0 within rounding, so it is not positive "
                f"definite: delta has to be over {-smallest:.6g}, which is the smallest value of A seen, negated"
            )
        return 0.0 if delta > 0 and smallest >= -noise else noise - delta

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

    def check(smallest: float, noise: float) -> float:
        if smallest < -noise:
            raise InputError(
                f"A has the Ritz value {smallest:.6g} < 0, so it is not positive semidefinite and has no effective "
                "dimension: use a GGN or Fisher matrix, or add at least that much to A (A.shift)"
            )
        return 0.0

    return _trace_of(A, lambda x: x.clamp_min(0.0) / (x.clamp_min(0.0) + delta), check, num_probes, num_steps, seed)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{what} must be a finite number, got {value!r}")
    return float(value)


def _trace_of(A: Any, f: Function, check: Check, num_probes: int, num_steps: int, seed: int | None) -> Estimate[float]:
    """tr f(A) by Gauss quadrature of the spectral measures of random vectors."""
    products, count, generator, seed = begun(A, num_probes, 2, seed, "num_probes")
    n = products.size
    steps = min(whole(num_steps, "num_steps", 1), n)
    found = []
    with products.at_work():
        for start, size in blocks(count, products, room=steps + 1):
            drawn = units(start, size, products) if count == n else sphere(size, products, generator) / math.sqrt(n)
            state = _chains(products, drawn, steps)
            noise = max(grain(products) * float(state.anorm.max()) + products.declared, 1e-300)
            upper = _gauss(state, steps)
            smallest = float(upper.nodes.min())
            left = check(smallest * products.scale, noise * products.scale) / products.scale
            lower = _radau(state, steps, min(left, smallest - noise))
            moved = upper._replace(nodes=upper.nodes + noise)
            rules = (upper, lower, moved)
            found.append(torch.stack([(rule.weights * f(rule.nodes * products.scale)).sum(-1) for rule in rules]))
    above, below, moved_samples = n * torch.cat(found, dim=1)
    samples, quadrature = (above + below) / 2, float((above - below).mean()) / 2
    rounding = float((above - moved_samples).abs().mean()) + grain(products) * float(samples.abs().mean())
    variance, dof = (0.0, math.inf) if count == n else (float(spread(samples)), count - 1.0)
    stderr = math.sqrt(variance + quadrature**2 + rounding**2)
    return Estimate(float(samples.mean()), stderr, dof, products.matvecs, seed)


def _chains(products: Products, starts: Tensor, steps: int) -> kernel.State:
    """Lanczos from each of the unit vectors (p, n) at once, a product with all of them at each step."""
    images = multiplied(products, starts)

    def begun(start: Tensor, image: Tensor) -> kernel.State:
        return kernel.absorb(kernel.init(start[None], image[None], steps + 1), image[None], 0)

    state: kernel.State = torch.func.vmap(begun)(starts, images)
    for j in range(1, steps):
        images = products(state.basis[:, j])
        state = torch.func.vmap(partial(kernel.absorb, j=j))(state, images[:, None])
    products.check_finite(bool(state.finite.all()))
    return state


def _gauss(state: kernel.State, steps: int) -> Quadrature:
    t = state.t[:, :steps, :steps].cpu()
    return _jacobi_rule(t, state.alive[:, :steps].cpu())


def _radau(state: kernel.State, steps: int, left: float) -> Quadrature:
    """The rule of one node more, at `left`, below all others. G. Golub, SIAM Rev. 15 (1973)."""
    t = state.t[:, : steps + 1, : steps + 1].cpu().clone()
    inner, coupling = t[:, :steps, :steps], t[:, steps, steps - 1]
    alive = state.alive[:, : steps + 1].cpu()
    identity = torch.eye(steps, dtype=t.dtype)
    shifted = inner - left * identity + torch.diag_embed((1 - alive[:, :steps]) * (left + 1))
    last = torch.linalg.solve(shifted, coupling[:, None] ** 2 * identity[-1])
    t[:, steps, steps] = left + last[:, -1]
    return _jacobi_rule(t, alive)


def _jacobi_rule(t: Tensor, alive: Tensor) -> Quadrature:
    alphas, couplings = torch.diagonal(t, dim1=1, dim2=2), torch.diagonal(t, offset=-1, dim1=1, dim2=2)
    return gauss(alphas, torch.cat([couplings, torch.zeros_like(alphas[:, :1])], dim=1), alive > 0)


def moments(A: Any, order: int = 4, *, num_probes: int = 32, seed: int | None = None) -> list[Estimate[float]]:
    """tr(A^p)/n, the moments of the spectral density, for p = 1, …, order, from ⌈order/2⌉ products for each probe.

    ⟨z, A^(i+j) z⟩ = ⟨A^i z, A^j z⟩ over random z on the sphere; all moments come from the same probes. With n probes
    or more nothing is random. Memory: a few vectors for each probe of a block.

    Raises `InputError` for arguments out of range and for a moment beyond float64; else as `trace` does.
    """
    order = whole(order, "order", 1)
    products, count, generator, seed = begun(A, num_probes, 2, seed, "num_probes")
    n = products.size
    unit, found = 0.0, []
    with products.at_work():
        for start, size in blocks(count, products, room=3):
            z = units(start, size, products) if count == n else sphere(size, products, generator) / math.sqrt(n)
            forms = []
            for _ in range((order + 1) // 2):
                image = multiplied(products, z)
                unit = unit or _binary(float(tree.norms(image).max()))
                image = image / unit
                forms += [tree.dots(z, image), tree.dots(image, image)]
                z = image
            found.append(torch.stack(forms))
    samples = torch.cat(found, dim=1).cpu()
    even = [1.0, *samples.mean(1)[1::2].tolist()]
    blur = grain(products) + products.declared / unit
    out = []
    for p, row in enumerate(samples[:order], start=1):
        rounding = p * blur * math.sqrt(even[p // 2] * even[(p + 1) // 2])
        variance, dof = (0.0, math.inf) if count == n else (float(spread(row)), count - 1.0)
        value = _raised(float(row.mean()), products.scale * unit, p)
        stderr = _raised(math.hypot(math.sqrt(variance), rounding), products.scale * unit, p)
        out.append(Estimate(value, stderr, dof, products.matvecs, seed))
    return out


def _binary(size: float) -> float:
    """The power of two next below, or 1 for zero."""
    return 2.0 ** math.floor(math.log2(size)) if size > 0 else 1.0


def _raised(value: float, unit: float, p: int) -> float:
    """value · unit^p for a power of two `unit`."""
    try:
        out = math.ldexp(value, p * round(math.log2(unit)))
    except OverflowError:
        out = math.inf
    if not math.isfinite(out) or (value != 0 and out == 0):
        raise InputError(f"the moment of order {p} leaves the range of float64: scale the operator (c * A)")
    return out
