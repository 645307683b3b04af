"""Products that `eigsh` needs on synthetic spectra, beside other solvers: `python -m benchmarks.solvers`.

A solver is counted at the products it has formed when all the pairs it returns have a true residual of at most tol·|λ|,
whatever its own criterion: one whose pairs do not is run again at a tenth of its tolerance, and so on. Of each peer
several settings run, and the best counts. All start from the same vector. `eigsh` spends some products on solving and
some on verifying, told apart. Install PRIMME with `pip install primme`; it needs a C compiler, BLAS and LAPACK.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Literal, NamedTuple

import scipy
import torch
from tqdm import tqdm

from benchmarks.peers import Case, Found, arpack, fewest, judged, lobpcg, our_solver, primme, products, unbounded
from benchmarks.spectra import SPECTRA, hess

TOLERANCES = (1e-4, 1e-6, 1e-8)
SIZES: dict[Literal["LA", "SA"], tuple[int, ...]] = {"LA": (1, 10, 20, 50), "SA": (1, 5)}
PEERS = {"ARPACK": arpack, "PRIMME": primme, "torch.lobpcg": lobpcg}

# The fewest products that any of ten methods took in an earlier study of spectra such as `hess`, until the largest
# residual was tol·λ_max: Lanczos with an unbounded basis, thick restarts, block thick restarts, ARPACK, GD+k, LOBPCG,
# Chebyshev and power iteration. SA was best with a basis of 120; there the count depends on how dense the edge is, so
# that of unbounded Lanczos on the spectrum at hand is the fairer measure.
BEST: dict[tuple[Literal["LA", "SA"], int], tuple[int, int, int]] = {
    ("LA", 1): (7, 9, 11),
    ("LA", 10): (29, 34, 38),
    ("LA", 20): (56, 62, 68),
    ("LA", 50): (148, 159, 169),
    ("SA", 1): (53, 89, 106),
}
_BEST_SA_BASIS = 120


class Row(NamedTuple):
    spectrum: str
    case: Case
    tol: float
    ours: Found | None
    peers: dict[str, Found | None]  # those that look for this end, at their best setting


def measure(name: str, case: Case, tol: float) -> Row:
    settings = {peer: make(case) for peer, make in PEERS.items()}
    peers = {peer: fewest(solvers, case, tol) for peer, solvers in settings.items() if solvers}
    return Row(name, case, tol, judged(our_solver, case, tol), peers)


def table(rows: Iterable[Row]) -> str:
    heads = ["spectrum", "end", "k", "tol", "eigsh: solving + verifying", *PEERS]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        ours = "wrong" if row.ours is None else f"{row.ours.products} + {row.ours.verification}"
        peers = [_cell(row.peers[peer]) if peer in row.peers else "–" for peer in PEERS]
        cells = [row.spectrum, row.case.which, str(row.case.k), f"{row.tol:.0e}", ours, *peers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Found | None) -> str:
    return "wrong" if found is None else str(found.products)


def shares(rows: list[Row]) -> str:
    """In how many cells `eigsh` needs no more than each peer, for solving and for solving and verifying."""
    lines = []
    for peer in PEERS:
        cells = [row for row in rows if peer in row.peers]
        if not cells:
            continue
        theirs = [products(row.peers[peer]) for row in cells]
        solving = [products(row.ours) for row in cells]
        total = [x + (row.ours.verification if row.ours else 0) for x, row in zip(solving, cells, strict=True)]
        won, won_all = (sum(map(float.__le__, map(float, ours), theirs)) for ours in (solving, total))
        ratio = statistics.median(x / y for x, y in zip(solving, theirs, strict=True) if math.isfinite(y))
        lines.append(
            f"- eigsh (solving) ≤ {peer} in {won} of {len(cells)} cells ({won / len(cells):.0%}), median ratio "
            f"{ratio:.2f}; with the products that verify, in {won_all}"
        )
    return "\n".join(lines)


def least(case: Case, tol: float, basis_size: int | None = None) -> int:
    """Products that `eigsh` takes (solving) until its largest true residual is at most tol·λ_max, as in BEST.

    Its own tolerance is relative to each eigenvalue. At tol·λ_max/|λ_k| it asks the same of the last pair, as a rule
    the last to converge, and less of those before, so the true residuals are looked at: where one is too large, the
    tolerance is halved.
    """
    largest = float(case.spectrum.abs().max())
    own = min(tol * largest / abs(float(case.wanted[-1])), 0.5)
    while True:
        found = our_solver(case, own, basis_size)
        if (case.residuals(found) * abs(case.wanted)).max() <= tol * largest:
            return found.products
        own /= 2


def against_best(n: int, progress: Callable[[], object]) -> str:
    heads = ["end", "k", "tol (of λ_max)", "basis", "best known", "unbounded Lanczos here", "eigsh, solving", "ratios"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    ratios = []
    for (which, k), bests in BEST.items():
        case = Case(hess(n), k, which)
        bases = (case.basis_size,) if which == "LA" else (case.basis_size, _BEST_SA_BASIS)
        for tol, best in zip(TOLERANCES, bests, strict=True):
            floor = unbounded(case, tol * float(case.spectrum.abs().max()))
            for basis_size in bases:
                taken = least(case, tol, basis_size)
                cells = [which, k, f"{tol:.0e}", basis_size, best, floor, taken]
                lines.append(f"| {' | '.join(map(str, cells))} | {taken / best:.2f}, {taken / floor:.2f} |")
                if which == "LA":
                    ratios.append(taken / best)
            progress()
    middle, worst = statistics.median(ratios), max(ratios)
    return "\n".join([*lines, "", f"- LA on hess over the best known: median {middle:.2f}, worst {worst:.2f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA))
    parser.add_argument("--quick", action="store_true", help="k ≤ 10 at 1e-4 and 1e-8, not against the best known")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # sparse tensors in torch.lobpcg
    tolerances = (1e-4, 1e-8) if args.quick else TOLERANCES
    cases = [
        (name, Case(SPECTRA[name](args.n), k, which), tol)
        for name in args.spectra
        for which, sizes in SIZES.items()
        for k in sizes
        if k <= 10 or not args.quick
        for tol in tolerances
    ]
    with tqdm(total=len(cases) + (0 if args.quick else 3 * len(BEST))) as progress:
        rows = []
        for case in cases:
            rows.append(measure(*case))
            progress.update()
        best = "" if args.quick else against_best(args.n, progress.update) + "\n"
    libraries = f"torch {torch.__version__}, SciPy {scipy.__version__}, Python {platform.python_version()}"
    print(f"Products, n = {args.n}, float64, one start vector; {libraries}", table(rows), sep="\n\n", end="\n\n")
    if find_spec("primme") is None:
        print("- PRIMME is not installed")
    print(shares(rows), best, sep="\n\n")


if __name__ == "__main__":
    main()
