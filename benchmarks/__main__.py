"""All benchmarks, as one page of tables and one file of numbers: `python -m benchmarks [--quick] [--only NAME ...]`.

Each runs in a process of its own, in one thread. After each, docs/benchmarks.json gets its figures and its text, from
which docs/benchmarks.md is written: a run that is stopped leaves what it has, and `--only NAME` renews some. What fails
or takes too long has its error on the page, and the rest goes on. Exit code 1 if a benchmark failed (`fuzz` fails if it
finds a false certificate).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.products import machine
from benchmarks.report import BENCHMARKS, DOCS, NUMBERS, PAGE, Benchmark, write


def run(benchmark: Benchmark, quick: bool) -> dict[str, Any]:
    """What a benchmark printed and how it ended, and its raw numbers where it writes them."""
    words = ["-m", f"benchmarks.{benchmark.module}", *(benchmark.quick if quick else benchmark.full)]
    load, begun, spent = os.getloadavg()[0], time.perf_counter(), _processor()
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "numbers.json"
        saving = ["--json", str(figures)] if benchmark.numbers else []
        code, output, errors = _finished([sys.executable, *words, *saving], benchmark.limit)
        numbers = json.loads(figures.read_text()) if figures.exists() else None
    return {
        "command": " ".join(["python", *words]),
        "quick": quick,
        "machine": machine(),
        "load": round(load, 1),
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.perf_counter() - begun, 1),
        "processor_seconds": round(_processor() - spent, 1),
        "exit_code": code,
        "ended": f"stopped after {benchmark.limit:.0f} s" if code is None else f"exit code {code}",
        "output": (output if code == 0 else f"{output}\n\n{errors[-2000:]}").strip(),
        "numbers": numbers,
    } | ({"exit_code": 124} if code is None else {})


def _processor() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _finished(command: list[str], limit: float) -> tuple[int | None, str, str]:
    """Exit code, output and errors; no code where it was stopped at the limit, with all that it had started."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
            return process.returncode, output, errors
        except BaseException as ended:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(ended, subprocess.TimeoutExpired):
                raise
            output, errors = process.communicate()
            return None, output, errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small runs: figures to look at, not to quote")
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHMARKS), default=tuple(BENCHMARKS))
    parser.add_argument("--out", type=Path, default=DOCS, metavar="DIR", help="folder of page, numbers and figures")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in the benchmarks' own processes, for `machine`
    numbers = args.out / NUMBERS
    results = json.loads(numbers.read_text()) if numbers.exists() else {}
    for name in tqdm(args.only, unit=" benchmarks"):
        results[name] = run(BENCHMARKS[name], args.quick)
        numbers.write_text(json.dumps(results, indent=1) + "\n")
        write(results, args.out)
    failed = [name for name in args.only if results[name]["exit_code"]]
    print(f"wrote {NUMBERS} and {PAGE} to {args.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
