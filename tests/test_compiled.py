"""Products by a traced and compiled graph: the same as eager ones, or given up with a warning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eigenfunc import Batches, functional_loss, hessian
from eigenfunc.curvature import compiled
from eigenfunc.errors import CompileWarning
from tests.helpers import Params, assert_blocks_close, cut, flat, labelled, mlp, random_like

CE = nn.CrossEntropyLoss()
X, Y = labelled(12)


def test_the_linearised_product_is_the_product_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[Any] = []

    def uncompiled(f: Any, **options: Any) -> Any:
        traces.append(f)
        return f

    monkeypatch.setattr(torch, "compile", uncompiled)
    for between in ([], [nn.Dropout(0.5)], [nn.BatchNorm1d(4)]):
        traces.clear()
        loss, params = functional_loss(mlp(*between), CE)
        v = random_like(params)
        for cache in ("auto", 0):
            A = hessian(loss, params, Batches(cut((X, Y), [5, 5, 2])), compile=True, cache=cache)  # type: ignore[arg-type]
            assert "compiled" in A.describe()
            eager = hessian(loss, params, Batches(cut((X, Y), [5, 5, 2])))(v)
            assert_blocks_close(A(v), flat(eager), 1e-11)
        assert len(traces) == 4  # two shapes of batch, for each operator


def test_the_traced_part_that_moves_with_the_vector_is_linear_and_apart() -> None:
    def joint(x: Tensor, v: Tensor) -> list[Tensor]:
        return [x.sin() * v + (x.cos() * x) @ v.mT, x.exp()]

    traced = torch.fx.symbolic_trace(joint)
    primal, tangent = compiled.split(traced, 1)
    x, v = X[:5], X[5:10]
    held = primal(x)
    assert len(held) == 3
    assert all(torch.equal(a, b) for a, b in zip(tangent(*held, v), joint(x, v), strict=True))


def branching(params: Params, batch: Any) -> Tensor:
    out = batch[0] @ params["w"]
    return (out**3).mean() if out.sum().item() > 0 else (out**2).mean()


def test_what_cannot_be_compiled_is_formed_eagerly_with_a_warning() -> None:
    params = {"w": X[0] + 1}
    with pytest.warns(CompileWarning, match="not compiled"):
        A = hessian(branching, params, (X, Y), compile=True)
    v = random_like(params)
    assert torch.equal(A(v)["w"], hessian(branching, params, (X, Y))(v)["w"])
    assert "compiled" not in A.describe()


def test_a_compiled_product_that_is_wrong_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda *args: [1.01 * x for x in f(*args)]

    monkeypatch.setattr(torch, "compile", wrong)
    loss, params = functional_loss(mlp(), CE)
    with pytest.warns(CompileWarning, match="is off by"):
        A = hessian(loss, params, (X, Y), compile=True)
    v = random_like(params)
    assert_blocks_close(A(v), flat(hessian(loss, params, (X, Y))(v)), 1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_for_real() -> None:
    loss, params = functional_loss(mlp(), CE)
    A = hessian(loss, params, Batches(cut((X, Y), [6, 6])), compile=True)
    v = random_like(params)
    assert_blocks_close(A(v), flat(hessian(loss, params, (X, Y))(v)), 1e-11)
    assert "compiled" in A.describe()
