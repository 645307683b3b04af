"""What makes a model differentiable twice, forward over reverse: one context each, all entered by `mended`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def math_attention() -> Iterator[None]:
    """Fused attention kernels have neither forward AD nor a double backward; the composite one has both."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _reduced(x: Tensor, reduction: str) -> Tensor:
    return x.mean() if reduction == "mean" else x.sum() if reduction == "sum" else x


def _mse_loss(
    input: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None, reduction: str = "mean", weight: Any = None
) -> Tensor:
    if size_average is not None or reduce is not None or weight is not None:
        return F.mse_loss(input, target, size_average, reduce, reduction, weight)
    return _reduced((input - target) ** 2, reduction)


def _huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Any = None
) -> Tensor:
    if weight is not None:
        return F.huber_loss(input, target, reduction, delta, weight)
    error = input - target
    size = error.abs()
    return _reduced(torch.where(size <= delta, error**2 / 2, delta * (size - delta / 2)), reduction)


class ElementaryLosses(TorchFunctionMode):
    """Losses whose fused kernels lack a forward derivative of their backward, in elementary operations."""

    swaps: dict[Callable[..., Any], Callable[..., Any]] = {F.mse_loss: _mse_loss, F.huber_loss: _huber_loss}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.swaps.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def mended() -> Iterator[None]:
    """All mends, for the forward pass and for every backward pass through its graph."""
    with math_attention(), ElementaryLosses():
        yield
