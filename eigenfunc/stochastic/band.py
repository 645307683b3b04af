"""How far a stochastic Lanczos quadrature can be off: by the draw of its probes, and by its finite number of steps.

The probes are uniform on the sphere of N dimensions, so that the share of a probe in the eigenspaces of c eigenvalues
is Beta(c/2, (N − c)/2) whatever the matrix is. The band follows from this law alone, as that of C. Clopper and E.
Pearson, Biometrika 26 (1934), does from the binomial one: nothing is estimated from the scatter of a few probes, so
that it is narrower than one by Student's t, is right where few eigenvalues make for skew, and exists for one probe.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

_DEVIATE = NormalDist().inv_cdf(0.975)  # bands hold 95%
_CRUMB = 1e-6  # of an eigenvalue, for rounding
_HALVINGS = 50  # of the unit interval
_FULL = 1e40  # a sum of squared polynomials beyond which its inverse is nothing


def freedom(num_probes: int, size: int) -> float:
    """κ such that Beta(κF, κ(1 − F)) has mean and variance, 2 F (1 − F) / (P (N + 2)), of the mean over P probes."""
    return num_probes * (size + 2) / 2 - 1


def interval(low: Tensor, high: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """The shares F whose Beta(κF, κ(1 − F)) law has what was seen, which lies between `low` and `high`, in its middle
    95%: by bisection, for its deviate falls with F."""
    seen = torch.stack([low, high]).clamp(0.0, 1.0)
    start, stop = torch.stack([torch.zeros_like(low), seen[1]]), torch.stack([seen[0], torch.ones_like(high)])
    target = seen.new_tensor([_DEVIATE, -_DEVIATE]).reshape(2, *[1] * low.ndim)
    for _ in range(_HALVINGS):
        middle = (start + stop) / 2
        beyond = _deviate(seen, middle, kappa) > target
        start, stop = torch.where(beyond, middle, start), torch.where(beyond, stop, middle)
    return start[0], stop[1]


def whole(low: Tensor, high: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The shares within [low, high] that a whole number of `size` eigenvalues can have; the next ones if none can."""
    first, last = torch.ceil(size * low - _CRUMB), torch.floor(size * high + _CRUMB)
    return first.minimum(torch.floor(size * high)) / size, last.maximum(torch.ceil(size * low)) / size


def _deviate(seen: Tensor, share: Tensor, kappa: float) -> Tensor:
    """The standard normal deviate that has the probability of `seen` under Beta(κF, κ(1 − F)), F = `share`.

    Barndorff-Nielsen's r* = r + log(u/r)/r of the signed root r of the likelihood ratio and of the standardised
    difference u: from κF = ½ on, and so for a single eigenvalue, intervals hold 95% to within 0.7%.
    (O. Barndorff-Nielsen, Biometrika 73 (1986); N. Temme, SIAM J. Math. Anal. 18 (1987), for the beta function.)
    """

    def part(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * torch.log(a / b), 0.0)

    r = torch.sqrt(2 * kappa * (part(share, seen) + part(1 - share, 1 - seen)).clamp_min(0.0))
    r = torch.copysign(r, seen - share)
    u = (seen - share) * math.sqrt(kappa) / torch.sqrt(share * (1 - share))
    apart = (r.abs() > 1e-2) & torch.isfinite(u) & torch.isfinite(r)
    return torch.where(apart, r + torch.log(torch.where(apart, u / r, 1.0)) / torch.where(apart, r, 1.0), r)


def alive(betas: Tensor) -> Tensor:
    """(..., m) bool: the rows of the recurrence before a breakdown, for its couplings `betas` (..., m)."""
    reached = torch.cumprod((betas[..., :-1] > 0).long(), -1) > 0
    return torch.cat([torch.ones_like(betas[..., :1], dtype=torch.bool), reached], -1)


def largest_step(alphas: Tensor, betas: Tensor, x: Tensor) -> Tensor:
    """The most (p, g) that the share below x (p, g) of a probe can differ from that of its Gauss rule.

    All measures with the 2m moments that m steps know lie, at x, within one interval of the length of the Christoffel
    function 1 / Σ p_k(x)², k = 0, …, m, of the orthonormal polynomials, the inequality of Chebyshev, Markov and
    Stieltjes; the Gauss rule is a limit of such measures. The length is some 1/m inside a bulk, next to nothing in
    gaps, and zero off the nodes once the space is exhausted. (Golub and Meurant, ch. 6; N. Akhiezer, The Classical
    Moment Problem, 1965, ch. 2.)
    """
    before, now = torch.zeros_like(x), torch.ones_like(x)
    total = now.clone()
    coupling = torch.zeros_like(x[:, 0])
    for alpha, beta in zip(alphas.unbind(1), betas.unbind(1), strict=True):
        following = (x - alpha[:, None]) * now - coupling[:, None] * before
        step = torch.where(beta > 0, beta, 1.0)[:, None]
        following = torch.where((beta > 0)[:, None], following / step, _FULL * (following != 0).to(x))
        going = total < _FULL
        before, now = torch.where(going, now, 0.0), torch.where(going, following, 0.0)
        total = total + now**2
        coupling = beta
    return torch.where(total < _FULL, 1 / total, 0.0)


def below(nodes: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """Σ of the weights (p, m) whose nodes (p, m) are at most x (p, g)."""
    order = torch.argsort(nodes, dim=1)
    sums = torch.cumsum(torch.gather(weights, 1, order), dim=1)
    sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=1)
    return torch.gather(sums, 1, torch.searchsorted(torch.gather(nodes, 1, order), x, right=True))
