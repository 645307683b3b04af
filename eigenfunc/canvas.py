"""Axes, scales and heat maps: what the pictures of `plot` share. No pyplot, no global settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from eigenfunc.errors import InputError

UP, DOWN, OPEN = "#0072B2", "#D55E00", "#555555"  # of M. Okabe and K. Ito's palette, and grey
GRID = "#dddddd"

_LETTER, _ROW = 0.075, 0.32  # inches of a letter and of a row of a heat map in a figure of its own
_LONGEST = 48  # characters of a layer's name that are shown


def new_axes(width: float = 8, height: float = 4.8) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need matplotlib: pip install 'eigenfunc[plot]'") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def finish(axes: Any, title: str, x: str, y: str, lines: Literal["both", "y"] = "both", **legend: Any) -> Any:
    """Labels, a light grid, a legend, and no frame above and to the right."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(axis=lines, color=GRID, lw=0.6)
    axes.legend(edgecolor=GRID, framealpha=0.9, **legend)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def signed_log(axes: Any, which: Literal["x", "y"], unit: float, low: float, high: float, linear: float) -> None:
    """A scale that is linear up to ±unit, a power of ten, and logarithmic beyond, with ticks that have room.

    linear  length of the linear part, relative to that of the logarithmic ones
    """
    from matplotlib.ticker import NullLocator

    start = math.log10(unit)
    decades = [max(math.log10(max(end, unit)) - start, 0.0) for end in (high, -low)]
    total = sum(decades)
    limits = [
        unit * 10 ** max(reach + 0.05 * total, 1.05) if reach > 0 else max(end, 0.0) + 0.1 * unit
        for end, reach in zip((high, -low), decades, strict=True)
    ]  # two ticks at least on a side that is logarithmic
    width = min(limits[0] / unit, 1.0) + min(limits[1] / unit, 1.0)
    axis, scale = (axes.xaxis, axes.set_xscale) if which == "x" else (axes.yaxis, axes.set_yscale)
    axes.autoscale(False, axis=which)  # margins beyond the data would overflow at the end of the range
    scale("symlog", linthresh=unit, linscale=max(linear * total / width, 0.5))
    axes.set(**{f"{which}lim": (-limits[1], limits[0])})
    axis.set_ticks(ticks(unit, -limits[1], limits[0], 6 if which == "x" else 10))
    axis.set_minor_locator(NullLocator())


def ticks(unit: float, low: float, high: float, most: int) -> list[float]:
    """0, ±unit and powers of ten beyond, about so many, between low and high."""
    total = sum(max(math.log10(max(end, unit) / unit), 0.0) for end in (high, -low))
    step = max(math.ceil((total - 0.1) / most), 1)
    powers = [10.0 ** (round(math.log10(unit)) + i * step) for i in range(math.ceil(total) + 2)]
    return sorted(tick for tick in {0.0, *powers, *(-x for x in powers)} if low <= tick <= high)


def heat_axes(labels: Sequence[str], columns: int, letters: int, ax: Any) -> Any:
    """The axes given, or new ones with room for the labels, and for that many letters in each cell."""
    if ax is not None:
        return ax
    margin = _LETTER * min(max(map(len, labels)), _LONGEST) + 1.8
    width = margin + _LETTER * (letters + 1.5) * columns
    return new_axes(min(max(width, 6.4), 14), max(1.4 + _ROW * len(labels), 3.2))


def heat_map(
    axes: Any,
    cells: Tensor,
    hatched: Tensor,
    labels: Sequence[str],
    words: Callable[[float], str],
    colours: Any,
    norm: Any,
    bar: Mapping[str, Any],
) -> Any:
    """Cells with their numbers in them, as large as fits; none where they would be too small to read.

    bar  the arguments of the colour bar, which is returned
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    image = axes.imshow(cells.numpy(), cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_facecolor(GRID)  # of the cells that are empty
    rows, columns = cells.shape
    axes.set_yticks(range(rows), [_shortened(label or "vector") for label in labels], fontsize=9)
    axes.set_xticks(range(0, columns, 1 if columns <= 20 else 5))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    made = axes.figure.colorbar(image, ax=axes, **bar)
    axes.figure.draw_without_rendering()  # lays out, so that the size of a cell is known
    points = 72 / axes.figure.dpi
    width, height = points * axes.bbox.width / columns, points * axes.bbox.height / rows
    full = [(i, j) for i, j in torch.nonzero(cells.isfinite()).tolist()]
    texts = [words(float(cells[i, j])) for i, j in full]
    size = min(8.5, 0.7 * height, width / (0.64 * (max(map(len, texts), default=1) + 0.8)))
    for (i, j), text in zip(full, texts, strict=True):
        if hatched[i, j]:
            corner = (j - 0.5, i - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="//", edgecolor=OPEN, lw=0))
        if size < 5:
            continue
        red, green, blue, _ = colours(norm(float(cells[i, j])))
        dark = not hatched[i, j] and 0.3 * red + 0.59 * green + 0.11 * blue < 0.46
        drawn = axes.text(j, i, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")
        if hatched[i, j]:
            drawn.set_path_effects([withStroke(linewidth=3, foreground="white")])
    return made


def short(value: float) -> str:
    """A number in few letters: 0.123, 12.3, −4.6e-5."""
    if value == 0 or 1e-2 <= abs(value) < 9.995e3:
        text = f"{value:.3g}"
    else:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−", 1) if value < 0 else text


def _shortened(label: str) -> str:
    """The end of a name, which is what tells it from the others."""
    return label if len(label) <= _LONGEST else "…" + label[1 - _LONGEST :]
