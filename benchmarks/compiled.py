"""A compiled Lanczos step beside an eager one, one thread: `python -m benchmarks.compiled`.

The matrix is diagonal, so that almost all the time is the step's own, in float32. Rounds of `lanczos` and `run` take
turns after both are warm; the ratio is the median over rounds with its quartiles, and first runs, which compile, are
given apart. Both make two passes over the basis; the eager step takes the terms of the recurrence off before, which the
compiled one does not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.products import machine, spread
from eigenfunc import lanczos
from eigenfunc.krylov import Tridiagonal, run

Solver = Callable[[Callable[[Tensor], Tensor], Tensor, int], Tridiagonal]


class Outcome(NamedTuple):
    eager: list[float]  # seconds a step, one entry a round
    compiled: list[float]
    first: float  # seconds of the run that compiles
    apart: float  # largest difference of the two results, relative


def clocked(solver: Solver, values: Tensor, num_steps: int) -> tuple[float, Tridiagonal]:
    begun = time.perf_counter()
    out = solver(lambda v: values * v, torch.ones_like(values), num_steps)
    return time.perf_counter() - begun, out


def measure(n: int, num_steps: int, rounds: int, progress: tqdm[None]) -> Outcome:
    torch.compiler.reset()
    values = torch.linspace(-1, 2, n) ** 3
    _, reference = clocked(lanczos, values, num_steps)
    first, out = clocked(run, values, num_steps)
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(out[:2], reference[:2], strict=True))
    seconds: dict[Solver, list[float]] = {lanczos: [], run: []}
    for _ in range(rounds):
        for solver, taken in seconds.items():
            taken.append(clocked(solver, values, num_steps)[0] / num_steps)
        progress.update()
    return Outcome(seconds[lanczos], seconds[run], first, apart)


def table(results: dict[int, Outcome]) -> str:
    lines = ["| n | eager step | compiled step | ratio | first run | apart |", "|---" * 6 + "|"]
    for n, (eager, compiled, first, apart) in results.items():
        slow, fast = (1e6 * statistics.median(x) for x in (eager, compiled))
        ratio = spread([x / y for x, y in zip(eager, compiled, strict=True)])
        lines.append(f"| {n:,} | {slow:,.0f} µs | {fast:,.0f} µs | {ratio} | {first:.1f} s | {apart:.0e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tqdm(total=len(args.sizes) * args.rounds) as progress:
        results = {n: measure(n, args.steps, args.rounds, progress) for n in args.sizes}
    print(
        f"{machine()}; float32, {args.steps} steps, {args.rounds} rounds in turns, medians", table(results), sep="\n\n"
    )


if __name__ == "__main__":
    main()
