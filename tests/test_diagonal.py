"""The diagonal: without bias, each entry as far off as it says, exact where it can be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from eigenfunc import tree
from eigenfunc.errors import InputError, NonFiniteError
from eigenfunc.operator import LinearOperator, aslinearoperator
from eigenfunc.stochastic.diagonal import diagonal
from tests.helpers import example_spectra, nested, on_tree, rotated, symmetric, vector

METHODS = ["hutchinson", "xdiag"]
SEEDS = 200
N = 40

SPECTRA = example_spectra(N)
MATRICES = {name: rotated(values, 3) for name, values in SPECTRA.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_entries_are_unbiased_and_in_their_intervals(spectrum: str, method: str) -> None:
    A, truth = aslinearoperator(MATRICES[spectrum]), MATRICES[spectrum].diagonal()
    found = [diagonal(A, num_matvecs=24, method=method, seed=seed) for seed in range(SEEDS)]
    inside = []
    for estimate in found:
        low, high = estimate.interval()
        inside.append((low <= truth) & (truth <= high))
    assert 0.9 <= float(torch.stack(inside).double().mean()) <= 0.99
    off = torch.stack([estimate.value - truth for estimate in found])
    assert (off.mean(0).abs() < 5 * off.std(0) / math.sqrt(SEEDS)).all()
    claimed = torch.stack([estimate.stderr for estimate in found]).square().mean().sqrt()
    assert 0.9 < float(claimed / off.square().mean().sqrt()) < 1.5


def test_the_intervals_of_the_regression_hold_exactly() -> None:
    """Student's t of an entry has its distribution for as few as three probes, whatever the matrix."""
    A, truth = aslinearoperator(MATRICES["outliers"]), MATRICES["outliers"].diagonal()
    inside = []
    for seed in range(1000):
        low, high = diagonal(A, num_matvecs=3, method="hutchinson", seed=seed).interval(0.8)
        inside.append((low <= truth) & (truth <= high))
    assert abs(float(torch.stack(inside).double().mean()) - 0.8) < 0.01


def test_xdiag_falls_faster_on_a_falling_spectrum() -> None:
    A, truth = aslinearoperator(MATRICES["power law"]), MATRICES["power law"].diagonal()

    def error(method: str, count: int) -> float:
        off = [diagonal(A, num_matvecs=count, method=method, seed=seed).value - truth for seed in range(40)]
        return float(torch.stack(off).square().mean().sqrt())

    slopes = {m: math.log(error(m, 36) / error(m, 9)) / math.log(4) for m in METHODS}
    assert -0.75 < slopes["hutchinson"] < -0.35
    assert slopes["xdiag"] < -1.0


@pytest.mark.parametrize("method", METHODS)
@given(n=st.integers(1, 12), extra=st.integers(0, 20), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_n_products_tell_everything(method: str, n: int, extra: int, seed: int) -> None:
    A = symmetric(n, seed)
    found = diagonal(A, num_matvecs=n + extra, method=method, seed=seed)
    assert found.dof == math.inf
    assert found.matvecs == n + 2
    assert ((found.value - A.diagonal()).abs() <= found.stderr + 1e-300).all()
    assert (found.stderr <= 1e-14 * torch.linalg.vector_norm(A, dim=0) + 1e-300).all()  # as the rounding of A e_j is


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(rank=st.integers(0, 4), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_xdiag_is_exact_for_a_matrix_of_small_rank(dtype: torch.dtype, rank: int, seed: int) -> None:
    values = torch.cat([vector(rank, seed), torch.zeros(30 - rank)])
    A = rotated(values, seed).to(dtype)
    found = diagonal(A, num_matvecs=18, method="xdiag", seed=seed)
    assert (found.value - A.diagonal()).abs().max() <= 300 * torch.finfo(dtype).eps * values.abs().sum()
    assert torch.isfinite(found.stderr).all()


def test_the_regression_is_exact_for_a_diagonal_matrix() -> None:
    values = torch.cat([torch.randn(99, generator=torch.Generator().manual_seed(0)), torch.zeros(1)])
    found = diagonal(LinearOperator(lambda v: values * v, values), num_matvecs=5, method="hutchinson", seed=0)
    assert ((found.value - values).abs() <= found.stderr).all()
    assert (found.stderr <= 1e-6 * values.abs()).all()


def test_blocks_of_probes_are_joined_to_one_regression() -> None:
    A, drawn = rotated(torch.linspace(-1, 1, 60).double(), 1), []

    def block(vs: Tensor) -> Tensor:
        drawn.append(vs)
        return vs @ A

    found = diagonal(LinearOperator(lambda v: A @ v, A[0], block), num_matvecs=50, method="hutchinson", seed=0)
    z = torch.cat(drawn)
    assert [len(vs) for vs in drawn] == [32, 18]
    slope = (z * (z @ A)).sum(0) / (z * z).sum(0)
    variance = ((z @ A - slope * z) ** 2).sum(0) / 49 / (z * z).sum(0)
    assert torch.allclose(found.value, slope, rtol=1e-12)
    assert torch.allclose(found.stderr, variance.sqrt(), rtol=1e-9)


def test_the_errors_of_xdiag_are_right_for_blocks_of_probes_too() -> None:
    A = rotated(torch.linspace(-1, 1, 200).double(), 1)
    found = diagonal(A, num_matvecs=70, seed=0)
    assert 0.8 < float(((found.value - A.diagonal()) / found.stderr).square().mean().sqrt()) < 1.2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "scales"), [(torch.float64, (1e-200, 1e200)), (torch.float32, (1e-25, 1e25))])
def test_the_scale_of_the_matrix_does_not_matter(method: str, dtype: torch.dtype, scales: tuple[float, float]) -> None:
    A = MATRICES["power law"].to(dtype)
    plain = diagonal(A, num_matvecs=12, method=method, seed=5)
    for scale in scales:
        found = diagonal(A * scale, num_matvecs=12, method=method, seed=5)
        tolerance = 1e4 * torch.finfo(dtype).eps
        assert ((found.value / scale - plain.value).abs() <= tolerance * plain.value.abs().max()).all()
        assert ((found.stderr / scale - plain.stderr).abs() <= tolerance * plain.stderr.max()).all()


@pytest.mark.parametrize("method", METHODS)
def test_values_and_errors_are_trees_in_float64(method: str) -> None:
    A = MATRICES["outliers"]
    B = on_tree(A.float(), nested(N, torch.float32))
    found = diagonal(B, num_matvecs=20, method=method, seed=1)
    dense = diagonal(A, num_matvecs=20, method=method, seed=1)
    low, high = found.interval()
    assert found.value["z"].shape == (2, 3)
    assert found.value["a"][1].dtype == torch.float64
    for part, whole in ((found.value, dense.value), (low, dense.interval()[0]), (high, dense.interval()[1])):
        flat: Tensor = torch.cat([leaf.flatten() for leaf in tree.leaves(part)])
        assert (flat - whole).abs().max() < 1e-4 * whole.abs().max()


def test_seeds_reproduce_and_are_told() -> None:
    A = MATRICES["flat"]
    before = torch.get_rng_state()
    free = diagonal(A, num_matvecs=6)
    again = diagonal(A, num_matvecs=6, seed=free.seed)
    assert torch.equal(free.value, again.value)
    assert not torch.equal(free.value, diagonal(A, num_matvecs=6, seed=free.seed + 1).value)
    assert torch.equal(torch.get_rng_state(), before)


def test_refusals() -> None:
    with pytest.raises(InputError, match="num_matvecs"):
        diagonal(MATRICES["flat"], num_matvecs=1, method="hutchinson")
    with pytest.raises(InputError, match="xdiag"):
        diagonal(MATRICES["flat"], num_matvecs=10, method="xtrace")
    with pytest.raises(NonFiniteError):
        diagonal(LinearOperator(lambda v: v / 0, torch.zeros(9)), num_matvecs=4)
