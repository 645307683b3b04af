"""Three small problems in plain torch, with random weights and data, and their exact products."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        same = stride == 1 and width_in == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def resnet() -> nn.Module:
    blocks: list[nn.Module] = []
    width_in = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        blocks += [ResidualBlock(width_in, width, stride), ResidualBlock(width, width, 1)]
        width_in = width
    stem = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Layer(nn.Module):
    """Pre-LN attention and MLP. No bias on queries, keys and values: that of the keys has an all-zero Hessian."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.inner(self.norm2(x))
        return out


class GPT(nn.Module):
    """Returns logits of shape (batch · time, vocabulary)."""

    def __init__(self, vocabulary: int = 1000, time: int = 128, width: int = 128, heads: int = 4, depth: int = 4):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(time, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layers(self.tokens(tokens) + self.positions)
        logits: Tensor = self.head(self.norm(hidden))
        return logits.flatten(0, 1)


def _vectors(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 784), torch.randint(10, (count,))


def _images(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 32, 32), torch.randint(10, (count,))


def _texts(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(1000, (count, 128)), torch.randint(1000, (count * 128,))


class _Spec(NamedTuple):
    model: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    batch_size: int
    attention: bool


_SPECS = {
    "MLP": _Spec(mlp, _vectors, 256, False),
    "ResNet": _Spec(resnet, _images, 32, False),
    "GPT": _Spec(GPT, _texts, 8, True),
}
NAMES = tuple(_SPECS)


@dataclass(frozen=True)
class Problem:
    """A model in train mode and one batch for `criterion(model(inputs), targets)`."""

    name: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    criterion: nn.Module
    attention: bool  # whether the model calls fused attention, which cannot be differentiated twice

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def problem(name: str, batch_size: int | None = None, seed: int = 0) -> Problem:
    """The problem of that name, the same at each call; reseeds the global random state."""
    spec = _SPECS[name]
    torch.manual_seed(seed)
    model = spec.model().train()
    return Problem(name, model, spec.data(batch_size or spec.batch_size), nn.CrossEntropyLoss(), spec.attention)


def batch_size(name: str) -> int:
    return _SPECS[name].batch_size


def math_attention(p: Problem) -> AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.MATH) if p.attention else nullcontext()


def loss_of(p: Problem, model: torch.nn.Module) -> Tensor:
    inputs, targets = p.batch
    loss: Tensor = p.criterion(model(inputs), targets)
    return loss


def probe_vectors(p: Problem, count: int) -> list[Tensor]:
    """`count` random vectors, stacked: one tensor a parameter."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, *x.shape, generator=generator) for x in p.model.parameters()]


def exact(p: Problem, vs: Sequence[Tensor]) -> list[Tensor]:
    """The products with all probes by plain double backward in float64."""
    model = copy.deepcopy(p.model).double()
    leaves = list(model.parameters())
    inputs, targets = p.batch
    with math_attention(p):
        outputs = model(inputs.double() if inputs.is_floating_point() else inputs)
        slopes = torch.autograd.grad(p.criterion(outputs, targets), leaves, create_graph=True)
        probes = ([v[i].double() for v in vs] for i in range(len(vs[0])))
        rows = [torch.autograd.grad(slopes, leaves, v, retain_graph=True) for v in probes]
    return [torch.stack(row) for row in zip(*rows, strict=True)]


def worst_block(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest relative error over parameter blocks and probes."""
    worst = 0.0
    for x, y in zip(found, truth, strict=True):
        x = x if x.ndim == y.ndim else x[None]
        for a, b in zip(x, y, strict=False):
            error = float((a.double() - b).norm() / b.norm())
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst
