"""Monitors on recorded runs: scores at every step, thresholds tuned on half of the healthy runs, what is caught.

A monitor gives a score for every step and alarms each time that it rises above its threshold; the tracker alarms where
it raises an alert. A healthy run with an alarm is a false alarm, and so is, counted by itself, a run with an alarm
before its fault. A fault in the rate counts if it doubled the loss on the fixed samples. It is caught if an alarm came
at the fault or after it, but before the loss had doubled. The stricter count is in the tables too: caught at once, by
the first alarm of the run, so that a run with an early alarm is always a miss.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.science.alarms import DATA, FACTORS, HARMLESS, OPTIMISERS
from benchmarks.science.setting import Json
from eigenfunc.alerts import overshoot
from eigenfunc.records import History, Observation, Record
from eigenfunc.tracking import KEPT, Tracking

_WINDOW, _QUIET = 30, 20  # steps that a z-score looks back; steps at the start in which none is given
_SPLITS = 30  # ways to halve the healthy runs
_TARGET = 0.05  # false alarms on the runs that are tuned on
SHIPPED = "**the tracker as shipped**, all its rules"
Scores = list[float]


def _z(series: Sequence[float]) -> Scores:
    """Robust z-scores of the logarithms against the last steps: median and median absolute deviation."""
    logs = [math.log(max(x, 1e-12)) if x == x and x != math.inf else math.nan for x in series]
    found = []
    for t, x in enumerate(logs):
        past = [y for y in logs[max(0, t - _WINDOW) : t] if y == y]
        if t < _QUIET or not past:
            found.append(-math.inf)
            continue
        middle = statistics.median(past)
        spread = 1.4826 * statistics.median([abs(y - middle) for y in past]) + 0.02
        found.append((x - middle) / spread if x == x else math.inf)
    return found


def loss_z(s: Json) -> Scores:
    return _z(s["loss"])


def held_z(s: Json) -> Scores:
    return _z(s["held"])


def gradient_z(s: Json) -> Scores:
    return _z(s["grad"])


def top_z(s: Json) -> Scores:
    return _z([x if x > -math.inf else math.nan for x in tops(s)])


def changed(s: Json) -> Scores:
    rates = s["rate"]
    return [0.0] + [float(b != a) for a, b in itertools.pairwise(rates)]


def rose(s: Json) -> Scores:
    """The factor by which the rate is above the largest of the last ten steps."""
    rates = s["rate"]
    return [1.0] + [rates[t] / max(rates[max(0, t - 10) : t]) for t in range(1, len(rates))]


def ratio(s: Json) -> Scores:
    """The last λ₁ against the limit at the current rate."""
    return [x / limit for x, limit in zip(tops(s), s["limit"], strict=True)]


def tops(s: Json) -> Scores:
    """The last λ₁ at every step, −∞ before the first."""
    seen = {step: values[0] for step, values, *_ in s["looks"] if values}
    found, last = [], -math.inf
    for t in range(len(s["loss"])):
        last = seen.get(t, last)
        found.append(last)
    return found


def seen(s: Json) -> tuple[list[Observation], dict[int, Record]]:
    """What was told at every step, with the stride as it was after the look, and the looks by step."""
    fields = ("loss", "grad", "rate", "limit", "batch", "stride")
    steps = [Observation(t, *x) for t, x in enumerate(zip(*(s[name] for name in fields), strict=True))]
    looks = {
        step: Record(step, tuple(values), tuple(bounds), tuple(residuals), (certified,) * len(values),
                     finite=finite, status=status, matrix=matrix)
        for step, values, bounds, residuals, certified, finite, status, matrix in s["looks"]
    }  # fmt: skip
    return steps, looks


def reach(s: Json) -> Scores:
    """What `overshoot` holds against its share: ½ λ₁ ‖Δ‖² over the loss."""
    some = 1e-9
    steps, looks = seen(s)
    found, known = [], []
    for t in range(len(steps)):
        known += [looks[t]] if t in looks else []
        alert = overshoot(History(known[-KEPT:], steps[max(0, t - KEPT + 1) : t + 1]), share=some)
        found.append(0.0 if alert is None else some * alert.value / alert.threshold)
    return found


def told(s: Json) -> list[tuple[int, str]]:
    """Step and rule of each alert that the tracker raises on what was recorded, with its rules of today.

    Its own core judges, at each step first what it is told and then the look, as in the run.
    """
    steps, looks = seen(s)
    core = Tracking(None, None)  # type: ignore[arg-type]  # it is not asked to look
    state, found, before = core.init(), [], None
    for t, step in enumerate(steps):
        state = core.observe(state._replace(stride=before), step)
        found += state.raised
        if t in looks:
            state = state._replace(records=(*state.records, looks[t])[-KEPT:])
        state = core.observe(state._replace(stride=step.stride), Observation(t))
        found += state.raised
        before = step.stride
    return [(alert.step, alert.rule) for alert in found]


def retold(s: Json) -> Json:
    """With the alerts of the rules of today, whatever they were when the run was made."""
    return s | {"alerts": told(s)}


@dataclass(frozen=True)
class Monitor:
    score: Callable[[Json], Scores] | None = None  # None: it alarms where the tracker raised an alert
    threshold: float | None = None  # None: tuned
    each: bool = False  # tuned for each optimiser by itself
    rules: str = ""  # how the names of these alerts begin

    @property
    def tuned(self) -> bool:
        return self.score is not None and self.threshold is None

    def alarms(self, s: Json, scores: Scores, limit: float) -> list[int]:
        """The steps at which it alarms, in order."""
        if self.score is None:
            return sorted(step for step, rule in s["alerts"] if rule.startswith(self.rules))
        return [t for t, x in enumerate(scores) if x > limit and not (t and scores[t - 1] > limit)]


MONITORS = {
    "loss of the batch, z-score": Monitor(loss_z),
    "loss on fixed samples, z-score": Monitor(held_z),
    "gradient norm, z-score": Monitor(gradient_z),
    "the rate changed": Monitor(changed, 0.5),
    "the rate rose by a factor": Monitor(rose),
    "the same, each optimiser": Monitor(rose, each=True),
    "λ₁, z-score": Monitor(top_z),
    "λ₁ over the limit": Monitor(ratio),
    "λ₁ over the limit, each optimiser": Monitor(ratio, each=True),
    "λ₁ over the limit > 0.4": Monitor(ratio, 0.4),
    "½ λ₁‖Δ‖² over the loss": Monitor(reach),
    "½ λ₁‖Δ‖² over the loss, each optimiser": Monitor(reach, each=True),
    "`stability`": Monitor(rules="stability"),
    "`overshoot`": Monitor(rules="overshoot"),
    "`jump` of λ₁": Monitor(rules="jump of λ₁"),
    "`jump` of the loss": Monitor(rules="jump of loss"),
    "`jump` of the gradient norm": Monitor(rules="jump of grad_norm"),
    "`repeated_batch`": Monitor(rules="repeated batch"),
    "`non_finite`": Monitor(rules="non-finite"),
    SHIPPED: Monitor(),
}


_MIXED = (
    "gradient norm, z-score",
    "the rate rose by a factor",
    "λ₁ over the limit",
    "`stability`",
    "`overshoot`",
    SHIPPED,
)


def doubled(s: Json) -> int | None:
    """The step at which the loss on the fixed samples is first over twice that at the change."""
    at, held = s["run"]["at"], s["held"]
    return next((t for t in range(at + 1, len(held)) if not held[t] <= 2 * held[at]), None)


def tuned(peaks: Sequence[float], target: float = _TARGET) -> float:
    """The smallest threshold that at most that share of the peaks exceeds."""
    ranked = sorted(peaks, reverse=True)
    return ranked[int(target * len(ranked))]


def halves(records: Sequence[Json], seed: int) -> tuple[list[Json], list[Json]]:
    """The healthy runs, split at random within each optimiser and kind: to tune on, and to test on."""
    groups: dict[tuple[str, str], list[Json]] = {}
    for s in records:
        groups.setdefault((s["run"]["optimiser"], s["run"]["kind"]), []).append(s)
    draw = random.Random(seed)
    tune: list[Json] = []
    test: list[Json] = []
    for group in groups.values():
        draw.shuffle(group)
        tune += group[: len(group) // 2]
        test += group[len(group) // 2 :]
    return tune, test


def sound(records: Sequence[Json]) -> list[Json]:
    """The healthy runs: without a fault, and after whose change of rate the loss did not double."""
    return [s for s in records if s["run"]["kind"] in HARMLESS and doubled(s) is None]


class Judged:
    """A monitor's scores on all runs, and what it does with given thresholds: counts [such runs, runs]."""

    def __init__(self, monitor: Monitor, records: Sequence[Json]) -> None:
        self.monitor = monitor
        self.scores = {id(s): [] if monitor.score is None else monitor.score(s) for s in records}

    def thresholds(self, tune: Sequence[Json]) -> dict[str, float]:
        if not self.monitor.tuned:
            return dict.fromkeys(OPTIMISERS, 0.0 if self.monitor.threshold is None else self.monitor.threshold)
        peaks = {o: [max(self.scores[id(s)]) for s in tune if s["run"]["optimiser"] == o] for o in OPTIMISERS}
        if self.monitor.each:
            return {name: tuned(some) for name, some in peaks.items()}
        return dict.fromkeys(OPTIMISERS, tuned([x for some in peaks.values() for x in some]))

    def alarms(self, s: Json, limits: dict[str, float]) -> list[int]:
        return self.monitor.alarms(s, self.scores[id(s)], limits[s["run"]["optimiser"]])

    def alarmed(self, some: Sequence[Json], limits: dict[str, float]) -> list[int]:
        return [sum(bool(self.alarms(s, limits)) for s in some), len(some)]

    def early(self, some: Sequence[Json], limits: dict[str, float]) -> list[int]:
        """With an alarm before the change."""
        return [sum(t < s["run"]["at"] for s in some for t in self.alarms(s, limits)[:1]), len(some)]

    def caught(self, some: Sequence[Json], limits: dict[str, float]) -> list[int]:
        """With an alarm at the change or after it, before the loss had doubled."""
        return [sum(_between(s, self.alarms(s, limits)) for s in some), len(some)]

    def at_once(self, some: Sequence[Json], limits: dict[str, float]) -> list[int]:
        """The same of the first alarm of the run."""
        return [sum(_between(s, self.alarms(s, limits)[:1]) for s in some), len(some)]

    def late(self, some: Sequence[Json], limits: dict[str, float]) -> list[float | None]:
        """With an alarm at the change or after it, and the median of the steps that it took."""
        delays = [t - s["run"]["at"] for s in some for t in self._after(s, limits)[:1]]
        return [len(delays), len(some), statistics.median(delays) if delays else None]

    def _after(self, s: Json, limits: dict[str, float]) -> list[int]:
        return [t for t in self.alarms(s, limits) if t >= s["run"]["at"]]


def _between(s: Json, alarms: Sequence[int]) -> bool:
    end = doubled(s)
    return end is not None and any(s["run"]["at"] <= t < end for t in alarms)


def outcome(monitor: Monitor, records: Sequence[Json]) -> Json:
    """What a monitor does on all runs, as counts [alarms, runs], for the first way to split the healthy ones in halves;
    `mean false` and `mean caught` are shares over all ways."""
    judged, healthy = Judged(monitor, records), sound(records)
    jumps = [s for s in records if s["run"]["kind"] == "jump"]
    harmful = [s for s in jumps if doubled(s) is not None]
    shares = []
    for seed in range(_SPLITS):
        tune, test = halves(healthy, seed)
        limits = judged.thresholds(tune)
        pairs = judged.alarmed(test, limits), judged.caught(harmful, limits)
        shares.append([count / number for count, number in pairs])
    tune, test = halves(healthy, 0)
    limits = judged.thresholds(tune)
    false, caught = partial(judged.alarmed, limits=limits), partial(judged.caught, limits=limits)
    return {
        "tuned": monitor.tuned,
        "thresholds": limits,
        "false": false(test),
        "false of all": false(healthy),
        "false by kind": {kind: false([s for s in test if s["run"]["kind"] == kind]) for kind in HARMLESS},
        "early": judged.early(jumps, limits),
        "caught": caught(harmful),
        "at once": judged.at_once(harmful, limits),
        "mean false": statistics.fmean(share for share, _ in shares),
        "mean caught": statistics.fmean(share for _, share in shares),
        **{name: caught([s for s in harmful if s["run"]["optimiser"] == name]) for name in OPTIMISERS},
        "by factor": {str(f): caught([s for s in harmful if s["run"]["factor"] == f]) for f in FACTORS},
        "other jumps": false([s for s in jumps if doubled(s) is None]),
        **{kind: judged.late([s for s in records if s["run"]["kind"] == kind], limits) for kind in DATA},
    }


def outcomes(records: Sequence[Json]) -> Json:
    return {name: outcome(monitor, records) for name, monitor in MONITORS.items()}


def confirmed(outcomes: Json, fresh: Sequence[Json]) -> Json:
    """The same counts on runs that no threshold was tuned on, for the thresholds of `outcomes`."""
    healthy = sound(fresh)
    jumps = [s for s in fresh if s["run"]["kind"] == "jump"]
    harmful = [s for s in jumps if doubled(s) is not None]
    found: Json = {}
    for name, row in outcomes.items():
        if row["caught"][0]:
            judged, limits = Judged(MONITORS[name], fresh), row["thresholds"]
            found[name] = {
                "false": judged.alarmed(healthy, limits), "early": judged.early(jumps, limits),
                "caught": judged.caught(harmful, limits), "at once": judged.at_once(harmful, limits),
            }  # fmt: skip
            for o in OPTIMISERS:
                some = [s for s in harmful if s["run"]["optimiser"] == o]
                found[name][o], found[name][f"{o} at once"] = judged.caught(some, limits), judged.at_once(some, limits)
    return found


MIXES = {
    "all": (),
    "without warm restarts (×20)": ("cosine with a restart",),
    "nor warm-up in one jump (×10)": ("cosine with a restart", "warm-up in one jump"),
}


def mixes(records: Sequence[Json]) -> Json:
    """Shares of false alarms and of faults caught, means over the splits, also without large harmless changes."""
    found: Json = {}
    for mix, without in MIXES.items():
        some = [s for s in records if s["run"]["kind"] not in without]
        for name in _MIXED:
            row = outcome(MONITORS[name], some)
            found.setdefault(name, {})[mix] = [row["mean false"], row["mean caught"]]
    return found


def numbers(records: Sequence[Json]) -> Json:
    """How many runs of which sort there are."""
    jumps = [s for s in records if s["run"]["kind"] == "jump"]
    return {
        "healthy": len(sound(records)),
        "meant as harmless, but the loss doubled": sum(s["run"]["kind"] in HARMLESS for s in records)
        - len(sound(records)),
        "jumps": len(jumps),
        "jumps that doubled the loss": sum(doubled(s) is not None for s in jumps),
        "of these in one step": sum(doubled(s) == s["run"]["at"] + 1 for s in jumps),
        "faults in the data": sum(s["run"]["kind"] in DATA for s in records),
        "largest λ₁ over the limit in a healthy run": max(max(ratio(s)) for s in sound(records)),
        "looks": sum(len(s["looks"]) for s in records),
        "of these certified": sum(look[4] for s in records for look in s["looks"]),
    }
