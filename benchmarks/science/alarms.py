"""Healthy and faulty training runs, with what monitors would see recorded at every step.

A step: the batch is drawn, its loss and gradient are measured, λ₁ is looked at every fifth time, the optimiser moves.
All that is recorded under step t is known before the loss of step t + 1 is.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.science.setting import Json, Problem, cached, curvature, drawn, first, random_vector, slope, top
from eigenfunc.alerts import stability_limit
from eigenfunc.preconditioners import adam_preconditioner

NET = Problem((64, 32, 32, 10), "tanh", "ce")
STEPS, EVERY, SAMPLES, PROBE = 200, 5, 1000, 256
OPTIMISERS = {"SGD": (0.01, 0.2), "momentum": (0.003, 0.06), "Adam": (3e-4, 6e-3)}  # ranges of the base rate
LIMITS = {  # λ₁ · rate at which a quadratic is just stable
    "SGD": stability_limit(1.0),
    "momentum": stability_limit(1.0, 0.9),
    "Adam": stability_limit(1.0, 0.9, dampening=0.9),
}
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


def planned(fresh: bool = False) -> list[Run]:
    """The same list at each call: healthy ones, jumps of the rate, and faults in the data; `fresh` ones, without the
    latter, are others of the same law, on which nothing is tuned."""
    draw = random.Random(int(fresh))
    found: list[Run] = []

    def add(kind: str, optimiser: str, factor: float) -> None:
        low, high = OPTIMISERS[optimiser]
        rate = math.exp(draw.uniform(math.log(low), math.log(high)))
        batch, at, seed = draw.choice((16, 64, 256)), draw.randrange(60, 140), len(found) + 1000 * fresh
        found.append(Run(optimiser, rate, batch, kind, factor, at, seed))

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


def record(run: Run) -> Json:
    """The raw series of a run. `held` is the loss on 256 fixed samples, `reach` Δᵀ P Δ of the update Δ."""
    data = first(SAMPLES)
    probe = (data[0][:PROBE], data[1][:PROBE])
    w = NET.start(run.seed).requires_grad_()
    optimiser = optimiser_of(run, w)
    batches = drawn(data, run.batch, run.seed)
    series: dict[str, list[float]] = {
        k: [] for k in ("loss", "held", "grad", "rate", "top", "residual", "reach", "batch")
    }
    v, kept = random_vector(w, run.seed), next(batches)
    scale = torch.ones_like(w)
    for step in range(STEPS):
        fed = batch_at(run, step, next(batches), kept)
        rate = run.rate * rate_at(run, step)
        with torch.no_grad():
            held = float(NET(w, probe))
        value, g = slope(NET, w, fed)
        if run.kind == "weight decay 1" and step >= run.at:
            g = g + w.detach()
        if step % EVERY == 0 and math.isfinite(held):
            A = curvature(NET, w, probe)
            if run.optimiser == "Adam" and step:
                scale = adam_preconditioner(optimiser, w)
            found = top(A.precondition(scale) if run.optimiser == "Adam" else A, v, 4 if step else 12)
            if math.isfinite(found.value) and found.value != 0:  # as it is where all units are saturated
                v = found.vector
        before = w.detach().clone()
        w.grad = g
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        moved = w.detach() - before
        seen = {
            "loss": value, "held": held, "grad": float(g.norm()), "rate": rate, "residual": found.residual,
            "top": found.value if step or run.optimiser != "Adam" else math.nan,
            "reach": float((scale * moved * moved).sum()),
            "batch": zlib.crc32(fed[0].numpy().tobytes()),
        }  # fmt: skip
        for name, number in seen.items():
            series[name].append(number)
        if not math.isfinite(held):
            break
    return {"run": asdict(run), **series}


def runs(folder: Path | None, some: Iterable[Run] | None = None, progress: bool = False) -> list[Json]:
    wanted = list(planned() if some is None else some)
    return [cached(folder, "alarm", record, run) for run in tqdm(wanted, desc="runs", disable=not progress)]
