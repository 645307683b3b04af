"""Peak memory of a kept gradient graph and of `hessian`, each in a process of its own: `python -m benchmarks.memory`.

Peak resident set over what was resident right before, batches large enough that activations dominate:
(a) the gradient by `autograd.grad(create_graph=True)` in plain torch, and one pull-back through the kept graph;
(b) `hessian(..., check=False, product="graph")` and one product; (c) `hessian(...)` as it comes, and one product.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.models import NAMES, Problem, batch_size, loss_of, math_attention, problem
from eigenfunc import functional_loss, hessian

_SCALE = {"MLP": 64, "ResNet": 4, "GPT": 4}  # on the batch sizes of `benchmarks.models`
_MB = 2**20


def plain(p: Problem) -> None:
    leaves = list(p.model.parameters())
    v = [torch.ones_like(leaf) for leaf in leaves]
    with math_attention(p):
        slopes = torch.autograd.grad(loss_of(p, p.model), leaves, create_graph=True)
        torch.autograd.grad(slopes, leaves, v, retain_graph=True)


def graph(p: Problem) -> None:
    loss, params = functional_loss(p.model, p.criterion)
    A = hessian(loss, params, p.batch, check=False, product="graph")
    A({name: torch.ones_like(x) for name, x in params.items()})


def default(p: Problem) -> None:
    loss, params = functional_loss(p.model, p.criterion)
    A = hessian(loss, params, p.batch)
    A({name: torch.ones_like(x) for name, x in params.items()})


WAYS: dict[str, Callable[[Problem], None]] = {"plain": plain, "graph": graph, "default": default}


def _resident() -> int:
    """Bytes resident now; where the system does not say, the peak so far."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else _peak()


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(name: str, way: str) -> int:
    """Bytes that `way` needs at its peak, in this process: to be called once in it."""
    torch.set_num_threads(1)
    WAYS[way](problem(name, 2))  # what loads or allocates at first use is not the product's
    p = problem(name, _SCALE[name] * batch_size(name))
    gc.collect()
    before = _resident()
    WAYS[way](p)
    return _peak() - before


def measured(name: str, way: str, repeats: int) -> list[int]:
    """`measure` in fresh processes."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--measure", name, way]
    return [int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(repeats)]


def report(results: dict[str, dict[str, list[int]]]) -> str:
    lines = [
        "| model | batch | three vectors | (a) plain | (b) graph | (c) default | (b)/(a) | (c)/(a) | target |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, peaks in results.items():
        a, b, c = (statistics.median(peaks[way]) for way in WAYS)
        vectors = 3 * 4 * problem(name, 2).size
        sizes = " | ".join(f"{x / _MB:.0f} MB" for x in (vectors, a, b, c))
        met = "met" if b <= 1.15 * a + vectors else "MISSED"
        batch = _SCALE[name] * batch_size(name)
        lines.append(f"| {name} | {batch} | {sizes} | {b / a:.2f} | {c / a:.2f} | {met} |")
    return "\n".join([*lines, "", "Target: (b) ≤ 1.15 (a) + three vectors."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes for each figure, a median")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers, in bytes")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "WAY"), help="print one figure of this process")
    args = parser.parse_args()
    if args.measure:
        print(measure(*args.measure))
        return
    results: dict[str, dict[str, list[int]]] = {name: {} for name in args.models}
    for name, way in tqdm([(name, way) for name in args.models for way in WAYS]):
        results[name][way] = measured(name, way, args.repeats)
    print(report(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
