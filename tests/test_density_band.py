"""Bands of spectral densities: that they hold what they promise, and how."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import scipy.stats
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from benchmarks.spectra import diagonal, hess
from eigenfunc import lanczos
from eigenfunc.krylov.quadrature import gauss
from eigenfunc.stochastic import band
from eigenfunc.stochastic.density import Density, spectral_density
from eigenfunc.testing import spectrum
from tests.helpers import rotated, vector


def share(values: Tensor, x: Tensor) -> Tensor:
    return (values[:, None] <= x).double().mean(0)


def groups(density: Density, size: int) -> list[Density]:
    """Many densities of `size` probes out of one of very many."""
    names = ("nodes", "weights", "alphas", "betas")
    return [
        replace(density, **{name: getattr(density, name)[i : i + size] for name in names})
        for i in range(0, len(density.nodes), size)
    ]


def smoothed(values: Tensor, density: Density) -> Tensor:
    """The exact spectrum through the kernel of `density`."""
    t, x = density.threshold, density.grid
    axis = (lambda y: y) if t is None else (lambda y: torch.asinh(y / t))
    slope = 1.0 if t is None else 1 / torch.sqrt(x**2 + t**2)
    kernel = torch.exp(-(((axis(x)[:, None] - axis(values)) / density.width) ** 2) / 2)
    return kernel.mean(1) * slope / (density.width * math.sqrt(2 * math.pi))


LAWS = [
    (kappa, fraction)
    for kappa in (1.0, 5.0, 100.0, 1e5)
    for fraction in (0.002, 0.03, 0.3, 0.5, 0.8, 0.99)
    if 0.5 <= kappa * fraction <= kappa - 0.5  # a single eigenvalue with a single probe has a half
]


@pytest.mark.parametrize(("kappa", "fraction"), LAWS)
def test_the_interval_holds_95_percent_of_its_beta_law(kappa: float, fraction: float) -> None:
    a, b = kappa * fraction, kappa * (1 - fraction)
    levels = torch.linspace(1e-4, 1 - 1e-4, 4001).double()
    seen = torch.from_numpy(scipy.stats.beta.ppf(levels.numpy(), a, b))
    low, high = band.interval(seen, seen, kappa)
    assert abs(((low <= fraction) & (fraction <= high)).double().mean() - 0.95) < 0.008
    assert ((low <= seen) & (seen <= high)).all()


def test_the_interval_is_that_of_clopper_and_pearson_by_scipy() -> None:
    seen, kappa = torch.tensor([0.1, 0.4, 0.9]).double(), 60.0
    low, high = band.interval(seen, seen, kappa)
    for x, lower, upper in zip(seen.tolist(), low.tolist(), high.tolist(), strict=True):
        assert abs(scipy.stats.beta.sf(x, kappa * lower, kappa * (1 - lower)) - 0.025) < 1e-3
        assert abs(scipy.stats.beta.cdf(x, kappa * upper, kappa * (1 - upper)) - 0.025) < 1e-3


def test_nothing_and_everything_have_intervals() -> None:
    seen = torch.tensor([0.0, 1.0]).double()
    low, high = band.interval(seen, seen, 50.0)
    assert low[0] == 0
    assert high[0] < 1e-10
    assert low[1] > 1 - 1e-10
    assert high[1] == 1


@given(
    n=st.integers(2, 40),
    m=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    family=st.sampled_from(["uniform", "outliers", "integers"]),
)
@settings(max_examples=60, deadline=None)
def test_the_measure_of_a_vector_lies_within_the_largest_step_of_its_gauss_rule(
    n: int, m: int, seed: int, family: str
) -> None:
    values = spectrum(family, n, seed)
    v = vector(n, seed)
    run = lanczos(lambda x: values * x, v / v.norm(), m)
    rule = gauss(run.alphas[None], run.betas[None], run.alive[None])
    ordered = values.sort().values
    x = torch.cat(
        [torch.linspace(-1, 1, 101).double() * (0.1 + 1.1 * values.abs().max()), (ordered[1:] + ordered[:-1]) / 2]
    )
    x = x[((x[:, None] - values).abs() > 1e-9).all(1)]
    exact = ((values[:, None] <= x) * (v**2)[:, None]).sum(0) / (v @ v)
    step = band.largest_step(run.alphas[None], run.betas[None], x[None])[0]
    assert ((exact - band.below(*rule, x[None])[0]).abs() <= step + 1e-10).all()
    if m > n:
        assert step.max() < 1e-6


SIX = torch.tensor([-1.0] + [0.0] * 11 + [0.1] * 20 + [0.2] * 5 + [1.0, 2.0]).double()
SPIKED = torch.cat([torch.tensor([-1.0, 1, 2, 3]), torch.linspace(0, 0.1, 96)]).double()
COVERED = {
    "six values, one probe": (SIX, 1, 6, [-0.5, 0.05, 0.15, 0.5, 1.5]),
    "outliers well apart from a bulk": (SPIKED, 2, 7, [-0.5, 0.5, 2.5]),
}


@pytest.mark.parametrize("case", COVERED)
def test_the_95_percent_band_holds_the_true_share_in_90_to_99_percent_of_200_runs(case: str) -> None:
    values, probes, steps, points = COVERED[case]
    many = spectral_density(rotated(values, 0), num_probes=200 * probes, num_steps=steps, seed=1)
    at = torch.tensor(points).double()
    truth, inside = share(values, at), torch.zeros(len(at)).double()
    for one in groups(many, probes):
        low, high = one.cdf(at)[1]
        inside += (low <= truth) & (truth <= high)
    assert (inside >= 180).all()
    assert (inside <= 198).all()


def test_within_a_bulk_and_at_an_eigenvalue_the_band_covers_what_the_rule_cannot_resolve() -> None:
    values = torch.cat([torch.tensor([1.0]), torch.linspace(0, 0.1, 199)]).double()
    many = spectral_density(rotated(values, 0), num_probes=30 * 4, num_steps=6, seed=1)
    at = torch.tensor([0.0, 0.02, 0.05, 0.08, 0.1, 1.0]).double()
    truth = share(values, at + 1e-12)
    for one in groups(many, 4):
        estimate, (low, high) = one.cdf(at)
        assert ((low <= truth) & (truth <= high))[1:4].all()
        assert low[-1] < 1
        assert high[-1] == 1
        assert ((low <= estimate) & (estimate <= high)).all()


@pytest.mark.parametrize("threshold", [None, 0.01])
def test_the_smoothed_density_of_the_true_eigenvalues_lies_in_the_band(threshold: float | None) -> None:
    values = hess(2000)
    density = spectral_density(diagonal(values), num_probes=5, num_steps=60, seed=0).on(threshold=threshold)
    truth = smoothed(values, density)
    matters = truth > 1e-3 * truth.max()
    inside = (density.band[0] <= truth) & (truth <= density.band[1])
    assert inside[matters].double().mean() > 0.85
    spacing = torch.gradient(density.grid)[0]
    assert ((density.density - truth).abs() * spacing).sum() < 0.06
    assert abs((density.density * spacing).sum() - 1) < 0.01


def test_the_band_of_a_kernel_too_narrow_for_the_steps_takes_in_the_error_of_the_quadrature() -> None:
    values = hess(2000)
    many = spectral_density(diagonal(values), num_probes=80, num_steps=20, seed=0)
    density = many.on(torch.linspace(-0.03, 0.02, 400), width=0.001)
    truth = smoothed(values, density)
    inside = (density.band[0] <= truth) & (truth <= density.band[1])
    assert (density.density - truth).abs().max() > 0.1 * truth.max()
    assert inside[truth > 1e-2 * truth.max()].double().mean() > 0.95
