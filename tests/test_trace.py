"""The trace and the Frobenius norm: without bias, as far off as they say, exact where they can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor
from torch.func import vmap

from eigenfunc.errors import InputError, NonFiniteError, TransformError, TreeError
from eigenfunc.operator import LinearOperator, aslinearoperator
from eigenfunc.stochastic.estimate import Estimate, quantile
from eigenfunc.stochastic.trace import frobenius_norm, trace
from tests.helpers import covered, example_spectra, nested, on_tree, rotated, symmetric, vector

METHODS = ["hutchinson", "hutch++", "xtrace"]
SEEDS = 200
N = 40

SPECTRA = example_spectra(N)
MATRICES = {name: rotated(values, 3) for name, values in SPECTRA.items()}


def errors(run: Callable[..., Estimate[float]], truth: float, count: int) -> Tensor:
    return torch.tensor([run(seed=seed).value - truth for seed in range(count)]).double()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_trace_is_unbiased_and_in_its_interval(spectrum: str, method: str) -> None:
    A, truth = aslinearoperator(MATRICES[spectrum]), float(SPECTRA[spectrum].sum())
    found = [trace(A, num_matvecs=24, method=method, seed=seed) for seed in range(SEEDS)]
    assert 0.9 <= covered(found, truth) <= 0.99
    off = torch.tensor([estimate.value - truth for estimate in found])
    assert abs(float(off.mean())) < 4 * float(off.std()) / math.sqrt(SEEDS)
    assert 0.8 < float(torch.tensor([estimate.stderr for estimate in found]).square().mean().sqrt() / off.std()) < 1.5


@pytest.mark.parametrize("count", [6, 8, 16, 30])
@pytest.mark.parametrize("rest", [0.0, 0.001, 0.1])
def test_hutchinsons_interval_holds_for_the_skew_samples_of_nearly_rank_one(rest: float, count: int) -> None:
    values = torch.cat([torch.ones(1), rest * torch.linspace(0, 1, N - 1)]).double()
    A, truth = aslinearoperator(rotated(values, 3)), float(values.sum())
    found = [trace(A, num_matvecs=count, method="hutchinson", seed=seed) for seed in range(SEEDS)]
    assert 0.9 <= covered(found, truth) <= 0.99


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_frobenius_norm_is_in_its_interval(spectrum: str) -> None:
    A, truth = aslinearoperator(MATRICES[spectrum]), float(torch.linalg.vector_norm(SPECTRA[spectrum]))
    found = [frobenius_norm(A, num_matvecs=30, seed=seed) for seed in range(SEEDS)]
    assert 0.9 <= covered(found, truth) <= 0.99
    off = torch.tensor([estimate.value - truth for estimate in found])
    assert abs(float(off.mean())) < 0.2 * float(off.std()) + 4 * float(off.std()) / math.sqrt(SEEDS)


def test_the_samples_of_xtrace_are_correlated_and_that_is_counted() -> None:
    """On a flat spectrum with many probes the spread of the samples alone is a third too small."""
    A, truth = aslinearoperator(MATRICES["flat"]), float(SPECTRA["flat"].sum())
    found = [trace(A, num_matvecs=36, seed=seed) for seed in range(SEEDS)]
    off = torch.tensor([estimate.value - truth for estimate in found])
    claimed = torch.tensor([estimate.stderr for estimate in found]).square().mean().sqrt()
    assert 0.9 < float(claimed / off.square().mean().sqrt()) < 1.2


def test_errors_fall_faster_than_hutchinsons() -> None:
    """rms error ∝ products^slope on a spectrum that falls as i^(−1.5): −1/2, against −1.5 or so."""
    A, truth = aslinearoperator(MATRICES["power law"]), float(SPECTRA["power law"].sum())
    slopes = {}
    for method in METHODS:
        few, many = (
            float(errors(partial(trace, A, num_matvecs=m, method=method), truth, 60).square().mean().sqrt())
            for m in (9, 36)
        )
        slopes[method] = math.log(many / few) / math.log(4)
    assert -0.7 < slopes["hutchinson"] < -0.3
    assert slopes["hutch++"] < -1.0
    assert slopes["xtrace"] < -1.0


@pytest.mark.parametrize("estimator", [partial(trace, method=method) for method in METHODS] + [frobenius_norm])
@pytest.mark.parametrize("extra", [0, 1, 50])
@given(n=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_n_products_tell_everything(estimator: Callable[..., Estimate[float]], extra: int, n: int, seed: int) -> None:
    A = symmetric(n, seed)
    found = estimator(A, num_matvecs=n + extra, seed=seed)
    truth = float(torch.linalg.matrix_norm(A)) if estimator is frobenius_norm else float(A.diagonal().sum())
    assert found.dof == math.inf
    assert found.matvecs == n + 2
    assert abs(found.value - truth) <= found.stderr <= 1e-13 * float(A.abs().sum()) + 1e-300


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("estimator", [trace, partial(trace, method="hutch++"), frobenius_norm])
@given(rank=st.integers(0, 4), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_a_matrix_of_small_rank_is_exact(
    estimator: Callable[..., Estimate[float]], dtype: torch.dtype, rank: int, seed: int
) -> None:
    values = torch.cat([vector(rank, seed), torch.zeros(30 - rank)])
    A = rotated(values, seed).to(dtype)
    found = estimator(A, num_matvecs=18, seed=seed)
    truth = float(torch.linalg.matrix_norm(A.double())) if estimator is frobenius_norm else float(A.double().trace())
    eps = torch.finfo(dtype).eps
    assert math.isfinite(found.stderr)
    assert abs(found.value - truth) <= 2 * found.stderr + 1e-300
    assert found.stderr <= 1000 * eps * float(values.abs().sum())


@pytest.mark.parametrize("method", METHODS)
def test_multiples_of_the_identity_are_exact(method: str) -> None:
    found = trace(-2.5 * torch.eye(50).double(), num_matvecs=8, method=method, seed=0)
    assert abs(found.value + 125) <= found.stderr < 1e-10


@pytest.mark.parametrize("estimator", [partial(trace, method=method) for method in METHODS] + [frobenius_norm])
@pytest.mark.parametrize(("dtype", "scales"), [(torch.float64, (1e-200, 1e200)), (torch.float32, (1e-25, 1e25))])
def test_the_scale_of_the_matrix_does_not_matter(
    estimator: Callable[..., Estimate[float]], dtype: torch.dtype, scales: tuple[float, float]
) -> None:
    A = MATRICES["power law"].to(dtype)
    plain = estimator(A, num_matvecs=12, seed=5)
    for scale in scales:
        found = estimator(A * scale, num_matvecs=12, seed=5)
        tolerance = 1e4 * torch.finfo(dtype).eps
        assert math.isclose(found.value / scale, plain.value, rel_tol=tolerance)
        assert math.isclose(found.stderr / scale, plain.stderr, rel_tol=max(tolerance, 1e-9))


@pytest.mark.parametrize("method", METHODS)
def test_a_tree_in_float32_gives_what_the_dense_matrix_gives(method: str) -> None:
    A = MATRICES["outliers"]
    B = on_tree(A.float(), nested(N, torch.float32))
    found = trace(B, num_matvecs=20, method=method, seed=1)
    dense = trace(A, num_matvecs=20, method=method, seed=1)
    assert math.isclose(found.value, dense.value, rel_tol=1e-4)
    assert found.matvecs == dense.matvecs <= 22


def test_float32_is_in_its_interval_too() -> None:
    A = MATRICES["power law"].float()
    found = [trace(A, num_matvecs=20, seed=seed) for seed in range(SEEDS)]
    assert 0.9 <= covered(found, float(A.double().trace())) <= 0.99


def test_many_probes_go_in_one_sweep_and_no_more_than_32() -> None:
    sizes = []

    def block(vs: Tensor) -> Tensor:
        sizes.append(len(vs))
        return 2 * vs

    A = LinearOperator(lambda v: 2 * v, torch.zeros(1000), block)
    trace(A, num_matvecs=70, method="hutchinson", seed=0)
    assert sizes == [32, 32, 6]


def test_seeds_reproduce_and_are_told_and_nothing_else_is_drawn_from() -> None:
    A = MATRICES["flat"]
    before = torch.get_rng_state()
    one, two, other = trace(A, num_matvecs=8, seed=3), trace(A, num_matvecs=8, seed=3), trace(A, num_matvecs=8)
    again = trace(A, num_matvecs=8, seed=other.seed)
    assert one.value == two.value != other.value == again.value
    assert torch.equal(torch.get_rng_state(), before)


@given(dof=st.floats(1, 500), level=st.floats(0.01, 0.9999))
@example(dof=1.05, level=0.9999)
@settings(max_examples=100, deadline=None)
def test_quantiles_are_students(dof: float, level: float) -> None:
    assert math.isclose(quantile(dof, level), scipy.stats.t.ppf((1 + level) / 2, dof), rel_tol=1e-8)


def test_an_infinite_number_of_degrees_of_freedom_is_normal() -> None:
    low, high = Estimate(1.0, 2.0, math.inf, 1, 0).interval(0.9)
    reach = 2 * scipy.stats.norm.ppf(0.95)
    assert (low, high) == pytest.approx((1 - reach, 1 + reach), rel=1e-12)


def test_refusals() -> None:
    A = MATRICES["flat"]
    for arguments in ({"num_matvecs": 3}, {"num_matvecs": 0}, {"num_matvecs": 10, "method": "girard"}):
        with pytest.raises(InputError):
            trace(A, seed=0, **arguments)
    with pytest.raises(InputError, match="level"):
        trace(A, num_matvecs=8, seed=0).interval(1.0)
    with pytest.raises(NonFiniteError):
        trace(LinearOperator(lambda v: v * float("nan"), torch.zeros(9)), num_matvecs=4)
    with pytest.raises(TreeError):
        trace(LinearOperator(lambda v: v[:3], torch.zeros(9)), num_matvecs=4)
    with pytest.raises(TransformError, match="trace_probes"):
        vmap(lambda c: torch.tensor(trace(lambda v: c * v, num_matvecs=4).value))(torch.ones(3))
