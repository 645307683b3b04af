"""What all the facts share: the digits, small networks of one flat parameter vector, the top of a spectrum, a cache."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eigenfunc import LinearOperator, demo, hessian, lanczos

SEEDS = (0, 1, 2)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu}


@dataclass(frozen=True)
class Problem:
    """A fully connected network and its loss, as functions of one flat vector w; an objective for `hessian` and `ggn`.

    widths      from the pixels to the classes
    loss        "ce", or "mse" for ½ · mean ‖outputs − onehot‖²
    normalised  batch norm, with the statistics of the batch, in front of each activation
    """

    widths: tuple[int, ...]
    activation: str
    loss: str
    normalised: bool = False

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        layers = list(itertools.pairwise(self.widths))
        found: list[tuple[int, ...]] = []
        for i, (a, b) in enumerate(layers):
            found += [(b, a), (b,)]
            if self.normalised and i < len(layers) - 1:
                found += [(b,), (b,)]
        return found

    def start(self, seed: int) -> Tensor:
        """Weights uniform in ±1/√fan_in, biases 0, gains 1."""
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for i, shape in enumerate(self.shapes):
            if len(shape) == 2:
                parts.append((2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1]))
            else:
                gain = len(self.shapes[i - 1]) == 1 and parts[-1].max() == 0
                parts.append(torch.ones(shape) if gain else torch.zeros(shape))
        return torch.cat([part.flatten() for part in parts])

    def predict(self, w: Tensor, x: Tensor) -> Tensor:
        shapes = self.shapes
        parts = iter([p.view(s) for p, s in zip(torch.split(w, [math.prod(s) for s in shapes]), shapes, strict=True)])
        act = _ACTIVATIONS[self.activation]
        last = len(self.widths) - 2
        for i in range(last + 1):
            x = F.linear(x, next(parts), next(parts))
            if i < last:
                x = act(F.batch_norm(x, None, None, next(parts), next(parts), training=True) if self.normalised else x)
        return x

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.loss == "ce":
            return F.cross_entropy(outputs, targets)
        onehot = F.one_hot(targets, outputs.shape[-1]).to(outputs.dtype)
        return ((outputs - onehot) ** 2).sum(-1).mean() / 2

    def __call__(self, w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.criterion(self.predict(w, batch[0]), batch[1])


@cache
def digits() -> tuple[Tensor, Tensor]:
    images, labels = demo.digits()
    return images.flatten(1), labels


def first(n: int) -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[:n], y[:n]


def of_classes(count: int) -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[y < count], y[y < count]


def drawn(data: tuple[Tensor, Tensor], size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless stream of batches, epoch by epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data[1]), generator=generator)
        for index in torch.split(order, size):
            if len(index) == min(size, len(order)):
                yield data[0][index], data[1][index]


def slope(problem: Problem, w: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
    """Loss and gradient at the leaf w."""
    value = problem(w, batch)
    (g,) = torch.autograd.grad(value, w)
    return float(value.detach()), g


class Top(NamedTuple):
    value: float
    residual: float  # ‖A v − λ v‖ by the recurrence, relative to λ
    vector: Tensor


def top(A: LinearOperator, v: Tensor, num_steps: int = 4) -> Top:
    """The largest eigenvalue by a few Lanczos steps from an earlier eigenvector; NaN where products overflow."""
    found = lanczos(A.matvec, v, num_steps)
    off = found.betas[:-1]
    if not bool(torch.isfinite(found.alphas.sum() + found.betas.sum())):
        return Top(math.nan, math.nan, v)
    values, s = torch.linalg.eigh(torch.diag(found.alphas) + torch.diag(off, 1) + torch.diag(off, -1))
    value = float(values[-1])
    residual = float((found.betas[-1] * s[-1, -1]).abs()) / max(abs(value), 1e-30)
    return Top(value, residual, s[:, -1].to(found.basis) @ found.basis)


def curvature(problem: Problem, w: Tensor, batch: tuple[Tensor, Tensor]) -> LinearOperator:
    """The Hessian at w, without the set-up checks, which cost more than the few products that are made with it."""
    return hessian(problem, w.detach(), batch, product="graph", check=False)


def random_vector(w: Tensor, seed: int) -> Tensor:
    return torch.randn(w.shape, generator=torch.Generator().manual_seed(1000 + seed))


Json = dict[str, Any]


def cached(folder: Path | None, name: str, run: Callable[..., Json], *args: Any) -> Json:
    """run(*args), or what it returned when it last ran with these arguments, from `folder`."""
    if folder is None:
        return run(*args)
    mark = hashlib.sha256(repr((run.__qualname__, args)).encode()).hexdigest()[:10]
    path = folder / f"{name}-{mark}.json"
    if path.exists():
        kept: Json = json.loads(path.read_text())
        return kept
    found = run(*args)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(found))
    temporary.replace(path)
    return found
