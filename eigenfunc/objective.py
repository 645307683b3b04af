"""nn.Module → (loss, params): a pure function of named parameters and a batch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eigenfunc import scope, tree
from eigenfunc.errors import InputError, ObjectiveError
from eigenfunc.selection import Select, chosen


@dataclass(frozen=True, eq=False)
class Objective:
    """A loss (params, batch) -> (), pure in its arguments.

    `predict(params, inputs)` and `criterion(outputs, targets)` are there for losses of that form, and None for
    others. Buffers and parameters outside `params` are constants, read from the module at each call; what the
    forward pass writes into buffers goes to copies.
    """

    module: nn.Module
    paths: tuple[str, ...]  # names of the module's parameters, each tied group under its first
    criterion: Callable[[Any, Any], Tensor] | None
    loss_fn: Callable[[nn.Module, Any], Tensor] | None
    guarded: bool = False  # constants are copies, and writing into them is an error

    def _apply(self, params: Mapping[str, Tensor], f: Callable[[nn.Module], Any]) -> Any:
        """f(module) with `params` in place of the module's own, and copies in place of its buffers."""
        if unknown := [name for name in params if name not in self.paths]:
            raise ObjectiveError(f"the module has no parameter {unknown[0]!r}; it has {', '.join(self.paths)}")
        if parametrize._cache_enabled:
            raise ObjectiveError(
                "torch.nn.utils.parametrize.cached() is active: parametrised weights would come out of its cache and "
                "not of the parameters; leave it first"
            )
        tensors: dict[str, Tensor] = {}
        constants: dict[str, Tensor] = {}
        for kind in ("_parameters", "_buffers"):
            for tensor, slots in _slots(self.module, kind):
                value = params.get(slots[0])
                if value is None:
                    value = tensor.clone() if kind == "_buffers" else scope.usable(tensor.detach())
                    if self.guarded and kind == "_parameters":
                        value = constants[slots[0]] = value.clone()
                tensors.update({f"module.{slot}": value for slot in slots})
        with _attributes_kept(self.module), _eagerly(self.module):
            out = torch.func.functional_call(_Applied(self.module), tensors, (f,), tie_weights=False)
        if written := [name for name, value in constants.items() if value._version > 0]:
            raise ObjectiveError(
                f"the forward pass writes into the constant parameter '{written[0]}', so that each product would see "
                "another model; do such updates outside of the loss"
            )
        return out

    def predict(self, params: Mapping[str, Tensor], inputs: Any) -> Any:
        return self._apply(params, lambda module: module(inputs))

    def __call__(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        if self.loss_fn is not None:
            loss_fn = self.loss_fn
            value: Tensor = self._apply(params, lambda module: loss_fn(module, batch))
            return value
        if self.criterion is not None:
            inputs, targets = pair(batch, "pass loss_fn=lambda model, batch: ... for anything else")
            criterion = self.criterion
            # inside, for a criterion may reach for the module's parameters, to penalise them say
            loss: Tensor = self._apply(params, lambda module: judged(criterion, module(inputs), targets))
            return loss
        if not isinstance(batch, Mapping):
            raise ObjectiveError(
                f"without criterion or loss_fn a batch must be a mapping of the module's keyword arguments, "
                f"this one is a {type(batch).__name__}; pass criterion= for (inputs, targets) or loss_fn= for the rest"
            )
        output = self._apply(params, lambda module: module(**batch))
        found: Tensor | None = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if found is None:
            raise ObjectiveError(
                "the module's output has no `loss`; put the labels into the batch, or pass criterion= or loss_fn="
            )
        return found


class _Applied(nn.Module):
    """Hands the module, with whatever has been swapped into it, to a function."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, f: Callable[[nn.Module], Any]) -> Any:
        return f(self.module)


def _eagerly(module: nn.Module) -> AbstractContextManager[Any]:
    """Compiled parts run uncompiled: compilers stop at first derivatives."""
    if any(type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) for m in module.modules()):
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Puts back plain tensor attributes that a forward pass sets (old-style weight norm, kept features)."""
    before = _attributes(module)
    try:
        yield
    finally:
        for (part, saved), (_, now) in zip(before, _attributes(module), strict=True):
            for name in [name for name, value in now.items() if saved.get(name) is not value]:
                if name in saved:
                    part.__dict__[name] = saved[name]
                else:
                    delattr(part, name)


def _attributes(module: nn.Module) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """The plain tensor attributes of each part."""
    parts = list(module.modules())
    names = _traced_names() if torch.compiler.is_compiling() else {name for part in parts for name in vars(part)}
    held = [(part, {name: part.__dict__.get(name) for name in names}) for part in parts]
    return [(part, {k: v for k, v in values.items() if isinstance(v, Tensor)}) for part, values in held]


def _traced_names() -> list[str]:
    """Names that hold plain tensors in any module that the compiler has met, or were set while it traces: up to
    torch 2.11 it cannot list the attributes of a module, though it reads and writes each."""
    effects: Any = importlib.import_module("torch._dynamo.symbolic_convert").tls.current_tx.output.side_effects
    names: set[str] = set()
    for met in effects.id_to_variable.values():
        if isinstance(part := getattr(met, "value", None), nn.Module):
            names.update(name for name, value in vars(part).items() if isinstance(value, Tensor))
            names.update(effects.store_attr_mutations.get(met, ()))
    return sorted(names)


_traced_names._dynamo_marked_constant = True  # type: ignore[attr-defined]  # run while the compiler traces


@dataclass(frozen=True, eq=False)
class Composition:
    """criterion(predict(params, inputs), targets) of a batch (inputs, targets), as a loss, for an `Objective` or any
    other object that has the two. The criterion is no part of the module here, so what it reads of the parameters is
    constant."""

    parts: Any

    def __call__(self, params: Any, batch: Any) -> Tensor:
        inputs, targets = pair(batch, AS_PAIRS)
        return judged(self.parts.criterion, self.parts.predict(params, inputs), targets)


def judged(criterion: Callable[[Any, Any], Tensor], outputs: Any, targets: Any) -> Tensor:
    """criterion(outputs, targets); `ObjectiveError` where it fails on a model that returns more than one tensor."""
    try:
        return criterion(outputs, targets)
    except (TypeError, AttributeError) as error:
        if isinstance(outputs, Tensor):
            raise
        names = [*outputs] if isinstance(outputs, Mapping) else []
        part = ".logits" if hasattr(outputs, "logits") else f"[{names[0]!r}]" if names else "[0]"
        raise ObjectiveError(
            f"the criterion does not take what the model returns, a {type(outputs).__name__} ({error}). Pick the "
            f"logits: loss_fn=lambda model, batch: criterion(model(batch[0]){part}, batch[1]); or, as ggn and fisher "
            f"need, give functional_loss a module whose forward returns model(inputs){part}"
        ) from error


AS_PAIRS = "have the data yield pairs, a dict of inputs and one of targets say"


def guarded(loss: Any) -> Any:
    """The same loss, to which writing into constants is an error, if it is one of this module."""
    if isinstance(loss, Composition):
        return Composition(guarded(loss.parts))
    return replace(loss, guarded=True) if isinstance(loss, Objective) else loss


def pair(batch: Any, remedy: str) -> tuple[Any, Any]:
    """(inputs, targets); `ObjectiveError` with the remedy for anything that is not a pair."""
    if isinstance(batch, Mapping) or not hasattr(batch, "__len__") or isinstance(batch, Tensor) or len(batch) != 2:
        size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        if isinstance(batch, Tensor):
            remedy = f"one batch alone goes into `Batches` as a list, Batches([(inputs, targets)]); {remedy}"
        raise ObjectiveError(
            f"with a criterion a batch must be a pair (inputs, targets), this one is a {type(batch).__name__}{size}; "
            f"{remedy}"
        )
    inputs, targets = batch
    return inputs, targets


def _slots(module: nn.Module, kind: str) -> list[tuple[Tensor, list[str]]]:
    """Each distinct parameter or buffer with one path for every (module, attribute) that holds it.

    A submodule reached by two paths counts once, since swapping it twice would leave plain tensors behind in it.
    """
    slots: dict[int, tuple[Tensor, list[str]]] = {}
    for prefix, part in module.named_modules():
        for attribute, value in getattr(part, kind).items():
            if value is not None:
                path = f"{prefix}.{attribute}" if prefix else attribute
                slots.setdefault(id(value), (value, []))[1].append(path)
    return list(slots.values())


def _refuse_wrapped(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Modules whose forward pass talks to other processes, found by name: not every torch has them all."""
    for path, part in model.named_modules():
        kinds = {kind.__name__ for kind in type(part).__mro__ if kind.__module__.startswith("torch.")}
        if "DistributedDataParallel" in kinds:
            raise ObjectiveError(
                f"{path or 'the model'} is wrapped in DistributedDataParallel, which sums gradients over processes, "
                "and no products: they would be those of this process's batches alone. Pass model.module; then "
                "data_parallel(hessian, loss, params, data) is the matrix over the data of all processes, and "
                "hessian(...) that over this one's"
            )
        if kinds & {"FSDPModule", "FullyShardedDataParallel"}:
            raise ObjectiveError(f"{path or 'the model'} is an FSDP module, {_SHARDED}")
    for name, tensor in parameters.items():
        if tree.is_sharded(tensor):
            raise ObjectiveError(f"parameter '{name}' is a DTensor, {_SHARDED}")


_SHARDED = (
    "whose parts on several processes cannot be swapped or differentiated twice. Take the loss from the same "
    "architecture without wrappers, loss, _ = functional_loss(plain_model, criterion), and the values from this one, "
    "params = {name: p.full_tensor() for name, p in model.named_parameters()} in the names of plain_model; every "
    "process then holds all parameters, and data_parallel(hessian, loss, params, data) deals out the batches"
)


def functional_loss(
    model: nn.Module,
    criterion: Callable[[Any, Any], Tensor] | None = None,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    select: Select | None = None,
) -> tuple[Objective, dict[str, Tensor]]:
    """Turn a module into a pure loss and its parameters, ready for `hessian` and torch.func.

    criterion  batches are pairs: loss = criterion(model(inputs), targets)
    loss_fn    anything else: loss = loss_fn(model, batch), where `model` is the module with the parameters swapped in
    neither    batches are mappings: loss = model(**batch).loss, as Hugging Face models return it
    select     which parameters to differentiate by: a predicate on names, a glob pattern, a name or a dotted
               prefix ("encoder.layer.0"), or a list of those; default: those that require grad. All others are
               constants.

    Returns the `Objective` and the selected parameters by name, detached, in the module's order; tied weights
    appear once, under their first name. The module itself is never changed, and it is read at each call: its
    buffers and constant parameters are those of the moment.

    Raises `ObjectiveError` for modules whose parameters cannot be swapped or differentiated, `InputError` for a
    selection that matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"functional_loss takes an nn.Module, got a {type(model).__name__}")
    if criterion is not None and loss_fn is not None:
        raise InputError("pass criterion or loss_fn, not both")
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        raise ObjectiveError(
            "the model holds a ScriptModule, whose weights torch.func.functional_call cannot swap, so its Hessian "
            "would come out as zero; use the original nn.Module"
        )
    own = {slots[0]: tensor for tensor, slots in _slots(model, "_parameters")}
    _refuse_wrapped(model, own)
    if select is None:
        picked = [name for name in own if own[name].requires_grad]
        if not picked:
            raise ObjectiveError(
                "the model has no parameter that requires grad; name the ones to differentiate by with select="
            )
    else:
        picked = chosen(list(own), select, "select")
    for name in picked:
        if isinstance(own[name], nn.parameter.UninitializedParameter):
            raise ObjectiveError(f"parameter '{name}' is not initialised yet: run one batch through the model first")
    with torch.inference_mode(False):
        params = {name: scope.usable(own[name].detach()) for name in picked}
    tree.check_vector_space(params, "the selected parameters")
    if any(own[name].is_meta for name in picked):
        raise ObjectiveError("the model has parameters on the meta device, without values")
    return Objective(model, tuple(own), criterion, loss_fn), params
