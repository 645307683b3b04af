"""The functional core of `SpectrumTracker`: looks, glances and alerts as functions of a state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from eigenfunc import alerts, scope, tree
from eigenfunc.budget import Depth, Ledger
from eigenfunc.certificate import Products, certify, whole
from eigenfunc.curvature.hessian import hessian
from eigenfunc.curvature.products import Loss
from eigenfunc.eigsh import Which, eigsh
from eigenfunc.errors import DataError, InputError, NonFiniteError, ProductError, TreeError
from eigenfunc.operator import LinearOperator
from eigenfunc.overlap import gradient
from eigenfunc.plan import plan_for
from eigenfunc.preconditioners import adam_preconditioner, stride
from eigenfunc.records import Alert, History, Observation, Record, Rule
from eigenfunc.solution import cluster_bounds
from eigenfunc.stochastic.trace import trace
from eigenfunc.tree import Tree

KEPT = 128  # records and observations that rules see
_MOST = 200  # products of a look, and 20 for each pair more: a run should not wait for what does not converge
_GRADIENTS = 2.5  # what a product costs, about, before one was timed
_QUIET = 100  # steps after which an alert of the same rule is news again
_WORSE = 2.0  # or if it is this many times the square of how far over the threshold it was
_GREW = 1.25  # a rate above so many times that at which the stride was read
_SAME = math.sqrt(0.5)  # overlaps beyond are with one vector at most, since squares sum to 1


class State(NamedTuple):
    """All that is remembered between calls.

    vectors  (k, *leaf), the last ones; ids: their numbers; born: numbers given out
    records, observations   the last 128
    told     rule -> (how far over its threshold when it was raised, the step at which it last held)
    raised   alerts of the last call
    calls    how many
    stride, paced   that of the optimiser, and the rate at which it was read
    """

    vectors: Tree | None = None
    ids: tuple[int, ...] = ()
    born: int = 0
    records: tuple[Record, ...] = ()
    observations: tuple[Observation, ...] = ()
    told: Mapping[str, tuple[float, int]] = MappingProxyType({})
    raised: tuple[Alert, ...] = ()
    calls: int = 0
    ledger: Ledger = Ledger()
    stride: float | None = None
    paced: float = 0.0

    @property
    def history(self) -> History:
        return History(self.records, self.observations)


@dataclass(frozen=True, eq=False)
class Tracking:
    """The functional core of `SpectrumTracker`, which explains the arguments: what is tracked, and three functions.

    `init()` is an empty state; `update(state, params)` and `observe(state, observation)` return the next one. They
    read the clock and, if there is one, the optimiser, and change nothing.
    """

    loss: Loss
    data: Any
    k: int = 5
    every: int | None = None
    which: Which = "LA"
    tol: float = 1e-3
    max_overhead: float = 0.05
    rules: Sequence[Rule] = alerts.RULES
    optimizer: Optimizer | None = None
    limit: Callable[[float], float] | None = None
    seed: int = 0
    block_size: int | None = None
    trace_matvecs: int = 8
    matrix: Callable[..., LinearOperator] = hessian
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False)

    def __post_init__(self) -> None:
        whole(self.k, "k", 1)
        whole(self.seed, "seed", 0)
        whole(self.trace_matvecs, "trace_matvecs", 0)
        if self.every is not None:
            whole(self.every, "every", 1)
        if self.which not in ("LM", "LA", "SA", "BE"):
            raise InputError(f"which must be 'LM', 'LA', 'SA' or 'BE', got {self.which!r}")
        if not self.max_overhead > 0:
            raise InputError(f"max_overhead must be a positive share of the training time, got {self.max_overhead!r}")

    def init(self) -> State:
        return State()

    def update(
        self, state: State, params: Tree | nn.Module, step: int | None = None, depth: Depth | None = None
    ) -> tuple[State, Record | None]:
        """The next state, and a record if it was time for one, or if `depth` asks for it."""
        step = state.calls if step is None else whole(step, "step", 0)
        since = self.clock()
        state = state._replace(calls=state.calls + 1, ledger=state.ledger.started(since))
        if self.optimizer is not None and alerts.is_adaptive(self.optimizer) and not self.optimizer.state:
            depth = None
        elif depth is None:
            state, depth = self._due(state, params, step, since)
        record: Record | None = None
        if depth is not None:
            point = parameters(params)
            _synchronised(tree.device(point))
            since = self.clock()
            state, record = self._seen(state, point, step, "look" if state.vectors is None else depth)
            state = state._replace(records=(*state.records, record)[-KEPT:])
        rate, limit = self._rate(None)
        state = self._measured(state, params, rate, record is not None)
        state = self._judged(state, Observation(step, rate=rate, limit=limit, stride=state.stride))
        now = self.clock()
        if record is not None:
            record = replace(record, rate=rate, limit=limit, alerts=state.raised, seconds=now - since)
            state = state._replace(records=(*state.records[:-1], record))
        done = record.kind if record is not None and record.values else None
        return state._replace(ledger=state.ledger.charged(now, since, self.max_overhead, done)), record

    def observe(self, state: State, seen: Observation) -> State:
        """The next state, with the alerts that what was seen at a step raises."""
        since = self.clock()
        rate, limit = self._rate(seen.rate)
        limit = limit if seen.limit is None else seen.limit
        state = self._judged(state, seen._replace(rate=rate, limit=limit, stride=state.stride))
        ledger = state.ledger.started(since)
        return state._replace(ledger=ledger.charged(self.clock(), since, self.max_overhead, None))

    def _due(self, state: State, params: Tree | nn.Module, step: int, now: float) -> tuple[State, Depth | None]:
        """What it is time for; the first time, what a look will cost is guessed from a gradient."""
        if self.every is not None:
            return state, "look" if step % self.every == 0 else None
        ledger = state.ledger
        if math.isnan(ledger.look):
            point = parameters(params)
            if not bool(tree.all_finite(point)):
                return state, None if state.records else "look"
            _synchronised(tree.device(point))
            for _ in range(2):  # the first one warms up
                before = self.clock()
                gradient(self.loss, point, self.data)
                product = _GRADIENTS * (self.clock() - before)
            count = 25 + 2 * self.k + self.trace_matvecs
            return state._replace(ledger=ledger._replace(look=product * count, glance=product * (self.k + 3))), None
        depth = ledger.affordable(now, self.max_overhead, state.vectors is not None)
        broken = len(state.records) > 0 and not state.records[-1].finite
        if depth is not None and broken and not bool(tree.all_finite(parameters(params))):
            return state, None  # as it was when last seen
        return state, depth

    def _measured(self, state: State, params: Tree | nn.Module, rate: float | None, anew: bool) -> State:
        """The stride is read with each record, and where the rate has grown since: every time would cost too much."""
        if self.optimizer is None or rate is None or not (anew or rate > _GREW * state.paced):
            return state
        return state._replace(stride=stride(self.optimizer, parameters(params)), paced=rate)

    def _rate(self, given: float | None) -> tuple[float | None, float | None]:
        """The learning rate now and the largest stable eigenvalue there."""
        rate, limit = given, None
        if self.optimizer is not None:
            rate, limit = alerts.optimizer_limit(self.optimizer, given)
        if self.limit is not None:
            limit = None if rate is None else self.limit(rate)
        elif self.optimizer is None and rate is not None:
            limit = alerts.stability_limit(rate)
        return rate, limit

    def _judged(self, state: State, seen: Observation) -> State:
        """Observations of the same step are merged; what begins to hold, or gets much worse, is an alert."""
        past = state.observations
        if past and past[-1].step == seen.step:
            known = past[-1]
            seen = known._replace(**{name: value for name, value in seen._asdict().items() if value is not None})
            if seen == known and (not state.records or state.records[-1].step != seen.step):
                return state._replace(raised=())  # nothing is new
            past = past[:-1]
        state = state._replace(observations=(*past, seen)[-KEPT:])
        history = state.history
        found = [alert for rule in self.rules if (alert := rule(history)) is not None]
        told, raised = state.told, []
        for alert in found:
            severity = abs(alert.value / alert.threshold) if alert.threshold else 0.0
            before, last = told.get(alert.rule, (0.0, -math.inf))
            if alert.step - last > _QUIET or severity > _WORSE * before**2:
                raised.append(alert)
                before = severity
            told = {**told, alert.rule: (before, alert.step)}
        return state._replace(told=told, raised=tuple(raised))

    def _seen(self, state: State, params: Tree, step: int, depth: Depth) -> tuple[State, Record]:
        blank = Record(step, which=self.which, kind=depth, matrix=self._name())
        if not bool(tree.all_finite(params)):
            return state, replace(blank, finite=False, status="a parameter holds NaN or infinity")
        try:
            s = None
            A = self.matrix(self.loss, params, self.data)
            if self.optimizer is not None and alerts.is_adaptive(self.optimizer):
                d = adam_preconditioner(self.optimizer, params)
                A, s = A.precondition(d), tree.tree_map(torch.rsqrt, d)
            if not _fit(state.vectors, A.like):  # a layer was unfrozen, say: all starts anew
                state, depth, blank = state._replace(vectors=None), "look", replace(blank, kind="look")
            record, vectors = self._glance(A, state, blank) if depth == "glance" else self._look(A, state, blank)
            if depth == "look":
                share = _share(gradient(self.loss, params, self.data), s, vectors)
                record = replace(record, gradient_share=share)
        except (NonFiniteError, DataError, ProductError) as error:
            if not any(record.finite for record in state.records):
                raise
            finite = isinstance(error, ProductError)
            return state, replace(blank, finite=finite, status=f"{type(error).__name__}: {error}")
        ids, born, overlaps = _continued(state, vectors)
        return state._replace(vectors=vectors, ids=ids, born=born), replace(record, ids=ids, overlaps=overlaps)

    def _name(self) -> str:
        name = getattr(getattr(self.matrix, "func", self.matrix), "__name__", "matrix")  # of a partial too
        return f"preconditioned {name}" if self.optimizer is not None and alerts.is_adaptive(self.optimizer) else name

    def _look(self, A: LinearOperator, state: State, blank: Record) -> tuple[Record, Tree]:
        found = eigsh(
            A, self.k, which=self.which, tol=self.tol, v0=state.vectors, seed=self.seed + blank.step,
            block_size=self.block_size, max_matvecs=_MOST + 20 * self.k, throw=False,
        )  # fmt: skip
        rest = None
        if self.trace_matvecs:
            rest = trace(A.deflate(found), num_matvecs=self.trace_matvecs, seed=self.seed + blank.step)
        stats = found.stats
        return replace(
            blank,
            values=tuple(found.values.tolist()),
            bounds=tuple(found.bounds.tolist()),
            residuals=tuple(found.residuals.tolist()),
            converged=tuple(found.converged.tolist()),
            noise=found.noise,
            status=str(found.status),
            trace=None if rest is None else float(found.values.sum()) + rest.value,
            trace_stderr=None if rest is None else rest.stderr,
            matvecs=stats.matvecs,
            verification=stats.verification,
            passes=stats.passes,
        ), found.vectors

    def _glance(self, A: LinearOperator, state: State, blank: Record) -> tuple[Record, Tree]:
        """Rayleigh–Ritz in the span of the last vectors, by one product with all of them."""
        products = Products(A)
        with scope.full_precision(products.device), torch.no_grad():
            found = certify(products, tree.ravel(state.vectors, A.like))
        order = plan_for(self.k, self.which, self.tol, products.size).reported(found.values)
        values, residuals = found.values[order], found.residuals[order]
        noise = next(record.noise for record in reversed(state.records) if record.values)
        noise = max(noise, products.floor(float(tree.norms(found.images).max())))
        return replace(
            blank,
            values=tuple(values.tolist()),
            bounds=tuple(cluster_bounds(values, residuals, noise).tolist()),
            residuals=tuple(residuals.tolist()),
            converged=(False,) * len(order),
            noise=noise,
            status="glance",
            matvecs=products.matvecs,
            passes=products.passes,
        ), tree.unravel(found.vectors[order.to(products.device)], A.like, narrow=False)


def parameters(params: Tree | nn.Module) -> Tree:
    """The parameters of a module that require grad, detached, as `functional_loss` returns them; a tree as it is."""
    if isinstance(params, nn.Module):
        return {name: p.detach() for name, p in params.named_parameters() if p.requires_grad}
    tree.check_vector_space(params, "params")
    return params


def _fit(vectors: Tree | None, like: Tree) -> bool:
    try:
        tree.check_like(vectors, like, "vectors", stacked=True, dtypes=False)
    except TreeError:
        return False
    return True


def _continued(state: State, vectors: Tree) -> tuple[tuple[int, ...], int, tuple[float, ...]]:
    """Numbers of the pairs, numbers given out so far, and overlaps with the vectors before.

    Squared overlaps with orthonormal vectors sum to at most 1, so one at most exceeds ½ in each row and column.
    """
    if state.vectors is None:
        count = state.born + len(tree.leaves(vectors)[0])
        return tuple(range(state.born, count)), count, ()
    best, at = tree.exact_gram(vectors, state.vectors).abs().cpu().max(1)
    ids, count = [], state.born
    for overlap, i in zip(best.tolist(), at.tolist(), strict=True):
        ids.append(state.ids[i] if overlap > _SAME else count)
        count += overlap <= _SAME
    return tuple(ids), count, tuple(min(overlap, 1.0) for overlap in best.tolist())


def _share(g: Tree, s: Tree | None, vectors: Tree) -> float | None:
    """Of ‖S g‖² in the span of the vectors; None for a zero gradient."""
    scaled = tree.lifted(g if s is None else tree.tree_map(torch.mul, g, s))
    total = float(tree.norms(scaled)[0]) ** 2
    return float((tree.exact_gram(vectors, scaled) ** 2).sum()) / total if total > 0 else None


def _synchronised(device: torch.device) -> None:
    """What was queued on the device is training, and no part of what a look costs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
