"""What makes a model differentiable twice, forward over reverse: one context each, all entered by `mended`."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from eigenfunc import scope
from eigenfunc.curvature.elementary import FORWARD, RANDOM, SWAPS
from eigenfunc.errors import ProductError, TransformError

forward_ad: Any = _forward_ad


class Seen:
    """What the mends met: their names, and the rounding unit of the coarsest operation between parameters and loss,
    which is what any two ways to the same derivative may differ by."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.eps = 0.0
        self.verify = False  # whether to hold the value of each formula against that of what it stands for


def math_attention(seen: Seen) -> AbstractContextManager[Any]:
    """Fused attention kernels have neither forward AD nor a double backward; the composite one has both."""
    return sdpa_kernel(SDPBackend.MATH)


class ElementaryFormulas(TorchFunctionMode):
    """Functions that fail when differentiated twice, in elementary operations; see `elementary`."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._call(func, args, kwargs or {})
        if isinstance(out, Tensor) and out.is_floating_point() and out.requires_grad:
            self.seen.eps = max(self.seen.eps, torch.finfo(out.dtype).eps)
        return out

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        formula = SWAPS.get(func)
        if formula is None or kwargs.get("inplace") or (func in FORWARD and not _pushing()):
            return func(*args, **kwargs)
        named = {name: value for name, value in kwargs.items() if value is not None}
        try:
            inspect.signature(formula).bind(*args, **named)
        except TypeError:
            return func(*args, **kwargs)
        self.seen.names.add(func.__name__.strip("_"))
        out = formula(*args, **named)
        if self.seen.verify and func not in RANDOM and not kwargs.get("dropout_p"):
            _check_value(func, func(*args, **kwargs), out)
        return out


def _pushing() -> bool:
    """Whether there may be tangents."""
    return forward_ad._current_level >= 0 or scope.inside_transform()


_READ_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]


def _check_value(func: Any, theirs: Any, ours: Any) -> None:
    if not isinstance(ours, Tensor) or not ours.is_floating_point():
        return
    eps = max(torch.finfo(theirs.dtype).eps, torch.finfo(ours.dtype).eps)
    if not torch.allclose(
        theirs.detach().double(), ours.detach().double(), rtol=eps**0.5, atol=eps**0.5, equal_nan=True
    ):
        raise ProductError(
            f"the formula that stands in for {func.__name__} gives another value than torch on these arguments: please "
            "report this call; elementary operations in its place would do"
        )


class Constants(TorchFunctionMode):
    """What is computed under `torch.no_grad()`, or read off `.data`, is a constant to forward AD, as it is to backward.

    Asking a tensor to require grad that does so already is granted, which torch.func would refuse.
    """

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _READ_DATA:
            return args[0].detach()
        if func is Tensor.requires_grad_ and args[0].requires_grad and args[1:] in ((), (True,)) and not kwargs:
            return args[0]
        out = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            switch: Any = torch._C
            switch._set_fwd_grad_enabled(*args)
            if not args[0]:
                self.seen.names.add("no_grad")
        return out


# what runs before and after a checkpointed function; the second name is that of torch 2.14
_GENERATORS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")


def _nothing_around() -> Iterator[None]:
    yield


class _PlainCheckpoints:
    """`torch.utils.checkpoint` calls its function plainly, in the threads that ask for it.

    It works by hooks that torch.func does not know, and would recompute the forward pass in every product. The
    functions behind it are replaced while any thread is inside, and put back when the last one leaves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = threading.local()
        self._depth = 0
        self._originals: dict[str, Any] = {}

    @contextmanager
    def __call__(self, seen: Seen) -> Iterator[None]:
        before = getattr(self._inside, "seen", None)
        self._enter()
        self._inside.seen = seen
        try:
            yield
        finally:
            self._inside.seen = before
            self._leave()

    def _met(self) -> bool:
        """Whether this thread is inside; notes that a checkpoint was met."""
        seen: Seen | None = getattr(self._inside, "seen", None)
        if seen is not None:
            seen.names.add("checkpoint")
        return seen is not None

    def _enter(self) -> None:
        module: Any = torch.utils.checkpoint
        with self._lock:
            self._depth += 1
            if self._depth > 1:
                return
            generators = {name: getattr(module, name) for name in _GENERATORS if hasattr(module, name)}
            function = module.CheckpointFunction
            self._originals = {**generators, "CheckpointFunction": function}

            def plain(generator: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
                def called(*args: Any, **kwargs: Any) -> Iterator[None]:
                    return _nothing_around() if self._met() else generator(*args, **kwargs)

                return called

            class Plain:
                @staticmethod
                def apply(f: Callable[..., Any], preserve: bool, *args: Any) -> Any:
                    return f(*args) if self._met() else function.apply(f, preserve, *args)

            module.CheckpointFunction = Plain
            for name, generator in generators.items():
                setattr(module, name, plain(generator))

    def _leave(self) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                for name, original in self._originals.items():
                    setattr(torch.utils.checkpoint, name, original)


plain_checkpoints = _PlainCheckpoints()

MENDS: dict[str, Callable[[Seen], AbstractContextManager[Any]]] = {
    "math attention": math_attention,
    "plain checkpoints": plain_checkpoints,
    "constants": Constants,
    "elementary formulas": ElementaryFormulas,
}


@contextmanager
def mended(seen: Seen | None = None) -> Iterator[Seen]:
    """All mends, for the forward pass and for every backward pass through its graph; yields what they met."""
    seen = Seen() if seen is None else seen
    with ExitStack() as stack:
        for mend in MENDS.values():
            stack.enter_context(mend(seen))
        yield seen


class Traceable(TorchFunctionMode):
    """The elementary formulas, and `.data` as a constant, in what torch.compile can trace: no signature is bound."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.unflatten:  # which calls super(), untraceably under a mode
            return torch.unflatten(*args, **(kwargs or {}))
        named = {name: value for name, value in (kwargs or {}).items() if value is not None}
        formula = _TRACED.get(func)
        if formula is None or named.get("inplace") or not set(named) <= _TAKEN[func]:
            return func(*args, **(kwargs or {}))
        return formula(*args, **named)


class LeanLinear(TorchFunctionMode):
    """Linear layers with little memory for tangents, which counts where outputs are logits over a large vocabulary.

    For tangents of input and weights torch holds five tensors of the size of the layer's output: here two, output and
    tangent, outside of transforms. Inside of them a function of one's own would not compose: a product and a sum, four.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or len(args) != 3 or kwargs:
            return func(*args, **(kwargs or {}))
        x, weight, bias = args
        if scope.inside_transform():
            return func(*args) if bias is None else x @ weight.mT + bias
        moving = all(forward_ad.unpack_dual(y).tangent is not None for y in (x, weight))
        if not moving or weight.ndim != 2 or torch.is_autocast_enabled(x.device.type):
            return func(*args)
        return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    """x Wᵀ + b with its tangent summed up in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x, weight), (by_x, by_weight, by_bias) = ctx.saved_tensors, tangents
        out: Tensor = _rows(by_x) @ weight.mT
        out.addmm_(_rows(x), by_weight.mT)
        if by_bias is not None:
            out += by_bias
        return out.reshape(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        (x, weight), (slope,) = ctx.saved_tensors, slopes
        if slope is None:
            return None, None, None
        by_bias = _rows(slope).sum(0) if ctx.needs_input_grad[2] else None
        return slope @ weight, _rows(slope).mT @ _rows(x), by_bias


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _show() -> None:
    rules: Any = importlib.import_module("torch._dynamo.variables.torch")
    tracing: Any = importlib.import_module("torch._dynamo.symbolic_convert").tls
    tracer = getattr(tracing, "current_tx", None)
    if tracer is None:
        raise TransformError(
            "torch.compile broke its graph inside a product, which torch.func does not survive: fullgraph=True shows "
            "where; mend the loss there, or keep the product out of what is compiled by torch.compiler.disable"
        )
    listed = rules.get_overridable_functions()
    hidden = {_read_data, torch._weight_norm} - listed
    listed.update(hidden)
    tracer.output.add_cleanup_hook(lambda: listed.difference_update(hidden))


def show_all_calls() -> None:
    """Have the compiler hand to modes also the calls that it does not list as overridable, until it has traced.

    It is called while the compiler traces, or for real where that gave up: `TransformError`.
    """
    untraced: Any = torch.compiler.disable
    untraced(_show)()


show_all_calls._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result

_read_data: Any = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]


def _detached(x: Tensor) -> Tensor:
    return x.detach()


# a table, for in what torch 2.11 traces a builtin of pybind is not itself, though it is found
_TRACED = {**SWAPS, _read_data: _detached}
_TAKEN = {func: frozenset(inspect.signature(formula).parameters) for func, formula in _TRACED.items()}
