"""A real network on real images: every eigenvalue within its bound of the dense float64 truth, in both precisions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from eigenfunc import Batches, demo, eigsh, functional_loss, hessian
from tests.helpers import assert_certified, dense_hessian, plain

Setting = tuple[Any, Any, Batches, Tensor]
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@pytest.fixture(scope="module")
def settings() -> dict[str, Setting]:
    """The demo's MLP in both precisions (it was trained in float32, so both hold the same numbers) and its Hessian."""
    objective, params, data = demo.make_problem("mlp", 0)
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    truth = dense_hessian(plain(objective.module, lambda m: cross_entropy(m(images), labels)), params)
    made = {}
    for name, dtype in DTYPES.items():
        loss, params = functional_loss(copy.deepcopy(objective.module).to(dtype), cross_entropy)
        made[name] = loss, params, Batches([(x.to(dtype), y) for x, y in data]), truth
    return made


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_twenty_eigenpairs_of_a_trained_network_are_certified(
    settings: dict[str, Setting], which: Any, precision: str
) -> None:
    loss, params, data, truth = settings[precision]
    tol = 1e-6 if precision == "float64" else 1e-4
    solution = eigsh(hessian(loss, params, data), 20, which=which, tol=tol, seed=0)
    assert solution.vectors["1.weight"].dtype == DTYPES[precision]
    assert_certified(solution, truth, 20, which)


@pytest.mark.parametrize("precision", DTYPES)
def test_uneven_batches_give_the_matrix_of_the_whole(settings: dict[str, Setting], precision: str) -> None:
    loss, params, data, truth = settings[precision]
    sizes = [len(labels) for _, labels in data]
    assert len(set(sizes)) > 2
    assert sum(sizes) == 1797
    A = hessian(loss, params, data).restrict(["5", "3.bias"])
    names = sorted(params)
    owner = torch.cat([torch.full((params[name].numel(),), i) for i, name in enumerate(names)])
    index = torch.isin(owner, torch.tensor([names.index(name) for name in A.like])).nonzero().flatten()
    tolerance = 1e-13 if precision == "float64" else 1e-5
    assert (A.to_dense().double() - truth[index][:, index]).abs().max() < tolerance * truth.abs().max()
