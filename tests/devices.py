"""A device that is not the CPU, on a machine without one: tensors that say so, with the arithmetic of the CPU behind.

An operation that mixes its tensors with those of the CPU fails as on a GPU. Values that the host reads are counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("lazy", 0)  # the one kind whose backward passes run without a driver of its own
_OPS: Any = torch.ops.aten
_CROSSING = (_OPS.copy_.default, _OPS._to_copy.default, _OPS.index.Tensor, _OPS.index_put_.default)
_READS = (_OPS._local_scalar_dense.default, _OPS.equal.default, _OPS.nonzero.default, _OPS.masked_select.default)


class Remote(Tensor):
    """A tensor on the device; `near` holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Remote:
        made: Remote = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        made.near = near
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.near.untyped_storage()

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with Device():
            return func(*args, **(kwargs or {}))


class Device(TorchDispatchMode):
    """Within, the device is there. `reads` counts the values that came to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        remote = [x for x in given if isinstance(x, Remote)]
        asked = kwargs.get("device")
        if remote and func not in _CROSSING and any(x.ndim > 0 for x in given if not isinstance(x, Remote)):
            raise RuntimeError(f"expected all tensors on one device: {func}")
        there = bool(remote) if asked is None else torch.device(asked).type == DEVICE.type
        if func is _OPS.copy_.default:
            there = isinstance(args[0], Remote)
        self.reads += bool(remote) and (func in _READS or not there)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        if func is _OPS._efficientzerotensor.default:
            func = _OPS.zeros.default
        known = {id(x.near): x for x in remote}
        near_args, near_kwargs = tree_map(lambda x: x.near if isinstance(x, Remote) else x, (args, kwargs))
        out = func(*near_args, **near_kwargs)
        if not there:
            return out
        return tree_map(lambda x: known[id(x)] if id(x) in known else Remote(x) if isinstance(x, Tensor) else x, out)
