"""Linear systems: solved where they can be, and a true word where they cannot."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from eigenfunc import functional_loss, hessian, tree
from eigenfunc.errors import InputError, NonFiniteError, NotConverged, TransformError, TreeError
from eigenfunc.krylov import conjugate, minres
from eigenfunc.operator import LinearOperator
from eigenfunc.solve import solve
from eigenfunc.testing.spectra import FAMILIES, spectrum
from tests.helpers import Counted, mlp, normal, rotated, untouched, vector

METHODS = ["cg", "minres"]


@pytest.mark.parametrize("method", METHODS)
@given(n=st.integers(1, 40), seed=st.integers(0, 10_000), digits=st.integers(2, 10))
@settings(max_examples=40, deadline=None)
def test_definite_systems_agree_with_a_dense_solve(method: str, n: int, seed: int, digits: int) -> None:
    values = 0.1 + torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    A, b = rotated(values, seed), vector(n, seed + 1)
    tol = 10.0**-digits
    found = solve(A, b, tol=tol, method=method)
    assert found.converged
    assert math.isclose(found.residual, float((b - A @ found.x).norm()), rel_tol=1e-6, abs_tol=1e-13 * float(b.norm()))
    assert found.residual <= tol * float(b.norm())
    truth = torch.linalg.solve(A, b)
    assert (found.x - truth).norm() <= found.residual / float(values.min()) + 1e-12 * truth.norm()
    assert found.matvecs <= n + 20


@given(n=st.integers(2, 40), seed=st.integers(0, 10_000), shift=st.floats(-0.5, 0.5))
@settings(max_examples=40, deadline=None)
def test_indefinite_systems_by_minres_and_refused_by_cg(n: int, seed: int, shift: float) -> None:
    signs = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)
    values = signs * (1 + torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    A, b = rotated(values, seed), vector(n, seed + 1)
    found = solve(A, b, shift=shift, tol=1e-8)
    truth = torch.linalg.solve(A + shift * torch.eye(n).double(), b)
    assert (found.x - truth).norm() <= found.residual / 0.5 + 1e-12 * truth.norm()
    other = solve(A, b, shift=shift, tol=1e-8, method="cg", throw=False, max_matvecs=200)
    if other.converged:  # the Krylov space showed no negative curvature before it held the solution
        assert (other.x - truth).norm() <= other.residual / 0.5 + 1e-12 * truth.norm()
    else:
        assert "not positive definite" in other.message
        assert "minres" in other.message


def test_cg_reports_negative_curvature_at_once() -> None:
    values = torch.linspace(-1, 2, 50).double()
    with pytest.raises(NotConverged, match="not positive definite") as caught:
        solve(rotated(values, 0), vector(50, 1), method="cg")
    assert caught.value.solution.matvecs < 30
    assert solve(rotated(values, 0), vector(50, 1), shift=1.2, method="cg").converged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_hard_spectra_are_solved_or_it_is_said_that_they_are_not(family: str, dtype: torch.dtype) -> None:
    n, eps = 60, torch.finfo(dtype).eps
    values = spectrum(family, n, 1)
    A = rotated(values, 1).to(dtype)
    for b in (vector(n, 2, dtype), A @ vector(n, 2, dtype)):
        for method in METHODS:
            found = solve(A, b, method=method, throw=False, max_matvecs=200)
            fresh = float((b.double() - A.double() @ found.x.double()).norm())
            blur = 10 * eps * float(values.abs().max() * found.x.double().norm() + b.double().norm())
            assert abs(fresh - found.residual) <= blur
            assert found.converged == (found.residual <= 1e-5 * float(b.double().norm()))
            assert found.residual <= (1 + 1e-6) * float(b.double().norm())


@pytest.mark.parametrize("method", METHODS)
def test_singular_systems_with_a_solution(method: str) -> None:
    values = torch.cat([torch.zeros(5), torch.linspace(0.5, 2, 25)]).double()
    A, x = rotated(values, 0), vector(30, 1)
    found = solve(A, A @ x, tol=1e-10, method=method)
    assert found.converged
    truth = torch.linalg.pinv(A, rtol=1e-12) @ (A @ x)  # b has no part outside of the range, nor has x
    assert (found.x - truth).norm() < 1e-8 * truth.norm()


@pytest.mark.parametrize("bottom", [[0.5, 2.0], [-2.0, 2.0], [1e-3, 10.0]])
def test_singular_systems_without_one_are_told(bottom: list[float]) -> None:
    values = torch.cat([torch.zeros(1), torch.linspace(*bottom, 30)]).double()
    A, b = rotated(values, 0), vector(31, 1)
    found = solve(A, b, throw=False)
    outside = b - A @ (torch.linalg.pinv(A, rtol=1e-12, hermitian=True) @ b)
    assert not found.converged
    assert "least-squares" in found.message
    assert math.isclose(found.residual, float(outside.norm()), rel_tol=1e-6)
    refused = solve(A, b, method="cg", throw=False, max_matvecs=300)
    assert not refused.converged
    assert "minres" in refused.message or "max_matvecs" in refused.message


def test_a_system_beyond_the_budget_is_not_called_solved() -> None:
    A, b = rotated(torch.logspace(-6, 0, 100).double(), 0), vector(100, 1)
    with pytest.raises(NotConverged, match="max_matvecs") as caught:
        solve(A, b, max_matvecs=10)
    found = caught.value.solution
    assert found.matvecs <= 10
    assert math.isclose(found.residual, float((b - A @ found.x).norm()), rel_tol=1e-10)


def test_float32_that_cannot_be_solved_better_says_so() -> None:
    A, b = rotated(torch.logspace(-4, 0, 50).double(), 0).float(), vector(50, 1, torch.float32)
    found = solve(A, b, tol=1e-7, throw=False)
    assert not found.converged
    assert float((b.double() - A.double() @ found.x.double()).norm()) <= 1.1 * found.residual + 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e200), (torch.float32, 1e25)])
def test_the_scales_of_matrix_and_right_hand_side_do_not_matter(method: str, dtype: torch.dtype, size: float) -> None:
    A, b = rotated(torch.linspace(1, 4, 20).double(), 0).to(dtype), vector(20, 1, dtype)
    plain = solve(A, b, method=method)
    for a, c in ((size, 1.0), (1 / size, 1.0), (1.0, size), (1.0, 1 / size), (size, size), (1 / size, 1 / size)):
        found = solve(A * a, b * c, method=method)
        assert found.matvecs == plain.matvecs
        assert math.isclose(found.residual / c, plain.residual, rel_tol=0.1, abs_tol=1e-5 * float(b.norm()))
        assert ((found.x.double() * (a / c) - plain.x).norm() <= 1e-4 * plain.x.norm()).all()


def test_zero_right_hand_sides_cost_nothing() -> None:
    found = solve(torch.eye(4), torch.zeros(4))
    assert found.converged
    assert found.matvecs == 0
    assert not found.x.any()


def test_a_newton_step_on_a_network_leaves_it_untouched() -> None:
    model, batch = mlp(), (normal(30, 5), normal(30, 3, seed=1))
    with untouched(model):
        loss, params = functional_loss(model, nn.MSELoss())
        A = hessian(loss, params, batch)
        slope = torch.func.grad(loss)(params, batch)
        found = solve(A, slope, shift=1.0, tol=1e-8)
    dense = A.to_dense() + torch.eye(A.size).double()
    truth = torch.linalg.solve(dense, tree.ravel(slope, A.like))
    assert set(found.x) == set(params)
    assert (tree.ravel(found.x, A.like) - truth).norm() <= 1e-7 * truth.norm()


def test_the_steps_are_pure() -> None:
    """Under vmap over matrices and under grad: n steps give the solution, and its derivative by symmetric changes."""
    matrices = torch.stack([rotated(torch.linspace(1, 2, 4).double() * c, c) for c in (1, 2, 3)])
    b = vector(4, 0)

    def by_cg(A: Tensor) -> Tensor:
        state = conjugate.init(b[None])
        for _ in range(4):
            state = conjugate.step(state, state.p @ A, torch.zeros(1), torch.zeros(1))
        return state.x[0]

    def by_minres(A: Tensor) -> Tensor:
        state = minres.init(b[None])
        for _ in range(4):
            state = minres.step(state, state.v @ A)
        return state.x[0]

    truth = torch.linalg.solve(matrices, b.expand(3, 4))
    for run in (by_cg, by_minres):
        assert (torch.func.vmap(run)(matrices) - truth).abs().max() < 1e-10
        slope = torch.func.grad(lambda A, run=run: run(A).sum())(matrices[0])
        y = torch.linalg.solve(matrices[0], torch.ones(4).double())
        along = torch.outer(truth[0], y)
        assert (slope + slope.mT + along + along.mT).abs().max() < 1e-6


def test_refusals() -> None:
    A, b = torch.eye(4).double(), torch.ones(4).double()
    for arguments in ({"tol": 0.0}, {"tol": 2}, {"method": "lu"}, {"max_matvecs": 1}, {"shift": math.nan}):
        with pytest.raises(InputError):
            solve(A, b, **arguments)
    with pytest.raises(InputError, match="NaN"):
        solve(A, b * math.nan)
    with pytest.raises(TreeError):
        solve(A, b[:3])
    with pytest.raises(NonFiniteError):
        solve(LinearOperator(lambda v: v * math.inf, b), b)
    with pytest.raises(TransformError):
        torch.func.vmap(lambda c: solve(lambda v: c * v, b).x)(torch.ones(2))


@pytest.mark.parametrize("method", METHODS)
def test_products_that_become_nan_are_an_error(method: str) -> None:
    product = Counted(lambda v: v * torch.linspace(1, 2, 9) * (math.nan if product.calls > 3 else 1))
    with pytest.raises(NonFiniteError):
        solve(LinearOperator(product, torch.zeros(9)), torch.ones(9), method=method)
