"""What the third-party packages need to be used here at all: a schema, their warnings, their casts to float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_NOISE = (  # (category, start of the message): nothing that the library causes
    (DeprecationWarning, r"`torch\.jit\..*` is deprecated"),
    (FutureWarning, r"`?torch\.nn\.utils\.weight_norm`? is deprecated"),
    (FutureWarning, r"`gradient_checkpointing_enable` is deprecated"),
    (UserWarning, r"Full backward hook is firing when gradients are computed with respect to module outputs"),
    (UserWarning, r"Initializing zero-element tensors is a no-op"),
    (UserWarning, r"LSTM with projections is not supported with oneDNN"),
    (UserWarning, r"Sparse invariant checks are implicitly disabled"),
    (UserWarning, r"enable_nested_tensor is True, but"),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Leaves out the warnings that making or calling a model of the zoo gives by itself."""
    with warnings.catch_warnings():
        for category, message in _NOISE:
            warnings.filterwarnings("ignore", message, category)
        yield


@cache
def torchvision_schemas() -> Any:
    """Declares two operators without which torchvision does not import beside a torch it was not built for.

    Their kernels are not needed. The library object has to stay alive, hence the cache.
    """
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


class _KeepDouble(TorchFunctionMode):
    """Makes casts from float64 to float32 do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64:
            if func is Tensor.float:
                return args[0]
            if func in _CASTING:
                args = tuple(torch.float64 if x is torch.float32 else x for x in args)
                kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        return func(*args, **kwargs)


_CASTING = {Tensor.to, Tensor.type, torch.softmax, nn.functional.softmax, nn.functional.log_softmax, Tensor.softmax}


def in_double(loss_fn: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    """The loss without the casts to float32 that norms, softmaxes and position tables make whatever the dtype.

    Models do so for the sake of half precision; in float64 it would be the largest rounding of all.
    """

    def kept(model: nn.Module, batch: Any) -> Tensor:
        with _KeepDouble():
            return loss_fn(model, batch)

    return kept
