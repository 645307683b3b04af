"""What makes a model differentiable twice, forward over reverse: one context each, all entered by `mended`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def math_attention() -> Iterator[None]:
    """Fused attention kernels have neither forward AD nor a double backward; the composite one has both."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _reduced(x: Tensor, reduction: str) -> Tensor:
    return x.mean() if reduction == "mean" else x.sum() if reduction == "sum" else x


def _mse_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return _reduced((input - target) ** 2, reduction)


def _huber_loss(input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0) -> Tensor:
    error = input - target
    size = error.abs()
    return _reduced(torch.where(size <= delta, error**2 / 2, delta * (size - delta / 2)), reduction)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


_ELEMENTARY: dict[Any, tuple[Callable[..., Tensor], int, frozenset[str]]] = {
    # function: (formula, positional arguments, keyword arguments that the formula knows)
    nn.functional.mse_loss: (_mse_loss, 2, frozenset({"reduction"})),
    nn.functional.huber_loss: (_huber_loss, 2, frozenset({"reduction", "delta"})),
    torch._weight_norm: (_weight_norm, 3, frozenset()),
}


class Elementary(TorchFunctionMode):
    """Functions whose fused kernels lack a forward or have a wrong second derivative, in elementary operations.

    Calls with options that the elementary formula does not know (sample weights, say) pass through.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {name: value for name, value in (kwargs or {}).items() if value is not None}
        formula, count, known = _ELEMENTARY.get(func, (None, 0, frozenset()))
        if formula is None or len(args) != count or not named.keys() <= known:
            return func(*args, **(kwargs or {}))
        return formula(*args, **named)


@contextmanager
def mended() -> Iterator[None]:
    """All mends, for the forward pass and for every backward pass through its graph."""
    with math_attention(), Elementary():
        yield
