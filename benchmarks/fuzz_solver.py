"""Looks for certificates of `eigsh` that are false: `python -m benchmarks.fuzz_solver --examples 20000`.

Random cases of every family of spectra, dtype, size, scale, tree and start vector, each held against the true spectrum
(see `eigenfunc.testing.faults`). Exit code 1 if anything is called converged that is not.
`--only INDEX` repeats one case of a run with the same `--seed` (and `--family`) and prints all about it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import torch
from tqdm import tqdm

from eigenfunc import Solution, eigsh
from eigenfunc.errors import EigenfuncError
from eigenfunc.testing import FAMILIES, Case, faults, random_case
from eigenfunc.testing.verdicts import explain

CHUNK = 25


class Outcome(NamedTuple):
    index: int
    groups: tuple[str, ...]  # the rows of the table that it counts in
    verdict: str  # "right", "WRONG", a status of Solution, or "refused: " and the error
    separated: bool  # what was wanted stood out by more than the tolerance and rounding
    seconds: float
    line: str  # the case, as Python
    faults: list[str]


def case_of(seed: int, index: int, families: tuple[str, ...]) -> Case:
    return random_case(random.Random(f"{seed}/{index}"), families=families)


def solve(case: Case) -> Solution:
    problem = case.problem
    return eigsh(
        problem.operator(),
        case.k,
        which=case.which,
        tol=case.tol,
        v0=problem.start(case.start, case.k, case.which),
        seed=case.seed,
        throw=False,
        block_size=case.block_size,
        basis_size=case.basis_size,
    )


def judge(seed: int, index: int, families: tuple[str, ...]) -> Outcome:
    case, begun = case_of(seed, index, families), time.perf_counter()
    wrong: list[str] = []
    try:
        solution = solve(case)
    except EigenfuncError as error:
        verdict = f"refused: {type(error).__name__}"
    except Exception as crash:
        verdict, wrong = f"crash: {type(crash).__name__}", [str(crash)]
    else:
        wrong = faults(case, solution)
        verdict = "WRONG" if wrong else "right" if solution.success else str(solution.status)
    sizes = f"block {case.block_size}, {'small' if case.basis_size else 'default'} basis"
    groups = (case.problem.family, case.problem.dtype, f"start: {case.start}", sizes, "all")
    return Outcome(index, groups, verdict, case.separated, time.perf_counter() - begun, repr(case), wrong)


def judge_all(seed: int, indices: Iterable[int], families: tuple[str, ...]) -> list[Outcome]:
    torch.set_num_threads(1)
    return [judge(seed, index, families) for index in indices]


def outcomes(seed: int, examples: int, processes: int, families: tuple[str, ...]) -> Iterator[Outcome]:
    chunks = [range(start, min(start + CHUNK, examples)) for start in range(0, examples, CHUNK)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for job in as_completed([pool.submit(judge_all, seed, chunk, families) for chunk in chunks]):
            yield from job.result()


def table(found: list[Outcome]) -> str:
    rows = [*FAMILIES, *sorted({group for o in found for group in o.groups[1:4]}), "all"]
    lines = [
        "| | cases | right | WRONG | not converged | refused, crashed | converged, of the separated | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        of = [o for o in found if row in o.groups]
        if of:
            verdicts, apart = Counter(o.verdict for o in of), [o for o in of if o.separated]
            ended = {v: c for v, c in verdicts.items() if v.startswith(("refused", "crash"))}
            open_ = {v: c for v, c in verdicts.items() if v not in {"right", "WRONG", *ended}}
            share = f"{sum(o.verdict == 'right' for o in apart) / len(apart):.2%}" if apart else "–"
            lines.append(
                f"| {row} | {len(of)} | {verdicts['right']} | {verdicts['WRONG']} | {_told(open_)} | {_told(ended)} "
                f"| {share} of {len(apart)} | {sum(o.seconds for o in of) / len(of):.3f} |"
            )
    return "\n".join(lines)


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "0"


def repeat(case: Case) -> list[str]:
    """Print all about one case; returns what is wrong with it."""
    solution = solve(case)
    wrong = faults(case, solution)
    print(solution, explain(case, solution, wrong or ["nothing is wrong"]), sep="\n")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--family", action="append", choices=tuple(FAMILIES), help="only these; may be repeated")
    parser.add_argument("--only", type=int, metavar="INDEX", help="repeat one case")
    parser.add_argument("--open", action="store_true", help="list the cases that did not converge, too")
    args = parser.parse_args()
    families = tuple(args.family or FAMILIES)
    if args.only is not None:
        return 1 if repeat(case_of(args.seed, args.only, families)) else 0
    found, bar = [], tqdm(total=args.examples, unit=" cases", smoothing=0)
    for outcome in outcomes(args.seed, args.examples, args.processes, families):
        found.append(outcome)
        bar.update()
        if outcome.faults or (args.open and outcome.verdict != "right"):
            apart = " (separated)" if outcome.separated else ""
            bar.write(f"--seed {args.seed} --only {outcome.index}: {outcome.verdict}{apart}: {outcome.line}")
            for fault in outcome.faults:
                bar.write(f"    {fault}")
    bar.close()
    print(table(found))
    return 1 if any(outcome.faults for outcome in found) else 0


if __name__ == "__main__":
    sys.exit(main())
