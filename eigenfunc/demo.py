"""Small networks trained on scikit-learn's handwritten digits: the problems of `eigenfunc demo`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eigenfunc import scope
from eigenfunc.data import Batches
from eigenfunc.objective import Objective, functional_loss

Model = Literal["mlp", "cnn"]

_SIZES = (512, 512, 256, 256, 200)  # batches of uneven size; the rest makes a sixth


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 images (1797, 1, 8, 8), float32, standardised over all pixels, and their labels (1797,)."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None]
    return (images - images.mean()) / images.std(), torch.tensor(raw.target, dtype=torch.long)


def network(model: Model) -> nn.Module:
    """A fresh network for the digits: "mlp" with 2,820 parameters, "cnn" with 3,658."""
    if model == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 36), nn.Tanh(), nn.Linear(36, 10), nn.Tanh(), nn.Linear(10, 10)
        )
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


def train(
    net: nn.Module, images: Tensor, labels: Tensor, *, seed: int, epochs: int, report: Callable[[], Any] = lambda: None
) -> None:
    """SGD with momentum, in place, the rate falling to zero, so that the weights come to rest."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        for index in torch.split(torch.randperm(len(images), generator=generator), 64):
            optimiser.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(net(images[index]), labels[index]))
            optimiser.step()
        schedule.step()
        report()


def make_problem(
    model: Model = "mlp", seed: int = 0, *, epochs: int = 30, report: Callable[[], Any] = lambda: None
) -> tuple[Objective, dict[str, Tensor], Batches]:
    """A trained network as (loss, params, data) in float64: cross-entropy over all images, in uneven batches."""
    images, labels = digits()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        scope.reseed(seed, images.device)
        net = network(model)
        train(net, images, labels, seed=seed, epochs=epochs, report=report)
    loss, params = functional_loss(net.double(), nn.functional.cross_entropy)
    sizes = [*_SIZES, len(images) - sum(_SIZES)]
    return (
        loss,
        params,
        Batches(list(zip(torch.split(images.double(), sizes), torch.split(labels, sizes), strict=True))),
    )
