"""Pictures of what the solvers return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eigenfunc.errors import InputError
from eigenfunc.solution import Solution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UP, _DOWN, _OPEN = "#0072B2", "#D55E00", "#777777"  # Okabe & Ito: told apart by every kind of eye


def _new_axes() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need matplotlib: pip install 'eigenfunc[plot]'") from error
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def spectrum(solution: Solution, ax: Axes | None = None) -> Axes:
    """Eigenvalues against rank with their error bounds; linear near zero, logarithmic beyond, on both sides.

    Draws into `ax`, or into a figure of its own (`ax.figure.savefig(...)`). Raises `InputError` without matplotlib.
    """
    axes: Any = _new_axes() if ax is None else ax
    values, bounds, converged = (x.tolist() for x in (solution.values, solution.bounds, solution.converged))
    ranks = range(1, len(values) + 1)
    groups = [
        ("positive", _UP, "o", [v >= 0 and ok for v, ok in zip(values, converged, strict=True)]),
        ("negative", _DOWN, "v", [v < 0 and ok for v, ok in zip(values, converged, strict=True)]),
        ("not converged", _OPEN, "x", [not ok for ok in converged]),
    ]
    for label, colour, marker, members in groups:
        x, y, error = (
            [item for item, member in zip(row, members, strict=True) if member] for row in (ranks, values, bounds)
        )
        if x:
            axes.errorbar(
                x, y, yerr=error, fmt=marker, color=colour, ms=5, capsize=3, lw=1.2, label=f"{label} ({len(x)})"
            )
    sizes = sorted(abs(value) for value in values if value != 0)
    if sizes and sizes[-1] > 20 * sizes[0]:
        axes.set_yscale("symlog", linthresh=sizes[0], linscale=0.5)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlabel("rank")
    axes.set_ylabel("eigenvalue, with its error bound")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.legend(frameon=False)
    axes.set_title(f"{solution.which}: {sum(converged)} of {len(values)} eigenpairs certified")
    axes.spines[["top", "right"]].set_visible(False)
    return axes  # type: ignore[no-any-return]
