"""Traces of functions by Lanczos quadrature: in their intervals, exact where they can be, refused where undefined."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from eigenfunc.errors import InputError, NonFiniteError
from eigenfunc.operator import LinearOperator, aslinearoperator
from eigenfunc.stochastic.estimate import Estimate
from eigenfunc.stochastic.functions import effective_dimension, logdet, moments
from tests.helpers import covered, example_spectra, nested, on_tree, rotated, vector

SEEDS = 200
N = 30

SPECTRA = example_spectra(N)
MATRICES = {name: rotated(values, 3) for name, values in SPECTRA.items()}
FUNCTIONS: dict[str, tuple[Callable[..., Estimate[float]], Callable[[Tensor], Tensor]]] = {
    "logdet": (partial(logdet, delta=0.1), lambda x: torch.log(x + 0.1)),
    "effective dimension": (partial(effective_dimension, delta=0.1), lambda x: x / (x + 0.1)),
}


@pytest.mark.parametrize(
    ("spectrum", "name"),
    [("flat", "logdet"), ("outliers", "logdet"), ("power law", "effective dimension")],
)
def test_the_truth_is_in_the_interval(spectrum: str, name: str) -> None:
    estimator, f = FUNCTIONS[name]
    A, truth = aslinearoperator(MATRICES[spectrum]), float(f(SPECTRA[spectrum]).sum())
    found = [estimator(A, num_probes=12, num_steps=6, seed=seed) for seed in range(SEEDS)]
    assert 0.9 <= covered(found, truth) <= 0.99
    off = torch.tensor([estimate.value - truth for estimate in found])
    assert abs(float(off.mean())) < 4 * float(off.std()) / math.sqrt(SEEDS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_error_of_too_few_steps_is_part_of_the_interval(name: str) -> None:
    """So many probes that the quadrature's bias is all there is."""
    estimator = partial({"logdet": logdet}.get(name, effective_dimension), delta=1e-4)
    values = torch.logspace(-4, 1, 50).double()
    truth = float((torch.log(values + 1e-4) if name == "logdet" else values / (values + 1e-4)).sum())
    for steps in (1, 2, 4, 6, 10, 20, 40):
        found = estimator(rotated(values, 0), num_probes=50, num_steps=steps, seed=0)
        assert found.dof == math.inf
        assert abs(found.value - truth) <= 1.96 * found.stderr
    assert found.stderr < 1e-3 * abs(truth)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(n=st.integers(1, 10), extra=st.integers(0, 20), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_n_probes_and_n_steps_tell_everything(name: str, n: int, extra: int, seed: int) -> None:
    estimator, f = FUNCTIONS[name]
    values = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[: seed % 3] = 0.5
    found = estimator(rotated(values, seed), num_probes=n + extra, num_steps=max(n + extra, 4), seed=seed)
    truth = float(f(values).sum())
    assert abs(found.value - truth) <= found.stderr + 1e-300
    assert found.stderr <= 1e-12 * n


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_scale_of_the_matrix_does_not_matter(scale: float) -> None:
    A = MATRICES["power law"]
    plain = effective_dimension(A, delta=0.1, num_probes=6, num_steps=8, seed=1)
    scaled = effective_dimension(A * scale, delta=0.1 * scale, num_probes=6, num_steps=8, seed=1)
    assert math.isclose(scaled.value, plain.value, rel_tol=1e-10)
    grown = logdet(A * scale, delta=0.1 * scale, num_probes=6, num_steps=8, seed=1)
    before = logdet(A, delta=0.1, num_probes=6, num_steps=8, seed=1)
    assert math.isclose(grown.value, before.value + N * math.log(scale), rel_tol=1e-10)


def test_special_matrices() -> None:
    assert effective_dimension(torch.zeros(20, 20), delta=1.0, num_probes=4).value == 0.0
    ones = logdet(3 * torch.eye(20).double(), num_probes=4)
    assert abs(ones.value - 20 * math.log(3)) <= ones.stderr < 1e-10
    rank_one = effective_dimension(torch.ones(20, 20).double(), delta=20.0, num_probes=20)
    assert abs(rank_one.value - 0.5) <= 2 * rank_one.stderr < 1e-12


def test_a_tree_in_float32_gives_what_the_dense_matrix_gives() -> None:
    A = MATRICES["power law"]
    B = on_tree(A.float(), nested(N, torch.float32))
    for estimator in (partial(logdet, delta=0.1), partial(effective_dimension, delta=0.1)):
        found = estimator(B, num_probes=6, num_steps=10, seed=1)
        dense = estimator(A, num_probes=6, num_steps=10, seed=1)
        assert math.isclose(found.value, dense.value, rel_tol=1e-5)
        assert found.matvecs == 62


def test_matrices_without_the_property_are_refused() -> None:
    A = rotated(torch.linspace(-0.5, 1, N).double(), 0)
    with pytest.raises(InputError, match=r"positive definite.*over 0\.5"):
        logdet(A, delta=0.25)
    with pytest.raises(InputError, match=r"semidefinite.*GGN"):
        effective_dimension(A, delta=0.25)
    assert logdet(A, delta=0.75, num_probes=4).value < 0
    singular = rotated(torch.linspace(0, 1, N).double(), 0)
    assert effective_dimension(singular, delta=0.1, num_probes=4).value > 0
    with pytest.raises(InputError, match="within rounding"):
        logdet(singular)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_moments_are_in_their_intervals(spectrum: str) -> None:
    A, values = aslinearoperator(MATRICES[spectrum]), SPECTRA[spectrum]
    runs = [moments(A, 5, num_probes=24, seed=seed) for seed in range(SEEDS)]
    for p in range(1, 6):
        assert 0.9 <= covered([run[p - 1] for run in runs], float((values**p).mean())) <= 0.99
    assert runs[0][0].matvecs == 3 * 24 + 2


@given(n=st.integers(1, 8), order=st.integers(1, 7), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_moments_from_n_probes_are_exact(n: int, order: int, seed: int) -> None:
    values = vector(n, seed)
    found = moments(rotated(values, seed), order, num_probes=n)
    assert len(found) == order
    for p, estimate in enumerate(found, start=1):
        assert abs(estimate.value - float((values**p).mean())) <= estimate.stderr
        assert estimate.stderr <= 1e-13 * n * float((values.abs() ** p).sum() + 1e-300)


def test_moments_scale_until_float64_ends() -> None:
    A = MATRICES["flat"]
    plain, scaled = moments(A, 3, seed=0), moments(A * 1e100, 3, seed=0)
    for p in range(1, 4):
        assert math.isclose(scaled[p - 1].value / 1e100**p, plain[p - 1].value, rel_tol=1e-12)
    for scale in (1e200, 1e-200):
        assert math.isclose(moments(A * scale, 1, seed=0)[0].value, plain[0].value * scale, rel_tol=1e-12)
        with pytest.raises(InputError, match="order 2"):
            moments(A * scale, 2, seed=0)


def test_refusals() -> None:
    A = MATRICES["flat"]
    for run in (
        lambda: logdet(A, delta=math.nan),
        lambda: logdet(A, num_probes=1),
        lambda: logdet(A, num_steps=0),
        lambda: effective_dimension(A, delta=0.0),
        lambda: moments(A, 0),
    ):
        with pytest.raises(InputError):
            run()
    with pytest.raises(NonFiniteError):
        logdet(LinearOperator(lambda v: v * math.inf, torch.zeros(9)))


def test_seeds_reproduce_and_are_told() -> None:
    A = MATRICES["power law"]
    before = torch.get_rng_state()
    free = logdet(A, delta=1.0, num_probes=4)
    assert logdet(A, delta=1.0, num_probes=4, seed=free.seed).value == free.value
    assert logdet(A, delta=1.0, num_probes=4, seed=free.seed + 1).value != free.value
    assert torch.equal(torch.get_rng_state(), before)
