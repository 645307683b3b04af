"""What surprises differentiation: checkpoints, custom functions, constants, graphs within the loss, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tests.cubes import Cube, CubeAdjoint, CubeModern, CubeOnce
from tests.zoo.cases import Make, Problem, case, supervised
from tests.zoo.models import LABELS, fused

CE = nn.CrossEntropyLoss()


def between(function: Callable[[Tensor], Tensor]) -> Make:
    """A function between two linear layers."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(function(self.first(x)))

    return lambda: supervised(Between(), CE, torch.randn(4, 5), LABELS)


def checkpointed(use_reentrant: bool | None, dropout: float = 0.0) -> Make:
    """Three blocks, each recomputed in the backward pass; None: not."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU(), nn.Dropout(dropout)) for _ in range(3)
            )
            self.first, self.out = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                part = block(x) if use_reentrant is None else checkpoint(block, x, use_reentrant=use_reentrant)
                x = x + part
            return self.out(x)

    return lambda: supervised(Deep(), CE, torch.randn(4, 5), LABELS)


case("checkpoint", checkpointed(False), truth=checkpointed(None))
case("checkpoint reentrant", checkpointed(True), truth=checkpointed(None))
case("checkpoint dropout", checkpointed(False, 0.2), truth=checkpointed(None, 0.2))


CUBE = between(lambda x: x**3)
case("Function once differentiable", between(CubeOnce.apply), refusable=True, truth=CUBE)
case("Function without forward AD", between(Cube.apply), truth=CUBE)
case("Function with setup_context", between(CubeModern.apply), truth=CUBE)
case("Function adjoint", between(CubeAdjoint.apply), refusable=True, truth=CUBE)


def adjoint_all(function: Callable[[Tensor], Tensor]) -> Make:
    """Every path from the loss to the parameters goes through the function, so that all slopes lack a graph."""
    return lambda: (nn.Linear(5, 3), lambda model, x: function(model(x)).sum(), torch.randn(4, 5))


case("Function adjoint, whole", adjoint_all(CubeAdjoint.apply), refusable=True, truth=adjoint_all(lambda x: x**3))


def flash(backends: list[SDPBackend]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def elementary(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


case("attention under FLASH", fused(flash([SDPBackend.FLASH_ATTENTION])), truth=fused(elementary))
case(
    "attention under FLASH or MATH",
    fused(flash([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])),
    truth=fused(elementary),
)


@case("ScriptModule", refusable=True)
def scripted() -> Problem:
    model = torch.jit.script(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
    return supervised(model, CE, torch.randn(4, 5), LABELS)


@case("torch.compile")
def compiled() -> Problem:
    """By a backend that needs no compiler of C++, but differentiates ahead of time as the default one does."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return supervised(torch.compile(model, backend="aot_eager"), CE, torch.randn(4, 5), LABELS)


@case("unused parameters")
def unused() -> Problem:
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "idle": nn.Linear(5, 3), "linear": nn.Linear(3, 1)})

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model["used"](batch[0]), batch[1]) + model["linear"].weight.sum()

    return model, loss_fn, (torch.randn(4, 5), LABELS)


@case("tied weights, shared layer")
def tied() -> Problem:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(7, 6), nn.Linear(6, 6)
            self.again, self.head = self.mix, nn.Linear(6, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(self.mix(self.embed(x)).tanh()).tanh())

    return supervised(Tied(), CE, torch.arange(7), torch.arange(7).roll(2))


@case("frozen parameters, float32 buffer")
def frozen() -> Problem:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    return supervised(model, CE, torch.randn(4, 5), LABELS)


@case("autocast bfloat16", tolerance=(0.1, 1e-8))
def autocast() -> Problem:
    """Rounds to eight bits inside, so float32 answers can be no better than that; float64 is left alone by it."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(batch[0])
        return F.cross_entropy(out.to(batch[0].dtype), batch[1])

    return model, loss_fn, (torch.randn(4, 5), LABELS)


@case("derivative in the loss")
def physics_informed() -> Problem:
    """The second derivative by the inputs is part of the loss, as in networks that solve differential equations."""
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        x = batch.clone().requires_grad_()
        u = model(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        return (second + u.sin()).square().mean()

    return model, loss_fn, torch.linspace(0, 1, 6)[:, None]


@case("training step in the loss")
def meta_learning() -> Problem:
    """The loss after a step of gradient descent on another batch."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        params = dict(model.named_parameters())
        (x, y), (x2, y2) = batch
        slopes = torch.autograd.grad(F.mse_loss(model(x), y), list(params.values()), create_graph=True)
        moved = {name: p - 0.1 * slope for (name, p), slope in zip(params.items(), slopes, strict=True)}
        return F.mse_loss(torch.func.functional_call(model, moved, (x2,)), y2)

    return model, loss_fn, ((torch.randn(5, 3), torch.randn(5, 1)), (torch.randn(5, 3), torch.randn(5, 1)))


@case("torch.func in the loss")
def functional() -> Problem:
    """Penalises the Jacobian of each sample, by vmap of jacrev."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Softplus(), nn.Linear(6, 2))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        jacobians = torch.func.vmap(torch.func.jacrev(model))(batch)
        return jacobians.square().sum() / len(batch) + model(batch).exp().mean()

    return model, loss_fn, torch.randn(5, 3)


@case("hooks on modules and tensors")
def hooked() -> Problem:
    """A forward hook that scales and a hook on a gradient that clips nothing."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    model[0].register_full_backward_hook(lambda module, slopes_in, slopes_out: None)
    return supervised(model, CE, torch.randn(4, 5), LABELS)


@case("written in place")
def in_place() -> Problem:
    def function(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 1] = x[:, 0].sin()
        y[:, 2:4].mul_(x[:, :2])
        y[:, 4:].add_(1).neg_()
        return y.clamp_(-1.5, 1.5)

    return between(function)()
