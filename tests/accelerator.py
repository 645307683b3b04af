"""An accelerator that is none: tensors that say they are on "meta", and a count of the memory on either side.

What they hold lies on the CPU, so that their numbers are right. As with an accelerator, an operation on tensors of both
sides is an error, unless it is a copy or an index; and what is made from a device is made there. Memory is counted as
storages come and go; what a single operation of torch needs within itself is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

FAR = torch.device("meta")
_BETWEEN = {"aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put_", "aten::_local_scalar_dense"}


class Far(Tensor):
    """A tensor on the accelerator."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Far:
        size = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **size, device=FAR)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    __torch_dispatch__ = None  # type: ignore[assignment]  # everything is up to the mode

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"Far({self.inner})"


class Accelerator(TorchDispatchMode):
    """Within it there is an accelerator; `held` are the bytes of tensors made since, on "meta" and on "cpu"."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.known = Counter[str](), dict[int, Any]()
        self.begin()

    def begin(self) -> None:
        """From here on `most` counts."""
        self.begun, self.peak = self.held.copy(), self.held.copy()

    def most(self, side: str) -> int:
        """Bytes that were held at a time, at most, beside what there was."""
        return self.peak[side] - self.begun[side]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        far = [x for x in tensors if isinstance(x, Far)]
        name = func._schema.name if func._schema.name in _BETWEEN else func.name()
        if far and len(far) < len(tensors) and name not in _BETWEEN:
            near = [x for x in tensors if not isinstance(x, Far) and x.ndim > 0]
            if near:
                raise RuntimeError(f"{func} of tensors on {FAR} and cpu")
        device = kwargs.get("device")
        there = bool(far) if device is None else torch.device(device).type == FAR.type
        if name == "aten::copy_":
            there = isinstance(args[0], Far)
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        for x in tensors:
            self._count(x.inner if isinstance(x, Far) else x, None)
        bare = tree_map_only(Far, lambda x: x.inner, (args, kwargs))
        out = func(*bare[0], **bare[1])
        if func._schema.name.endswith("_") and isinstance(out, Tensor):
            return args[0]
        tree_map_only(Tensor, lambda x: self._count(x, FAR.type if there else "cpu"), out)
        return tree_map_only(Tensor, Far, out) if there else out

    def _count(self, x: Tensor, where: str | None) -> None:
        """Take note of a storage; None for one that was there before, and of which only the address is of interest."""
        storage = x.untyped_storage()
        if id(storage) in self.known or storage.filename is not None:
            return
        key, size = id(storage), storage.nbytes() if where else 0
        self.known[key] = weakref.finalize(storage, self._forget, key, where or "cpu", size)
        self.held[where or "cpu"] += size
        for side in self.held:
            self.peak[side] = max(self.peak[side], self.held[side])

    def _forget(self, key: int, where: str, size: int) -> None:
        del self.known[key]
        self.held[where] -= size
