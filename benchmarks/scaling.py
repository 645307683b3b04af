"""What a step of `eigsh` costs as n grows, in time and in memory: `python -m benchmarks.scaling`.

Two eigenpairs of a diagonal operator in float32, its outliers 1, 1/2, 1/3, … above a bulk, with 30 + 1 vectors in
memory and on disk, each in a process of its own. Seconds are of the whole run over its products, verification
included; memory is the peak resident set over what was resident with the operator made, and disk what the plan
reserves at most. The largest run, n = 1e8, takes 18 GB of disk in the folder given by --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from eigenfunc import LinearOperator, aslinearoperator, eigsh
from eigenfunc.plan import plan

SIZES = [10**5, 10**6, 10**7, 10**8]
BASIS = 30
IN_MEMORY = 4 * 2**30  # no basis larger than this is held there


class Row(NamedTuple):
    n: int
    place: str
    matvecs: int
    seconds: float
    peak: int  # bytes beside the operator
    disk: int
    success: bool


def operator(n: int) -> LinearOperator:
    values = torch.rand(n, generator=torch.Generator().manual_seed(1)).mul_(0.01)
    values[:12] = 1 / torch.arange(1, 13)
    return aslinearoperator(lambda v: values * v, values)


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(n: int, folder: str | None) -> Row:
    """In this process, which should be a fresh one."""
    eigsh(operator(1000), 2, seed=0)  # what loads at first use is not the run's
    A, options = operator(n), {"basis_size": BASIS, "basis_path": folder}
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    found = eigsh(A, 2, seed=0, throw=False, **options)
    peak = _status("VmHWM") - before
    disk = plan(operator(1000), 2, **options)._replace(n=n).disk_bytes
    stats = found.stats
    return Row(n, "on disk" if folder else "in memory", stats.matvecs, stats.seconds, peak, disk, found.success)


def measured(n: int, folder: str | None) -> Row:
    words = ["-m", "benchmarks.scaling", "--measure", str(n), "--folder", folder or ""]
    command = [sys.executable, "-W", "ignore", *words]
    return Row(*json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=dict(os.environ)).stdout))


def table(rows: list[Row]) -> str:
    lines = [
        "| n | basis | products | seconds a product | ns a product and entry | peak memory | in vectors | disk |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        each = row.seconds / row.matvecs
        cells = [f"{row.n:.0e}", row.place, f"{row.matvecs}{'' if row.success else ' (not converged)'}", f"{each:.3g}"]
        cells += [f"{1e9 * each / row.n:.1f}", f"{row.peak / 2**20:,.0f} MiB", f"{row.peak / (4 * row.n):.1f}"]
        lines.append(f"| {' | '.join([*cells, f'{row.disk / 2**20:,.0f} MiB'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on a disk with room for the largest basis")
    parser.add_argument("--largest", type=float, default=1e8, help="n to stop at")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers")
    parser.add_argument("--measure", type=int, metavar="N", help="print the figures of one run in this process")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder or None)))
        return
    rows = []
    for n in tqdm([n for n in SIZES if n <= args.largest], desc="sizes"):
        if 4 * n * BASIS <= IN_MEMORY:
            rows.append(measured(n, None))
        rows.append(measured(n, args.folder))
        tqdm.write(table(rows[-1:]), file=sys.stderr)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"rows": [row._asdict() for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
