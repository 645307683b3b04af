"""Figures of a tracked training run, each with a sentence about it, or None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from eigenfunc import canvas
from eigenfunc.canvas import DOWN, GRID, OPEN, UP
from eigenfunc.runlog import Run, certified, of_limit

_PALETTE = (UP, DOWN, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of M. Okabe and K. Ito

Drawn = tuple[Any, str] | None


def _segments(points: Sequence[tuple[int, float]]) -> Iterator[list[tuple[int, float]]]:
    """Parts of a course with rising steps and finite values: nothing is drawn across a gap."""
    part: list[tuple[int, float]] = []
    for step, value in points:
        if part and (not math.isfinite(value) or step <= part[-1][0]):
            yield part
            part = []
        if math.isfinite(value):
            part.append((step, value))
    if part:
        yield part


def _drawable(size: float) -> bool:
    """Whether logarithmic axes reach there without an overflow."""
    return 1e-100 < size < 1e100


def _line(axes: Any, points: Sequence[tuple[int, float]], **look: Any) -> None:
    for part in _segments(points):
        axes.plot(*zip(*part, strict=True), **look)
        look.pop("label", None)


def _alerted(axes: Any, run: Run) -> None:
    for i, step in enumerate(sorted({alert["step"] for alert in run.alerts})):
        axes.axvline(step, color=DOWN, lw=0.8, ls=":", label=None if i else "alert", zorder=1)


def _largest(values: Sequence[float]) -> float:
    """Size of the largest; what passes near zero further in, as at a glance it may, is no matter for the scale."""
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def eigenvalues(run: Run) -> Drawn:
    courses: dict[Any, list[tuple[int, float]]] = {}
    groups: dict[str, list[tuple[int, float, float, str]]] = {"look, certified": [], "look, not converged": []}
    groups["glance"] = []
    for record in run.records:
        values = record["values"]
        ids = record.get("ids") or []
        ids = ids if len(ids) == len(values) else [f"rank {i}" for i in range(len(values))]
        kind = "glance" if record.get("kind") == "glance" else "look, certified"
        kind = kind if kind == "glance" or certified(record) else "look, not converged"
        for identity, value, bound in zip(ids, values, record["bounds"], strict=True):
            courses.setdefault(identity, []).append((record["step"], value))
            colour = _PALETTE[list(courses).index(identity) % len(_PALETTE)]
            if math.isfinite(value):
                groups[kind].append((record["step"], value, bound if math.isfinite(bound) else 0.0, colour))
    if not any(groups.values()):
        return None
    axes = canvas.new_axes()
    for i, points in enumerate(courses.values()):
        _line(axes, points, color=_PALETTE[i % len(_PALETTE)], lw=1, alpha=0.6)
    looks: dict[str, dict[str, Any]] = {
        "look, certified": {"marker": "o", "s": 22},
        "glance": {"marker": "o", "s": 12, "facecolors": "white"},
        "look, not converged": {"marker": "x", "s": 30},
    }
    for label, found in groups.items():
        if not found:
            continue
        steps, values, bounds, colours = (list(column) for column in zip(*found, strict=True))
        if label == "look, certified":
            axes.errorbar(steps, values, bounds, ls="none", ecolor=OPEN, elinewidth=0.8, capsize=2, zorder=2)
        key = "color" if label != "glance" else "edgecolors"
        axes.scatter(steps, values, zorder=3, label=label, **looks[label], **{key: colours})
    every = [value for found in groups.values() for _, value, *_ in found]
    sizes = [size for size in (_largest(record["values"]) for record in run.records) if size > 0]
    if sizes and max(sizes) > 100 * min(sizes) and _drawable(max(sizes)):
        unit = 10.0 ** math.floor(math.log10(max(min(sizes), 1e-4 * max(sizes))))
        canvas.signed_log(axes, "y", unit, min(every), max(every), linear=0.25)
    _alerted(axes, run)
    axes.set_ylabel("eigenvalue")
    axes.legend(edgecolor=GRID, framealpha=0.9)
    words = "Eigenvalues with their bounds; a line follows one eigenvector, whatever its rank."
    return axes, words + (" Dotted: alerts." if run.alerts else "")


def stability(run: Run) -> Drawn:
    points = []
    for record in run.records:
        share = of_limit(record)
        if share is not None:
            points.append((record["step"], share))
    if not any(math.isfinite(y) for _, y in points):
        return None
    axes = canvas.new_axes(8, 3.2)
    _line(axes, points, color=UP, lw=1.2, marker="o", ms=3.5)
    axes.axhline(1, color=DOWN, lw=1, ls="--")
    _alerted(axes, run)
    heights = [y for _, y in points if math.isfinite(y)]
    if min(heights) > 0 and max(heights) > 10 * min(heights) and _drawable(min(heights)) and _drawable(max(heights)):
        axes.set_yscale("log")
    else:
        axes.set_ylim(min(0.0, *heights, 0.0))
    axes.set_ylabel("largest λ / limit")
    words = "The largest eigenvalue, a lower bound unless certified, over what the learning rate allows; "
    return axes, words + "above the dashed line a quadratic diverges."


def trace(run: Run) -> Drawn:
    rows = [(r["step"], r["trace"], r.get("trace_stderr") or 0.0) for r in run.records if r.get("trace") is not None]
    rows = [row for row in rows if math.isfinite(row[1]) and math.isfinite(row[2])]
    if not rows:
        return None
    axes = canvas.new_axes(8, 3.2)
    steps, values, errors = zip(*rows, strict=True)
    _line(axes, [(step, value) for step, value, _ in rows], color=UP, lw=1)
    axes.errorbar(steps, values, [2 * e for e in errors], ls="none", marker="o", ms=3.5, color=UP, capsize=2, lw=1)
    axes.set_ylabel("trace")
    return axes, "The trace, with two standard errors."


def gradient_share(run: Run) -> Drawn:
    points = [(r["step"], r["gradient_share"]) for r in run.records if r.get("gradient_share") is not None]
    if not any(math.isfinite(y) for _, y in points):
        return None
    axes = canvas.new_axes(8, 3.2)
    _line(axes, points, color=UP, lw=1.2, marker="o", ms=3.5)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share")
    return axes, "The share of the squared gradient norm in the span of the eigenvectors."


FIGURES: tuple[Callable[[Run], Drawn], ...] = (eigenvalues, stability, trace, gradient_share)
