"""Healthy and faulty training runs, with what monitors would see recorded at every step.

A step: the batch is drawn, its loss and gradient are measured, the library's tracker is told and looks at λ₁ every
fifth time, the optimiser moves. All that is recorded under step t is known before that step is taken.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.science.setting import Json, Problem, cached, drawn, first, slope
from eigenfunc import hessian
from eigenfunc.track import SpectrumTracker

NET = Problem((64, 32, 32, 10), "tanh", "ce")
STEPS, EVERY, SAMPLES, PROBE = 200, 5, 1000, 256
ROUNDS = 6
OPTIMISERS = {"SGD": (0.01, 0.2), "momentum": (0.003, 0.06), "Adam": (3e-4, 6e-3)}  # ranges of the base rate
HARMLESS = ("constant", "warm-up", "warm-up in one jump", "decay", "cosine with a restart", "jump by 1.5 or 2")
DATA = ("labels shuffled", "inputs times 10", "one batch repeated", "weight decay 1")
FACTORS = (10, 30, 100)


@dataclass(frozen=True)
class Run:
    optimiser: str
    rate: float
    batch: int
    kind: str  # one of HARMLESS, of DATA, or "jump"
    factor: float
    at: int  # the step of the change
    seed: int

    @property
    def healthy(self) -> bool:
        return self.kind in HARMLESS


def _run(draw: random.Random, kind: str, optimiser: str, factor: float, seed: int) -> Run:
    low, high = OPTIMISERS[optimiser]
    rate = math.exp(draw.uniform(math.log(low), math.log(high)))
    return Run(optimiser, rate, draw.choice((16, 64, 256)), kind, factor, draw.randrange(60, 140), seed)


def planned(fresh: bool = False) -> list[Run]:
    """The same list at each call: healthy ones, jumps of the rate, and faults in the data; `fresh` ones, without the
    latter, are others of the same law, on which nothing is tuned."""
    draw = random.Random(3 * fresh)
    found: list[Run] = []

    def add(kind: str, optimiser: str, factor: float) -> None:
        found.append(_run(draw, kind, optimiser, factor, len(found) + 3000 * fresh))

    for optimiser in OPTIMISERS:
        for _ in range(8):
            for kind in HARMLESS:
                add(kind, optimiser, draw.choice((1.5, 2.0)) if kind.startswith("jump") else 1.0)
        for factor in FACTORS:
            for _ in range(16):
                add("jump", optimiser, factor)
        for kind in () if fresh else DATA:
            for _ in range(6):
                add(kind, optimiser, 1.0)
    return found


def confirming(rounds: int = ROUNDS) -> list[Run]:
    """More runs of the same law: 18 healthy ones and 36 jumps a round, made when nothing was changed any more."""
    draw = random.Random(6)
    found: list[Run] = []
    for _ in range(rounds):
        for optimiser in OPTIMISERS:
            for kind in HARMLESS:
                factor = draw.choice((1.5, 2.0)) if kind.startswith("jump") else 1.0
                found.append(_run(draw, kind, optimiser, factor, 6000 + len(found)))
            for factor in 4 * FACTORS:
                found.append(_run(draw, "jump", optimiser, factor, 6000 + len(found)))
    return found


def rate_at(run: Run, step: int) -> float:
    """The learning rate of an update, over the base rate."""
    late = step >= run.at
    match run.kind:
        case "warm-up":
            return min(1.0, (step + 1) / 60)
        case "warm-up in one jump":
            return 1.0 if late else 0.1
        case "decay":
            return 0.1 if late else 1.0
        case "cosine with a restart":
            part = step / run.at if step < run.at else (step - run.at) / (STEPS - run.at)
            return 0.05 + 0.95 * (1 + math.cos(math.pi * part)) / 2
        case "jump by 1.5 or 2" | "jump":
            return run.factor if late else 1.0
    return 1.0


def optimiser_of(run: Run, w: Tensor) -> torch.optim.Optimizer:
    if run.optimiser == "Adam":
        return torch.optim.Adam([w], run.rate)
    return torch.optim.SGD([w], run.rate, momentum=0.9 if run.optimiser == "momentum" else 0.0)


def batch_at(run: Run, step: int, fresh: tuple[Tensor, Tensor], kept: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What the model is fed: the fresh batch, or what the fault makes of it."""
    if step < run.at or run.kind not in DATA:
        return fresh
    if run.kind == "labels shuffled":
        order = torch.randperm(len(fresh[1]), generator=torch.Generator().manual_seed(step))
        return fresh[0], fresh[1][order]
    if run.kind == "inputs times 10":
        return 10 * fresh[0], fresh[1]
    return kept if run.kind == "one batch repeated" else fresh


def tracked(
    run: Run, optimiser: torch.optim.Optimizer, probe: tuple[Tensor, Tensor], **options: Any
) -> SpectrumTracker:
    """The library's tracker, with a look every fifth step at one pair."""
    matrix = partial(hessian, product="graph", check=False)  # a network whose products are known to be right
    return SpectrumTracker(
        NET, probe, k=1, every=EVERY, trace_matvecs=0, optimizer=optimiser, matrix=matrix, seed=run.seed, **options
    )


def record(run: Run, **options: Any) -> Json:
    """The raw series of a run: all that the tracker gives to its rules, and `held`, the loss on 256 fixed samples.

    `looks` holds step, λ₁, its bound and whether it is certified; `alerts`, step and rule, is what the tracker said.
    """
    data = first(SAMPLES)
    probe = (data[0][:PROBE], data[1][:PROBE])
    w = NET.start(run.seed).requires_grad_()
    optimiser = optimiser_of(run, w)
    tracker = tracked(run, optimiser, probe, **options)
    batches = drawn(data, run.batch, run.seed)
    series: dict[str, list[Any]] = {k: [] for k in ("loss", "held", "grad", "rate", "limit", "stride", "batch")}
    kept = next(batches)
    for step in range(STEPS):
        fed = batch_at(run, step, next(batches), kept)
        with torch.no_grad():
            held = float(NET(w, probe))
        value, g = slope(NET, w, fed)
        if run.kind == "weight decay 1" and step >= run.at:
            g = g + w.detach()
        w.grad = g
        optimiser.param_groups[0]["lr"] = run.rate * rate_at(run, step)
        tracker.observe(step, loss=value, grad_norm=g.norm(), batch=zlib.crc32(fed[0].numpy().tobytes()))
        tracker(w.detach(), step)
        seen = tracker.state.observations[-1]
        series["held"].append(held)
        for name, number in zip(("loss", "grad", "rate", "limit", "batch", "stride"), seen[1:], strict=True):
            series[name].append(number)
        if not math.isfinite(held):
            break
        optimiser.step()
    looks = [
        (r.step, r.values, r.bounds, r.residuals, r.certified, r.finite, r.status, r.matrix) for r in tracker.records
    ]
    return {"run": asdict(run), "looks": looks, "alerts": [(x.step, x.rule) for x in tracker.alerts], **series}


def runs(folder: Path | None, some: Iterable[Run], progress: bool = False) -> list[Json]:
    return [cached(folder, "alarm", record, run) for run in tqdm(list(some), desc="runs", disable=not progress)]
