"""The solver: certificates against dense float64 truth, invariances, hard spectra, counts of products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import eigenfunc
from benchmarks.spectra import diagonal, hess
from eigenfunc import eigsh
from eigenfunc.testing import FAMILIES, spectrum, strategies
from tests.helpers import Counted, assert_certified, rotated, vector

WHICH = ("LM", "LA", "SA", "BE")


@given(values=strategies.spectra(max_n=60), which=st.sampled_from(WHICH), data=st.data(), seed=st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_converged_values_lie_within_their_bounds_of_the_dense_truth(
    values: Tensor, which: Any, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(1, min(6, len(values))))
    dtype, tol = data.draw(st.sampled_from([(torch.float64, 1e-6), (torch.float64, 1e-9), (torch.float32, 1e-4)]))
    A = rotated(values, seed, dtype)
    assert_certified(eigsh(A, k, which=which, tol=tol, seed=seed), A, k, which)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", WHICH)
def test_hard_spectra_are_certified(family: str, which: Any) -> None:
    """Shifts, scales, signs and trees of such: test_contract."""
    sizes = FAMILIES[family].sizes
    A = rotated(spectrum(family, sizes[1] if sizes else 50, 0), 0)
    assert_certified(eigsh(A, 5, which=which, tol=1e-8, seed=0), A, 5, which)


@pytest.mark.parametrize("which", WHICH)
def test_all_eigenpairs_of_a_matrix_can_be_asked_for(which: Any) -> None:
    A = rotated(vector(25, 0), 0)
    assert_certified(eigsh(A, 25, which=which, tol=1e-10, seed=0), A, 25, which)


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float64, 200), (torch.float32, 25)])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_scales_give_the_same_relative_answer(dtype: torch.dtype, exponent: int, sign: int) -> None:
    A = rotated(1 / torch.arange(1, 81).double(), 0, dtype)
    c = 10.0 ** (sign * exponent)
    solution = eigsh(A * c, 4, which="LA", tol=1e-5, seed=0)
    assert ((solution.values / c - 1 / torch.arange(1, 5)).abs() <= solution.bounds / c).all()
    assert (solution.residuals / c < 1e-4).all()


def test_every_copy_of_a_multiple_eigenvalue_is_found_from_one_start_vector() -> None:
    values = torch.cat([torch.tensor([5.0, 5, 5, 4]), torch.linspace(0, 3, 396)]).double()
    for seed in range(20):
        solution = eigsh(diagonal(values), 4, which="LA", tol=1e-6, seed=seed)
        assert ((solution.values - values[:4]).abs() <= solution.bounds).all()


@pytest.mark.parametrize("seed", [33, *range(25)])
def test_copies_do_not_hide_among_the_coming_vectors(seed: int) -> None:
    counts = {-3: 1, -2: 5, -1: 2, 0: 4, 1: 6, 2: 10, 3: 5}
    values = torch.cat([torch.full((count,), float(value)) for value, count in counts.items()]).double()
    A = rotated(values[torch.randperm(33, generator=torch.Generator().manual_seed(seed))], seed)
    for which in WHICH:
        assert_certified(eigsh(A, 6, which=which, tol=1e-6, seed=seed), A, 6, which)


@pytest.mark.parametrize("start", ["eigenvector", "orthogonal to all that is wanted"])
def test_an_unlucky_start_vector_does_not_hide_what_is_wanted(start: str) -> None:
    values = torch.cat([torch.tensor([5.0, 4, 3]), torch.linspace(0, 1, 300)]).double()
    v0 = torch.zeros(303).double()
    if start == "eigenvector":
        v0[2] = 1
    else:
        v0[3:] = 1
    A = eigenfunc.aslinearoperator(lambda v: values * v, values)
    solution = eigsh(A, 3, which="LA", v0=v0, tol=1e-8, seed=0)
    assert ((solution.values - values[:3]).abs() <= solution.bounds).all()


def test_residuals_are_true_ones() -> None:
    A = diagonal(hess(5_000))
    solution = eigsh(A, 6, which="LA", tol=1e-3, seed=0)
    for value, x, residual in zip(solution.values, solution.vectors, solution.residuals, strict=True):
        fresh = torch.linalg.vector_norm(A(x) - value * x)
        assert abs(fresh - residual) < 1e-14
        assert fresh <= 1e-3 * value


# Products of thick restart at m = 1.5 k + 4 on this spectrum, for tolerances 1e-4, 1e-6, 1e-8 relative to the largest
# eigenvalue; those of `eigsh` are relative to each one, which asks for more.
COUNTS = {1: (8, 9, 11), 10: (34, 39, 43), 20: (56, 63, 69), 50: (152, 162, 173)}
# What the proof of completeness may take: the closer the next value is, relative to the spread, the more.
PROOFS = {1: 12, 10: 12, 20: 15, 50: 28}


@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_no_more_products_than_thick_restart_needs(k: int, index: int) -> None:
    spectrum, spent = hess(10_000), []
    for seed in range(3):
        solution = eigsh(diagonal(spectrum), k, which="LA", tol=(1e-4, 1e-6, 1e-8)[index], seed=seed)
        assert ((solution.values - spectrum[:k]).abs() <= solution.bounds).all()
        assert solution.stats.verification <= k + PROOFS[k]
        spent.append(solution.stats.matvecs - solution.stats.verification)
    assert sum(spent) / 3 <= 1.15 * COUNTS[k][index]


def test_both_ends_with_their_own_counts_come_falling() -> None:
    A = rotated(torch.linspace(-1, 2, 60).double() ** 3, 0)
    solution = eigsh(A, (3, 2), which="BE", tol=1e-8, seed=0)
    rising = torch.linalg.eigvalsh(A)
    truth = torch.cat([rising.flip(0)[:3], rising[:2].flip(0)])
    assert ((solution.values - truth).abs() <= solution.bounds).all()


def test_a_seed_reproduces_the_run_bit_by_bit_and_none_is_always_another() -> None:
    A = diagonal(hess(2_000))
    first, second = (eigsh(A, 3, which="LA", seed=5) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    fresh = {eigsh(A, 1, which="LA").stats.seed for _ in range(3)}
    assert len(fresh) == 3
    again = eigsh(A, 1, which="LA", seed=fresh.pop())
    assert again.success


def test_matvecs_count_every_call_of_the_operator() -> None:
    values = hess(1_000)
    product = Counted(lambda v: values * v)
    solution = eigsh(eigenfunc.aslinearoperator(product, values), 4, which="LA", seed=0)
    assert solution.stats.matvecs == product.calls
