"""Overhead on a clock that the test turns: what is spent stays below what was earned, and is spent well."""

from __future__ import annotations

import itertools
import logging
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from eigenfunc import LinearOperator, hessian
from eigenfunc.budget import Ledger
from eigenfunc.track import SpectrumTracker
from eigenfunc.tracking import Tracking

START = {"x": torch.linspace(0.5, 3.0, 40, dtype=torch.float64)}


class Clock:
    """Time passes where the test says so: in training, in each evaluation of the loss, in each product."""

    time = 0.0

    def __call__(self) -> float:
        return self.time

    def loss(self, params: dict[str, Tensor], _: Any) -> Tensor:
        self.time += 1e-3
        return (params["x"] ** 4).sum() / 12

    def matrix(self, *arguments: Any) -> LinearOperator:
        A = hessian(*arguments)

        def product(v: Any) -> Any:
            self.time += 3e-3
            return A.matvec(v)

        return replace(A, matvec=product, block=None)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_overhead_stays_within_its_budget_and_the_budget_is_used(share: float) -> None:
    clock = Clock()
    tracking = Tracking(
        clock.loss, torch.zeros(1), k=2, max_overhead=share, clock=clock, matrix=clock.matrix, trace_matvecs=0
    )
    state, records = tracking.init(), []
    for _ in range(800):
        clock.time += 0.02
        state, record = tracking.update(state, START)
        earned = share * state.ledger.training(clock())
        assert state.ledger.spent <= earned + 0.05  # half of a look: the first one costs more than was guessed
        records += [record] if record is not None else []
    overhead = state.ledger.spent / state.ledger.training(clock())
    assert 0.7 * share <= overhead <= share + 1e-3
    assert {record.kind for record in records} == {"look", "glance"}
    assert sum(record.seconds for record in records) == pytest.approx(state.ledger.spent, abs=0.01)
    steps = [record.step for record in records if record.kind == "look"]
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert max(gaps) <= 3 * min(gaps)  # evenly


def test_the_first_look_waits_until_it_can_be_afforded_unless_it_is_asked_for() -> None:
    clock = Clock()
    tracking = Tracking(clock.loss, torch.zeros(1), k=2, clock=clock, matrix=clock.matrix)
    state, record = tracking.update(tracking.init(), START)
    assert record is None
    state, record = tracking.update(state, START, depth="look")
    assert record is not None
    assert record.seconds > 0
    assert state.ledger.look == pytest.approx(record.seconds)
    clock.time += 0.95 * state.ledger.spent / 0.05
    assert tracking.update(state, START)[1] is None  # the debt is paid back first
    clock.time += 0.3 * state.ledger.look / 0.05
    glance = tracking.update(state, START)[1]
    assert glance is not None
    assert glance.kind == "glance"
    clock.time += state.ledger.look / 0.05
    look = tracking.update(state, START)[1]
    assert look is not None
    assert look.kind == "look"


@given(st.floats(0.01, 0.5), st.lists(st.tuples(st.floats(0.001, 1), st.floats(0.5, 2)), min_size=50, max_size=200))
@settings(deadline=None)
def test_no_more_is_spent_than_earned_but_for_what_a_look_costs_beyond_the_foreseen(
    share: float, steps: list[tuple[float, float]]
) -> None:
    now, ledger, excess = 0.0, Ledger(look=1.0, glance=0.1).started(0.0), 0.0
    for seconds, dearer in steps:
        now += seconds
        depth = ledger.affordable(now, share, True)
        if depth is not None:
            foreseen = ledger.look if depth == "look" else ledger.glance
            since, now = now, now + foreseen * dearer
            excess = max(excess, foreseen * (dearer - 1))
            ledger = ledger.charged(now, since, share, depth)
        assert ledger.spent <= share * ledger.training(now) + excess + 1e-9


def test_an_unknown_price_is_never_paid() -> None:
    assert Ledger().started(0.0).affordable(1e9, 0.5, True) is None
    assert math.isnan(Ledger().look)


def test_a_budget_that_buys_nothing_says_which_one_would(caplog: pytest.LogCaptureFixture) -> None:
    """And it would: the same run with that budget has a look."""

    def run(share: float) -> tuple[SpectrumTracker, list[str]]:
        clock = Clock()
        tracker = SpectrumTracker(
            clock.loss, torch.zeros(1), k=2, max_overhead=share, matrix=clock.matrix, trace_matvecs=0
        )
        tracker.core = replace(tracker.core, clock=clock)
        caplog.clear()
        for _ in range(120):
            clock.time += 1e-3
            tracker(START)
        return tracker, [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    tracker, said = run(0.02)
    assert not tracker.records
    assert len(said) == 1  # at the hundredth call
    assert "bought no look yet" in said[0]
    named = re.search(r"max_overhead=([\d.]+)", said[0])
    assert named is not None
    enough, silent = run(float(named[1]))
    assert enough.records
    assert not silent
    assert "1 looks" in enough.summary()
    assert not run(0.9 * float(named[1]) * 100 / 120)[0].records
    assert "bought" not in enough.summary()
