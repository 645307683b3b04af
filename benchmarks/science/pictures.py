"""The figures of docs/science.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.science import edge, rules
from benchmarks.science.setting import Json
from eigenfunc import plot
from eigenfunc.canvas import DOWN, GRID, OPEN, UP
from eigenfunc.stochastic.density import Density


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(*axes: Any) -> None:
    for ax in axes:
        ax.grid(color=GRID, lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)


def edges(found: dict[str, list[Json]], path: Path) -> None:
    figure = _figure(2.6 * len(found), 4.6)
    edge.picture(found, figure.subplots(2, len(found), sharex="col", sharey="row"))
    figure.savefig(path)


def outliers(found: Json, path: Path) -> None:
    """λ_k over λ_1 by rank, the gradient in the top ten, the largest eigenvalues with and without batch norm."""
    figure = _figure(12, 6.4)
    axes = figure.subplots(2, 4).flatten()
    for ax, (name, runs) in zip((*axes[:3], *axes[4:7]), found["counts"].items(), strict=True):
        rows = [row for run in runs for row in run["rows"]]
        for row in rows:
            ranks = range(1, len(row["values"]) + 1)
            ax.plot(ranks, row["values"], "o-", color=UP, ms=3, lw=0.7, alpha=0.6)
        ax.axvline(rows[0]["expected"] + 0.5, color=DOWN, ls="--", lw=1.2, label=f"{rows[0]['expected']} outliers")
        ax.set(yscale="log", xlabel="rank", title=name.replace("ce", "cross-entropy").replace("mse", "squared error"))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(edgecolor=GRID)
    for ax in (axes[0], axes[4]):
        ax.set_ylabel("eigenvalue of the Hessian")
    for run in found["shares"]:
        steps = [row["step"] for row in run["rows"]]
        for key, marker, colour in (("full", "o-", UP), ("batch", "s--", DOWN), ("random", "x:", OPEN)):
            label = {"full": "full gradient", "batch": "batches of 64", "random": "random vector"}[key]
            known = label if run is found["shares"][0] else None
            axes[3].plot(steps, [row[key] for row in run["rows"]], marker, color=colour, ms=4, lw=1, label=known)
    axes[3].set(xlabel="step", ylabel="share in the span of the top 10", title="gradients, C = 10")
    axes[3].legend(edgecolor=GRID)
    for run in found["norms"]:
        for key, marker, colour in (("without", "o-", UP), ("with", "s-", DOWN)):
            for row in run[key]:
                known = f"{key} batch norm" if row is found["norms"][0][key][0] else None
                ranks = range(1, len(row["values"]) + 1)
                axes[7].plot(ranks, row["values"], marker, color=colour, ms=3, lw=0.7, alpha=0.6, label=known)
    axes[7].set(yscale="log", xlabel="rank", ylim=(0.5, None), title="cross-entropy at 0.2 and 0.1")
    axes[7].xaxis.get_major_locator().set_params(integer=True)
    axes[7].legend(edgecolor=GRID, loc="lower left")
    _tidy(*axes)
    figure.savefig(path)


def density(whole: Density, path: Path) -> None:
    axes: Any = plot.density(whole)
    axes.figure.set_dpi(110)
    axes.figure.savefig(path)


def _bars(outcomes: Json, ax: Any) -> None:
    names = [name for name, row in outcomes.items() if row["caught"][0]][::-1]  # some rules are for other faults
    for key, shift, colour, label in (("caught", 0.2, UP, "caught in time"), ("false", -0.2, DOWN, "false alarms")):
        shares = [outcomes[name][key][0] / outcomes[name][key][1] for name in names]
        ax.barh([y + shift for y in range(len(names))], shares, 0.38, color=colour, label=label)
    ax.axvline(0.07, color="black", lw=0.8, ls=":", label="7%")
    ax.set_yticks(range(len(names)), [name.replace("`", "").replace("*", "") for name in names], fontsize=8)
    ax.set(xlim=(0, 1), xlabel="share of runs")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=8)


def alarms(records: Sequence[Json], outcomes: Json, path: Path) -> None:
    """What each monitor does, and one run: the loss, and λ₁ over its limit."""
    figure = _figure(12, 4.8)
    left, above, below = figure.subplot_mosaic([["a", "b"], ["a", "c"]], width_ratios=[1.3, 1]).values()
    _bars(outcomes, left)
    example = next(
        s for s in records
        if s["run"]["kind"] == "jump" and s["run"]["factor"] == 10
        and (end := rules.doubled(s)) and end - s["run"]["at"] >= 3
    )  # fmt: skip
    run, end = example["run"], rules.doubled(example)
    at = run["at"]
    span = range(max(0, at - 40), min(len(example["held"]), at + 40))
    above.plot(span, [example["held"][t] for t in span], color=UP, lw=1.3)
    above.set(yscale="log", ylabel="loss on fixed samples")
    above.set_title(f"{run['optimiser']}, rate {run['rate']:.3f}, times 10 at step {at}", fontsize=9)
    below.plot(span, [rules.ratio(example)[t] for t in span], color=UP, lw=1.3)
    below.axhline(1, color="black", ls="--", lw=1)
    below.set(xlabel="step", ylabel="λ₁ over its limit")
    for ax in (above, below):
        ax.axvline(at, color=OPEN, lw=1, ls=":", label="the rate changes")
        ax.axvline(end, color=DOWN, lw=1, ls="--", label="the loss has doubled")
    above.legend(edgecolor=GRID, fontsize=8)
    _tidy(left, above, below)
    figure.savefig(path)
