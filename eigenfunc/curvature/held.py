"""Functions whose first and second derivative are computed once for a kept graph, not again in every product.

torch differentiates the formula of the derivative: a pull-back through GELU's takes a dozen passes over its input,
where two products with numbers known beforehand suffice; one through log-softmax takes the exponential again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Derivatives = Callable[[Tensor], tuple[Tensor, Tensor]]


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    density = torch.exp(x * x * -0.5).mul_(1 / math.sqrt(2 * math.pi))
    return torch.special.ndtr(x).addcmul_(x, density), density * (2 - x * x)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    slope = s * (1 - s)
    return torch.addcmul(s, x, slope), slope * (2 + x * (1 - 2 * s))


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (x + a * x**3))
    slope, flat = c * (1 + 3 * a * x * x), 1 - t * t
    first = (1 + t + x * flat * slope) / 2
    return first, flat * (slope + x * (3 * a * c * x - t * slope * slope))


DERIVATIVES: dict[tuple[Any, str], Derivatives] = {  # by function and its `approximate`
    (F.gelu, "none"): _gelu,
    (F.gelu, "tanh"): _gelu_tanh,
    (F.silu, "none"): _silu,
}


def _wide(x: Tensor) -> Tensor:
    """At least float32, for derivatives whose parts overflow before their product vanishes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[], Tensor], derivatives: Derivatives) -> Tensor:
        ctx.derivatives = derivatives
        ctx.save_for_backward(x, derivatives(_wide(x))[0].to(x.dtype))
        return f()

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        x, first = ctx.saved_tensors
        (slope,) = slopes
        if not torch.is_grad_enabled():
            return slope * first, None, None
        return _Slope.apply(slope, x, first, ctx.derivatives), None, None  # type: ignore[no-untyped-call]


class _Slope(torch.autograd.Function):
    """slope · f'(x); its backward is a number to autograd, so that nothing beyond second derivatives comes of it."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, x: Tensor, first: Tensor, derivatives: Derivatives) -> Tensor:
        ctx.save_for_backward(first, derivatives(_wide(x))[1].mul_(slope).to(x.dtype))
        return slope * first

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Any) -> Any:
        first, second = ctx.saved_tensors
        (slope,) = slopes
        return slope * first, slope * second, None, None


class _LogSoftmax(torch.autograd.Function):
    """Over axis 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.log_softmax(x, 1)
        ctx.save_for_backward(x, out.exp())
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        x, share = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return torch.addcmul(slopes[0], share, slopes[0].sum(1, keepdim=True), value=-1)
        return _LogSoftmaxSlope.apply(slopes[0], x, share)  # type: ignore[no-untyped-call]


class _LogSoftmaxSlope(torch.autograd.Function):
    """slope − p Σ slope, for the probabilities p of x."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, x: Tensor, share: Tensor) -> Tensor:
        total = slope.sum(1, keepdim=True)
        ctx.save_for_backward(share, total)
        return torch.addcmul(slope, share, total, value=-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Any) -> Any:
        share, total = ctx.saved_tensors
        centred = slopes[0] - (slopes[0] * share).sum(1, keepdim=True)
        return centred, centred * share * -total, None


_CROSS_ENTROPY = {"weight", "ignore_index", "reduction"}


def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    scores: Tensor = _LogSoftmax.apply(input)  # type: ignore[no-untyped-call]
    return F.nll_loss(scores, target, weight, ignore_index=ignore_index, reduction=reduction)


class Held(TorchFunctionMode):
    """For plain autograd alone, and for what is differentiated no further than twice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        derivatives = DERIVATIVES.get((func, kwargs.get("approximate", "none")))
        if derivatives is not None and len(args) == 1 and not kwargs.get("inplace") and args[0].requires_grad:
            return _Value.apply(args[0], partial(func, *args, **kwargs), derivatives)  # type: ignore[no-untyped-call]
        if func is F.cross_entropy and len(args) == 2 and args[0].ndim > 1 and args[1].dtype == torch.long:
            named = {name: value for name, value in kwargs.items() if value is not None}
            if named.pop("label_smoothing", 0.0) == 0 and named.keys() <= _CROSS_ENTROPY and args[0].requires_grad:
                return _cross_entropy(*args, **named)
        return func(*args, **kwargs)
