"""The pure kernels, against their defining identities and dense float64 matrices; under transforms: composition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import eigenfunc
from eigenfunc import tree
from tests.helpers import nested, on_tree, symmetric, vector


def tridiagonal(run: eigenfunc.Tridiagonal) -> Tensor:
    inner = run.betas[:-1]
    return torch.diag(run.alphas) + torch.diag(inner, 1) + torch.diag(inner, -1)


@given(n=st.integers(2, 30), seed=st.integers(0, 10_000), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_recurrence_holds_and_the_basis_is_orthonormal(n: int, seed: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(1, n - 1))
    A = symmetric(n, seed)
    run = eigenfunc.lanczos(lambda v: A @ v, vector(n, seed + 1), m)
    V, T = run.basis, tridiagonal(run)
    last = torch.zeros(m, n, dtype=torch.float64)
    last[-1] = run.betas[-1] * run.residual
    assert (V @ A - T @ V - last).abs().max() < 1e-12 * n
    assert (V @ V.mT - torch.eye(m)).abs().max() < 1e-13


def test_a_tree_gives_what_its_flat_vector_gives() -> None:
    A, v = symmetric(12, 0), vector(12, 1)
    like = nested(12)
    flat = eigenfunc.lanczos(lambda x: A @ x, v, 6)
    shaped = eigenfunc.lanczos(on_tree(A, like), tree.unravel(v, like), 6)
    assert torch.allclose(flat.alphas, shaped.alphas, atol=1e-13, rtol=0)
    assert torch.allclose(flat.basis, tree.ravel(shaped.basis, like), atol=1e-12, rtol=0)


def test_sixty_steps_on_a_spread_spectrum_bring_no_second_copy() -> None:
    values = torch.cat([torch.tensor([100.0, 50.0]), torch.linspace(0, 1, 198)]).double()
    run = eigenfunc.lanczos(lambda v: values * v, vector(200, 3), 60)
    ritz = torch.linalg.eigvalsh(tridiagonal(run))
    assert int((ritz > 10).sum()) == 2
    assert (run.basis @ run.basis.mT - torch.eye(60)).abs().max() < 1e-13


def test_float32_keeps_its_basis_orthogonal_to_single_precision() -> None:
    values = torch.cat([torch.tensor([100.0, 50.0]), torch.linspace(0, 1, 99_998)])
    run = eigenfunc.lanczos(lambda v: values * v, vector(100_000, 3, torch.float32), 30)
    basis = run.basis.double()
    assert (basis @ basis.mT - torch.eye(30)).abs().max() < 2e-6


def test_an_exhausted_space_is_masked_and_not_divided_by() -> None:
    values = torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0]).double()
    run = eigenfunc.lanczos(lambda v: values * v, torch.ones(5).double(), 4)
    assert run.alive.tolist() == [True, True, False, False]
    assert torch.isfinite(run.basis).all()
    assert torch.allclose(torch.linalg.eigvalsh(tridiagonal(run)[:2, :2]), torch.tensor([1.0, 3.0]).double())


@pytest.mark.parametrize("momentum", [0.0, 0.05])
def test_the_power_kernel_reports_the_rayleigh_quotient_of_the_matrix_itself(momentum: float) -> None:
    values = torch.tensor([2.0, 0.4, 0.3, -0.1]).double()
    state = eigenfunc.power(lambda v: values * v, torch.ones(4).double(), 40, momentum=momentum)
    assert abs(state.value - 2) < 1e-12
    assert state.residual < 1e-6
    assert abs(torch.linalg.vector_norm(state.vector) - 1) < 1e-14
