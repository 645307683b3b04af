"""What a loss holds constant: targets under no_grad, buffers it writes itself, steps to a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.zoo.cases import Make, Problem, case, doubled, supervised
from tests.zoo.layers import dense

LABELS = torch.tensor([0, 2, 1, 1])
CE = nn.CrossEntropyLoss()


class Straight(torch.autograd.Function):
    """Rounds, and passes the slope through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round(decimals=1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return slope


def settled(make: Make) -> Make:
    """The same problem with what a forward pass writes into buffers written once, and constant from there on."""

    def truth() -> Problem:
        model, loss_fn, batch = make()
        with torch.no_grad():
            loss_fn(model.double(), doubled(batch))
        for part in model.modules():
            if hasattr(part, "moving"):
                part.moving = False
        return model.eval(), loss_fn, batch

    return truth


def held_constant(stop: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Make, Make]:
    """The outputs held against a target that a part of the same model gives, as self-supervised losses do.

    The second form has that target in its batch, computed in float64 by an equal model.
    """

    def make() -> Problem:
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            return F.mse_loss(model(batch[0]), stop(model, batch[1])) + model[0].weight.square().sum()

        return model, loss_fn, (torch.randn(5, 4), torch.randn(5, 4))

    def truth() -> Problem:
        model, _, (x, other) = make()
        with torch.no_grad():
            target = model.double()(other.double())

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            return F.mse_loss(model(batch[0]), batch[1]) + model[0].weight.square().sum()

        return model, loss_fn, (x, target)

    return make, truth


def without_grad(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def grad_switched_off(model: nn.Module, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        return model(x)


@torch.no_grad()
def decorated(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


for _name, _stop in {
    "no_grad": without_grad,
    "set_grad_enabled(False)": grad_switched_off,
    "no_grad as decorator": decorated,
    "detach": lambda model, x: model(x).detach(),
    "data": lambda model, x: model(x).data,
    "tolist": lambda model, x: torch.tensor(model(x).tolist(), dtype=x.dtype),
    "numpy": lambda model, x: torch.from_numpy(model(x).detach().numpy()),
}.items():
    _make, _truth = held_constant(_stop)
    case(f"constant by {_name}", _make, truth=_truth)


def quantised(quantise: Callable[[Tensor], Tensor], held: bool = False) -> Make:
    """Hidden values rounded to a grid, with a slope of one; held: the steps to the grid are those of this point."""

    def make() -> Problem:
        model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            hidden = model[0](batch[0])
            hidden = hidden + batch[2] if held else quantise(hidden)
            return F.cross_entropy(model[1](hidden), batch[1])

        x = torch.randn(4, 5)
        with torch.no_grad():
            hidden = model.double()[0](x.double())
        return model.float(), loss_fn, (x, LABELS, quantise(hidden) - hidden if held else x)

    return make


HELD = quantised(lambda x: x.round(decimals=1), held=True)
case("straight through by detach", quantised(lambda x: x + (x.round(decimals=1) - x).detach()), truth=HELD)
case("straight through by Function", quantised(Straight.apply), truth=HELD, refusable=True)


def spectral(norm: Callable[[nn.Module], nn.Module]) -> Make:
    """In train mode each forward pass takes a step of power iteration, whose result counts as a constant."""
    return dense(lambda: norm(nn.Linear(8, 8)))


for _name, _norm in {
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm old": nn.utils.spectral_norm,
}.items():
    case(f"{_name} train", spectral(_norm), truth=settled(spectral(_norm)))
    case(f"{_name} eval", dense(lambda norm=_norm: norm(nn.Linear(8, 8)).eval()))


class Centred(nn.Module):
    """Subtracts a moving average, which the forward pass writes into a buffer first."""

    def __init__(self, moving: bool) -> None:
        super().__init__()
        self.first, self.last, self.moving = nn.Linear(5, 6), nn.Linear(6, 3), moving
        self.register_buffer("centre", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.moving:
            with torch.no_grad():
                self.centre.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return self.last((h - self.centre).tanh())


def centred() -> Problem:
    return supervised(Centred(moving=True), CE, torch.randn(4, 5), LABELS)


case("average in a buffer", centred, truth=settled(centred))
