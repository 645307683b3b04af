"""What a kept graph holds of a function are its true derivatives, and only where they may stand in for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F

from eigenfunc.curvature import products
from eigenfunc.curvature.held import DERIVATIVES, Held
from tests.helpers import normal


@pytest.mark.parametrize("key", DERIVATIVES, ids=lambda key: f"{key[0].__name__} {key[1]}")
def test_derivatives_of_activations_are_those_of_autograd(key: Any) -> None:
    f, approximate = key
    x = torch.linspace(-9, 9, 501).double().requires_grad_()
    value = f(x, approximate=approximate) if f is F.gelu else f(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    ours = DERIVATIVES[key](x.detach())
    assert (ours[0] - first).abs().max() < 1e-13
    assert (ours[1] - second).abs().max() < 1e-12


def assert_same(f: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Value, gradient, and products one at a time and batched, with and without; the number of our own nodes."""
    g = torch.Generator().manual_seed(1)
    vs = torch.randn((3, *x.shape), generator=g, dtype=x.dtype)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    with Held():
        value = f(leaf)
    expected = f(other)
    assert (value - expected).abs() <= 1e-14 * (1 + expected.abs())
    (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
    (right,) = torch.autograd.grad(expected, other, create_graph=True)
    assert (slope - right).abs().max() <= 1e-13 * (1 + right.abs().max())
    held = products.graph(lambda leaves: f(leaves[0]), [x])
    for i in range(3):
        (image,) = torch.autograd.grad(right, other, vs[i], retain_graph=True)
        scale = 1 + image.abs().max()
        assert (held.single([vs[i]])[0] - image).abs().max() <= 1e-12 * scale
        assert (held.block([vs])[0][i] - image).abs().max() <= 1e-12 * scale
    seen, names = {value.grad_fn}, []
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        names.append(type(node).__name__)
        for following, _ in node.next_functions:  # type: ignore[union-attr]
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return sum(name in ("_ValueBackward", "_LogSoftmaxBackward") for name in names)


@given(seed=st.integers(0, 1000), key=st.sampled_from(list(DERIVATIVES)))
@settings(max_examples=20, deadline=None)
def test_products_through_activations_are_unchanged(seed: int, key: Any) -> None:
    f, approximate = key
    x = normal(4, 3, seed=seed)
    options = {"approximate": approximate} if f is F.gelu else {}
    assert assert_same(lambda p: (f(p * p + p, **options) ** 2).sum(), x) == 1


@given(
    seed=st.integers(0, 1000),
    ignored=st.sampled_from([-100, 0, 2]),
    reduction=st.sampled_from(["mean", "sum"]),
    weighed=st.booleans(),
    deep=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_products_through_cross_entropy_are_unchanged(
    seed: int, ignored: int, reduction: str, weighed: bool, deep: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    shape, sizes = ((4, 3, 2), (4, 2)) if deep else ((4, 3), (4,))
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 3, sizes, generator=g)
    labels.view(-1)[0] = 1
    weight = torch.rand(3, generator=g, dtype=torch.float64) + 0.1 if weighed else None

    def f(p: Tensor) -> Tensor:
        return F.cross_entropy(p * p + p, labels, weight, ignore_index=ignored, reduction=reduction)

    assert assert_same(f, x) == 1


X = normal(4, 3)
LABELS = torch.tensor([0, 2, 1, 1])
ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "label smoothing": lambda p: F.cross_entropy(p * p, LABELS, label_smoothing=0.1),
    "soft targets": lambda p: F.cross_entropy(p * p, X.softmax(1)),
    "one sample without an axis": lambda p: F.cross_entropy(p[0] * p[0], LABELS[0]),
    "in place": lambda p: F.silu(p * p, inplace=True).sum(),
    "constant": lambda p: (F.gelu(X) * p**3).sum(),
}


@pytest.mark.parametrize("name", ALONE)
def test_other_calls_are_left_alone(name: str) -> None:
    assert assert_same(ALONE[name], X) == 0


def test_a_third_derivative_is_refused_and_not_wrong() -> None:
    leaf = X.clone().requires_grad_()
    with Held():
        value = F.gelu(leaf).sum()
    (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="grad"):
        torch.autograd.grad(second.sum(), leaf)
