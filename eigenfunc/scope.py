"""Global state: nothing that runs inside `untouched()` leaves a trace in it, nor depends on grad modes outside."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eigenfunc import tree
from eigenfunc.tree import Tree

_LOCK = threading.RLock()  # torch's transforms, random state and backend switches belong to the process


@contextmanager
def untouched(device: torch.device | None = None) -> Iterator[None]:
    """Gradients on, inference mode and autocast off, one thread at a time, and the random state put back at the end.

    That is the global state, of the CPU and of `device`, and it is put back on exceptions too. Random operations
    inside see the caller's state, so a model with dropout draws the same masks whenever that state is the same.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with _LOCK, full_precision(device), _untouched(device):
        yield


@contextmanager
def full_precision(device: torch.device | None = None) -> Iterator[None]:
    """No autocast from outside, and on a GPU no TF32: what a loss does at lower precision is up to the loss."""
    kinds = {"cpu", *([device.type] if device is not None and device.type != "meta" else [])}
    with ExitStack() as stack:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if "cuda" in kinds:
            stack.enter_context(_no_tf32())
        yield


_SWITCHING = threading.Lock()
_FOUND: list[tuple[bool, str]] = []  # by each one inside; the first of them is what stood before


@contextmanager
def _no_tf32() -> Iterator[None]:
    """TF32, torch's default for convolutions, has a mantissa of ten bits: two ways to a product would part by 1e-3.

    The switches belong to the process: they are off while any thread is inside, and put back when the last one leaves.
    """
    backends: Any = torch.backends
    with _SWITCHING:
        try:
            found = backends.cudnn.allow_tf32
        except RuntimeError:  # set apart for each kind of layer, by hand, and torch cannot tell: so it stays
            found = False
        _FOUND.append((found, backends.cuda.matmul.fp32_precision))
        if found:
            backends.cudnn.allow_tf32 = False
        backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _SWITCHING:
            if len(_FOUND) == 1:
                if _FOUND[0][0]:
                    backends.cudnn.allow_tf32 = True
                backends.cuda.matmul.fp32_precision = _FOUND[0][1]
            _FOUND.pop()


@contextmanager
def _untouched(device: torch.device | None) -> Iterator[None]:
    devices = [device] if device is not None and device.type not in ("cpu", "meta") else []
    kind = devices[0].type if devices else "cuda"
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices, device_type=kind):
        yield


def reseed(seed: int, device: torch.device) -> None:
    """Start the global random state of the CPU and of `device` anew; only for use inside `untouched`."""
    seed %= 2**63
    torch.default_generator.manual_seed(seed)
    if device.type not in ("cpu", "meta"):
        module: Any = torch.get_device_module(device)
        with module.device(device):
            module.manual_seed(seed)


def drawn_since_reseed(seed: int, device: torch.device) -> bool:
    """Whether random numbers were drawn, on the CPU or on `device`, after `reseed(seed, device)`."""
    seed %= 2**63
    if not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state()):
        return True
    if device.type in ("cpu", "meta"):
        return False
    module: Any = torch.get_device_module(device)
    return not torch.equal(module.get_rng_state(device), torch.Generator(device).manual_seed(seed).get_state())


def inside_transform() -> bool:
    """Whether a torch.func transform (grad, jvp, vmap, functionalize) is active."""
    functorch: Any = torch._C._functorch
    return functorch.peek_interpreter_stack() is not None


def process() -> str:
    """Which process this is, in words for what only knows of its own data; nothing where there is but one."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    return f"; over the data of process {dist.get_rank()} of {dist.get_world_size()} alone"


def derivative_levels() -> int:
    """How many torch.func transforms that differentiate (grad, vjp, jvp, jacrev, …) are active."""
    return sum(level in ("Grad", "Jvp") for level in _levels())


def jvp_levels() -> int:
    """How many forward-mode transforms of torch.func are active."""
    return sum(level == "Jvp" for level in _levels())


def _levels() -> list[str]:
    functorch: Any = torch._C._functorch
    return [level.key().name for level in functorch.get_interpreter_stack() or []]


_levels._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the compiler traces inside the same levels


def usable(x: Tree) -> Tree:
    """x with tensors born in inference mode copied, because autograd cannot save those; the compiler copes."""
    if torch.compiler.is_compiling():
        return x

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_inference():
            return leaf
        with torch.inference_mode(False):
            return leaf.clone()

    return tree.tree_map(copied, x)
