"""On a device that is not the CPU: the same figures, no tensors of the two mixed, few reads by the host; and TF32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eigenfunc import (
    Batches,
    diagonal,
    eigsh,
    ggnvp,
    hessian,
    hvp,
    lanczos,
    lobpcg,
    scope,
    sharpness,
    trace,
    tree,
)
from eigenfunc.objective import functional_loss
from tests.devices import DEVICE, Device, Remote
from tests.helpers import labelled, mlp, random_like

X, Y = labelled(12)
LOSS, PARAMS = functional_loss(mlp(), nn.CrossEntropyLoss())
V = random_like(PARAMS)


@pytest.fixture(autouse=True)
def _driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch has of each of its devices, and this one lacks."""
    driver = SimpleNamespace(
        device_count=lambda: 1,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        device=lambda device: nullcontext(),
        manual_seed=lambda seed: None,
        synchronize=lambda *device: None,
    )
    known = torch.is_autocast_enabled
    monkeypatch.setattr(torch, DEVICE.type, driver, raising=False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != DEVICE.type and known(kind))


def away(x: Any) -> Any:
    return tree.tree_map(lambda leaf: leaf.to(DEVICE), x)


def near(x: Any) -> list[Tensor]:
    return [leaf.near if isinstance(leaf, Remote) else leaf for leaf in tree.leaves(x)]


def test_an_operation_on_tensors_of_two_devices_is_an_error() -> None:
    with Device():
        x = away(X)
        assert x.device == DEVICE
        with pytest.raises(RuntimeError, match="one device"):
            x + X


PURE: dict[str, Callable[..., Any]] = {
    "hvp": lambda p, b, v: hvp(LOSS, p, b, v),
    "ggnvp": lambda p, b, v: ggnvp(LOSS, p, b, v),
    "lanczos": lambda p, b, v: tuple(lanczos(lambda u: hvp(LOSS, p, b, u), v, 4))[:2],
    "sharpness": lambda p, b, v: torch.func.grad(lambda q: sharpness(LOSS, q, b, num_steps=10, v0=v))(p),
}


@pytest.mark.parametrize("name", PURE)
def test_pure_functions_stay_on_the_device_and_read_nothing(name: str) -> None:
    with Device() as device:
        far = away(PARAMS), away((X, Y)), away(V)
        found = PURE[name](*far)
        assert device.reads == 0
        assert all(leaf.device == DEVICE for leaf in tree.leaves(found))
    for x, y in zip(near(found), tree.leaves(PURE[name](PARAMS, (X, Y), V)), strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-11)


HOST: dict[str, Callable[..., Any]] = {
    "eigsh": lambda A: eigsh(A, 3, which="BE", seed=0).values,
    "eigsh blocks": lambda A: eigsh(A, 3, block_size=3, seed=0).values,
    "lobpcg": lambda A: lobpcg(A, 2, seed=0).values,
    "trace": lambda A: torch.tensor(trace(A, num_matvecs=10, seed=0).value),
    "diagonal": lambda A: diagonal(A, num_matvecs=10, seed=0).value,
}


@pytest.mark.parametrize("name", HOST)
def test_solvers_and_estimators_work_on_the_device(name: str) -> None:
    batches = Batches([(X[:7], Y[:7]), (X[7:], Y[7:])])  # on the CPU: they are moved
    with Device():
        found = HOST[name](hessian(LOSS, away(PARAMS), batches))
    for x, y in zip(near(found), tree.leaves(HOST[name](hessian(LOSS, PARAMS, batches))), strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-8)


def test_a_solver_reads_about_one_figure_for_each_product() -> None:
    with Device() as device:
        A = hessian(LOSS, away(PARAMS), away((X, Y)))
        device.reads = 0
        solution = eigsh(A, 3, seed=0)
    assert 0 < device.reads <= 1.5 * (solution.stats.matvecs + solution.stats.verification)


def tf32() -> tuple[str, ...]:
    backends: Any = torch.backends
    return tuple(x.fp32_precision for x in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul))


@pytest.mark.parametrize("precision", ["none", "tf32"])
def test_no_product_is_formed_in_tf32_and_the_switches_are_put_back(precision: str) -> None:
    matmul: Any = torch.backends.cuda.matmul
    usual = tf32()
    assert usual[:2] == ("tf32", "tf32")  # torch's default for convolutions and recurrent layers
    try:
        matmul.fp32_precision = precision
        first, second = (scope.full_precision(torch.device("cuda")) for _ in range(2))
        with first:
            second.__enter__()
            assert "tf32" not in tf32()
        assert "tf32" not in tf32()  # the other one, of another thread say, is still inside
        second.__exit__(None, None, None)
        assert tf32() == (*usual[:2], precision)
    finally:
        matmul.fp32_precision = usual[2]
    assert tf32() == usual
