"""The density of the spectrum of a symmetric operator, with its error, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eigenfunc.certificate import positive
from eigenfunc.errors import InputError
from eigenfunc.krylov.quadrature import gauss
from eigenfunc.stochastic import band
from eigenfunc.stochastic.chains import Probed, probe

_POINTS = 1000  # of the default grid
_WIDEST = 4  # doublings of a width of two grid points: no kernel is wider than 3% of the axis
_SETTLED = 0.01  # of the mass may move when the rule loses a node, for a width to be wide enough
_SHORTER = 4  # rules by which the error of the quadrature is estimated
_CHUNK = 2**22  # entries of a kernel matrix


@dataclass(frozen=True, eq=False)
class Density:
    """A spectral density, on the CPU in float64. All eigenvalues weigh 1/n; `values` are known one by one, and
    `density` spreads the others over the axis.

    grid       (g,) eigenvalues, rising
    density    (g,) per unit of eigenvalue, smoothed; without `values`, so that it integrates to (n − k)/n
    band       (2, g) lower and upper end, 95% at each point, for the smoothed density of the true eigenvalues
    nodes      (probes, steps) of the Gauss rule of each probe; those behind a breakdown lie at its mean
    weights    (probes, steps), each row summing to (n − k)/n; zero behind a breakdown
    values     (k,) eigenvalues of the pairs that were given, rising; empty if none were
    residuals  (k,) their true residual norms, from fresh products
    alphas     (probes, steps) diagonals of the tridiagonal matrices, and
    betas      (probes, steps) what lies beside them; the last entry couples to what was not multiplied any more
    width      standard deviation of the smoothing: in units of eigenvalue, or of asinh(λ/threshold)
    threshold  None for a linear axis
    n          the size of the matrix
    noise      rounding, and what else is known to be wrong with products, may move eigenvalues by as much

    Tr f(A)/n is about `(weights * f(nodes)).sum(1).mean() + f(values).sum() / n`.
    """

    grid: Tensor
    density: Tensor
    band: Tensor
    nodes: Tensor
    weights: Tensor
    values: Tensor
    residuals: Tensor
    alphas: Tensor
    betas: Tensor
    width: float
    threshold: float | None
    n: int
    noise: float
    matvecs: int
    passes: int
    seconds: float
    seed: int

    def cdf(self, x: Any) -> tuple[Tensor, Tensor]:
        """The share (g,) of eigenvalues that are at most x (g,), and its band (2, g), 95% at each point.

        A sum of steps: exact ones of 1/n at `values`, estimated ones at the nodes. The band takes in three errors: the
        draw of the probes, whose law is known and does not depend on the matrix; the finite number of steps, by the
        inequality of Chebyshev, Markov and Stieltjes, which is a strict bound and prevails inside a bulk, where it is
        about the weight of a node, so that it holds there in nearly all cases and not in 95%; and that eigenvalues are
        known to `noise` only, and `values` to their residuals. As there can only be whole numbers of eigenvalues, it
        ends at multiples of 1/n. Raises `InputError` for NaN and ∞.
        """
        points = torch.as_tensor(x, dtype=torch.float64).detach().cpu().reshape(-1)
        if not bool(torch.isfinite(points).all()):
            raise InputError("the distribution function is asked for at finite numbers")
        shift = self._shift(points)
        ends, exact = [], []
        for moved in (points - shift, points, points + shift):
            at = moved.expand(len(self.nodes), -1).contiguous()
            part = band.below(self.nodes, self.weights / self._rest, at).clamp_max(1.0)
            slack = band.largest_step(self.alphas, self.betas, at) + 1e-12
            ends.append(((part - slack).clamp_min(0.0).mean(0), part.mean(0), (part + slack).clamp_max(1.0).mean(0)))
            exact.append((self.values[:, None] <= moved).double().sum(0) / self.n)
        low, high = band.interval(ends[0][0], ends[2][2], self._freedom())
        low, high = band.whole(low, high, self.n - len(self.values))
        share = exact[1] + self._rest * ends[1][1]
        return share, torch.stack(
            [(exact[0] + self._rest * low).minimum(share), (exact[2] + self._rest * high).maximum(share)]
        )

    def on(self, grid: Any = None, *, width: float | None = None, threshold: float | None = None) -> Density:
        """The same density on another grid, smoothed by a Gaussian kernel.

        grid       (g,) rising; default: 1000 points, from beyond the smallest node to beyond the largest
        width      standard deviation of the kernel, in units of the axis; default: two points of the default grid,
                   or what it takes for the quadrature to be settled, such that a rule of one node less, which has its
                   nodes elsewhere, moves no more than 1% of the mass; but never over 3% of the axis, where a spectrum
                   that the steps do not resolve, bunched at zero on a logarithmic axis say, has a wide band instead
        threshold  makes the axis symmetric-logarithmic, asinh(λ/threshold): linear below, logarithmic beyond on both
                   sides. The density remains one per unit of eigenvalue

        The band is that of the draw, by the law of the probes for as many eigenvalues as the kernel takes in, plus
        what rules of one to four nodes less differ by: an estimate of the error of the quadrature, and not a bound as
        in `cdf`. At the default width that error is small; at a much smaller one the band can miss a tenth of the
        points. Raises `InputError` for a grid that does not rise or a width that is not positive.
        """
        for value, what in ((width, "width"), (threshold, "threshold")):
            if value is not None:
                positive(value, what)
        rules = self._rules()
        marks = [_axis(nodes, threshold) for nodes, _ in rules]
        carrying = marks[0][rules[0][1] > 0]
        low, high = float(carrying.min()), float(carrying.max())
        if width is None:
            least = max(1e-6 * max(abs(low), abs(high)), self.noise / (threshold or 1.0)) or 1e-6
            width = self._settled(rules, marks, low, high, max(least, 2 * (high - low) / _POINTS))
        if grid is None:
            u = torch.linspace(low - 4 * width, high + 4 * width, _POINTS, dtype=torch.float64)
            points = u if threshold is None else threshold * torch.sinh(u)
        else:
            points = torch.as_tensor(grid, dtype=torch.float64).detach().cpu()
            if points.ndim != 1 or not bool(torch.isfinite(points).all()) or not bool((points.diff() > 0).all()):
                raise InputError("the grid must be one row of finite, rising numbers")
            u = _axis(points, threshold)
        slope = torch.ones_like(points) if threshold is None else torch.rsqrt(points**2 + threshold**2)
        sums = [_smooth(u, m, w, width) for m, (_, w) in zip(marks, rules, strict=True)]
        first, second = sums[0]
        error = torch.stack([(first - other).abs() for other, _ in sums[1:]] or [torch.zeros_like(first)]).amax(0)
        height = torch.where(first > 0, second / torch.where(first > 0, first, 1.0), 1.0)
        share = torch.where(height > 0, first / torch.where(height > 0, height, 1.0), 0.0)
        lower, upper = band.interval(share, share, self._freedom())
        unit = self._rest * slope / (width * math.sqrt(2 * math.pi))
        ends = torch.stack([(height * lower - error).clamp_min(0.0), height * upper + error])
        return replace(self, grid=points, density=first * unit, band=ends * unit, width=width, threshold=threshold)

    @property
    def _rest(self) -> float:
        return 1 - len(self.values) / self.n

    def _freedom(self) -> float:
        return band.freedom(len(self.nodes), self.n - len(self.values))

    def _shift(self, x: Tensor) -> Tensor:
        """How far eigenvalues near x may be from those of the parts that A was cut into.

        The coupling R of the two parts, ‖R‖ = r, moves an eigenvalue of one by less than √(η² + 4r²) − η, η its
        distance to the other part. (C.-K. Li and R.-C. Li, Linear Algebra Appl. 395, 2005, whose bound is half of it.)
        """
        if len(self.values) == 0:
            return torch.full_like(x, self.noise)
        r = float(torch.linalg.vector_norm(self.residuals))
        eta = (x[:, None] - self.values).abs().amin(1)
        scale = torch.hypot(eta, torch.full_like(eta, 2 * r))
        return self.noise + torch.where(scale > 0, 4 * r * (r / torch.where(scale > 0, scale + eta, 1.0)), 0.0)

    def _rules(self) -> list[tuple[Tensor, Tensor]]:
        """Nodes and weights (p, m), of unit sum, and those of rules one to `_SHORTER` nodes shorter."""
        steps, alive = self.alphas.shape[1], band.alive(self.betas)
        lengths = range(steps - 1, max(0, steps - 1 - _SHORTER), -1)
        shorter = [gauss(self.alphas[:, :m], self.betas[:, :m], alive[:, :m]) for m in lengths]
        return [(self.nodes, self.weights / self._rest), *((rule.nodes, rule.weights) for rule in shorter)]

    def _settled(
        self, rules: list[tuple[Tensor, Tensor]], marks: list[Tensor], low: float, high: float, least: float
    ) -> float:
        """The smallest width, twice as large each time, at which the rules agree."""
        width = least
        for _ in range(_WIDEST):
            u = torch.linspace(low - 4 * width, high + 4 * width, _POINTS, dtype=torch.float64)
            found = [_smooth(u, m, w, width)[0] for m, (_, w) in zip(marks[:2], rules, strict=False)]
            moved = float((found[0] - found[-1]).abs().sum() * (u[1] - u[0])) / (width * math.sqrt(2 * math.pi))
            if moved <= _SETTLED:
                break
            width *= 2
        return width

    def __str__(self) -> str:
        k, (probes, steps) = len(self.values), self.nodes.shape
        pooled = torch.cat([self.nodes.flatten(), self.values])
        mass = torch.cat([self.weights.flatten() / probes, torch.full_like(self.values, 1 / self.n)])
        order = torch.argsort(pooled)
        pooled, mass = pooled[order], mass[order].cumsum(0)
        marks = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
        x = pooled[torch.searchsorted(mass, marks * mass[-1]).clamp_max(len(mass) - 1)]
        x = torch.unique(torch.cat([x, torch.zeros(1, dtype=torch.float64)]))
        share, ends = self.cdf(x)
        lines = ["          λ    share of eigenvalues up to λ, 95%"]
        lines += [
            f"{at:+11.3e}    {value:.4f}  [{low:.4f}, {high:.4f}]"
            for at, value, low, high in zip(x.tolist(), share.tolist(), *ends.tolist(), strict=True)
        ]
        if k:
            lines.append(
                f"{k} eigenvalues known, from {float(self.values[0]):.6g} to {float(self.values[-1]):.6g}, "
                f"largest residual {float(self.residuals.max()):.1e}"
            )
        lines.append(
            f"n = {self.n}, {probes} probes of {steps} steps, {self.matvecs} matvecs, {self.passes} passes, "
            f"{self.seconds:.2f} s, noise {self.noise:.1e}, seed {self.seed}"
        )
        return "\n".join(lines)


def _axis(x: Tensor, threshold: float | None) -> Tensor:
    return x if threshold is None else torch.asinh(x / threshold)


def _smooth(u: Tensor, marks: Tensor, weights: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Mean over the probes, at each u (g,), of Σ w K and Σ w K², for a Gaussian kernel K of height one."""
    at, mass = marks.flatten(), weights.flatten() / len(weights)
    at, mass = at[mass > 0], mass[mass > 0]
    parts = []
    for some in torch.split(u, max(1, _CHUNK // max(1, len(at)))):
        kernel = torch.exp(-(((some[:, None] - at) / width) ** 2) / 2)
        parts.append(torch.stack([kernel @ mass, (kernel * kernel) @ mass]))
    first, second = torch.cat(parts, dim=1)
    return first, second


def spectral_density(
    A: Any,
    *,
    num_probes: int = 10,
    num_steps: int = 80,
    pairs: Any = None,
    seed: int | None = None,
    block_size: int | None = None,
    progress: bool = False,
) -> Density:
    """The density of all eigenvalues of a symmetric operator, by stochastic Lanczos quadrature, with error bands.

    A           `LinearOperator`, or what `aslinearoperator` takes
    num_probes  random vectors; the error of a share F is about √(2 F (1 − F)/(n · num_probes)), its standard deviation
    num_steps   of Lanczos for each, fully reorthogonalised, so that no eigenvalue is seen twice: detail inside a bulk
                is resolved to about its width over the steps. At most n
    pairs       eigenpairs known already, a `Solution` say, or anything with `vectors` (k, *leaf): they enter with
                weight 1/n each, and the rest is estimated in their orthogonal complement. They cost k products, which
                give their values and true residuals anew
    seed        of the probes; default: a fresh one, told in `seed`. The result does not depend on `block_size`
    block_size  probes that advance together, in one sweep over the data a step; default: all, or as many as have
                bases of 2²⁷ entries together

    Costs num_probes · num_steps products, and two to measure their noise. Memory: num_steps + 1 vectors for each probe
    of a block.

    The probes are Gaussian, of length one: uniform on the sphere. Their variance 2 F (1 − F)/(N + 2) is known and the
    same for every matrix, and stays so in the complement of `pairs`, so that bands are exact. That of random signs is
    smaller by a factor which depends on how the eigenvectors lie, between one (spread over all entries, as they are for
    networks) and zero (on few), but which products do not tell, and is biased in a complement.

    Raises `InputError` for arguments out of range and for `pairs` that are no eigenpairs of A, `TreeError` for those of
    another structure, `NonFiniteError`, naming the step, for a product with NaN, `TransformError` inside a torch.func
    transform, and `NotConverged` where products prove not to be symmetric.

    S. Ubaru, J. Chen and Y. Saad, SIAM J. Matrix Anal. Appl. 38 (2017); L. Lin, Y. Saad and C. Yang, SIAM Review 58
    (2016); for networks B. Ghorbani, S. Krishnan and Y. Xiao, ICML 2019; G. Golub and G. Meurant, Matrices, Moments and
    Quadrature with Applications (2010).
    """
    begun = time.perf_counter()
    found = probe(A, num_probes, num_steps, pairs, seed, block_size, progress)
    return _density(found, time.perf_counter() - begun)


def _density(found: Probed, seconds: float) -> Density:
    nodes, weights = gauss(found.alphas, found.betas, band.alive(found.betas))
    none = torch.empty(0, dtype=torch.float64)
    raw = Density(
        grid=none,
        density=none,
        band=none.expand(2, 0),
        nodes=nodes,
        weights=weights * (1 - len(found.values) / found.size),
        values=found.values,
        residuals=found.residuals,
        alphas=found.alphas,
        betas=found.betas,
        width=0.0,
        threshold=None,
        n=found.size,
        noise=found.noise,
        matvecs=found.matvecs,
        passes=found.passes,
        seconds=seconds,
        seed=found.seed,
    )
    return raw.on()
