"""The loss around the parameters: against the loss by hand, and against losses that are their quadratic model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eigenfunc import Batches, Solution, eigsh, functional_loss, hessian, plot, tree
from eigenfunc.errors import DataError, InputError, TreeError
from eigenfunc.landscape import landscape
from tests.helpers import cut, labelled, mlp, never, rotated, untouched


def small() -> tuple[Any, Any, Batches, nn.Module]:
    """With all that is easily disturbed, and uneven batches."""
    model = mlp(nn.BatchNorm1d(4), nn.Dropout(0.3))
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
    return loss, params, Batches(cut(labelled(14), 10)), model


def quadratic() -> tuple[Callable[..., Tensor], Tensor, Tensor, Solution]:
    """½ (p − c)ᵀ A (p − c) + 1, of which the quadratic model is all there is."""
    A = rotated(torch.tensor([4.0, 2.0, 1.0, -1.0]), 0)
    centre = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()

    def loss(p: Tensor, batch: Tensor) -> Tensor:
        return (p - centre) @ A @ (p - centre) / 2 + 1 + 0 * batch.sum()

    return loss, torch.zeros(4).double(), A, eigsh(A, 4, which="LA", seed=0)


def test_a_quadratic_loss_is_its_model_everywhere() -> None:
    loss, params, _, solution = quadratic()
    found = landscape(loss, params, torch.zeros(1), solution, (3, 1), radius=2.0, points=7)
    assert found.offsets.tolist() == pytest.approx([-2, -4 / 3, -2 / 3, 0, 2 / 3, 4 / 3, 2])
    u, v = solution.vectors[3], solution.vectors[1]
    for i, x in enumerate(found.offsets):
        for j, y in enumerate(found.offsets):
            assert found.losses[i, j] == pytest.approx(float(loss(params + x * u + y * v, torch.zeros(1))), rel=1e-12)
    torch.testing.assert_close(found.model, found.losses, rtol=1e-11, atol=1e-11)
    line = landscape(loss, params, torch.zeros(1), solution, 2, radius=2.0, points=5)
    torch.testing.assert_close(line.model, line.losses, rtol=1e-11, atol=1e-11)
    default = landscape(loss, params, torch.zeros(1), solution, (2, 0), points=3)
    assert float(default.offsets[-1]) == pytest.approx((2 * abs(float(loss(params, torch.zeros(1)))) / 4) ** 0.5)


def test_the_landscape_is_that_of_the_whole_data_and_touches_nothing() -> None:
    """Uneven batches by their weight, dropout with one mask, batch norm in train mode: against the loss by hand."""
    loss, params, data, model = small()
    solution = eigsh(hessian(loss, params, data), 2, seed=0)
    with untouched(model):
        found = landscape(loss, params, data, solution, points=3, radius=0.5)
        again = landscape(loss, params, data, solution, points=3, radius=0.5)
    assert torch.equal(found.losses, again.losses)
    plain, _ = functional_loss(model.eval(), nn.CrossEntropyLoss())
    found = landscape(plain, params, data, solution, points=3, radius=0.5)
    (first, second) = data
    for i, x in enumerate((-0.5, 0.0, 0.5)):
        for j, y in enumerate((-0.5, 0.0, 0.5)):
            at = {name: p + x * solution.vectors[name][0] + y * solution.vectors[name][1] for name, p in params.items()}
            truth = (10 * plain(at, first) + 4 * plain(at, second)) / 14
            assert found.losses[i, j] == pytest.approx(float(truth), rel=1e-12)


def test_random_losses_draw_the_same_at_every_point() -> None:
    """A random linear function is straight along any line only if its slope stays the same."""

    def loss(p: Tensor, batch: Tensor) -> Tensor:
        return (torch.rand(4, dtype=torch.float64) * p).sum() + 1 + 0 * batch.sum()

    data = Batches([torch.zeros(2), torch.ones(3)])
    state = torch.get_rng_state()
    found = landscape(loss, torch.ones(4).double(), data, quadratic()[3], (0, 1), radius=1.0, points=5)
    assert torch.equal(state, torch.get_rng_state())
    assert (found.losses[1:] - found.losses[:-1]).std(0).max() < 1e-12
    assert found.losses.std() > 1e-3


def test_losses_that_blow_up_away_from_the_parameters_leave_a_gap() -> None:
    def loss(p: Tensor, batch: Tensor) -> Tensor:
        return torch.log(1 + p).sum() + 2 + 0 * batch.sum()

    params = torch.zeros(2).double()
    solution = eigsh(hessian(loss, params, torch.zeros(1)), 2, seed=0)
    found = landscape(loss, params, torch.zeros(1), solution, radius=2.0, points=5)
    assert found.losses.isnan().any()
    assert found.losses[2, 2] == 2
    plot.landscape(loss, params, torch.zeros(1), solution, radius=2.0, points=5).figure.canvas.draw()  # type: ignore[union-attr]


BAD: dict[str, dict[str, Any]] = {
    "no pair": {"pairs": ()},
    "three pairs": {"pairs": (0, 1, 2)},
    "twice the same": {"pairs": (1, 1)},
    "beyond the last": {"pairs": (0, 4)},
    "negative": {"pairs": -1},
    "not whole": {"pairs": (0.5, 1)},
    "even": {"points": 4},
    "one point": {"points": 1},
    "no radius": {"radius": 0.0},
    "endless": {"radius": float("inf")},
}


@pytest.mark.parametrize("name", BAD)
def test_landscapes_out_of_range_are_refused_before_the_loss_is_called(name: str) -> None:
    with pytest.raises(InputError):
        landscape(never, torch.zeros(4).double(), torch.zeros(1), quadratic()[3], **BAD[name])


def test_vectors_of_another_tree_and_losses_without_a_value_are_refused() -> None:
    loss, params, _, solution = quadratic()
    with pytest.raises(TreeError, match=r"solution\.vectors"):
        landscape(loss, {"a": params}, torch.zeros(1), solution)
    with pytest.raises(DataError, match="no landscape"):
        landscape(lambda p, b: loss(p, b) + float("inf"), params, torch.zeros(1), solution)


def test_a_half_precision_point_and_a_bundle_of_leaves_keep_their_dtypes() -> None:
    params = {"z": torch.ones(3).bfloat16(), "a": [torch.ones(2), torch.tensor(2.0)]}

    def loss(p: Any, batch: Tensor) -> Tensor:
        assert [leaf.dtype for leaf in tree.leaves(p)] == [leaf.dtype for leaf in tree.leaves(params)]
        return sum((leaf.float() ** 2).sum() for leaf in tree.leaves(p)) + 0 * batch.sum()

    vectors = tree.tree_map(lambda leaf: torch.ones_like(leaf)[None] / 6**0.5, params)
    solution = replace(eigsh(2 * torch.eye(1).double(), 1, seed=0), vectors=vectors)
    found = landscape(loss, params, torch.zeros(1), solution, 0, radius=1.0, points=3)
    assert found.losses.tolist() == pytest.approx([9 + 1 - 2 * 7 / 6**0.5, 9.0, 9 + 1 + 2 * 7 / 6**0.5], rel=5e-3)
