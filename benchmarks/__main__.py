"""All benchmarks, as one page of tables and one file of numbers: `python -m benchmarks [--quick] [--only NAME ...]`.

Each runs in a process of its own. After each, docs/benchmarks.json gets its figures and its text, from which
docs/benchmarks.md is written: a run that is stopped leaves what it has, and `--only NAME` renews some. Exit code 1 if a
benchmark failed (`fuzz` fails if it finds a false certificate).
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.products import machine

DOCS = Path(__file__).parent.parent / "docs"


class Benchmark(NamedTuple):
    title: str
    module: str
    quick: tuple[str, ...]  # arguments of a small run
    full: tuple[str, ...] = ()
    numbers: bool = False  # whether it writes its raw numbers with --json


BENCHMARKS = {
    "products": Benchmark("The cost of a product", "products", ("--quick",), numbers=True),
    "solvers": Benchmark("Products that solvers need", "solvers", ("--quick",)),
    "end_to_end": Benchmark("From a model to ten eigenpairs", "end_to_end", ("--rounds", "1"), numbers=True),
    "memory": Benchmark("Peak memory of a product", "memory", ("--repeats", "1"), numbers=True),
    "vocabulary": Benchmark(
        "Peak memory with a large vocabulary", "vocabulary", ("--tokens", "512"), ("--repeats", "3"), numbers=True
    ),
    "compiled": Benchmark("A compiled Lanczos step", "compiled", ("--rounds", "2", "--sizes", "1000", "10000")),
    "overhead": Benchmark("Time outside the products", "overhead", ("--rounds", "1")),
    "fuzz": Benchmark("A hunt for false certificates", "fuzz_solver", ("--examples", "500"), ("--examples", "20000")),
}


def run(benchmark: Benchmark, quick: bool) -> dict[str, Any]:
    """What a benchmark printed and how it ended, and its raw numbers where it writes them."""
    words = ["-m", f"benchmarks.{benchmark.module}", *(benchmark.quick if quick else benchmark.full)]
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "numbers.json"
        saving = ["--json", str(figures)] if benchmark.numbers else []
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, *words, *saving], capture_output=True, text=True)
        return {
            "command": " ".join(["python", *words]),
            "quick": quick,
            "machine": machine(),
            "date": datetime.date.today().isoformat(),
            "seconds": round(time.perf_counter() - begun, 1),
            "exit_code": done.returncode,
            "output": done.stdout.strip() if done.returncode == 0 else f"{done.stdout}\n{done.stderr}".strip()[-4000:],
            "numbers": json.loads(figures.read_text()) if figures.exists() else None,
        }


def page(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a section for each benchmark that has run, in the order of BENCHMARKS."""
    lines = ["# Benchmarks", "", "Written by `python -m benchmarks`, numbers in docs/benchmarks.json."]
    for name, benchmark in BENCHMARKS.items():
        if result := results.get(name):
            how = "a quick run, " if result["quick"] else ""
            lines += ["", f"## {benchmark.title}", ""]
            lines += [
                f"`{result['command']}`, {how}{result['date']}, {result['seconds']:.0f} s, on {result['machine']}."
            ]
            if result["exit_code"]:
                lines += ["", f"**Failed** with exit code {result['exit_code']}."]
            lines += ["", *shown(result["output"])]
    return "\n".join(lines) + "\n"


def shown(output: str) -> list[str]:
    """Tables and lists as they are, all else as text to the letter."""
    lines: list[str] = []
    for part in output.split("\n\n"):
        marked = part.lstrip().startswith(("|", "- ", "#"))
        lines += [part.strip("\n"), ""] if marked else ["```text", part.strip("\n"), "```", ""]
    return lines[:-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small runs: figures to look at, not to quote")
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHMARKS), default=tuple(BENCHMARKS))
    parser.add_argument("--out", type=Path, default=DOCS, metavar="DIR", help="folder of the two files")
    args = parser.parse_args()
    numbers = args.out / "benchmarks.json"
    results = json.loads(numbers.read_text()) if numbers.exists() else {}
    for name in tqdm(args.only, unit=" benchmarks"):
        results[name] = run(BENCHMARKS[name], args.quick)
        numbers.write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "benchmarks.md").write_text(page(results))
    failed = [name for name in args.only if results[name]["exit_code"]]
    print(
        f"wrote benchmarks.json and benchmarks.md to {args.out}" + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
