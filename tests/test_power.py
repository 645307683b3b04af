"""Power iteration: right with momentum, with deflation, over mini-batches, and honest where it cannot be right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import eigenfunc
from benchmarks.spectra import diagonal
from eigenfunc import Batches, NotConverged, Status, eigsh, functional_loss, hessian, power, power_iteration
from eigenfunc.errors import InputError, TreeError
from tests.helpers import assert_certified, cut, mlp, never, normal, rotated, untouched


def geometric(n: int, ratio: float, alternate: bool = False) -> Tensor:
    values = ratio ** torch.arange(n).double()
    return values * (-1.0) ** torch.arange(n) if alternate else values


@given(seed=st.integers(0, 10_000), k=st.integers(1, 4), ratio=st.floats(0.3, 0.8), alternate=st.booleans())
@settings(deadline=None, max_examples=30)
def test_the_largest_in_magnitude_come_with_a_certificate(seed: int, k: int, ratio: float, alternate: bool) -> None:
    A = rotated(geometric(12, ratio, alternate), seed)
    assert_certified(power_iteration(A, k, tol=1e-5, seed=seed), A, k, "LM")


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.2])
def test_momentum_biases_neither_value_nor_residual_at_any_scale(momentum: float, scale: float) -> None:
    A = rotated(torch.tensor([1.0, 0.9, 0.8, 0.5, 0.1, -0.3]).double(), 1) * scale
    solution = power_iteration(A, 1, momentum=momentum * scale**2, tol=1e-8, seed=0)
    assert abs(solution.values[0] / scale - 1) < 1e-8
    fresh = torch.linalg.vector_norm(A @ solution.vectors[0] - solution.values[0] * solution.vectors[0])
    assert abs(fresh - solution.residuals[0]) < 1e-13 * scale


def test_momentum_needs_fewer_products() -> None:
    A = diagonal(torch.cat([torch.ones(1), torch.linspace(-0.97, 0.97, 400)]).double())
    plain, heavy = (power_iteration(A, 1, momentum=beta, seed=0) for beta in (0.0, 0.97**2 / 4))
    assert heavy.stats.matvecs < plain.stats.matvecs / 2
    assert abs(heavy.values[0] - 1) <= heavy.bounds[0]


def test_the_driver_takes_the_steps_of_the_pure_kernel() -> None:
    A = rotated(geometric(20, 0.7), 0)
    v0 = torch.ones(20).double()
    solution = power_iteration(A, 1, v0=v0, tol=1e-6, seed=0)
    assert abs(power(lambda v: A @ v, v0, 60).value - solution.values[0]) < 1e-10


def test_opposite_eigenvalues_of_equal_size_are_not_called_converged_before_they_are() -> None:
    values = torch.cat([torch.tensor([1.0, -1.0]), torch.linspace(-0.5, 0.5, 30)]).double()
    solution = power_iteration(rotated(values, 0), 1, max_steps=100, seed=0, throw=False)
    wrong = solution.residuals[0] > 1e-4
    assert wrong == (not solution.converged[0])
    assert solution.status is not Status.CONVERGED
    both = power_iteration(rotated(values, 0), 2, max_steps=200, seed=0, throw=False)
    assert (both.values.abs()[both.converged] - 1).abs().max() < 1e-4 if both.converged.any() else True


def test_an_eigenvalue_hidden_from_the_start_vector_is_not_passed_over_in_silence() -> None:
    values = torch.cat([torch.tensor([3.0, 2.0]), torch.linspace(0, 1, 200)]).double()
    v0 = torch.zeros(202).double()
    v0[1] = 1.0
    A = eigenfunc.aslinearoperator(lambda v: values * v, values)
    solution = power_iteration(A, 1, v0=v0, seed=0, throw=False)
    assert not solution.converged[0]
    assert abs(solution.values[0] - 2) < 1e-12
    assert solution.status is Status.INCOMPLETE


def test_too_few_steps_raise_with_what_was_found_and_the_remedy() -> None:
    A = rotated(torch.linspace(0.9, 1, 50).double(), 0)
    with pytest.raises(NotConverged, match="raise max_steps") as caught:
        power_iteration(A, 2, max_steps=5, seed=0)
    assert not caught.value.solution.converged.any()
    assert caught.value.solution.values.shape == (2,)


def test_the_zero_matrix_has_zero_eigenvalues() -> None:
    solution = power_iteration(torch.zeros(6, 6), 3, seed=0)
    assert not solution.values.any()
    assert solution.success


def problem() -> tuple[nn.Module, Any, dict[str, Tensor], Batches]:
    model, x = mlp(sizes=(6, 5, 3)), normal(120, 6)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
    return model, loss, params, Batches(cut((x, y), 35))


def test_mini_batches_lead_to_the_vector_of_the_whole_and_the_certificate_sees_it_all() -> None:
    model, loss, params, data = problem()
    A = hessian(loss, params, data)
    with untouched(model):
        solution = power_iteration(A, 1, stochastic=True, max_steps=400, tol=0.2, seed=0, throw=False)
    truth = eigsh(A, 1, which="LM", seed=0, tol=1e-8)
    assert abs(solution.values[0] - truth.values[0]) <= solution.bounds[0]
    assert abs(solution.values[0] / truth.values[0] - 1) < 0.05
    top = eigenfunc.tree.row(solution.vectors, 0)
    residual = eigenfunc.tree.norm(eigenfunc.tree.sub(A(top), eigenfunc.tree.scale(solution.values[0], top)))
    assert abs(residual - solution.residuals[0]) < 1e-12


def test_mini_batches_can_only_be_drawn_where_there_are_some() -> None:
    with pytest.raises(InputError, match="Batches"):
        power_iteration(torch.eye(4), 1, stochastic=True)


BAD: dict[str, dict[str, Any]] = {
    "momentum negative": {"momentum": -0.1},
    "momentum nan": {"momentum": float("nan")},
    "steps zero": {"max_steps": 0},
    "k zero": {"k": 0},
    "k above n": {"k": 9},
    "tol zero": {"tol": 0.0},
    "v0 zero": {"v0": torch.zeros(8).double()},
    "seed negative": {"seed": -2},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_the_first_product(name: str) -> None:
    with pytest.raises(InputError):
        power_iteration(eigenfunc.aslinearoperator(never, torch.zeros(8).double()), **BAD[name])


def test_a_start_vector_of_another_structure_is_refused() -> None:
    with pytest.raises(TreeError, match="v0"):
        power_iteration(torch.eye(4), v0={"w": torch.ones(4)})


def test_pairs_that_were_not_probed_claim_nothing_that_needs_completeness() -> None:
    values = torch.cat([torch.tensor([2.0, 1.0]), torch.linspace(0, 0.1, 98)]).double()
    solution = power_iteration(torch.diag(values), 2, tol=1e-12, max_steps=8, seed=0, throw=False)
    assert not solution.converged.any()
    assert torch.equal(solution.sharp, solution.bounds)
    assert (solution.angles == 1).all()
