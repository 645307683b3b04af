"""How flat a minimum is, by the measures in use, each with its error: one call, one table."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from eigenfunc import tree
from eigenfunc.certificate import positive, seeded, whole
from eigenfunc.curvature.ggn import ggn
from eigenfunc.curvature.hessian import hessian
from eigenfunc.curvature.products import Loss
from eigenfunc.eigsh import eigsh
from eigenfunc.errors import InputError
from eigenfunc.nearby import Ascent, Rises, average_sharpness, worst_sharpness
from eigenfunc.solution import Solution
from eigenfunc.stochastic.estimate import Estimate
from eigenfunc.stochastic.functions import effective_dimension
from eigenfunc.stochastic.trace import trace
from eigenfunc.tree import Tree
from eigenfunc.trust_region import Peak, peak

_STEPS = 16  # of Lanczos for each probe of the effective dimension
_SHARE = 0.01  # of λmax: the effective dimension counts directions of more curvature


@dataclass(frozen=True, eq=False)
class Flatness:
    """Measures of flatness at one point, each with its error. With the length of δ in the units of the parameters:

    n              number of parameters
    loss           L(θ) over the data
    gradient_norm  ‖∇L(θ)‖. The measures of curvature mean flatness only where it is small
    solution       the certified top eigenpair of the Hessian H: λmax is `lambda_max`, within `lambda_bound`
    trace          tr H, estimated without bias: Σ λ_i (the average one is `mean_curvature`, tr H / n)
    effective_dimension   Σ λ_i/(λ_i + delta) over the eigenvalues of `dimension_of`: how many directions are curved
                   more than delta, softly counted (D. MacKay, Neural Comput. 4, 1992). None where that matrix has
                   eigenvalues below zero, which leaves it without meaning
    worst          the largest rise found over ‖δ‖ ≤ rho by gradient ascent, and that of the single step of SAM: lower
                   bounds of max L(θ + δ) − L(θ), up to the noise of the loss (P. Foret et al., Sharpness-aware
                   minimization, ICLR 2021). Nothing that evaluates the loss at points bounds it from above
    model          the maximum of ⟨∇L, δ⟩ + ½ ⟨δ, H δ⟩ over ‖δ‖ ≤ rho, between two rigorous bounds. It is off that of
                   the loss by at most M rho³/6 either way, M the Lipschitz constant of H, which is not known: so it
                   bounds nothing of the loss
    average        E L(θ + δ) − L(θ), δ uniform in the ball ‖δ‖ ≤ rho, or Gaussian with standard deviation sigma
    seed           of all random numbers

    None but the worst and the average rise depend on more than derivatives at θ. All change under rescalings that
    leave the network's function as it is (L. Dinh et al., Sharp minima can generalize for deep nets, ICML 2017), so
    compare them only within one parametrisation: see docs/flatness.md.
    """

    n: int
    loss: float
    gradient_norm: float
    solution: Solution
    trace: Estimate[float]
    effective_dimension: Estimate[float] | None
    dimension_of: str
    delta: float | None
    rho: float
    worst: Ascent
    model: Peak
    average: Estimate[float]
    sigma: float | None
    seed: int

    @property
    def lambda_max(self) -> float:
        return float(self.solution.values[0])

    @property
    def lambda_bound(self) -> float:
        """λmax is within this of `lambda_max`."""
        return float(self.solution.bounds[0])

    @property
    def mean_curvature(self) -> Estimate[float]:
        """tr H / n, the mean of the eigenvalues."""
        return replace(self.trace, value=self.trace.value / self.n, stderr=self.trace.stderr / self.n)

    def __str__(self) -> str:
        """A table: each measure, its value, its error and what that is."""
        rows = [
            ("λmax", _number(self.lambda_max), f"± {self.lambda_bound:.1e}", "certified bound"),
            ("trace", *_interval(self.trace)),
            ("trace / n", *_interval(self.mean_curvature)),
        ]
        if self.effective_dimension is None:
            why = "λmax is not positive" if self.delta is None else f"the {self.dimension_of} has eigenvalues below 0"
            rows.append(("effective dimension", "none", "", why))
        else:
            value, error, kind = _interval(self.effective_dimension)
            rows.append(("effective dimension", value, error, f"{kind}; {self.dimension_of}, delta = {self.delta:.3g}"))
        ball = f"‖δ‖ ≤ {self.rho:g}"
        noise = f"± {self.worst.noise:.1e}"
        spread = ball if self.sigma is None else f"σ = {self.sigma:g}"
        middle, half = (self.model.low + self.model.high) / 2, (self.model.high - self.model.low) / 2
        rows += [
            (f"worst rise, {ball}", f"≥ {_number(self.worst.value)}", noise, "lower bound, by gradient ascent"),
            ("  one step of SAM", f"≥ {_number(self.worst.one_step)}", noise, "lower bound"),
            ("  quadratic model", _number(middle), f"± {half:.1e}", "rigorous for the model, no bound of the loss"),
            (f"average rise, {spread}", *_interval(self.average)),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        head = f"n = {self.n:,}, loss {_number(self.loss)}, ‖gradient‖ {_number(self.gradient_norm)}, seed {self.seed}"
        lines = [
            f"{name.ljust(widths[0])}  {value.rjust(widths[1])}  {error.ljust(widths[2])}  {kind}"
            for name, value, error, kind in rows
        ]
        return "\n".join([head, *lines])


def flatness(
    loss: Loss,
    params: Tree,
    data: Any,
    *,
    rho: float = 0.05,
    sigma: float | None = None,
    delta: float | None = None,
    tol: float = 1e-3,
    num_matvecs: int = 128,
    num_samples: int = 32,
    num_steps: int = 10,
    seed: int | None = None,
) -> Flatness:
    """λmax, trace, effective dimension, worst-case and average sharpness of a loss, each with its error.

    loss, params, data  as for `hessian`: the weighted mean (or sum) over all batches
    rho          radius of the ball of displacements, in units of ‖params‖
    sigma        standard deviation of each entry of Gaussian displacements, for the average rise; default: they are
                 uniform in the ball
    delta        in units of the curvature, the prior precision say; default: λmax/100
    tol          of λmax, relative
    num_matvecs  products for the trace, and as many for the effective dimension, in chains of 16
    num_samples  pairs of displacements for the average rise: see `average_sharpness`
    num_steps    gradients for the worst rise: see `worst_sharpness`
    seed         of all random numbers; default: a fresh one, told in the result

    The effective dimension is that of the Gauss–Newton matrix, semidefinite for the usual losses, where the loss is an
    `Objective` of model and criterion, and else of the Hessian. What each measure means and is worth: `Flatness`.

    Nothing of the model, its buffers, gradients and flags, or the global random state changes. Raises `InputError` for
    arguments out of range and where displacements drown in the rounding of the parameters, both before the first
    product; `NotConverged` where λmax cannot be certified; and what `hessian` and `average_sharpness` raise.
    """
    rho = positive(rho, "rho")
    sigma = None if sigma is None else positive(sigma, "sigma")
    delta = None if delta is None else positive(delta, "delta")
    for value, what, least in ((num_matvecs, "num_matvecs", 4), (num_samples, "num_samples", 2)):
        whole(value, what, least)
    whole(num_steps, "num_steps", 0)
    rises = Rises(loss, params, data)
    generator, seed = seeded(seed)
    rises.check(rho, generator)
    if sigma is not None:
        rises.check(sigma * math.sqrt(rises.size), generator)
    H = hessian(loss, params, data)
    solution = eigsh(H, 1, which="LA", tol=tol, seed=seed)
    highest = float(solution.values[0] + solution.bounds[0])
    if delta is None and float(solution.values[0]) > float(solution.bounds[0]):
        delta = _SHARE * float(solution.values[0])
    curved = loss if getattr(loss, "criterion", None) is not None and hasattr(loss, "predict") else None
    matrix = H if curved is None else ggn(curved, params, data)
    slope = rises.gradient()
    model = peak(
        H,
        tree.unravel(slope, H.like),
        rho,
        top=highest,
        top_vector=tree.row(solution.vectors, 0),
        seed=seed,
    )
    ridge = [model.offset, -model.offset]  # where the slope is small the model does not tell its two ends apart
    return Flatness(
        n=H.size,
        loss=float(rises.losses(slope.new_zeros(0, H.size))[0]),
        gradient_norm=float(tree.length(slope)),
        solution=solution,
        trace=trace(H, num_matvecs=num_matvecs, seed=seed),
        effective_dimension=_dimension(matrix, delta, num_matvecs, seed),
        dimension_of="Hessian" if curved is None else "Gauss–Newton matrix",
        delta=delta,
        rho=rho,
        worst=worst_sharpness(loss, params, data, rho=rho, num_steps=num_steps, starts=ridge, seed=seed),
        model=model,
        average=average_sharpness(loss, params, data, rho=rho, sigma=sigma, num_samples=num_samples, seed=seed),
        sigma=sigma,
        seed=seed,
    )


def _dimension(matrix: Any, delta: float | None, num_matvecs: int, seed: int) -> Estimate[float] | None:
    if delta is None:
        return None
    probes = max(num_matvecs // _STEPS, 2)
    try:
        return effective_dimension(matrix, delta=delta, num_probes=probes, num_steps=_STEPS, seed=seed)
    except InputError:  # a Ritz value below zero
        return None


def _interval(estimate: Estimate[float]) -> tuple[str, str, str]:
    """Value, half the 95% interval, and what it is."""
    low, high = estimate.interval()
    kind = "exact up to rounding" if math.isinf(estimate.dof) else "95% interval, from samples"
    return _number(estimate.value), f"± {(high - low) / 2:.1e}", kind


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "−", 1) if value < 0 else f"{value:.6g}"
