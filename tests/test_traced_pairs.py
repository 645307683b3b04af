"""Eigenpairs under torch.compile(fullgraph=True): the eager pairs, first derivatives of sharpness, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.func import grad, jvp

from eigenfunc import sharpness, top_eigenpairs, tree
from tests.helpers import Params, normal, random_like

X = normal(6, 4)
P = random_like({"w": X[:3], "b": X[0, :3], "a": X[:2, :3]}, 1)
START = random_like(P, 2)
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


def tanh_net(params: Params, x: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(x @ params["w"].mT + params["b"]) @ params["a"].mT, LABELS)


def normed(params: Params, x: Tensor) -> Tensor:
    """Functions whose third derivatives torch gets wrong, or lacks."""
    h = F.layer_norm(x @ params["w"].mT + params["b"], (3,), params["a"][0], params["a"][1])
    return F.mse_loss(F.normalize(h) + h.std(1, keepdim=True), x[:, :3]) + torch.logdet(h.mT @ h + torch.eye(3))


def sharp(loss: Callable[..., Tensor] = tanh_net, num_steps: int = 1) -> Callable[..., Tensor]:
    return lambda p, x: sharpness(loss, p, x, num_steps=num_steps, v0=START)


def pairs(p: Params, x: Tensor) -> tuple[Tensor, Params, Tensor]:
    return tuple(top_eigenpairs(tanh_net, p, x, k=2, num_steps=3, v0=START))


def compiled(f: Callable[..., Any], backend: str = "eager") -> Callable[..., Any]:
    torch.compiler.reset()
    counters.clear()
    return torch.compile(f, fullgraph=True, backend=backend)


def distance(x: Any, y: Any) -> float:
    assert not counters["graph_break"]
    return float(tree.norm(tree.sub(x, y)).detach())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_pairs_are_the_eager_ones(backend: str) -> None:
    assert distance(compiled(pairs, backend)(P, X), pairs(P, X)) < 1e-10


@pytest.mark.parametrize("loss", [tanh_net, normed])
def test_the_compiled_gradient_of_sharpness_is_the_eager_one(loss: Any) -> None:
    slopes = grad(sharp(loss), argnums=(0, 1))
    assert distance(compiled(slopes, "aot_eager")(P, X), slopes(P, X)) < 1e-10


def test_a_compiled_sharpness_is_differentiated_once_from_outside() -> None:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in P.items()}
    truth = grad(sharp())(P, X)
    value = compiled(sharp(), "aot_eager")(leaves, X)
    assert distance(dict(zip(P, torch.autograd.grad(value, [*leaves.values()]), strict=True)), truth) < 1e-10
    f = compiled(sharp())
    assert distance(grad(f)(P, X), truth) < 1e-10
    first = torch.autograd.grad(f(leaves, X), [*leaves.values()], create_graph=True)
    second = torch.autograd.grad(sum(slope.sum() for slope in first), [*leaves.values()])
    assert all(leaf.isnan().all() for leaf in second)
    with pytest.raises(Exception, match=r"TransformError.*differentiated once"):
        grad(lambda p: grad(f, 1)(p, X).sum())(P)


def test_a_compiled_sharpness_follows_what_the_loss_closes_over() -> None:
    def scaled(c: Tensor) -> Tensor:
        return sharp(lambda p, x: c * tanh_net(p, x))(P, X)

    one = torch.ones(()).double()
    assert distance(compiled(grad(scaled))(one), scaled(one)) < 1e-10


def test_what_has_no_derivative_there_is_refused() -> None:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in P.items()}
    asked: list[tuple[Callable[..., Any], Params]] = [
        (pairs, leaves),
        (grad(lambda p, x: pairs(p, x)[0].sum()), P),
        (lambda p, x: jvp(lambda x: pairs(p, x)[0], (x,), (x,)), P),
    ]
    for f, params in asked:
        with pytest.raises(Exception, match=r"TransformError.*eigenpairs cannot"):
            compiled(f)(params, X)
    with pytest.raises(Exception, match=r"TransformError.*nested"):
        compiled(lambda x: jvp(lambda x: jvp(lambda x: sharp()(P, x), (x,), (x,))[1], (x,), (x,)))(X)
    with torch.no_grad():
        assert distance(compiled(pairs)(leaves, X)[0], pairs(P, X)[0]) < 1e-10


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_for_real() -> None:
    assert distance(compiled(pairs, "inductor")(P, X), pairs(P, X)) < 1e-10
    slopes = grad(sharp(num_steps=5), argnums=(0, 1))
    assert distance(compiled(slopes, "inductor")(P, X), slopes(P, X)) < 1e-10
