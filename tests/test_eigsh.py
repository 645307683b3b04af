"""The solver: certificates against dense float64 truth, invariances, hard spectra, counts of products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import eigenfunc
from benchmarks.spectra import diagonal, hess
from eigenfunc import eigsh, tree
from tests.helpers import assert_certified, rotated

WHICH = ("LM", "LA", "SA", "BE")


@st.composite
def spectra(draw: st.DrawFn) -> Tensor:
    n = draw(st.integers(1, 60))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    i = torch.arange(1, n + 1).double()
    kind = draw(st.sampled_from(["gauss", "outliers", "multiple", "pairs", "integers", "low rank", "one value"]))
    return {
        "gauss": torch.randn(n, generator=g).double(),
        "outliers": torch.cat([1 / i[:8], 0.01 * torch.rand(n, generator=g).double()])[:n],
        "multiple": torch.cat([torch.ones(min(4, n)).double(), 0.8 * torch.rand(n, generator=g).double()])[:n],
        "pairs": torch.cat([i, -i])[:n] / n,
        "integers": torch.randint(-3, 4, (n,), generator=g).double(),
        "low rank": torch.where(i <= 3, 1 / i, 0.0),
        "one value": torch.full((n,), 2.0).double(),
    }[kind]


@given(values=spectra(), which=st.sampled_from(WHICH), data=st.data(), seed=st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_converged_values_lie_within_their_bounds_of_the_dense_truth(
    values: Tensor, which: Any, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(1, min(6, len(values))))
    dtype, tol = data.draw(st.sampled_from([(torch.float64, 1e-6), (torch.float64, 1e-9), (torch.float32, 1e-4)]))
    A = rotated(values, seed).to(dtype)
    A = (A + A.mT) / 2
    assert_certified(eigsh(A, k, which=which, tol=tol, seed=seed), A, k, which)


@given(values=spectra(), which=st.sampled_from(WHICH), shift=st.floats(-5, 5), power=st.integers(-6, 6))
@settings(max_examples=40, deadline=None)
def test_shift_and_scale_move_the_values_and_nothing_else(values: Tensor, which: Any, shift: float, power: int) -> None:
    A, k = rotated(values, 0), min(3, len(values))
    c = 10.0**power
    scaled = eigsh(c * A, k, which=which, tol=1e-8, seed=1)
    plain = eigsh(A, k, which=which, tol=1e-8, seed=1)
    slack = scaled.bounds / c + plain.bounds
    assert ((scaled.values.abs() / c - plain.values.abs()).abs() <= slack).all()
    if which != "LM":
        moved = eigsh(eigenfunc.aslinearoperator(A).shift(shift), k, which=which, tol=1e-8, seed=1)
        assert ((moved.values - shift - plain.values).abs() <= moved.bounds + plain.bounds).all()


@given(values=spectra(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_largest_of_a_matrix_are_the_smallest_of_its_negative(values: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(5, len(values))))
    A = rotated(values, 1)
    top, bottom = eigsh(A, k, which="LA", tol=1e-8, seed=0), eigsh(-A, k, which="SA", tol=1e-8, seed=0)
    assert ((top.values + bottom.values).abs() <= top.bounds + bottom.bounds).all()


@given(values=spectra(), which=st.sampled_from(["LM", "LA", "SA"]), data=st.data())
@settings(max_examples=40, deadline=None)
def test_k_values_are_the_first_of_k_plus_one(values: Tensor, which: Any, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(5, len(values))))
    if k == len(values):
        k -= 1
    if k == 0:
        return
    A = rotated(values, 2)
    few, more = eigsh(A, k, which=which, tol=1e-8, seed=0), eigsh(A, k + 1, which=which, tol=1e-8, seed=0)
    assert ((few.values.abs() - more.values[:k].abs()).abs() <= few.bounds + more.bounds[:k]).all()


@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_structure_of_the_tree_does_not_matter(cuts: list[int], seed: int) -> None:
    n = sum(cuts)
    A = rotated(torch.randn(n, generator=torch.Generator().manual_seed(seed)), seed)
    like = {f"{'zyxwv'[i]}": [torch.zeros(c, 1).double()] for i, c in enumerate(cuts)}
    B = eigenfunc.aslinearoperator(A, like)
    k = min(2, n)
    flat, nested = eigsh(A, k, tol=1e-9, seed=seed), eigsh(B, k, tol=1e-9, seed=seed)
    assert ((flat.values - nested.values).abs() <= flat.bounds + nested.bounds).all()
    assert tree.ravel(nested.vectors, like).shape == (k, n)


def wilkinson(n: int) -> Tensor:
    off = torch.ones(n - 1).double()
    return torch.diag((torch.arange(n) - n // 2).abs().double()) + torch.diag(off, 1) + torch.diag(off, -1)


def glued(glue: float) -> Tensor:
    A = torch.block_diag(wilkinson(21), wilkinson(21), wilkinson(21))
    for i in (20, 41):
        A[i, i + 1] = A[i + 1, i] = glue
    return A


def clement(n: int) -> Tensor:
    i = torch.arange(1, n).double()
    off = torch.sqrt(i * (n - i))
    return torch.diag(off, 1) + torch.diag(off, -1)


def hilbert(n: int) -> Tensor:
    i = torch.arange(n).double()
    return 1 / (i[:, None] + i[None] + 1)


HARD = {
    "Wilkinson 21": wilkinson(21),
    "Wilkinson 201": wilkinson(201),
    "glued Wilkinson 1e-8": glued(1e-8),
    "glued Wilkinson 1e-14": glued(1e-14),
    "Clement": clement(40),
    "Hilbert": hilbert(30),
    "identity": torch.eye(50).double(),
    "zero": torch.zeros(50, 50).double(),
    "rank one": torch.ones(50, 50).double(),
    "cluster": rotated(torch.cat([1 - 1e-6 * torch.arange(5).double(), torch.linspace(0, 0.5, 45).double()]), 0),
    "above": rotated(torch.cat([torch.ones(7), torch.linspace(0, 0.9, 43)]).double(), 0),
    "geometric": rotated(10.0 ** torch.linspace(0, -16, 40).double(), 0),
    "one by one": torch.tensor([[-2.0]]).double(),
    "two by two": torch.tensor([[1.0, 2.0], [2.0, -3.0]]).double(),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("which", WHICH)
def test_hard_cases_are_certified(name: str, which: Any) -> None:
    A = HARD[name]
    k = min(5, len(A))
    assert_certified(eigsh(A, k, which=which, tol=1e-8, seed=0), A, k, which)


@pytest.mark.parametrize("which", WHICH)
def test_all_eigenpairs_of_a_matrix_can_be_asked_for(which: Any) -> None:
    A = rotated(torch.randn(25, generator=torch.Generator().manual_seed(0)), 0)
    assert_certified(eigsh(A, 25, which=which, tol=1e-10, seed=0), A, 25, which)


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float64, 200), (torch.float32, 25)])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_scales_give_the_same_relative_answer(dtype: torch.dtype, exponent: int, sign: int) -> None:
    A = rotated(1 / torch.arange(1, 81).double(), 0).to(dtype)
    A = (A + A.mT) / 2
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
    for value, vector, residual in zip(solution.values, solution.vectors, solution.residuals, strict=True):
        fresh = torch.linalg.vector_norm(A(vector) - value * vector)
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
    calls = 0
    values = hess(1_000)

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return values * v

    solution = eigsh(eigenfunc.aslinearoperator(product, values), 4, which="LA", seed=0)
    assert solution.stats.matvecs == calls
