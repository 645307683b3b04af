"""The diagonal from products with random vectors."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from eigenfunc import tree
from eigenfunc.certificate import Products
from eigenfunc.stochastic import leave_one_out as loo
from eigenfunc.stochastic.estimate import Estimate
from eigenfunc.stochastic.probes import begun, blocks, grain, least_of, multiplied, normal, signs, spilt, units
from eigenfunc.tree import Tree

DiagonalMethod = Literal["hutchinson", "xdiag"]
_LEAST = {"hutchinson": 2, "xdiag": 4}
_CUBE = 2**24  # entries of scratch memory


def diagonal(A: Any, *, num_matvecs: int, method: DiagonalMethod = "xdiag", seed: int | None = None) -> Estimate[Tree]:
    """The entries a_jj as a tree shaped as `A.like`, without bias, each with its standard error, in float64.

    A            `LinearOperator`, or what `aslinearoperator` takes
    num_matvecs  products to spend, beside two that measure their noise; from n on the result is exact, by n of them
    method       "hutchinson": Σ z ∘ A z / Σ z ∘ z over normal z (C. Bekas, E. Kokiopoulou and Y. Saad, Appl. Numer.
                 Math. 57, 2007), the slope of a regression of A z on z, entry by entry, so that Student's t holds
                 exactly; the error of an entry is the length of the rest of its row over √(num_matvecs − 2); memory
                 for three vectors and a block of probes. "xdiag": takes large eigenvalues out first, as
                 `trace` does (E. Epperly, J. Tropp and R. Webber, SIAM J. Matrix Anal. Appl. 45, 2024); memory for
                 about 2 `num_matvecs` vectors, work of order n num_matvecs³
    seed         of the probes; default: a fresh one, told in the estimate

    Raises as `trace` does.
    """
    products, count, generator, seed = begun(A, num_matvecs, least_of(method, _LEAST), seed)
    n = products.size
    with products.at_work():
        dof, row = math.inf, torch.zeros((), dtype=torch.float64)
        if count == n:
            value, row = _exact(products)
            variance = torch.zeros_like(value)
        elif method == "hutchinson":
            value, variance, dof = *_regressed(products, count, generator), count - 1.0
        else:
            value, variance, dof = *_xdiag(products, count // 2, generator), count // 2 - 1.0
        # what scaling may have rounded to zero
        least = 0.0 if products.scale == 1 else torch.finfo(products.dtype).tiny
        row = row.to(value)
        whole = torch.linalg.vector_norm(row)  # samples have the rounding of other rows in their variance
        rounding = grain(products) * value.abs().maximum(row).maximum(whole / math.sqrt(n)) + spilt(products) * whole
        rounding = rounding + math.sqrt(n) * products.declared + least
        stderr = torch.hypot(torch.sqrt(variance), rounding)

    def shaped(flat: Tensor) -> Tree:
        wide = tree.tree_map(lambda leaf: leaf.new_empty(leaf.shape, dtype=torch.float64), products.A.like)
        return tree.unravel(flat * products.scale, wide)

    return Estimate(shaped(value), shaped(stderr), dof, products.matvecs, seed)


def _exact(products: Products) -> tuple[Tensor, Tensor]:
    """The entries (n,), and the lengths of their rows, to which the rounding of a product is relative."""
    entries, lengths = [], []
    for start, size in blocks(products.size, products):
        image = multiplied(products, units(start, size, products))
        entries.append(torch.diagonal(image[:, start : start + size]).double())
        lengths.append(tree.norms(image))
    return torch.cat(entries), torch.cat(lengths)


def _regressed(products: Products, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Slopes (n,) of A z on z and their variances, blocks joined by the change of their slopes."""
    weight = torch.zeros(products.size, dtype=torch.float64, device=products.device)
    slope, left = torch.zeros_like(weight), torch.zeros_like(weight)
    for _, size in blocks(count, products):
        z = normal(size, products, generator)
        image, z = multiplied(products, z).double(), z.double()
        squares = (z * z).sum(0)
        steep = (z * image).sum(0) / squares
        total = weight + squares
        left += ((image - steep * z) ** 2).sum(0) + (steep - slope) ** 2 * weight * squares / total
        slope = slope + (steep - slope) * squares / total
        weight = total
    return slope, left / ((count - 1) * weight)


def _xdiag(products: Products, m: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Means (n,) of the m samples diag(P_i A) + ω_i ∘ (1 − P_i) A ω_i, and their variances."""
    found = loo.sketch(products, signs(m, products, generator))
    c = found.coordinates
    s = loo.left_out(c.r)
    fewer, basis = loo.without_each(c)
    u = torch.zeros(m, m, m, dtype=torch.float64)
    u[torch.arange(m)[:, None], loo.others(m)] = (basis @ loo.left_out(fewer.r)).mT
    share = (s * c.r).sum(0)
    shares = (u * c.r.mT).sum(-1)
    s, u, share, shares = (x.to(products.device) for x in (s, u, share, shares))
    means, variances = [], []
    width = max(_CUBE // m**2, 1)
    for start in range(0, products.size, width):
        omega, q, z = (x[:, start : start + width].double() for x in (found.probes, found.q, found.images))
        qs, zs = s.mT @ q, s.mT @ z
        known = (q * z).sum(0) - qs * zs
        samples = known + omega * qs * share[:, None]
        qu, zu = u @ q, u @ z
        full = known[:, None] - qu * zu + omega * qu * shares[..., None]
        full.diagonal()[...] = samples.mT
        means.append(samples.mean(0))
        variances.append(loo.variance(samples, full))
    return torch.cat(means), torch.cat(variances)
