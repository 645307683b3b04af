"""Blocks, start vectors, half-precision bases, resuming: the ways of running `eigsh` beside the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from benchmarks.spectra import diagonal, hess
from eigenfunc import (
    Batches,
    LinearOperator,
    eigsh,
    functional_loss,
    hessian,
    lobpcg,
    power_iteration,
    subspace_iteration,
)
from eigenfunc.errors import InputError, TransformError
from eigenfunc.krylov import lanczos as kernel
from eigenfunc.plan import plan_for
from tests.helpers import assert_certified, cut, labelled, mlp, nested, normal, on_tree, rotated

WHICH = ("LM", "LA", "SA", "BE")


@given(n=st.integers(1, 70), b=st.integers(1, 6), which=st.sampled_from(WHICH), data=st.data())
@settings(max_examples=100, deadline=None)
def test_blocks_of_any_size_find_the_dense_truth(n: int, b: int, which: Any, data: st.DataObject) -> None:
    seed, k = data.draw(st.integers(0, 10_000)), data.draw(st.integers(1, min(5, n)))
    distinct = data.draw(st.integers(1, n))
    values = normal(distinct, seed=seed)[torch.arange(n) % distinct]
    A = rotated(values, seed)
    basis_size = data.draw(st.sampled_from([None, min(k + 3 + b, n), min(k + 3 + 2 * b, n)]))
    solution = eigsh(A, k, which=which, tol=1e-7, seed=seed, block_size=b, basis_size=basis_size, throw=False)
    if basis_size is None:
        assert solution.success
    if solution.success:
        assert_certified(solution, A, k, which)


def test_a_block_takes_its_products_together() -> None:
    sizes: list[int] = []
    values = hess(5_000)

    def block(vs: Tensor) -> Tensor:
        sizes.append(len(vs))
        return values * vs

    solution = eigsh(LinearOperator(lambda v: values * v, values, block), 4, which="LA", seed=0, block_size=6)
    assert solution.success
    assert sizes[0] == 6 + 1  # the vector that calibrates goes along
    assert solution.stats.passes < solution.stats.matvecs / 2


@pytest.mark.parametrize("b", [1, 5])
def test_earlier_eigenvectors_start_the_run_and_save_products(b: int) -> None:
    A = diagonal(hess(5_000))
    old = eigsh(A, 5, which="LA", tol=1e-3, seed=0)
    warm = eigsh(A, 5, which="LA", tol=1e-3, seed=1, v0=old.vectors, block_size=b)
    cold = eigsh(A, 5, which="LA", tol=1e-3, seed=1, block_size=b)
    assert warm.success
    assert ((warm.values - hess(5_000)[:5]).abs() <= warm.bounds).all()
    assert warm.stats.matvecs - warm.stats.verification < cold.stats.matvecs - cold.stats.verification


@pytest.mark.parametrize("bad", [torch.zeros(2, 5), torch.full((2, 5), torch.nan), torch.zeros(0, 5)])
def test_start_blocks_that_cannot_start_are_refused(bad: Tensor) -> None:
    with pytest.raises(InputError, match="v0"):
        eigsh(torch.eye(5, dtype=torch.float64), 1, v0=bad.double())


def reread(x: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(x.numpy().tobytes()), dtype=x.dtype).reshape(x.shape)


@given(
    n=st.integers(3, 40), b=st.integers(1, 3), steps=st.integers(1, 8), stop=st.integers(0, 7), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_resuming_from_a_saved_state_is_bitwise_the_run_without_a_stop(
    n: int, b: int, steps: int, stop: int, seed: int
) -> None:
    A, b = rotated(normal(n, seed=seed), seed), min(b, n)
    steps = max(min(steps, n // b - 1), 1)
    q = torch.linalg.qr(normal(n, b, seed=seed)).Q.mT.contiguous()

    def matmat(block: Tensor) -> Tensor:
        return block @ A

    def run(interrupted: int | None) -> kernel.State:
        state = kernel.absorb(kernel.init(q, matmat(q), b * (steps + 2)), matmat(q), 0, b)
        for i in range(1, steps):
            if i == interrupted:
                state = kernel.State(*map(reread, state))
            state = kernel.step(state, matmat, i * b, b, b)
        return state

    for whole, resumed in zip(run(None), run(stop), strict=True):
        assert torch.equal(whole, resumed)


@given(n=st.integers(4, 30), b=st.integers(1, 4), seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_block_recurrence_holds_and_its_basis_is_orthonormal(n: int, b: int, seed: int) -> None:
    b = min(b, n)
    A = rotated(normal(n, seed=seed), seed)
    steps = max(n // b - 1, 1)
    q = torch.linalg.qr(normal(n, b, seed=seed)).Q.mT
    state = kernel.absorb(kernel.init(q, q @ A, b * (steps + 1)), q @ A, 0, b)
    for i in range(1, steps):
        state = kernel.step(state, lambda block: block @ A, i * b, b, b)
    j = steps * b
    V, T = state.basis, state.t[: j + b, :j]
    assert (V[:j] @ A - T.mT @ V[: j + b]).abs().max() < 1e-12
    alive = torch.diag(state.alive[: j + b])
    assert (V[: j + b] @ V[: j + b].mT - alive).abs().max() < 1e-13
    assert state.asym < 1e-13


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_a_half_precision_basis_gives_what_its_digits_give_and_says_so(dtype: torch.dtype, tol: float) -> None:
    values = hess(50_000).float()
    A = diagonal(values)
    solution = eigsh(A, 10, which="LA", tol=tol, seed=0, basis_dtype=dtype)
    full = eigsh(A, 10, which="LA", tol=tol, seed=0)
    error = (solution.values - values[:10]).abs()
    assert (error <= solution.bounds).all()
    assert error.max() < 10 * torch.finfo(dtype).eps ** 2
    assert solution.stats.basis_bytes == full.stats.basis_bytes // 2
    strict = eigsh(A, 10, which="LA", tol=1e-6, seed=0, basis_dtype=dtype, throw=False)
    assert not strict.success
    assert "basis_dtype" in strict.message
    assert ((strict.values - values[:10]).abs() <= strict.bounds).all()
    assert strict.residuals.max() < torch.finfo(dtype).eps


def test_other_dtypes_of_the_basis_are_refused() -> None:
    with pytest.raises(InputError, match="basis_dtype"):
        eigsh(torch.eye(3), 1, basis_dtype=torch.float64)


def test_float32_residuals_reach_rounding_at_a_hundred_thousand_parameters() -> None:
    values = hess(100_000).float()
    solution = eigsh(diagonal(values), 10, which="LA", tol=3e-7, seed=0, throw=False)
    X = solution.vectors.double()
    images = diagonal(values.double()).matmat(X)
    true = torch.linalg.vector_norm(images - solution.values[:, None] * X, dim=1)
    assert true.max() <= 3e-7


@given(n=st.integers(2, 40), which=st.sampled_from(WHICH), seed=st.integers(0, 10_000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_sharp_bounds_and_angles_hold_against_the_dense_truth(
    n: int, which: Any, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(5, n)))
    A = rotated(normal(n, seed=seed), seed)
    solution = eigsh(A, k, which=which, tol=1e-3, seed=seed)
    truth, basis = torch.linalg.eigh(A)
    for value, x, sharp, bound, angle in zip(
        solution.values, solution.vectors, solution.sharp, solution.bounds, solution.angles, strict=True
    ):
        i = int((truth - value).abs().argmin())
        assert sharp <= bound
        assert (truth[i] - value).abs() <= sharp + 1e-14
        if angle < 1:
            sine = torch.linalg.vector_norm(x - basis[:, i] * (basis[:, i] @ x))
            assert sine <= angle + 1e-12


def test_a_block_is_taken_where_it_is_measured_to_pay() -> None:
    def size(k: int, which: str, ratio: float) -> int:
        return plan_for(k, which, 1e-4, 10_000, block_ratio=lambda: ratio).block_size

    assert [size(k, "LA", 0.48) for k in (1, 10, 20, 50)] == [1, 1, 8, 8]
    assert size(10, "LM", 0.4) == 8
    assert size(50, "SA", 0.2) == 1
    assert plan_for(20, "LA", 1e-4, 10_000).block_size == 1


def test_the_hessian_measures_blocks_only_where_it_keeps_no_graphs() -> None:
    loss, params = functional_loss(mlp(), nn.CrossEntropyLoss())
    data = Batches(cut(labelled(32), 16))
    kept = hessian(loss, params, data).block_ratio
    streamed = hessian(loss, params, data, cache=0).block_ratio
    assert kept is not None
    assert kept() == 1.0
    assert streamed is not None
    assert streamed() > 0


def test_a_larger_basis_is_kept_for_a_dense_edge_while_it_fits() -> None:
    assert plan_for(1, "SA", 1e-4, 1_000_000).basis_size == 120
    assert plan_for(1, "SA", 1e-4, 100_000_000).basis_size == 60
    assert plan_for(10, "LA", 1e-4, 100_000_000).basis_size == 30


def test_trees_and_blocks_go_together() -> None:
    A = rotated(normal(12, seed=0), 0)
    solution = eigsh(on_tree(A, nested(12)), 3, which="LA", tol=1e-9, seed=0, block_size=2)
    assert_certified(solution, A, 3, "LA")


@pytest.mark.parametrize("solver", [eigsh, lobpcg, power_iteration, subspace_iteration])
def test_solvers_with_a_verdict_refuse_transforms_whatever_the_matrix_is_given_as(solver: Any) -> None:
    with pytest.raises(TransformError, match="lanczos"):
        torch.func.vmap(lambda c: solver(c * torch.eye(3), 1).values)(torch.ones(2))
