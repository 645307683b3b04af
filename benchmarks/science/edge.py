"""The edge of stability: full-batch training sharpens until the largest eigenvalue hovers at what the rate allows.

J. Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability, ICLR 2021; J. Cohen et
al., Adaptive gradient methods at the edge of stability, 2022.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.science.setting import SEEDS, Json, Problem, cached, curvature, first, random_vector, slope, top
from eigenfunc.alerts import stability_limit
from eigenfunc.canvas import DOWN, GRID, UP
from eigenfunc.preconditioners import adam_preconditioner

DEEP = Problem((64, 64, 64, 64, 64, 10), "tanh", "mse")
SMALL = Problem((64, 32, 32, 32, 10), "tanh", "mse")


@dataclass(frozen=True)
class Setting:
    problem: Problem
    optimiser: str  # "gd", "heavy ball", "adam"
    rate: float
    steps: int
    noise: float = 0.0  # share of labels drawn at random
    every: int = 10  # steps between two looks
    samples: int = 500

    @property
    def limit(self) -> float:
        """The largest eigenvalue, preconditioned for Adam, at which a quadratic is still stable."""
        momentum = 0.0 if self.optimiser == "gd" else 0.9
        return stability_limit(self.rate, momentum, dampening=0.9 if self.optimiser == "adam" else 0.0)


SETTINGS = {
    "GD, η = 0.1": Setting(DEEP, "gd", 0.1, 1500),
    "GD, η = 0.2": Setting(DEEP, "gd", 0.2, 800),
    "GD, small net, η = 0.15": Setting(SMALL, "gd", 0.15, 1500),
    "heavy ball, β = 0.9, η = 0.1": Setting(SMALL, "heavy ball", 0.1, 1000, noise=0.5),
    "Adam, β₂ = 0.99, η = 0.001": Setting(SMALL, "adam", 1e-3, 1000),
}


def made(setting: Setting, w: torch.Tensor) -> torch.optim.Optimizer:
    if setting.optimiser == "adam":
        return torch.optim.Adam([w], setting.rate, betas=(0.9, 0.99))
    return torch.optim.SGD([w], setting.rate, momentum=0.9 if setting.optimiser == "heavy ball" else 0.0)


def run(setting: Setting, seed: int) -> Json:
    """Loss and λ₁ over the limit at every look, and how exact that λ₁ is."""
    x, y = first(setting.samples)
    if setting.noise:
        g = torch.Generator().manual_seed(500 + seed)
        y = torch.where(torch.rand(y.shape, generator=g) < setting.noise, torch.randint(10, y.shape, generator=g), y)
    w = setting.problem.start(seed).requires_grad_()
    optimiser = made(setting, w)
    v = random_vector(w, seed)
    rows: list[tuple[float, float, float, float]] = []
    for step in range(setting.steps + 1):
        value, w.grad = slope(setting.problem, w, (x, y))
        adapted = setting.optimiser == "adam"
        if step % setting.every == 0 and (step or not adapted):
            A = curvature(setting.problem, w, (x, y))
            A = A.precondition(adam_preconditioner(optimiser, w)) if adapted else A
            found = top(A, v, 4 if rows else 12)
            v = found.vector
            rows.append((step, value, found.value / setting.limit, found.residual))
        optimiser.step()
    return {"step": [r[0] for r in rows], "loss": [r[1] for r in rows], "ratio": [r[2] for r in rows],
            "residual": [r[3] for r in rows]}  # fmt: skip


def figures(series: Json) -> dict[str, float | None]:
    """Of one run: ratio at the start, where it crosses 1, its median over the last half, and what the loss does."""
    steps, losses, ratios = series["step"], series["loss"], series["ratio"]
    crossed = next((i for i, ratio in enumerate(ratios) if ratio >= 1), None)
    half = [ratio for step, ratio in zip(steps, ratios, strict=True) if step >= steps[-1] / 2]
    late = statistics.fmean(losses[-5:])
    return {
        "start": ratios[0],
        "crosses": None if crossed is None else steps[crossed],
        "late": statistics.median(half),
        "low": min(half),
        "high": max(half),
        "fall": None if crossed is None else losses[crossed] / late,
        "late fall": losses[len(losses) // 2] / late,
        "residual": statistics.median(series["residual"]),
    }


def starts(setting: Setting, seeds: int) -> Json:
    """λ₁ over the limit of so many fresh networks."""
    batch = first(setting.samples)
    ratios = []
    for seed in range(seeds):
        w = setting.problem.start(seed)
        ratios.append(top(curvature(setting.problem, w, batch), random_vector(w, seed), 12).value / setting.limit)
    return {"ratios": ratios}


def starts_words(told: Json) -> str:
    ratios = told["ratios"]
    below = sum(x < 0.5 for x in ratios)
    return (
        f"Of the seeds 0 to {len(ratios) - 1}, {below} of {len(ratios)} start below 0.5 at η = 0.2; "
        f"median {statistics.median(ratios):.2f}, largest {max(ratios):.2f}."
    )


def runs(folder: Path | None, seeds: Iterable[int] = SEEDS) -> dict[str, list[Json]]:
    return {name: [cached(folder, "edge", run, s, seed) for seed in seeds] for name, s in SETTINGS.items()}


def summary(found: dict[str, list[Json]]) -> Json:
    return {name: [figures(series) for series in all_seeds] for name, all_seeds in found.items()}


def _span(values: list[Any], digits: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = (format(end, digits) for end in (min(known), max(known)))
    return (low if low == high else f"{low} – {high}") + (f" ({len(known)} of {len(values)})" * (known != values))


def table(told: Json) -> str:
    lines = [
        "| setting | start | first above 1 at step | median, last half | range, last half | loss then / at the end |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in told.items():
        cells = [_span([row[key] for row in rows], digits) for key, digits in
                 (("start", ".2f"), ("crosses", "d"), ("late", ".2f"))]  # fmt: skip
        span = f"{min(row['low'] for row in rows):.2f} – {max(row['high'] for row in rows):.2f}"
        lines.append(f"| {name} | " + " | ".join([*cells, span, _span([row["fall"] for row in rows], ".1f")]) + " |")
    return "\n".join(lines)


def picture(found: dict[str, list[Json]], axes: Any) -> None:
    """Two axes a setting: the ratio above, the loss below; a line for each seed."""
    for column, (name, rows) in enumerate(found.items()):
        above, below = axes[0][column], axes[1][column]
        for series in rows:
            above.plot(series["step"], series["ratio"], color=UP, lw=0.9, alpha=0.75)
            below.plot(series["step"], series["loss"], color=DOWN, lw=0.9, alpha=0.75)
        above.axhline(1, color="black", lw=1, ls="--")
        above.set_title(name, fontsize=9)
        above.set_ylim(0, 1.5)
        below.set_yscale("log")
        below.set_xlabel("step")
        for ax in (above, below):
            ax.grid(color=GRID, lw=0.6)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("λ₁ over the limit")
    axes[1][0].set_ylabel("training loss")
