"""Small losses whose Hessians are known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from eigenfunc import tree
from eigenfunc.testing.layouts import LAYOUTS, parameter_tree
from eigenfunc.testing.spectra import drawn_count
from eigenfunc.tree import Tree


class SmallLoss(NamedTuple):
    """A loss at a point, in float64.

    loss     (params, batch) -> ()
    hessian  (n, n) by a formula that differentiates nothing, in the order of `eigenfunc.tree.ravel`
    """

    kind: str
    loss: Callable[[Tree, Any], Tensor]
    params: Tree
    batch: Any
    hessian: Tensor


def _gauss(g: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _quadratic(generator: Generator) -> SmallLoss:
    """½ xᵀ S x + bᵀ x on any tree, with S the batch."""
    n = drawn_count(1, 12, generator)
    like = parameter_tree(n, LAYOUTS[drawn_count(0, len(LAYOUTS) - 1, generator)], drawn_count(0, 999, generator))
    S = _gauss(generator, n, n)
    S = (S + S.mT) / 2

    def loss(params: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = tree.ravel(params, like)
        return x @ batch[0] @ x / 2 + batch[1] @ x

    return SmallLoss("quadratic", loss, tree.randn(like, generator), (S, _gauss(generator, n)), S)


def _rosenbrock(g: Generator) -> SmallLoss:
    """Σ b (x₍ᵢ₊₁₎ − xᵢ²)² + (a − xᵢ)² on a tuple of numbers, with (a, b) the batch."""
    n = drawn_count(2, 6, g)
    x, (a, b) = _gauss(g, n), (1.0, 100.0)
    H = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n - 1):
        H[i, i] += 12 * b * x[i] ** 2 - 4 * b * x[i + 1] + 2
        H[i + 1, i + 1] += 2 * b
        H[i, i + 1] = H[i + 1, i] = -4 * b * x[i]

    def loss(params: tuple[Tensor, ...], batch: tuple[float, float]) -> Tensor:
        p = torch.stack(params)
        return (batch[1] * (p[1:] - p[:-1] ** 2) ** 2 + (batch[0] - p[:-1]) ** 2).sum()

    return SmallLoss("rosenbrock", loss, tuple(x.unbind()), (a, b), H)


def _linear(
    kind: str,
    criterion: Callable[[Tensor, Tensor], Tensor],
    targets: Callable[[int, int, Generator], Tensor],
    curvature: Callable[[Tensor], Tensor],
    outputs: int,
    g: Generator,
) -> SmallLoss:
    """criterion(x Wᵀ + b, y): H is the mean over samples of Dᵀ C D, with D the derivative of the outputs, which is
    constant, and C (outputs, outputs) the `curvature` of one sample's loss in its outputs."""
    count, inputs = drawn_count(1, 9, g), drawn_count(1, 4, g)
    x, y = _gauss(g, count, inputs), targets(count, outputs, g)
    params = {"weight": _gauss(g, outputs, inputs), "bias": _gauss(g, outputs)}
    H = torch.zeros(outputs * (1 + inputs), outputs * (1 + inputs), dtype=torch.float64)
    eye = torch.eye(outputs, dtype=torch.float64)
    for sample in x:
        D = torch.cat([eye, torch.kron(eye, sample)], dim=1)  # leaves in the order of their names: bias, weight
        H += D.mT @ curvature(params["weight"] @ sample + params["bias"]) @ D / count

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return criterion(F.linear(batch[0], params["weight"], params["bias"]), batch[1])

    return SmallLoss(kind, loss, params, (x, y), H)


def _mse(g: Generator) -> SmallLoss:
    outputs = drawn_count(1, 3, g)
    return _linear(
        "mse",
        F.mse_loss,
        lambda count, outputs, g: _gauss(g, count, outputs),
        lambda z: 2 / outputs * torch.eye(outputs, dtype=torch.float64),
        outputs,
        g,
    )


def _softmax(g: Generator) -> SmallLoss:
    def curvature(z: Tensor) -> Tensor:
        p = torch.exp(z - z.max())
        p = p / p.sum()
        return torch.diag(p) - torch.outer(p, p)

    def labels(count: int, outputs: int, g: Generator) -> Tensor:
        return torch.randint(outputs, (count,), generator=g)

    return _linear("softmax regression", F.cross_entropy, labels, curvature, drawn_count(2, 4, g), g)


def _logistic(g: Generator) -> SmallLoss:
    def curvature(z: Tensor) -> Tensor:
        return torch.diag(1 / ((1 + torch.exp(z)) * (1 + torch.exp(-z))))

    def labels(count: int, outputs: int, g: Generator) -> Tensor:
        return torch.randint(2, (count, outputs), generator=g).double()

    return _linear("logistic regression", F.binary_cross_entropy_with_logits, labels, curvature, 1, g)


def _poisson(g: Generator) -> SmallLoss:
    def criterion(z: Tensor, y: Tensor) -> Tensor:
        return (z.exp() - y * z).sum(1).mean()

    def counts(count: int, outputs: int, g: Generator) -> Tensor:
        return torch.randint(5, (count, outputs), generator=g).double()

    return _linear("poisson regression", criterion, counts, lambda z: torch.diag(torch.exp(z)), drawn_count(1, 3, g), g)


LOSSES: dict[str, Callable[[Generator], SmallLoss]] = {
    "quadratic": _quadratic,
    "mse": _mse,
    "softmax regression": _softmax,
    "logistic regression": _logistic,
    "poisson regression": _poisson,
    "rosenbrock": _rosenbrock,
}


def small_loss(kind: str, seed: int = 0) -> SmallLoss:
    """A loss of one of `LOSSES`, the same for the same seed."""
    return LOSSES[kind](torch.Generator().manual_seed(seed))
