"""The top of the spectrum along a training run, at a bounded share of its time, without a trace in the training."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eigenfunc import alerts, tree
from eigenfunc.curvature.hessian import hessian
from eigenfunc.curvature.products import Loss
from eigenfunc.eigsh import Which
from eigenfunc.operator import LinearOperator
from eigenfunc.records import Alert, Log, Observation, Record, Rule, jsonl
from eigenfunc.tracking import State, Tracking
from eigenfunc.tree import Tree

_log = logging.getLogger("eigenfunc")
_PATIENCE = 100  # calls without a look after which the user is told why; and again after ten times as many


class SpectrumTracker:
    """Watches the top of a spectrum while a model trains: call it in the training loop, before or after each step.

        tracker = SpectrumTracker(loss, data, optimizer=optimizer, on_alert=print, log="run.jsonl")
        for step, batch in enumerate(loader):
            ...
            optimizer.step()
            tracker(model, step)

    loss, data    as for `hessian`: a loss (params, batch) -> () and what it is averaged over, a fixed sample of the
                  training data say. A look costs some 30 passes over it, forward and backward
    k, which, tol as for `eigsh`. Negative curvature needs which "BE", "SA" or "LM"
    every         look at each step that is a multiple of it. Otherwise
    max_overhead  is the share of the training time, measured from the first call on, that tracking may take. What a
                  look costs is guessed from one gradient at first, so the first one comes when it can be afforded;
                  `look` asks for one at once. In between there are glances. After 100 calls without a look, and ten
                  times as many each time, a warning says which budget would have bought one, as `summary` does
    rules         what raises alerts: see `eigenfunc.alerts`
    on_alert      called with each alert; what it raises ends the training
    log           path of a JSON Lines file to append to, or a function that is called with each record and alert
    optimizer     tells the learning rate, and with it the limit of stability, at each call. For Adam and its relatives
                  the matrix is the preconditioned one; looks begin after its first step
    limit         rate -> largest stable eigenvalue, where the optimiser does not tell; default 2/rate
    seed          of all random numbers
    block_size    as for `eigsh`: k starts from each old vector instead of their sum, in fewer but dearer passes, for
                  data that is streamed
    trace_matvecs products for the trace, at looks; 0 leaves it out
    matrix        `hessian`, `ggn` or another function of (loss, params, data)

    A *look* is `eigsh` from the last eigenvectors, with its certificate. A *glance* is one product with all of those:
    Rayleigh–Ritz values with true residuals that prove nothing about rank, and are only ever too small at the top.

    Neither weights, buffers, gradients, flags nor random state change, so training goes as it would without. A model
    that diverges does not raise: its records say so. Errors of set-up do raise, at the first look.
    """

    def __init__(
        self,
        loss: Loss,
        data: Any,
        *,
        k: int = 5,
        every: int | None = None,
        which: Which = "LA",
        tol: float = 1e-3,
        max_overhead: float = 0.05,
        rules: Sequence[Rule] = alerts.RULES,
        on_alert: Callable[[Alert], Any] | None = None,
        log: str | PathLike[str] | Log | None = None,
        optimizer: Optimizer | None = None,
        limit: Callable[[float], float] | None = None,
        seed: int = 0,
        block_size: int | None = None,
        trace_matvecs: int = 8,
        matrix: Callable[..., LinearOperator] = hessian,
    ) -> None:
        self.core = Tracking(
            loss, data, k, every, which, tol, max_overhead, tuple(rules), optimizer, limit, seed, block_size,
            trace_matvecs, matrix,
        )  # fmt: skip
        self.state = self.core.init()
        self.records: list[Record] = []
        self.alerts: list[Alert] = []
        self._patience = _PATIENCE
        self._on_alert = on_alert
        self._log: Log | None = jsonl(log) if isinstance(log, (str, PathLike)) else log

    def __call__(self, params: Tree | nn.Module, step: int | None = None) -> Record | None:
        """The record of this step if it was time for one; the rules are asked in any case.

        params  the current ones, a tree as `loss` takes it, or the module itself: those of its parameters that require
                grad, by name
        step    default: the number of calls before

        Raises at the first look what `hessian` and `eigsh` raise (but `NotConverged`, which the record tells).
        """
        state, record = self.core.update(self.state, params, step)
        if self.core.every is None and not self.records and record is None and state.calls >= self._patience:
            self._patience = 10 * state.calls
            self.state = state
            _log.warning("%s", self.summary())
        return self._done(state, record)

    def look(self, params: Tree | nn.Module, step: int | None = None) -> Record | None:
        """A look at once, whatever the budget, which it is charged to; None before the first step of Adam."""
        state, record = self.core.update(self.state, params, step, "look")
        return self._done(state, record)

    def attach(self, optimizer: Optimizer) -> None:
        """From now on this optimiser tells the rate, for loops that make it after the tracker."""
        self.core = replace(self.core, optimizer=optimizer)

    def observe(
        self,
        step: int,
        *,
        loss: float | Tensor | None = None,
        grad_norm: float | Tensor | None = None,
        lr: float | Tensor | None = None,
        batch: Any = None,
    ) -> tuple[Alert, ...]:
        """What was seen at a training step, all of it optional; the alerts that it raises.

        lr     of the step to come, where the optimiser does not tell
        batch  a hash, or the batch itself, any tree of tensors, which is hashed (and read by the CPU for that)
        """
        seen = Observation(
            step,
            _number(loss),
            _number(grad_norm),
            _number(lr),
            batch=batch if batch is None or isinstance(batch, (int, str)) else fingerprint(batch),
        )
        self._done(self.core.observe(self.state, seen), None)
        return self.state.raised

    @property
    def overhead(self) -> float:
        """Seconds spent by the tracker over those of everything else since the first call."""
        ledger, now = self.state.ledger, self.core.clock()
        return ledger.spent / ledger.training(now) if ledger.spent else 0.0

    def summary(self) -> str:
        """What the tracker did so far and what it cost, in a line; without any look, what would have bought one."""
        state, now = self.state, self.core.clock()
        kinds = [record.kind for record in self.records]
        looks, glances, alarms = kinds.count("look"), kinds.count("glance"), len(self.alerts)
        told = f"{looks} looks, {glances} glances and {alarms} alerts in {state.calls:,} calls"
        if self.core.every is not None:
            return f"{told}; overhead {self.overhead:.2%}, whatever it is: every={self.core.every}"
        told = f"{told}; overhead {self.overhead:.2%} of a budget of {self.core.max_overhead:.2%}"
        needed = state.ledger.needed(now)
        if looks or not math.isfinite(needed):
            return told
        wait = (state.ledger.spent + state.ledger.look) / self.core.max_overhead
        return (
            f"{told}. The budget has bought no look yet: one takes about {state.ledger.look:.2g} s and comes after "
            f"{wait:.2g} s of training, of which there were {state.ledger.training(now):.2g} s. The smallest budget "
            f"that would have bought one is max_overhead={_up(needed):g}; look(params) takes one at once, a smaller "
            "sample as data makes it cheaper"
        )

    @property
    def vectors(self) -> Tree | None:
        """(k, *leaf), of the last look or glance."""
        return self.state.vectors

    def _done(self, state: State, record: Record | None) -> Record | None:
        self.state = state
        if record is not None:
            self.records.append(record)
            if self._log is not None:
                self._log(record)
        for alert in state.raised:
            self.alerts.append(alert)
            _log.warning("%s", alert)
            if self._log is not None:
                self._log(alert)
        if self._on_alert is not None:
            for alert in state.raised:
                self._on_alert(alert)
        return record


def _up(share: float) -> float:
    """Rounded up to two digits."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 1)
    return math.ceil(share / unit) * unit


def _number(x: float | Tensor | None) -> float | None:
    return None if x is None else float(x.detach() if isinstance(x, Tensor) else x)


def fingerprint(batch: Any) -> str:
    """A hash of the tensors in a batch, and of what else is in it by its repr."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in tree.leaves(batch):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
