"""What the product engine refuses, with the reason, and that a refusal leaves everything as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eigenfunc
from eigenfunc import functional_loss, hessian, hvp
from eigenfunc.errors import DataError, EigenfuncError, InputError, ObjectiveError, ProductError, TreeError
from tests.cubes import CubeAdjoint, CubeOnce
from tests.helpers import Params, never, normal, random_like, untouched

CE = nn.CrossEntropyLoss()
X = normal(6, 4)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()


REFUSED: dict[str, Any] = {
    "once differentiable": lambda p, batch: (CubeOnce.apply(p) * batch).sum() + (p**4).sum(),
    "once differentiable, alone": lambda p, batch: (CubeOnce.apply(p) * batch).sum(),
    "adjoint": lambda p, batch: (CubeAdjoint.apply(p) * batch).sum() + (p**4).sum(),
    "adjoint, whose zero Hessian is none": lambda p, batch: (CubeAdjoint.apply(p) * batch).sum(),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_differentiates_only_once_is_refused_and_not_wrong(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ProductError, match="no two ways"):
        hessian(REFUSED[name], normal(3).to(dtype), normal(3).to(dtype))


def test_what_nothing_else_can_do_finite_differences_do_on_request() -> None:
    p, batch, v = normal(3), normal(3) + 1, normal(3) - 0.5
    A = hessian(REFUSED["adjoint"], p, batch, product="finite-difference")
    truth = (6 * p * batch + 12 * p**2) * v
    error = (A(v) - truth).norm()
    assert error < 1e-9 * truth.norm()
    assert error <= A.noise() * v.norm()
    assert (A(1000 * v) - 1000 * truth).norm() < 1e-9 * (1000 * truth).norm()
    assert "finite-difference" in A.describe()


REWRITING: dict[str, tuple[Any, str]] = {
    "max_norm": (lambda p, b: F.embedding(b, p, max_norm=0.5).pow(3).sum(), "max_norm rewrites"),
    "frequency": (lambda p, b: F.embedding(b, p, scale_grad_by_freq=True).pow(3).sum(), "not the derivative"),
    "bag": (lambda p, b: F.embedding_bag(b[None], p, max_norm=0.5).pow(3).sum(), "max_norm rewrites"),
    "parameter": (lambda p, b: p.mul_(0.5).pow(3).sum() + b.sum(), "writes into"),
    "batch": (lambda p, b: b.add_(1).sum() + p.pow(3).sum(), "writes into a tensor of its batch"),
}


@pytest.mark.parametrize("name", REWRITING)
def test_losses_that_write_into_their_arguments_are_refused_and_write_nothing(name: str) -> None:
    loss, message = REWRITING[name]
    p, batch = normal(4, 2), torch.tensor([0, 2, 1])
    before = p.clone()
    with pytest.raises(ObjectiveError, match=message):
        hessian(loss, p, batch)
    assert torch.equal(p, before)
    assert torch.equal(batch, torch.tensor([0, 2, 1]))


def test_what_raises_in_the_forward_pass_leaves_everything_as_it_was() -> None:
    model, x = normalised(), X
    loss, params = functional_loss(model, CE)
    A = hessian(loss, params, (x, LABELS), product="jvp")
    with untouched(model):
        with pytest.raises(IndexError):
            hvp(loss, params, (x, LABELS + 5), random_like(params))
        with pytest.raises(RuntimeError):
            hessian(loss, params, (x[:, :1], LABELS))
        with pytest.raises(TreeError):
            A({"wrong": x})


def independent(p: Params, batch: Tensor) -> Tensor:
    return batch.sum()


BAD_LOSSES: dict[str, tuple[Any, str]] = {
    "not a scalar": (lambda p, batch: p["w"] * 2, r"shape \(3,\), not \(\)"),
    "no tensor": (lambda p, batch: 1.0, "returned a float"),
    "an integer": (lambda p, batch: p["w"].sum().long(), "torch.int64"),
    "no parameter in it": (independent, "does not depend on any"),
    "detached": (lambda p, batch: p["w"].detach().sum(), "does not depend on any"),
}


@pytest.mark.parametrize("name", BAD_LOSSES)
@pytest.mark.parametrize("product", ["auto", "graph"])
def test_losses_that_cannot_be_differentiated_are_refused(name: str, product: str) -> None:
    loss, message = BAD_LOSSES[name]
    with pytest.raises(ObjectiveError, match=message):
        hessian(loss, {"w": normal(3)}, normal(3), product=product)


BAD_POINTS: dict[str, tuple[Any, str]] = {
    "nan": ({"w": torch.tensor([1.0, float("nan")])}, "'w' holds NaN"),
    "empty": ({}, "no tensor entries"),
    "integers": ({"w": torch.ones(2), "steps": torch.tensor([1, 2])}, "'steps' has dtype torch.int64"),
    "complex": ({"w": torch.ones(2, dtype=torch.complex64)}, "complex"),
    "not tensors": ({"w": torch.ones(2), "c": 3.0}, "'c' is a float"),
    "two devices": ({"w": torch.ones(2), "m": torch.ones(2, device="meta")}, "several devices"),
}


@pytest.mark.parametrize("name", BAD_POINTS)
def test_points_that_are_none_are_refused_before_the_first_product(name: str) -> None:
    params, message = BAD_POINTS[name]
    with pytest.raises(EigenfuncError, match=message):
        hessian(never, params, torch.ones(1))
    if name != "nan":
        with pytest.raises(EigenfuncError, match=message):
            hvp(never, params, torch.ones(1), params)


@pytest.mark.parametrize("wrong", ["structure", "shape", "dtype", "device"])
def test_vectors_that_do_not_match_are_refused(wrong: str) -> None:
    params = {"a": normal(2), "b": normal(3)}
    v = {
        "structure": {"a": normal(2)},
        "shape": {"a": normal(2), "b": normal(2)},
        "dtype": {"a": normal(2), "b": normal(3).float()},
        "device": {"a": normal(2), "b": normal(3).to("meta")},
    }[wrong]

    def loss(p: Params, batch: Tensor) -> Tensor:
        return (p["a"].sum() * p["b"] ** 2).sum()

    A = hessian(loss, params, normal(1))
    for product in (A, A.__matmul__, lambda v: hvp(loss, params, normal(1), v)):
        with pytest.raises(TreeError, match="v"):
            product(v)


@pytest.mark.parametrize("cache", [-1, "all"])
def test_caches_that_are_none_are_refused(cache: Any) -> None:
    with pytest.raises(InputError, match="cache"):
        hessian(lambda p, b: (p**2).sum(), normal(2), normal(1), cache=cache)


def test_unknown_products_and_chunks_are_refused() -> None:
    with pytest.raises(InputError, match="product must be 'auto'"):
        hessian(lambda p, b: (p**2).sum(), normal(2), normal(1), product="fast")
    with pytest.raises(InputError, match="chunk"):
        hessian(lambda p, b: (p**2).sum(), normal(2), normal(1), chunk=0)


def test_nan_in_the_loss_of_a_batch_names_it_and_the_model_is_whole() -> None:
    model, x = normalised(), X
    loss, params = functional_loss(model, CE)
    bad = x.clone()
    bad[0, 0] = float("nan")
    data = eigenfunc.Batches([(x, LABELS), (x, LABELS), (bad, LABELS)])
    with untouched(model), pytest.raises(DataError, match="loss of batch 2 is nan"):
        hessian(loss, params, data)
