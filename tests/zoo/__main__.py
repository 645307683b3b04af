"""`python -m tests.zoo [--dtype float64|float32] [NAME ...]`: a line for each case, then the counts."""

from __future__ import annotations

import argparse
import fnmatch
import warnings
from collections import Counter
from collections.abc import Sequence

import torch

from tests.zoo.check import coarseness, outcome, tolerance, truth
from tests.zoo.everything import CASES


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases, or patterns of them; default: all")
    parser.add_argument("--dtype", choices=["float64", "float32"], help="default: one after the other")
    parser.add_argument("--words", type=int, default=110, help="characters of the last column")
    options = parser.parse_args(arguments)
    names = [n for n in CASES if not options.names or any(fnmatch.fnmatch(n, pattern) for pattern in options.names)]
    warnings.simplefilter("ignore")
    for dtype in [options.dtype] if options.dtype else ["float64", "float32"]:
        _table(names, getattr(torch, dtype), options.words)


def _table(names: list[str], dtype: torch.dtype, length: int) -> None:
    print(f"{dtype}\n{'case':34} {'hessian':>16} {'hvp':>16} {'reference':>9} {'seconds':>7}  way or error", flush=True)
    counts: dict[str, Counter[str]] = {"hessian": Counter(), "hvp": Counter()}
    for name in names:
        case = CASES[name]
        if missing := case.missing():
            print(f"{name:34} needs {', '.join(missing)}")
            continue
        try:
            known, coarse = truth(name), coarseness(name, dtype)
        except Exception as error:
            counts["hessian"]["no reference"] += 1
            print(f"{name:34} no reference: {type(error).__name__}: {str(error)[:length]}", flush=True)
            continue
        cells = {}
        for kind in ("hessian", "hvp"):
            found = outcome(name, dtype, kind)
            verdict = "refused, rightly" if found.verdict == "refused" and case.refusable else found.verdict
            counts[kind][verdict] += 1
            cells[kind] = f"{found.verdict} {found.worst:.0e}" if found.worst else found.verdict
        made = outcome(name, dtype, "hessian")
        words = " ".join(made.words.split())
        flag = "" if 3 * coarse <= tolerance(case, dtype) else f"  REFERENCE TOO COARSE ({known.source})"
        print(
            f"{name:34} {cells['hessian']:>16} {cells['hvp']:>16} {coarse:9.0e} {made.seconds:7.2f}  "
            f"{words[:length]}{flag}",
            flush=True,
        )
    for kind, count in counts.items():
        print(f"{kind}: " + ", ".join(f"{n} {verdict}" for verdict, n in count.most_common()), flush=True)


if __name__ == "__main__":
    main()
