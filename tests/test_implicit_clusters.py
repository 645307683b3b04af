"""Derivatives of eigenpairs where eigenvalues coincide, and where the Krylov space runs out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp

from eigenfunc import EigenPairs, sharpness, top_eigenpairs
from tests.helpers import ZERO, difference, normal, orthogonal, slope


def close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    return bool((x - y).abs().max() <= tolerance * y.abs().max())


def cluster(values: Tensor) -> tuple[Tensor, Tensor]:
    n = len(values)
    Q = orthogonal(n, 0)
    change = normal(n, n, seed=1)
    return Q @ torch.diag(values) @ Q.mT, change + change.mT


@pytest.mark.parametrize("split", [0.0, 1e-14, 1e-12])
@pytest.mark.parametrize("k", [3, 4])
def test_the_sum_over_a_cluster_has_its_derivatives_and_single_vectors_stay_finite(split: float, k: int) -> None:
    A, change = cluster(torch.tensor([3, 3 - split, 3 - 2 * split, 2, 1, 0.5, -1, -2]).double())

    def run(t: Tensor) -> EigenPairs:
        form = A + t * change
        return top_eigenpairs(
            lambda p, b: p @ b @ p / 2, torch.zeros(8).double(), form, k=k, num_steps=4, v0=normal(4, 8, seed=2)
        )

    def total(t: Tensor) -> Tensor:
        return run(t).values.sum()

    def theirs(t: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(A + t * change)[-k:].sum()

    def projector(t: Tensor) -> Tensor:
        rows = run(t).vectors
        return (rows.mT @ rows * normal(8, 8, seed=3)).sum()

    assert torch.allclose(run(ZERO).values[:3], torch.full((3,), 3.0).double(), atol=1e-11)
    assert close(grad(total)(ZERO), difference(theirs), 1e-7)
    assert close(grad(projector)(ZERO), difference(projector), 1e-7)
    assert close(grad(grad(total))(ZERO), difference(grad(total)), 1e-4)
    single = grad(lambda t: (run(t).vectors[1] ** 3).sum())
    assert torch.isfinite(single(ZERO))
    assert torch.isfinite(slope(lambda t: (run(t).vectors[1] ** 3).sum())(ZERO))


def test_a_single_vector_of_a_cluster_moves_only_out_of_it() -> None:
    A, change = cluster(torch.tensor([3.0, 3.0, 2.0, 1.0, -1.0]).double())
    start = normal(2, 5, seed=2)

    def run(t: Tensor) -> Tensor:
        form = A + t * change
        found = top_eigenpairs(
            lambda p, b: p @ b @ p / 2, torch.zeros(5).double(), form, k=2, num_steps=3, v0=start, num_trips=10
        )
        return found.vectors

    rows, moved = jvp(run, (ZERO,), (ZERO + 1,))
    assert (rows @ moved.mT).abs().max() < 1e-12
    truth = torch.stack([torch.linalg.pinv(3 * torch.eye(5) - A, rtol=1e-8) @ change @ v for v in rows])
    assert torch.allclose(moved, truth, atol=1e-11)


@pytest.mark.parametrize("split", [0.0, 1e-13])
def test_vectors_of_a_cluster_cut_by_k_have_no_derivative_and_all_else_has(split: float) -> None:
    A, change = cluster(torch.tensor([4.0, 3.0, 3.0 - split, 3.0 - 2 * split, 1.0, -1.0]).double())

    def run(t: Tensor) -> EigenPairs:
        form = A + t * change
        return top_eigenpairs(
            lambda p, b: p @ b @ p / 2, torch.zeros(6).double(), form, k=3, num_steps=2, v0=normal(3, 6), num_trips=12
        )

    def theirs(t: Tensor) -> Tensor:
        return (torch.linalg.eigh(A + t * change)[1][:, -1] ** 4).sum()

    first, cut = (lambda t: (run(t).vectors[0] ** 4).sum()), (lambda t: (run(t).vectors[1] ** 4).sum())
    for derivative in (grad, slope):
        assert torch.isfinite(derivative(lambda t: run(t).values.sum())(ZERO))
        assert close(derivative(first)(ZERO), difference(theirs), 1e-7)
        assert derivative(cut)(ZERO).isnan()


def test_pairs_outside_an_exhausted_space_are_nan_and_disturb_no_other() -> None:
    A = torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0]).double())

    def run(form: Tensor) -> EigenPairs:
        start = torch.ones(4).double()
        return top_eigenpairs(lambda p, b: p @ b @ p / 2, torch.zeros(4).double(), form, k=3, num_steps=3, v0=start)

    found = run(A)
    assert torch.allclose(found.values[:2], torch.tensor([3.0, 1.0]).double())
    assert found.values[2].isnan()
    assert found.residuals.isnan().tolist() == [False, False, True]
    assert torch.allclose(grad(lambda B: run(B).values[0])(A), torch.outer(found.vectors[0], found.vectors[0]))
    assert torch.isfinite(grad(lambda B: run(B).vectors[0].sum())(A)).all()


def test_a_start_vector_of_zero_gives_nan_and_a_matrix_of_zero_its_zeros() -> None:
    def run(form: Tensor, start: Tensor) -> Tensor:
        return sharpness(lambda p, b: p @ b @ p / 2, torch.zeros(4).double(), form, num_steps=3, v0=start)

    eye, zero = torch.eye(4).double(), torch.zeros(4).double()
    assert run(eye, zero).isnan()
    assert run(0 * eye, zero + 1) == 0
    assert torch.allclose(grad(run)(0 * eye, zero + 1), torch.full((4, 4), 0.25).double())
