"""Pictures of what the solvers and estimators return: one call each, on the axes given or in a figure of its own.

`plot.spectrum(solution).figure.savefig("spectrum.png")`. Nothing global changes: neither pyplot's figures nor rcParams.
Colours are told apart by every kind of eye (M. Okabe and K. Ito, Color Universal Design, 2008), and what matters is
also said by shape, hatching or number. All raise `InputError` without matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eigenfunc import canvas, tree
from eigenfunc.canvas import DOWN, OPEN, UP
from eigenfunc.curvature.products import Loss
from eigenfunc.errors import InputError
from eigenfunc.landscape import Landscape, landscape as sampled
from eigenfunc.records import Alert, Record
from eigenfunc.selection import By, grouped
from eigenfunc.solution import Solution
from eigenfunc.stochastic.density import Density
from eigenfunc.tree import Tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKS: dict[str, dict[str, Any]] = {
    "positive": {"marker": "o", "color": UP},
    "negative": {"marker": "v", "color": DOWN},
    "zero within the bound": {"marker": "s", "color": "black", "mfc": "white"},
    "not converged": {"marker": "x", "color": OPEN},
}


def spectrum(solution: Solution, ax: Axes | None = None) -> Axes:
    """Eigenvalues against rank with their error bounds; linear near zero, logarithmic beyond, on both sides.

    Apart by colour and shape: positive and negative ones, those whose bound leaves the sign open, and, as grey crosses,
    those that are not converged.
    """
    axes: Any = canvas.new_axes() if ax is None else ax
    values, bounds, converged = (x.tolist() for x in (solution.values, solution.bounds, solution.converged))
    groups: dict[str, list[int]] = {label: [] for label in _LOOKS}
    for i, (value, bound, ok) in enumerate(zip(values, bounds, converged, strict=True)):
        sign = "positive" if value > bound else "negative" if value < -bound else "zero within the bound"
        groups[sign if ok else "not converged"].append(i)
    for label, members in groups.items():
        if members:
            axes.errorbar(
                [i + 1 for i in members], [values[i] for i in members], [bounds[i] for i in members],
                label=f"{label} ({len(members)})", ls="none", ms=5, capsize=3, lw=1.2, **_LOOKS[label],
            )  # fmt: skip
    sizes = sorted(abs(value) for value in values if value != 0)
    if sizes and sizes[-1] > 20 * sizes[0]:
        low = min(value - bound for value, bound in zip(values, bounds, strict=True))
        high = max(value + bound for value, bound in zip(values, bounds, strict=True))
        unit = 10.0 ** math.floor(math.log10(max(sizes[0], 1e-8 * sizes[-1])))
        canvas.signed_log(axes, "y", unit, low, high, linear=0.25)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlim(0.3, len(values) + 0.7)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    title = f"{solution.which}: {sum(converged)} of {len(values)} eigenpairs certified"
    return canvas.finish(axes, title, "rank", "eigenvalue, with its error bound", "y")  # type: ignore[no-any-return]


def density(density: Density, ax: Axes | None = None) -> Axes:
    """A spectral density with its band: logarithmic upwards, sideways linear over the bulk and logarithmic beyond.

    The eigenvalues of known pairs, which the density leaves out, are marks along the lower edge. Where the others span
    several orders of magnitude, `density.on(threshold=...)` smooths them evenly on such an axis.
    """
    axes: Any = canvas.new_axes() if ax is None else ax
    grid, height = density.grid, density.density
    low, high = density.band
    floor = _floor(density)
    axes.fill_between(
        grid.tolist(), low.clamp_min(floor / 10).tolist(), high.clamp_min(floor / 10).tolist(),
        color=UP, alpha=0.25, lw=0, label="95% band",
    )  # fmt: skip
    axes.plot(grid.tolist(), height.clamp_min(floor / 10).tolist(), color=UP, lw=1.5, label="density")
    outliers = density.values.tolist()
    if outliers:
        axes.plot(
            outliers, [0.03] * len(outliers), "v", color=DOWN, ms=6, mew=0,
            transform=axes.get_xaxis_transform(), label=f"known eigenvalues ({len(outliers)})", clip_on=False,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(floor, 3 * float(high.max().clamp_min(height.max())))
    ends = [*grid[[0, -1]].tolist(), *outliers]
    bulk = max(_bulk(density.nodes, density.weights), 0.0 if density.threshold else density.width)
    if bulk > 0 and max(map(abs, ends)) > 20 * bulk:
        canvas.signed_log(axes, "x", 10.0 ** math.ceil(math.log10(bulk)), min(ends), max(ends), linear=0.8)
    else:
        axes.margins(x=0.03)
    probes, steps = density.nodes.shape
    title = f"spectral density, n = {density.n:,}: {probes} random vector{'s' * (probes > 1)}, {steps} steps"
    return canvas.finish(axes, title, "eigenvalue", "share of the eigenvalues per unit")  # type: ignore[no-any-return]


def _floor(density: Density) -> float:
    """Low enough to show each eigenvalue that a probe has seen by itself, but no more than twelve decades down."""
    top = max(float(density.density.max()), 1e-300)
    seen = density.nodes[density.weights > 0.1 / density.n]
    at = torch.searchsorted(density.grid, seen).clamp_max(len(density.grid) - 1)
    least = float(density.density[at].min()) if len(seen) else top
    return min(max(0.1 * least, 1e-12 * top), 1e-3 * top)


def _bulk(nodes: Tensor, weights: Tensor) -> float:
    """The size of an eigenvalue below which nine in ten of them lie."""
    sizes, order = nodes.abs().flatten().sort()
    shares = weights.flatten()[order].cumsum(0)
    return float(sizes[min(int((shares < 0.9 * shares[-1]).sum()), len(sizes) - 1)])


def layers(solutions: Mapping[str, Solution], ax: Axes | None = None) -> Axes:
    """The eigenvalues of each layer, a row of a heat map each: blue above zero, orange below, in orders of magnitude.

    solutions  layer name -> Solution; those with fewer eigenvalues leave cells empty. Hatched cells are not converged.
    """
    if not solutions:
        raise InputError("layers: there is no solution to draw")
    columns = max(len(solution.values) for solution in solutions.values())
    values = torch.full((len(solutions), columns), math.nan, dtype=torch.float64)
    converged = torch.ones(values.shape, dtype=torch.bool)
    for i, solution in enumerate(solutions.values()):
        values[i, : len(solution.values)] = solution.values
        converged[i, : len(solution.values)] = solution.converged
    axes = canvas.heat_axes(list(solutions), columns, 7, ax)
    from matplotlib.colors import LinearSegmentedColormap, SymLogNorm

    sizes = values[values.isfinite() & (values != 0)].abs()
    largest = float(sizes.max()) if len(sizes) else 1.0
    unit = 10.0 ** math.floor(math.log10(max(float(sizes.min()), 1e-4 * largest))) if len(sizes) else 1.0
    norm = SymLogNorm(unit, vmin=-largest, vmax=largest)
    colours = LinearSegmentedColormap.from_list("signed", [DOWN, "white", UP])
    ends = float(values.nan_to_num().min().clamp_max(0)), float(values.nan_to_num().max().clamp_min(0))
    bar = canvas.heat_map(
        axes, values, ~converged, list(solutions), canvas.short, colours, norm,
        {"label": "eigenvalue", "ticks": canvas.ticks(unit, *ends, 2 + min(len(solutions), 6))},
    )  # fmt: skip
    if ends[0] < ends[1]:
        bar.ax.set_ylim(*ends)
    axes.set_xlabel("index of the eigenvalue")
    count = int(values.isfinite().sum())
    axes.set_title(_title("eigenvalues by layer", count, int((~converged).sum())))
    return axes  # type: ignore[no-any-return]


def vector_norms(solution: Solution, by: By = "parameter", ax: Axes | None = None) -> Axes:
    """Where each eigenvector lives: the share of its squared norm in each layer, in percent, as a heat map.

    by  "parameter" for a row each, "module" for those of one module together, a function from a name to that of its
        row, or a list of names, prefixes or glob patterns, a row each; rows are in the order of `solution.vectors`
    """
    squares = {
        name: tree.norms(leaf).cpu() ** 2
        for name, leaf in zip(tree.names(solution.vectors), tree.leaves(solution.vectors), strict=True)
    }
    rows = grouped(solution.vectors, by, "by")
    shares = torch.stack([torch.stack([squares[name] for name in members]).sum(0) for members in rows.values()])
    shares = 100 * shares / torch.stack(list(squares.values())).sum(0)
    open_ = ~solution.converged
    axes = canvas.heat_axes(list(rows), len(open_), 3, ax)
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours = LinearSegmentedColormap.from_list("shares", ["white", UP])
    bar = {"label": "share of the squared norm (%)"}
    canvas.heat_map(axes, shares, open_.expand_as(shares), list(rows), _percent, colours, Normalize(0, 100), bar)
    axes.set_xlabel("index of the eigenvector")
    axes.set_title(_title("eigenvectors by layer", len(open_), int(open_.sum())))
    return axes  # type: ignore[no-any-return]


def track(records: Sequence[Record], alerts: Sequence[Alert] = (), ax: Axes | None = None) -> Axes:
    """Eigenvalues along a training run, with the limit of stability and, as vertical lines with numbers, the alerts.

    records  of a `SpectrumTracker`, or of `read_jsonl`. A line follows a pair by its `ids`, through crossings. Filled
             marks are certified, hollow ones glances or looks without a certificate; crosses on the lower edge records
             without numbers
    alerts   more of them than the records hold: `tracker.alerts`, which has all
    """
    if not records:
        raise InputError("track: there is no record to draw")
    axes: Any = canvas.new_axes() if ax is None else ax
    paths: dict[int, list[tuple[int, float, bool]]] = {}
    for record in records:
        for name, value, ok in zip(record.ids, record.values, record.converged, strict=True):
            paths.setdefault(name, []).append((record.step, value, ok))
    for path in paths.values():
        axes.plot([step for step, _, _ in path], [value for _, value, _ in path], "-", color=UP, lw=1, alpha=0.6)
    seen = [point for path in paths.values() for point in path]
    for certified, look in (
        (True, {"mfc": UP, "label": "certified"}),
        (False, {"mfc": "white", "label": "not proven"}),
    ):
        chosen = [(step, value) for step, value, ok in seen if ok == certified]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), "o", color=UP, ms=4, mew=0.8, **look)
    limits = [(r.step, r.limit) for r in records if r.limit is not None and math.isfinite(r.limit)]
    if limits:
        axes.plot(
            *zip(*limits, strict=True), "--", color="black", lw=1.2, drawstyle="steps-post", label="stability limit"
        )
    low, high = _reach([value for _, value, _ in seen], [limit for _, limit in limits])
    axes.set_ylim(low, high)
    if failed := [r.step for r in records if not r.values]:
        edge = axes.get_xaxis_transform()
        axes.plot(failed, [0.03] * len(failed), "x", color=OPEN, transform=edge, label=f"failed ({len(failed)})")
    _alerted(axes, dict.fromkeys([alert for r in records for alert in r.alerts] + list(alerts)))
    axes.axhline(0, color="black", lw=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    what = "eigenvalue" if records[-1].matrix == "hessian" else f"eigenvalue of the {records[-1].matrix}"
    looks = [record for record in records if record.kind == "look"]
    sure = sum(record.certified for record in looks)
    title = f"{sure} of {len(looks)} looks certified, {len(records) - len(looks)} glances"
    return canvas.finish(axes, title, "training step", what, fontsize=8.5)  # type: ignore[no-any-return]


def _alerted(axes: Any, alerts: Iterable[Alert]) -> None:
    """A numbered line at each rule's first alert, marks on the upper edge at all; the legend names the rules."""
    steps: dict[str, list[int]] = {}
    for alert in sorted(alerts, key=lambda alert: alert.step):
        steps.setdefault(alert.rule, []).append(alert.step)
    edge = axes.get_xaxis_transform()
    for number, (rule, at) in enumerate(steps.items(), 1):
        count = f" ({len(at)} times)" if len(at) > 1 else ""
        axes.axvline(at[0], color=DOWN, lw=1, ls=":", label=f"{number}: {rule}{count}")
        axes.plot(at, [1.0] * len(at), "v", color=DOWN, ms=4, mew=0, transform=edge, clip_on=False)
        axes.text(
            at[0], 1.0 - 0.055 * number, str(number), color=DOWN, ha="center", va="center", fontsize=9, transform=edge,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": DOWN, "linewidth": 0.6},
        )  # fmt: skip


def _reach(values: list[float], limits: list[float]) -> tuple[float, float]:
    """What to show: all values, and limits that are not far beyond them."""
    high = max(values, default=1.0)
    near = [limit for limit in limits if limit <= 3 * high]
    low, high = min([*values, 0.0]), max([high, *near])
    room = 0.08 * (high - low or 1.0)
    return low - room * (low < 0), high + room


def landscape(
    loss: Loss,
    params: Tree,
    data: Any,
    solution: Solution,
    pairs: int | Sequence[int] = (0, 1),
    *,
    radius: float | None = None,
    points: int = 25,
    progress: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """The loss along one eigenvector (a line) or two (a plane) through `params`, beside its quadratic model.

    The numbers, the arguments and the errors are those of `eigenfunc.landscape.landscape`.
    """
    found = sampled(loss, params, data, solution, pairs, radius=radius, points=points, progress=progress)
    chosen = (pairs,) if isinstance(pairs, int) else tuple(pairs)
    labels = [
        f"distance along eigenvector {i} (λ = {canvas.short(float(solution.values[i]))}"
        + (")" if bool(solution.converged[i]) else ", not converged)")
        for i in chosen
    ]
    if len(chosen) == 1:
        axes: Any = canvas.new_axes() if ax is None else ax
        axes.plot(found.offsets.tolist(), found.losses.tolist(), "-", color=UP, lw=1.8, label="loss")
        axes.plot(found.offsets.tolist(), found.model.tolist(), "--", color=DOWN, lw=1.4, label="quadratic model")
        canvas.finish(axes, "loss around the parameters", labels[0], "loss")
    else:
        axes = canvas.new_axes(7.2, 5.4) if ax is None else ax
        _contours(axes, found)
        title = "loss around the parameters; dashed: its quadratic model"
        axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
    return axes  # type: ignore[no-any-return]


def _contours(axes: Any, found: Landscape) -> None:
    x = found.offsets.tolist()
    losses = torch.where(found.losses.isfinite(), found.losses, math.nan).mT.numpy()
    filled = axes.contourf(x, x, losses, levels=12, cmap="Blues_r")
    axes.contour(x, x, found.model.mT.numpy(), levels=filled.levels, colors=DOWN, linestyles="dashed", linewidths=1.2)
    axes.plot([0], [0], "o", color="black", ms=5)
    axes.set_aspect("equal")
    axes.figure.colorbar(filled, ax=axes, label="loss")


def _title(what: str, count: int, failed: int) -> str:
    return f"{what}: {count - failed} of {count} certified" + (", hatched: not converged" if failed else "")


def _percent(share: float) -> str:
    return f"{share:.0f}" if share >= 9.95 else f"{share:.1f}"
