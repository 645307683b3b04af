"""Lanczos from several random vectors that advance together, in the complement of known eigenvectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.certificate import Products, certify, not_symmetric, seeded, where_due, whole
from eigenfunc.errors import InputError, NotConverged
from eigenfunc.krylov import basis, lanczos as kernel
from eigenfunc.plan import ROOMY
from eigenfunc.solution import Status

_ALIEN = 0.01  # residual, in terms of the largest value, or overlap, beyond which pairs are none


class Probed(NamedTuple):
    """What was learnt, on the CPU, in the operator's own units."""

    alphas: Tensor  # (p, m) float64
    betas: Tensor  # (p, m)
    values: Tensor  # (k,)
    residuals: Tensor  # (k,)
    size: int
    noise: float
    matvecs: int
    passes: int
    seed: int


class _Known(NamedTuple):
    values: Tensor  # (k,)
    residuals: Tensor  # (k,)
    vectors: Tensor  # (k, n), orthonormal

    def without(self, block: Tensor) -> Tensor:
        """The part of the rows of `block` (p, n) that is orthogonal to the vectors."""
        if len(self.vectors):
            for _ in range(2):
                block = basis.subtract(block, tree.gram(self.vectors, block), self.vectors)
        return block


class _Advanced(NamedTuple):
    alphas: Tensor  # (p, m)
    betas: Tensor  # (p, m)
    anorm: float  # largest ‖A q‖ seen, a lower bound of ‖A‖
    asym: float  # largest departure from symmetry


def probe(
    A: Any, num_probes: int, num_steps: int, pairs: Any, seed: int | None, block_size: int | None, progress: bool
) -> Probed:
    """See `spectral_density`."""
    products = Products(A)
    num_probes, num_steps = whole(num_probes, "num_probes", 1), whole(num_steps, "num_steps", 2)
    given = _given(pairs, products)
    steps = min(num_steps, products.size - len(given))
    room = max(1, ROOMY // (products.size * (steps + 1)))
    together = min(num_probes, room if block_size is None else whole(block_size, "block_size", 1))
    generator, seed = seeded(seed)
    with products.at_work("density", progress) as bar:
        _, image = products.calibrate(generator)
        known = _verified(products, given, float(tree.norm(image)))
        parts = []
        for start in range(0, num_probes, together):
            count = min(together, num_probes - start)
            block = torch.cat([products.random(generator) for _ in range(count)])
            parts.append(_advance(products, known, block, steps, start, lambda: bar.update(products.matvecs - bar.n)))
    anorm = max([*(part.anorm for part in parts), *known.values.abs().tolist()])
    skew, explained = max(part.asym for part in parts) / (anorm or 1.0), products.explained(anorm)
    if skew > explained:
        raise NotConverged(f"{Status.NOT_SYMMETRIC}: {not_symmetric(skew, explained)}", None)
    return Probed(
        torch.cat([part.alphas for part in parts]) * products.scale,
        torch.cat([part.betas for part in parts]) * products.scale,
        known.values * products.scale,
        known.residuals * products.scale,
        products.size,
        math.sqrt(steps) * products.rounding(anorm) * products.scale,
        products.matvecs,
        products.passes,
        seed,
    )


def _given(pairs: Any, products: Products) -> Tensor:
    """The vectors of `pairs`, flat (k, n)."""
    like = products.A.like
    if pairs is None:
        return torch.empty(0, products.size, dtype=products.dtype, device=products.device)
    if not hasattr(pairs, "vectors"):
        raise InputError(f"pairs must have `vectors`, as a Solution does; got a {type(pairs).__name__}")
    full = tree.tree_map(lambda leaf: leaf.to(torch.promote_types(leaf.dtype, torch.float32)), like)
    tree.check_like(pairs.vectors, full, "pairs.vectors", stacked=True)
    flat = tree.ravel(tree.tree_map(lambda leaf: leaf.detach(), pairs.vectors), like)
    if len(flat) >= products.size:
        raise InputError(f"pairs hold {len(flat)} vectors, and n = {products.size}: there is no rest to estimate")
    lengths = tree.norms(flat)
    if not bool(torch.isfinite(lengths).all()) or not bool((lengths > 0).all()):
        raise InputError("pairs.vectors hold NaN, infinity, or a vector that is zero")
    flat = flat / lengths[:, None].to(flat)
    overlap = float((tree.gram(flat, flat).abs().fill_diagonal_(0.0)).max()) if len(flat) else 0.0
    if overlap > _ALIEN:
        raise InputError(f"pairs.vectors are not orthogonal: the largest inner product is {overlap:.2g}")
    return flat


def _verified(products: Products, given: Tensor, size: float) -> _Known:
    """Rayleigh–Ritz by fresh products; refuses vectors that are not eigenvectors of this matrix."""
    if len(given) == 0:
        none = torch.empty(0, dtype=torch.float64)
        return _Known(none, none, given)
    found = certify(products, given)
    worst = float(tree.norm(found.residuals))
    size = max(float(found.values.abs().max()), size)
    limit = max(_ALIEN * size, 4 * products.rounding(size))
    if worst > limit:
        raise InputError(
            f"pairs are no eigenvectors of this matrix: residual {worst * products.scale:.2g}, where no more than "
            f"{limit * products.scale:.2g} will do. Solve for them at the same parameters and on the same data, to a "
            "tolerance of 1% or better"
        )
    return _Known(found.values, found.residuals, found.vectors)


def _advance(
    products: Products, known: _Known, block: Tensor, steps: int, first: int, report: Callable[[], Any]
) -> _Advanced:
    """`steps` steps from each row of `block` (p, n), one sweep over the data a step; a probe whose space is exhausted
    takes no further part. `first` is the number of the first probe."""
    q = known.without(block)
    q = q / tree.norms(q)[:, None].to(q)
    states: list[kernel.State] = []
    running = list(range(len(block)))
    for j in range(steps):
        images = known.without(products(q))
        if j == 0:
            states = [kernel.init(q[p : p + 1], images[p : p + 1], steps + 1) for p in running]
        for row, p in enumerate(running):
            states[p] = kernel.absorb(states[p], images[row : row + 1], j, again=where_due)
        report()
        flags = torch.stack([torch.stack([states[p].finite.double(), states[p].alive[j + 1]]) for p in running]).cpu()
        for p, (finite, _) in zip(running, flags.tolist(), strict=True):
            products.check_finite(bool(finite), f"step {j + 1} of probe {first + p + 1}: ")
        running = [p for p, (_, alive) in zip(running, flags.tolist(), strict=True) if alive]
        if not running or j + 1 == steps:
            break
        q = torch.cat([states[p].basis[j + 1 : j + 2] for p in running])
        if len(known.vectors):  # a short residual is mostly rounding, and that is not orthogonal to anything
            q = known.without(q)
            q = q / tree.norms(q)[:, None].to(q)
            for row, p in enumerate(running):
                states[p].basis[j + 1] = q[row]
    t = torch.stack([state.t for state in states]).cpu()
    return _Advanced(
        torch.diagonal(t, dim1=1, dim2=2)[:, :steps].contiguous(),
        torch.diagonal(t, offset=-1, dim1=1, dim2=2)[:, :steps].contiguous(),
        max(float(state.anorm) for state in states),
        max(float(state.asym) for state in states),
    )
