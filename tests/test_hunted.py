"""What a search for false statements has found, each mended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F

from eigenfunc.curvature.ggn import ggn
from eigenfunc.curvature.hessian import hessian
from eigenfunc.data import Batches
from eigenfunc.eigsh import eigsh
from eigenfunc.errors import NotConverged, ProductError
from eigenfunc.flatness import flatness
from eigenfunc.funm import funm_multiply
from eigenfunc.objective import functional_loss
from eigenfunc.operator import LinearOperator
from eigenfunc.overlap import gradient_shares
from eigenfunc.sampling import sampling_error
from eigenfunc.solve import solve
from eigenfunc.stochastic.diagonal import diagonal
from eigenfunc.stochastic.trace import frobenius_norm, trace
from eigenfunc.testing.problems import Problem
from tests.helpers import cut, labelled, mlp


def _diagonal_with_cut_pair(n: int, k: int, gap: float) -> Tensor:
    """Falling values of which the k-th and the next are `gap` apart."""
    values = torch.linspace(1, -0.5, n, dtype=torch.float64)
    values[k] = values[k - 1] - gap
    return values


@settings(max_examples=25, deadline=None)
@example(n=12, k=3, power=-11, which="LA", seed=1)
@given(
    n=st.integers(6, 24),
    k=st.integers(1, 4),
    power=st.floats(-12, -2),
    which=st.sampled_from(["LA", "SA", "BE"]),
    seed=st.integers(0, 99),
)
def test_angles_know_of_the_next_pair_where_the_basis_holds_the_whole_space(
    n: int, k: int, power: float, which: str, seed: int
) -> None:
    values = _diagonal_with_cut_pair(n, k, 10**power)
    sign = -1.0 if which == "SA" else 1.0
    solution = eigsh(torch.diag(sign * values), (k, 1) if which == "BE" else k, which=which, seed=seed)
    for rank, claimed in enumerate(solution.angles[:k].tolist()):
        vector = solution.vectors[rank].clone()
        vector[rank] = 0
        assert float(torch.linalg.vector_norm(vector)) <= claimed


def _scaled(factor: Tensor, dtype: torch.dtype) -> LinearOperator:
    """Multiplication by `factor` (n,), rounded to `dtype`."""
    return LinearOperator(lambda v: (v.double() * factor).to(dtype), torch.zeros(len(factor), dtype=dtype))


@settings(max_examples=40, deadline=None)
@example(dtype=torch.float16, size=1e-3, scale=1e3, seed=0)  # x is infinite
@example(dtype=torch.float16, size=1e4, scale=1e-3, seed=0)  # x is subnormal
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    size=st.floats(1e-3, 1e3),
    scale=st.floats(1e-2, 10),
    seed=st.integers(0, 99),
)
def test_the_residual_of_a_system_is_that_of_the_solution_as_it_is_returned(
    dtype: torch.dtype, size: float, scale: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    A = _scaled(size * torch.logspace(-1, 0, 6, dtype=torch.float64), dtype)
    b = (scale * torch.randn(6, generator=g, dtype=torch.float64)).to(dtype)
    solution = solve(A, b, tol=2e-2, throw=False)
    true = float(torch.linalg.vector_norm(b.double() - A(solution.x).double()))
    if solution.x.isfinite().all():
        assert abs(true - solution.residual) <= 1e-6 * float(torch.linalg.vector_norm(b.double()))
    else:
        assert not solution.converged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_error_of_a_function_product_takes_in_the_dtype_of_its_value(dtype: torch.dtype) -> None:
    factor = torch.tensor([1, 2, -1, -3], dtype=torch.float64)
    v = torch.tensor([1, 0.531, 0.3, 0.777]).to(dtype)
    found = funm_multiply(_scaled(factor, dtype), lambda x: 1.1 * torch.sign(x), v, tol=1e-4, throw=False)
    error = float(torch.linalg.vector_norm(found.value.double() - 1.1 * torch.sign(factor) * v.double()))
    assert error <= found.error
    assert found.converged is (dtype == torch.float32)


@settings(max_examples=20, deadline=None)
@given(dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 999))
def test_an_exact_diagonal_is_within_the_rounding_of_its_products(dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(40, 40, generator=g, dtype=torch.float64))[0].to(dtype)
    values = torch.randn(40, generator=g, dtype=torch.float64).to(dtype)
    A = LinearOperator(lambda v: q @ (values * (q.mT @ v)), torch.zeros(40, dtype=dtype))
    truth = ((q.double() * values.double()) @ q.double().mT).diagonal()
    found = diagonal(A, num_matvecs=40, seed=0)
    assert ((found.value - truth).abs() <= 2 * found.stderr).all()


def test_an_entry_too_small_for_the_products_is_not_known_to_be_zero() -> None:
    entries = torch.tensor([1e30, 1e-30, 1.0])
    found = diagonal(torch.diag(entries), num_matvecs=3, seed=0)
    assert ((found.value - entries.double()).abs() <= found.stderr).all()


def test_a_function_product_beyond_its_dtype_has_not_converged() -> None:
    found = funm_multiply(torch.diag(torch.tensor([100.0, 90.0])), torch.exp, torch.tensor([1.0, 0.0]), throw=False)
    assert not found.converged


@pytest.mark.parametrize("seed", range(3))
def test_vectors_of_a_coarse_basis_are_orthonormal_when_they_are_certified(seed: int) -> None:
    problem = Problem("identity", 108, seed=565309 + seed, scale=-1.0, dense=True)
    start = problem.start("eigenvector", (5, 1), "BE")
    options = {"v0": start, "basis_dtype": torch.bfloat16, "seed": 637154 + seed, "tol": 0.5}
    solution = eigsh(problem.operator(), (5, 1), which="BE", **options)
    assert solution.stats.orthogonality <= 32 * torch.finfo(torch.float64).eps
    assert ((solution.values + 1).abs() <= solution.bounds).all()


def _cancelling(n: int, size: float, seed: int) -> tuple[LinearOperator, Tensor]:
    """A matrix of entries about 1 as the difference of two of entries about `size`, in float32, and its exact value."""
    g = torch.Generator().manual_seed(seed)
    root = (size / n) ** 0.5 * torch.randn(n, n, generator=g)
    second = root @ root.mT + torch.diag(torch.randn(n, generator=g))
    second = (second + second.mT) / 2
    like = torch.zeros(n)
    A = LinearOperator(lambda v: root @ (root.mT @ v), like) - LinearOperator(lambda v: second @ v, like)
    return A, root.double() @ root.double().mT - second.double()


@pytest.mark.parametrize(("count", "reach"), [(12, 8), (40, 1)])
@settings(max_examples=15, deadline=None)
@given(size=st.sampled_from([1.0, 1e3, 1e5, 1e7]), seed=st.integers(0, 10**6))
def test_what_cancels_inside_of_products_is_in_the_error_of_estimates(
    count: int, reach: int, size: float, seed: int
) -> None:
    A, dense = _cancelling(40, size, seed)
    truths = {trace: dense.trace(), diagonal: dense.diagonal(), frobenius_norm: torch.linalg.matrix_norm(dense)}
    for estimator, truth in truths.items():
        found = estimator(A, num_matvecs=count, seed=seed)
        assert (abs(torch.as_tensor(found.value) - truth) <= reach * torch.as_tensor(found.stderr)).all()


def _scaled_loss(scale: float, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any]:
    X, Y = labelled(10)
    loss, params = functional_loss(mlp().to(dtype), lambda outputs, y: scale * F.cross_entropy(outputs, y))
    return loss, params, (X.to(dtype), Y)


@pytest.mark.parametrize("matrix", [hessian, ggn])
@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-100, 1e150, 1e250])
def test_a_loss_of_any_size_has_its_eigenvalues(matrix: Any, scale: float) -> None:
    """Squares of its derivatives leave float64."""
    truth = torch.linalg.eigvalsh(matrix(*_scaled_loss(1.0)).to_dense())[-2:].flip(0)
    solution = eigsh(matrix(*_scaled_loss(scale)), 2, which="LA", seed=0)
    assert ((solution.values / scale - truth).abs() <= solution.bounds / scale + 1e-12).all()
    assert (solution.bounds <= 1e-2 * scale * truth).all()


class _Frozen(torch.autograd.Function):
    """x³ whose slope says that it is constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0].detach() ** 2 * slope


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e-290, 1e250])
def test_a_wrong_product_is_refused_at_any_size(scale: float) -> None:
    with pytest.raises(ProductError, match="no two ways"):
        hessian(lambda x, batch: scale * (_Frozen.apply(x) + x**2).sum(), torch.ones(3).double(), None)


@pytest.mark.parametrize("scale", [1e-43, 1e-44])
def test_too_small_for_the_dtype_is_what_is_said_of_a_loss_that_is(scale: float) -> None:
    with pytest.raises(ProductError, match=r"full precision below 1\.2e-38: multiply the loss"):
        hessian(*_scaled_loss(scale, torch.float32))
    A = hessian(*_scaled_loss(scale, torch.float32), check=False)
    with pytest.raises(NotConverged, match=r"full precision below 1\.2e-38\. Multiply the loss|not symmetric"):
        eigsh(A, 1, seed=0)


@pytest.mark.parametrize("scale", [1e-290, 1e-200, 1e200])
def test_errors_and_lengths_of_any_size(scale: float) -> None:
    """Neither an error bar nor the norm of a gradient is zero because its square is."""
    found = []
    for size in (1.0, scale):
        loss, params, batch = _scaled_loss(size)
        data = Batches(cut(batch, 2))
        solution = eigsh(hessian(loss, params, data), 2, which="LA", seed=0, tol=1e-8)
        gradient_norm = flatness(loss, params, data, seed=0, num_matvecs=4, num_samples=2, num_steps=1).gradient_norm
        shares = gradient_shares(loss, params, data, solution)
        found.append((sampling_error(loss, params, data, solution) / size, gradient_norm / size, shares))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-5, atol=0)
