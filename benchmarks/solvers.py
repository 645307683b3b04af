"""Products that `eigsh` needs on the `hess` spectrum, beside SciPy's ARPACK: `python -m benchmarks.solvers`."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from scipy.sparse import linalg as arpack
from tqdm import tqdm

from benchmarks.spectra import diagonal, hess
from eigenfunc import eigsh


def counted_arpack(values: np.ndarray[Any, Any], k: int, tol: float) -> int:
    count = 0

    def product(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        nonlocal count
        count += 1
        return values * v.ravel()

    A = arpack.LinearOperator((len(values), len(values)), matvec=product, dtype=values.dtype)
    start = np.random.default_rng(0).standard_normal(len(values))
    arpack.eigsh(A, k=k, which="LA", ncv=2 * k + 10, tol=tol, v0=start)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    n = parser.parse_args().n
    spectrum = hess(n)
    A = diagonal(spectrum)
    lines = ["| k | tol | eigsh: solving + verifying | ARPACK | restarts |", "|---|---|---|---|---|"]
    for k in tqdm((1, 10, 20, 50)):
        for tol in (1e-4, 1e-6, 1e-8):
            stats = eigsh(A, k, which="LA", tol=tol, seed=0).stats
            solving = stats.matvecs - stats.verification
            peer = counted_arpack(spectrum.numpy(), k, tol)
            lines.append(f"| {k} | {tol:.0e} | {solving} + {stats.verification} | {peer} | {stats.restarts} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
