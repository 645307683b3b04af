"""`SpectrumTracker` in other people's training loops: Lightning, the Trainer of transformers, TensorBoard.

Each adapter only passes on what the loop tells, after every optimiser step. None of the packages is needed otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from eigenfunc.errors import InputError
from eigenfunc.objective import Objective
from eigenfunc.records import Alert, Log, Record
from eigenfunc.track import SpectrumTracker

_log = logging.getLogger("eigenfunc")


def lightning(tracker: SpectrumTracker, model: nn.Module | None = None) -> Any:
    """A Lightning callback, for `Trainer(callbacks=[...])`; also of the package pytorch_lightning.

    model  whose parameters are tracked; default: that of the tracker's objective, or else the LightningModule

    The tracker learns the step, the loss that `training_step` returns, and, unless it has one, the optimiser if there
    is just one. Batches whose gradients are accumulated do not count. Raises `InputError` without either package.
    """
    steps = _Steps(tracker, model)

    def on_train_start(_: Any, trainer: Any, module: nn.Module) -> None:
        steps.begin(trainer.optimizers[0] if len(trainer.optimizers) == 1 else None)

    def on_train_batch_end(_: Any, trainer: Any, module: nn.Module, outputs: Any, *__: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        steps.end(trainer.global_step, module, loss=loss if isinstance(loss, Tensor) else None)

    def on_train_end(_: Any, trainer: Any, module: nn.Module) -> None:
        steps.close()

    base = _first(["lightning.pytorch", "pytorch_lightning"], "lightning").Callback
    return _made(base, on_train_start, on_train_batch_end, on_train_end)


def trainer(tracker: SpectrumTracker, model: nn.Module | None = None) -> Any:
    """A callback for the Trainer of transformers, for `Trainer(callbacks=[...])`.

    model  whose parameters are tracked; default: that of the tracker's objective, or else the one that is trained

    The tracker learns the step, the loss and the gradient norm as they are logged (`logging_steps`), and, unless it
    has one, the optimiser. Raises `InputError` without transformers.
    """
    steps = _Steps(tracker, model)

    def on_train_begin(_: Any, args: Any, state: Any, control: Any, optimizer: Any = None, **__: Any) -> None:
        steps.begin(getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it

    def on_step_end(_: Any, args: Any, state: Any, control: Any, model: Any = None, **__: Any) -> None:
        steps.end(state.global_step, model)

    def on_log(_: Any, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
        if logs and "loss" in logs:
            tracker.observe(state.global_step, loss=logs["loss"], grad_norm=logs.get("grad_norm"))

    def on_train_end(_: Any, args: Any, state: Any, control: Any, **__: Any) -> None:
        steps.close()

    base = _first(["transformers"], "transformers").TrainerCallback
    return _made(base, on_train_begin, on_step_end, on_log, on_train_end)


def tensorboard(writer: Any) -> Log:
    """For `SpectrumTracker(log=...)`: records as scalars, alerts as texts, to a SummaryWriter or what resembles it."""

    def write(entry: Record | Alert) -> None:
        if isinstance(entry, Alert):
            writer.add_text(f"alerts/{entry.rule}", str(entry), entry.step)
            return
        for rank, value in enumerate(entry.values, 1):
            writer.add_scalar(f"eigenvalues/{rank}", value, entry.step)
        rest = {"trace": entry.trace, "gradient share": entry.gradient_share, "stability limit": entry.limit}
        for name, number in (rest | {"seconds": entry.seconds, "certified": float(entry.certified)}).items():
            if number is not None:
                writer.add_scalar(f"spectrum/{name}", number, entry.step)

    return write


class _Steps:
    """What both loops tell."""

    def __init__(self, tracker: SpectrumTracker, model: nn.Module | None) -> None:
        own = tracker.core.loss
        self.model = own.module if model is None and isinstance(own, Objective) else model
        self.tracker = tracker
        self.last = 0

    def begin(self, optimizer: Any) -> None:
        if self.tracker.core.optimizer is None and isinstance(optimizer, Optimizer):
            self.tracker.attach(optimizer)

    def end(self, step: int, trained: nn.Module, loss: Tensor | None = None) -> None:
        if step > self.last:
            self.last = step
            self.tracker.observe(step, loss=loss)
            self.tracker(trained if self.model is None else self.model, step)

    def close(self) -> None:
        """At the end of the training: that it went by without a look is a warning."""
        _log.log(logging.INFO if self.tracker.records else logging.WARNING, "%s", self.tracker.summary())


def _made(base: Any, *hooks: Any) -> Any:
    return type("SpectrumCallback", (base,), {hook.__name__: hook for hook in hooks})()


def _first(packages: list[str], extra: str) -> Any:
    for name in packages:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise InputError(f"this callback needs the package {extra}: pip install {extra}")
