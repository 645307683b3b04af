"""The contract of operators: each property that solvers rely on is missed when it is missing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eigenfunc import LinearOperator, aslinearoperator, tree
from eigenfunc.testing import OperatorFault, check_operator
from tests.helpers import rotated

M = rotated(torch.linspace(-1, 2, 12).double(), 0)
LIKE = {"a": torch.zeros(2, 3).double(), "b": torch.zeros(()).double(), "c": torch.zeros(5).double()}


def on_tree(product: Callable[[Tensor], Tensor], block: Any = None) -> LinearOperator:
    return LinearOperator(lambda v: tree.unravel(product(tree.ravel(v, LIKE)), LIKE), LIKE, block)


def test_matrices_of_any_dtype_and_scale_pass() -> None:
    for dtype, power in ((torch.float64, 0), (torch.float64, 200), (torch.float64, -200), (torch.float32, 25)):
        for seed in range(3):
            assert check_operator((M * 10.0**power).to(dtype), seed=seed) is None
    assert check_operator(on_tree(lambda x: M @ x)) is None
    assert check_operator(on_tree(lambda x: 0 * x)) is None
    assert check_operator(aslinearoperator(M[:1, :1])) is None


def affine(x: Tensor) -> Tensor:
    return M @ x + 1e-9


def homogeneous(x: Tensor) -> Tensor:
    return M @ x.abs()


def differenced(x: Tensor) -> Tensor:
    """Central differences with a fixed step: right for unit vectors, wrong for long ones."""
    return (torch.sin(M @ x * 1e-2) - torch.sin(-M @ x * 1e-2)) / 2e-2


def triangular(x: Tensor) -> Tensor:
    return M.triu() @ x


def skew_between_leaves(x: Tensor) -> Tensor:
    A = M.clone()
    A[6, 7:] *= 1 + 1e-6
    return A @ x


def noisy(x: Tensor) -> Tensor:
    return M @ x * (1 + 1e-6 * float(torch.randn((), generator=GENERATOR)))


GENERATOR = torch.Generator().manual_seed(0)
CALLS = iter(range(10**9))


def every_third(x: Tensor) -> Tensor:
    return M @ x * (1 + (next(CALLS) % 3 == 2))


def undefined(x: Tensor) -> Tensor:
    return M @ x / 0


def drawing(x: Tensor) -> Tensor:
    torch.rand(1)
    return M @ x


def drawing_numpy(x: Tensor) -> Tensor:
    np.random.rand()
    return M @ x


def drawing_python(x: Tensor) -> Tensor:
    random.random()
    return M @ x


def switching(x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    return M @ x


BROKEN: dict[Callable[[Tensor], Tensor], str] = {
    affine: "not linear",
    homogeneous: "not linear",
    differenced: "not linear",
    triangular: "not symmetric: for two random vectors",
    skew_between_leaves: "not symmetric",
    noisy: "not deterministic",
    every_third: "not (deterministic|linear)",
    undefined: "not finite",
    drawing: "random state of torch",
    drawing_numpy: "random state of NumPy",
    drawing_python: "random state of Python",
    switching: "grad mode",
}


@pytest.mark.parametrize("product", BROKEN, ids=lambda product: product.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_each_missing_property_is_named(product: Callable[[Tensor], Tensor], seed: int) -> None:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        with pytest.raises(OperatorFault, match=BROKEN[product]) as caught:
            check_operator(on_tree(product), seed=seed)
        assert caught.value.error > caught.value.allowed
    finally:
        torch.set_grad_enabled(True)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def in_place(v: Tensor) -> Tensor:
    return v.mul_(2.0)


def narrow(v: Tensor) -> Tensor:
    return (2 * v).float()


def reshaped(v: Tensor) -> Tensor:
    return 2 * v[None]


@pytest.mark.parametrize(
    ("product", "told"), [(in_place, "its argument"), (narrow, "float32"), (reshaped, r"shape \(1, 6\)")]
)
def test_products_neither_change_their_argument_nor_its_shape(product: Callable[[Tensor], Tensor], told: str) -> None:
    with pytest.raises(OperatorFault, match=told) as caught:
        check_operator(LinearOperator(product, torch.zeros(6).double()))
    assert caught.value.property in ("pure", "shaped like its vectors")


@pytest.mark.parametrize(
    "block",
    [
        lambda vs: vs @ M * (1 + 1e-9),
        lambda vs: (vs @ M)[:1],
        lambda vs: (vs @ M).flip(0),
        lambda vs: vs.mul_(2.0) @ M / 2,
        lambda vs: vs @ M * (1 if len(vs) == 1 else 2),
    ],
    ids=["off", "too few", "out of order", "in place", "summed"],
)
def test_stacks_have_the_products_of_their_members(block: Callable[[Tensor], Tensor]) -> None:
    A = LinearOperator(lambda v: M @ v, torch.zeros(12).double(), block)
    with pytest.raises(OperatorFault, match="the same on stacks"):
        check_operator(A)


def test_declared_noise_is_allowed_and_a_tolerance_can_be_given() -> None:
    rough = LinearOperator(lambda v: M @ v + 1e-7 * v.abs(), torch.zeros(12).double())
    with pytest.raises(OperatorFault, match="not linear") as caught:
        check_operator(rough)
    assert 1e-8 < caught.value.error < 1e-5
    assert check_operator(rough, tol=1e-5) is None
    declared = LinearOperator(rough.matvec, rough.like, noise=lambda: 1e-6)
    assert check_operator(declared) is None
