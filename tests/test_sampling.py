"""The standard error of an eigenvalue against resampling from a population that is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eigenfunc import Batches, eigsh, hessian
from eigenfunc.errors import DataError, TreeError
from eigenfunc.sampling import sampling_error

SCALES = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2]).double()


def least_squares(params: Tensor, x: Tensor) -> Tensor:
    return ((x @ params) ** 2).sum(1).mean() / 2


def total(params: Tensor, x: Tensor) -> Tensor:
    return ((x @ params) ** 2).sum() / 2


def draw(seed: int, sizes: list[int]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 5, generator=g, dtype=torch.float64) * SCALES.sqrt()
    return list(x.split(sizes))


def test_the_error_is_that_of_drawing_the_data_again() -> None:
    """The Hessian is the second moment of the data, in the population diag(SCALES)."""
    w = torch.zeros(5, 1).double()
    sizes = [20, 60, 40] * 10
    values, errors = [], []
    for seed in range(60):
        data = Batches(draw(seed, sizes))
        solution = eigsh(hessian(least_squares, w, data, check=False), 2, which="LA", tol=1e-8, seed=0)
        values.append(solution.values)
        errors.append(sampling_error(least_squares, w, data, solution))
    spread = torch.stack(values).std(0)
    told = torch.stack(errors).mean(0)
    assert ((told / spread - 1).abs() < 0.3).all()
    exact = SCALES[:2] * (2 / sum(sizes)) ** 0.5  # of the variance of a Gaussian
    assert ((told / exact - 1).abs() < 0.1).all()
    covered = ((torch.stack(values) - SCALES[:2]).abs() <= 2 * torch.stack(errors)).double().mean()
    assert covered > 0.9


def test_sums_have_the_errors_of_means_times_the_count() -> None:
    w = torch.zeros(5, 1).double()
    batches = draw(0, [30] * 12)
    mean, added = Batches(batches), Batches(batches, reduction="sum")
    one = eigsh(hessian(least_squares, w, mean), 2, tol=1e-8, seed=0)
    other = eigsh(hessian(total, w, added), 2, tol=1e-8, seed=0)
    left = sampling_error(least_squares, w, mean, one)
    right = sampling_error(total, w, added, other)
    assert torch.allclose(360 * left, right, rtol=1e-8)
    truth = torch.stack(
        [((x @ torch.cat([v.flatten()[:, None] for v in one.vectors], 1)) ** 2).mean(0) for x in batches]
    )
    assert torch.allclose(left, truth.std(0) / 12**0.5, rtol=1e-8)


def test_one_batch_says_nothing_and_other_parameters_are_refused() -> None:
    w = torch.zeros(5, 1).double()
    data = Batches(draw(0, [30, 30]))
    solution = eigsh(hessian(least_squares, w, data), 1, seed=0)
    with pytest.raises(DataError, match="two batches"):
        sampling_error(least_squares, w, draw(0, [30])[0], solution)
    with pytest.raises(TreeError):
        sampling_error(least_squares, torch.zeros(4, 1).double(), data, solution)
