"""How the error of the trace falls with the products spent: Hutchinson, Hutch++ and XTrace on three spectra.

Prints a table of rms errors over seeds, relative to the trace of |A|, beside the standard errors claimed, and draws
the errors into docs/figures/trace_decay.png:

    python -m benchmarks.trace_decay
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.spectra import diagonal, hess
from eigenfunc.stochastic.trace import trace

N = 1_000
SEEDS = 100
COUNTS = (6, 12, 24, 48, 96, 192)
METHODS = {"hutchinson": ("#0072B2", "o"), "hutch++": ("#E69F00", "s"), "xtrace": ("#009E73", "^")}  # Okabe & Ito
SPECTRA = {
    "flat: uniform in [1, 3]": torch.linspace(1, 3, N).double(),
    "like a Hessian's: outliers, bulk, edge": hess(N),
    "power law: $i^{-2}$": torch.arange(1, N + 1).double() ** -2,
}


def errors(values: torch.Tensor, method: str, count: int) -> tuple[float, float]:
    """The rms error, and the rms of the standard errors claimed, over Σ|λ|."""
    run = partial(trace, diagonal(values), num_matvecs=count, method=method)
    found = [run(seed=seed) for seed in range(SEEDS)]
    truth, unit = float(values.sum()), float(values.abs().sum())
    rms = math.sqrt(sum((estimate.value - truth) ** 2 for estimate in found) / SEEDS)
    claimed = math.sqrt(sum(estimate.stderr**2 for estimate in found) / SEEDS)
    return rms / unit, claimed / unit


def main() -> None:
    figure = Figure(figsize=(10, 3.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(SPECTRA), sharex=True)
    for axis, (name, values) in zip(axes, SPECTRA.items(), strict=True):
        print(f"{name}, n = {N}: rms error (claimed)\n{'products':>10}" + "".join(f"{m:>22}" for m in METHODS))
        table = {method: [errors(values, method, count) for count in COUNTS] for method in METHODS}
        for i, count in enumerate(COUNTS):
            cells = "".join(f"{rms:>11.2e} ({claimed:.2e})" for rms, claimed in (table[m][i] for m in METHODS))
            print(f"{count:>10}{cells}")
        for method, (colour, marker) in METHODS.items():
            rms = [pair[0] for pair in table[method]]
            axis.loglog(COUNTS, rms, color=colour, marker=marker, ms=5, lw=1.6, label=method)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("products with A")
        axis.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axis.minorticks_off()
        axis.grid(color="#dddddd", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("rms error of the trace, over Σ|λ|")
    axes[0].legend(frameon=False)
    path = Path(__file__).parent.parent / "docs" / "figures" / "trace_decay.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
