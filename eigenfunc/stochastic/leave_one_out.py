"""Estimators that use each probe twice: once to find the large part of A, once to sample what the others left over.

m probes Ω with A Ω = Q R give m projections P_i, onto the images of all probes but the i-th, and m unbiased samples

    t_i = tr P_i A P_i + a sample of tr (1 − P_i) A (1 − P_i) by the i-th probe.

E. Epperly, J. Tropp and R. Webber, XTrace, SIAM J. Matrix Anal. Appl. 45 (2024). All of it happens in coordinates of
Q, and leaving out one probe more is the same thing for smaller matrices. That gives the covariance of the samples,
which is not zero: with t_j^(i) for the sample j from all probes but the i-th,

    Cov(t_i, t_j) = E (t_i − t_i^(j)) (t_j − t_j^(i)),

because t_i^(j) does not depend on probe j, given which t_j has the right mean, and the other way round. The spread of
the samples alone, the paper's error estimate, is too small by up to a third on slowly falling spectra.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.certificate import Products
from eigenfunc.stochastic.estimate import spread
from eigenfunc.stochastic.probes import all_multiplied

_EPS = torch.finfo(torch.float64).eps
_CORRELATED = 3.0  # the covariance counts up to this multiple of the variance of the mean; 1.3 was the most met


class Coordinates(NamedTuple):
    """Probes and matrix in an orthonormal basis Q of the probes' images, for any number of leading axes."""

    r: Tensor  # (..., m, m) float64: A Ω = Q R, one column for each probe
    w: Tensor  # (..., m, m) Qᵀ Ω
    h: Tensor  # (..., m, m) Qᵀ A Q
    k: Tensor  # (..., m, m) Qᵀ A² Q


class Sketch(NamedTuple):
    probes: Tensor  # (m, n)
    q: Tensor  # (m, n), orthonormal rows that span the images
    images: Tensor  # (m, n): A Q
    coordinates: Coordinates


def sketch(products: Products, probes: Tensor) -> Sketch:
    """Two products for each probe."""
    q, r = torch.linalg.qr(all_multiplied(products, probes).mT)
    q = q.mT.contiguous()
    images = all_multiplied(products, q)
    h = tree.exact_gram(q, images)
    w, k = tree.exact_gram(q, probes), tree.exact_gram(images, images)
    return Sketch(probes, q, images, Coordinates(*(x.double().cpu() for x in (r, w, (h + h.mT) / 2, k))))


def others(m: int) -> Tensor:
    """(m, m−1): the indices but the i-th."""
    index = torch.arange(m)
    return torch.stack([index[index != i] for i in range(m)])


def left_out(r: Tensor) -> Tensor:
    """Unit columns (..., m, m): the i-th is what the images lose in span without the i-th probe, R⁻ᵀ e_i normalised.

    A diagonal entry that rounding could have left is lifted to that: probes without a share lose nothing that counts.
    """
    diagonal = torch.diagonal(r, dim1=-2, dim2=-1)
    least = _EPS * torch.linalg.matrix_norm(r, keepdim=True)[..., 0]
    least = torch.where(least > 0, least, 1.0)
    lifted = torch.where(diagonal.abs() < least, least, diagonal)
    identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device).expand(r.shape)
    inverse = torch.linalg.solve_triangular(r + torch.diag_embed(lifted - diagonal), identity, upper=True)
    directions: Tensor = inverse.mT / torch.linalg.vector_norm(inverse.mT, dim=-2, keepdim=True)
    return directions


class Rest(NamedTuple):
    directions: Tensor  # (..., m, m): `left_out`
    x: Tensor  # (..., m, m) coordinates of P_i ω_i
    share: Tensor  # (..., m): dimensions left over ÷ ‖(1 − P_i) ω_i‖²


def _rest(c: Coordinates, n: int) -> Rest:
    s = left_out(c.r)
    x = c.w - s * (s * c.w).sum(-2, keepdim=True)
    m = c.r.shape[-1]
    return Rest(s, x, (n - m + 1) / (n - (x * x).sum(-2)))


def trace_samples(c: Coordinates, n: int) -> Tensor:
    """t_i (..., m) for tr A, of probes on the sphere of radius √n."""
    s, x, share = _rest(c, n)
    found = torch.diagonal(c.h, dim1=-2, dim2=-1).sum(-1, keepdim=True) - (s * (c.h @ s)).sum(-2)
    sampled = (s * c.w).sum(-2) * (s * c.r).sum(-2) - (x * (c.r - c.h @ x)).sum(-2)
    return found + share * sampled


def square_samples(c: Coordinates, n: int) -> Tensor:
    """As `trace_samples`, for tr A²: ‖A P_i‖² and samples of ‖A (1 − P_i)‖², norms being Frobenius's."""
    s, x, share = _rest(c, n)
    found = torch.diagonal(c.k, dim1=-2, dim2=-1).sum(-1, keepdim=True) - (s * (c.k @ s)).sum(-2)
    sampled = (c.r * c.r).sum(-2) - 2 * (x * (c.h @ c.r)).sum(-2) + (x * (c.k @ x)).sum(-2)
    return found + share * sampled.clamp_min(0.0)


def without_each(c: Coordinates) -> tuple[Coordinates, Tensor]:
    """The coordinates (m, m−1, m−1) without the i-th probe, and their basis (m, m, m−1) in the old ones."""
    keep = others(c.r.shape[-1])
    basis, r = torch.linalg.qr(c.r[:, keep].movedim(1, 0))
    w = basis.mT @ c.w[:, keep].movedim(1, 0)
    return Coordinates(r, w, basis.mT @ c.h @ basis, basis.mT @ c.k @ basis), basis


def spread_over(fewer: Tensor, samples: Tensor) -> Tensor:
    """(m, m, ...): row i the samples from all probes but the i-th (m, m−1, ...), and `samples` (m, ...) on the
    diagonal."""
    m = samples.shape[0]
    full = samples.expand(m, *samples.shape).clone()
    full[torch.arange(m)[:, None], others(m)] = fewer
    return full


def variance(samples: Tensor, full: Tensor) -> Tensor:
    """The variance (...) of the mean of the samples (m, ...): of independent ones, and the covariance of these."""
    m = samples.shape[0]
    change = samples[None] - full
    covariance = (change * change.transpose(0, 1)).sum((0, 1)) / (m * (m - 1))
    alone = spread(samples)
    total: Tensor = alone + torch.minimum(covariance.abs(), _CORRELATED * alone)
    return total
