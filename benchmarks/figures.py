"""Figures of the page of benchmarks, each from the numbers that a benchmark has written."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.products import GRADIENT

OURS, OTHERS, WRONG = "#0072B2", "#999999", "#D55E00"  # Okabe & Ito


def _figure(width: float, height: float, count: int, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    found = figure.subplots(1, count, squeeze=False, **options)[0]
    for axes in found:
        axes.grid(color="#dddddd", lw=0.6, axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(found)


def _colour(name: str) -> str:
    return OURS if name.startswith("eigenfunc") else OTHERS


def products(numbers: Any) -> Figure:
    """Seconds of a probe over those of a gradient: a bar to the median, a line over the quartiles."""
    models = numbers["models"]
    ways = [way for way in next(iter(models.values())) if way != GRADIENT]
    figure, found = _figure(10, 0.28 * len(ways) + 1, len(models), sharey=True)
    for axes, (model, outcomes) in zip(found, models.items(), strict=True):
        unit = outcomes[GRADIENT]["seconds"]
        for place, way in enumerate(ways):
            ratios = [x / y for x, y in zip(outcomes[way]["seconds"], unit, strict=False)]
            if not ratios:
                axes.text(0.05, place, outcomes[way]["failure"], va="center", fontsize=7, color=WRONG)
                continue
            wrong = (outcomes[way]["error"] or 0) > 1e-2
            axes.barh(place, statistics.median(ratios), color=WRONG if wrong else _colour(way), height=0.7)
            if len(ratios) > 1:
                low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
                axes.plot([low, high], [place, place], color="black", lw=1)
            if wrong:
                axes.text(statistics.median(ratios), place, " wrong", va="center", fontsize=7, color=WRONG)
        axes.set_title(model, fontsize=10)
        axes.set_xlabel("gradients a probe")
    found[0].set_yticks(range(len(ways)), ways, fontsize=8)
    found[0].invert_yaxis()
    return figure


def end_to_end(numbers: Any) -> Figure:
    """Seconds of every round of every library that is right; what is not right has its reason in place of dots."""
    models = numbers["models"]
    libraries = list(next(iter(models.values())))
    figure, found = _figure(11, 0.4 * len(libraries) + 1, len(models), sharey=True)
    for axes, (model, outcomes) in zip(found, models.items(), strict=True):
        for place, name in enumerate(libraries):
            outcome = outcomes[name]
            if outcome["seconds"]:
                axes.plot(
                    outcome["seconds"], [place] * len(outcome["seconds"]), "o", ms=6, alpha=0.6, color=_colour(name)
                )
            else:
                why = "raises" if outcome["residual"] is None and outcome["failure"] else "not right"
                axes.text(0.03, place, why, va="center", fontsize=8, color=WRONG, transform=axes.get_yaxis_transform())
        axes.set_xlim(left=0)
        axes.set_title(model, fontsize=9)
        axes.set_xlabel("seconds")
    found[0].set_yticks(range(len(libraries)), libraries, fontsize=8)
    found[0].set_ylim(len(libraries) - 0.5, -0.5)
    return figure


def density(numbers: Any) -> Figure:
    """The error of each round against its seconds."""
    figure, (axes,) = _figure(6, 3.4, 1)
    marks = iter("os^Dv")
    for name, outcome in numbers["libraries"].items():
        mark = next(marks)
        if outcome["seconds"]:
            axes.plot(outcome["seconds"], outcome["errors"], mark, ms=6, alpha=0.7, color=_colour(name), label=name)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("Wasserstein distance / largest |λ|")
    axes.legend(frameon=False, fontsize=8)
    return figure


def scaling(numbers: Any) -> Figure:
    """Seconds of a product and peak memory as n grows."""
    figure, (left, right) = _figure(9, 3.6, 2, sharex=True)
    rows = numbers["rows"]
    for place, colour in (("in memory", OURS), ("on disk", WRONG)):
        own = [row for row in rows if row["place"] == place]
        style: dict[str, Any] = {"color": colour, "marker": "o", "ms": 5, "lw": 1.6, "label": f"basis {place}"}
        left.loglog([row["n"] for row in own], [row["seconds"] / row["matvecs"] for row in own], **style)
        right.loglog([row["n"] for row in own], [row["peak"] / 2**30 for row in own], **style)
    last = rows[-1]["seconds"] / rows[-1]["matvecs"] / rows[-1]["n"]
    ends = [rows[0]["n"], rows[-1]["n"]]
    left.loglog(ends, [last * n for n in ends], color="#999999", ls=":", lw=1, label="linear")
    left.set_ylabel("seconds a product")
    right.set_ylabel("peak memory beside the operator, GiB")
    for axes in (left, right):
        axes.set_xlabel("n")
        axes.legend(frameon=False)
    return figure


FIGURES: dict[str, Callable[[Any], Figure]] = {
    "products": products,
    "end_to_end": end_to_end,
    "density": density,
    "scaling": scaling,
}


def draw(name: str, numbers: Any, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    FIGURES[name](numbers).savefig(path)
