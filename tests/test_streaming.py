"""Streamed data: few passes, counted in full; and how far an eigenvalue is from that of the population."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from eigenfunc import Batches, NotConverged, demo, eigsh, functional_loss, hessian
from eigenfunc.curvature.ggn import ggn
from eigenfunc.data import head
from eigenfunc.errors import DataError, InputError
from eigenfunc.streaming import eigsh_streaming
from tests.helpers import assert_certified, dense_hessian, plain

Setting = tuple[Any, Any, Batches]


@functools.cache
def mixture(count: int) -> Setting:
    g = torch.Generator().manual_seed(0)
    centers = 1.5 * torch.randn(10, 20, generator=g)
    labels = torch.randint(10, (count,), generator=g)
    inputs = centers[labels] + torch.randn(count, 20, generator=g)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        rows = torch.randint(count, (256,), generator=g)
        optimizer.zero_grad()
        cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
    loss, params = functional_loss(model, cross_entropy)
    return loss, params, Batches(list(zip(inputs.split(1000), labels.split(1000), strict=True)))


@functools.cache
def digits() -> Setting:
    objective, params, data = demo.make_problem("mlp", 0)
    loss, params = functional_loss(objective.module.float(), cross_entropy)
    return loss, params, Batches([(x.float(), y) for x, y in data])


class Counting:
    """Batches that count how often each is read."""

    def __init__(self, batches: Batches) -> None:
        self.held = list(batches)
        self.read = 0

    def __len__(self) -> int:
        return len(self.held)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.held:
            self.read += 1
            yield batch


@pytest.mark.parametrize("setting", ["digits", pytest.param("mixture", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("k", "most"), [(5, 0.45), (10, 0.35)])
@pytest.mark.parametrize("tol", [1e-3, 1e-5])
def test_a_block_from_a_subset_takes_less_than_half_of_the_passes(
    setting: str, k: int, most: float, tol: float
) -> None:
    loss, params, data = digits() if setting == "digits" else mixture(20_000)
    cold = eigsh(hessian(loss, params, data), k, tol=tol, seed=0, block_size=1)
    found = eigsh_streaming(loss, params, data, k, tol=tol, seed=0)
    assert found.converged.all()
    assert found.stats.passes <= most * cold.stats.passes
    assert ((found.values - cold.values).abs() <= found.bounds + cold.bounds).all()


def test_the_passes_told_are_those_that_read_the_data() -> None:
    loss, params, data = mixture(4000)
    counting = Counting(data)
    read = []

    def watched(*args: Any, **options: Any) -> Any:
        A = hessian(*args, **options)
        read.append(counting.read)
        return A

    found = eigsh_streaming(loss, params, Batches(counting), 4, schedule=(1.0,), matrix=watched, seed=0)
    chunked = 1  # the first block measures how many vectors are best multiplied at once, on the first batch
    assert (counting.read - read[-1] - chunked) == found.stats.passes * len(counting)


def test_a_misleading_subset_costs_passes_and_no_truth() -> None:
    loss, params, data = mixture(2000)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    order = torch.argsort(y)  # the subset shows one class only
    A = dense_hessian(plain(loss.module, lambda m: cross_entropy(m(x), y)), params)
    batches = Batches(list(zip(x[order].split(100), y[order].split(100), strict=True)))
    assert_certified(eigsh_streaming(loss, params, batches, 3, which="LA", seed=0), A, 3, "LA")


def test_old_eigenvectors_start_a_run_without_a_subset() -> None:
    loss, params, data = mixture(2000)
    old = eigsh_streaming(loss, params, data, 4, tol=1e-5, seed=0)
    moved = {
        name: x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for name, x in params.items()
    }
    warm = eigsh_streaming(loss, moved, data, 4, schedule=(1.0,), v0=old.vectors, seed=0)
    cold = eigsh_streaming(loss, moved, data, 4, schedule=(1.0,), seed=0)
    assert warm.stats.matvecs - warm.stats.verification < cold.stats.matvecs - cold.stats.verification
    assert ((warm.values - cold.values).abs() <= warm.bounds + cold.bounds).all()


@pytest.mark.parametrize("k", [1, 3])
def test_loaders_shuffled_and_other_matrices(k: int) -> None:
    loss, params, data = mixture(2000)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=250, shuffle=True)
    state = torch.get_rng_state()
    found = eigsh_streaming(loss, params, loader, k, matrix=ggn, tol=1e-3, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    held = eigsh(ggn(loss, params, (x, y)), k, tol=1e-3, seed=0)
    assert ((found.values - held.values).abs() <= found.bounds + held.bounds).all()


def test_half_precision_parameters_hand_their_vectors_on() -> None:
    loss, params, data = mixture(2000)
    narrow = {name: x.bfloat16() for name, x in params.items()}
    wide = Batches([(x.bfloat16(), y) for x, y in data])
    found = eigsh_streaming(loss, narrow, wide, 2, tol=0.1, seed=0, throw=False)
    assert found.values[0] > 0


@pytest.mark.parametrize("schedule", [(), (0.5,), (0.5, 0.2, 1.0), (0.0, 1.0), (1.0, 1.0), (0.5, 2.0)])
def test_schedules_rise_to_one(schedule: tuple[float, ...]) -> None:
    loss, params, data = mixture(2000)
    with pytest.raises(InputError, match="schedule"):
        eigsh_streaming(loss, params, data, 2, schedule=schedule)


def test_a_share_of_data_without_length_is_refused() -> None:
    class Endless:
        def __iter__(self) -> Iterator[Any]:
            return iter(mixture(2000)[2])

    loss, params, _ = mixture(2000)
    with pytest.raises(DataError, match="length"):
        eigsh_streaming(loss, params, Batches(Endless()), 2)


def test_what_does_not_converge_raises_with_all_passes_told() -> None:
    loss, params, data = mixture(2000)
    with pytest.raises(NotConverged) as error:
        eigsh_streaming(loss, params, data, 5, tol=1e-6, max_matvecs=10, seed=0)
    assert error.value.solution.stats.passes >= 3


def test_the_head_of_a_batch() -> None:
    batch = {"x": torch.arange(10), "y": torch.arange(20).reshape(10, 2)}
    assert len(head(batch, 0.25)["y"]) == 2
    assert len(head(batch, 0.001)["x"]) == 1
    uneven: tuple[Tensor, ...] = (torch.zeros(3), torch.zeros(4))
    assert head(uneven, 0.5) is uneven
