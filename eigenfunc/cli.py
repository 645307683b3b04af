"""The command line: `demo`, `run`, `density` and `layers` of a PROBLEM.py, `report` of a DIR or a RUN.jsonl."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eigenfunc import archive, demo, jsonlog, plot, problem, report, runlog, signals, tree
from eigenfunc._version import __version__
from eigenfunc.checkpoint import part_of
from eigenfunc.curvature.hessian import hessian
from eigenfunc.distributed.deal import share
from eigenfunc.distributed.parallel import data_parallel
from eigenfunc.distributed.team import Team, alone, first, launched
from eigenfunc.eigsh import eigsh
from eigenfunc.errors import DistributedError, EigenfuncError, FileError, InputError
from eigenfunc.layers import eigsh_blocks
from eigenfunc.operator import LinearOperator
from eigenfunc.plan import plan
from eigenfunc.solution import EigenPairs, Solution
from eigenfunc.stochastic.density import spectral_density

CONVERGED, NOT_CONVERGED, BAD_INPUT, LOST = 0, 3, 2, 4

_OUT = Path("eigenfunc-out")
_SMALLEST = 5  # eigenpairs at the lower end that the demo adds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 all converged, 3 not all converged, 2 bad input, 4 another
    process of the same run failed, died or hangs, 130 and 143 stopped by a signal and saved."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or printed the help
        return int(stop.code or 0)
    lines = bool(getattr(args, "log_json", False)) and int(os.environ.get("RANK", "0")) == 0
    with warnings.catch_warnings(), jsonlog.json_lines(sys.stderr) if lines else nullcontext():
        say = partial(_say, lines)
        warnings.showwarning = partial(_warned, say)
        try:
            _require(args.needs)
            return int(args.command(args))
        except signals.Ended as ended:
            return int(ended.code or 0)
        except EigenfuncError as error:
            say("error", f"eigenfunc: {error}")
            return LOST if isinstance(error, DistributedError) else BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eigenfunc",
        description="Certified eigenpairs of the Hessian of a PyTorch loss. "
        "Exit codes: 0 all converged, 3 finished but not all converged, 2 bad input, 4 another process of the run "
        "failed, 130 and 143 stopped by SIGINT and SIGTERM after saving a checkpoint; torchrun makes 1 of all but 0.",
    )
    parser.add_argument("--version", action="version", version=f"eigenfunc {__version__}")
    commands = parser.add_subparsers(required=True)
    show = commands.add_parser("demo", help="train a small network on handwritten digits and take its spectrum")
    show.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    show.add_argument("--k", type=int, default=20, help=f"largest eigenpairs, beside the {_SMALLEST} smallest")
    show.add_argument("--seed", type=int, default=0)
    show.set_defaults(command=_demo, needs=("matplotlib", "safetensors", "sklearn"))
    run = commands.add_parser("run", help="the spectrum of your own model")
    run.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="start afresh and save the run there, at restarts, every ten minutes, and on SIGINT and SIGTERM, which "
        "end it with exit codes 130 and 143 (a second one at once); only a file of the same problem is replaced; under "
        "torchrun a file of each process, PATH.rank0 and so on",
    )
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint, where there is one")
    run.add_argument(
        "--memory-budget",
        type=_bytes,
        metavar="BYTES",
        help="beside the model and its products, as 4GB or 500MiB: the basis is made smaller, then of shorter numbers, "
        "then files; where that cannot do, the least that can is told",
    )
    run.add_argument("--basis-path", type=Path, metavar="FOLDER", help="keep the basis there and not in memory")
    run.add_argument(
        "--log-json", action="store_true", help="lines of JSON on stderr, one an event, in place of the progress bar"
    )
    wait = "under torchrun, seconds after which a process gives up waiting for another"
    run.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help=wait)
    run.set_defaults(command=_run, needs=("matplotlib", "safetensors"))
    density = commands.add_parser("density", help="how the eigenvalues of your own model are distributed")
    density.add_argument(
        "--k", type=int, default=10, help="eigenpairs of largest magnitude to take out and find exactly"
    )
    density.add_argument("--tol", type=float, default=1e-4, help="of those, relative to each eigenvalue")
    density.add_argument("--probes", type=int, default=10, help="random vectors")
    density.add_argument("--steps", type=int, default=80, help="products for each")
    density.set_defaults(command=_density, needs=("matplotlib",))
    layers = commands.add_parser("layers", help="the spectrum of each layer of your own model")
    layers.add_argument("--by", choices=("module", "parameter"), default="module")
    layers.set_defaults(command=_layers, needs=("matplotlib",))
    for command in (run, layers):
        command.add_argument("--k", type=int, default=6)
        command.add_argument("--which", choices=("LM", "LA", "SA", "BE"), default="LM")
        command.add_argument("--tol", type=float, default=1e-4, help="relative to each eigenvalue")
    for command in (run, density, layers):
        command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, problem.EXAMPLE
        command.add_argument("problem", type=Path, metavar="PROBLEM.py")
        command.add_argument("--seed", type=int, default=None)
    for command in (show, run, density, layers):
        command.add_argument("--out", type=Path, default=_OUT, metavar="DIR")
    saved = commands.add_parser(
        "report",
        help="the table of a solution that was saved in DIR, by demo, run or Solution.save; "
        "or the log RUN.jsonl of a tracked training run as a page, RUN.html, that holds everything in itself",
    )
    saved.add_argument("source", type=Path, nargs="?", default=_OUT, metavar="DIR or RUN.jsonl")
    saved.set_defaults(command=_report, needs=())
    return parser


def _say(lines: bool, event: str, words: str) -> None:
    if lines:
        jsonlog.tell(event, message=words)
    else:
        print(words, file=sys.stderr)


def _warned(say: Callable[[str, str], None], message: Warning | str, category: type[Warning], *rest: Any) -> None:
    if not issubclass(category, DeprecationWarning):
        say("warning", f"warning: {message}")


def _bytes(text: str) -> int:
    """A number of bytes, as 4GB, 500 MiB or 1e9."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) *([kmgt]?)(i?)b?", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes: write 4GB, 500MiB or 1e9")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" kmgt".index(unit) if unit else 0))


def _require(packages: Sequence[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the command line needs {', '.join(missing)}: pip install 'eigenfunc[cli]'")


def _demo(args: argparse.Namespace) -> int:
    epochs = 30
    if args.k < 1 or args.seed < 0:
        raise InputError(f"--k must be at least 1 and --seed at least 0, got {args.k} and {args.seed}")
    print(f"training the {args.model} on 1,797 handwritten digits")
    with tqdm(total=epochs, unit=" epochs", leave=False) as bar:
        loss, params, data = demo.make_problem(args.model, args.seed, epochs=epochs, report=bar.update)
    A = hessian(loss, params, data)
    print(A.describe())
    if args.k + _SMALLEST > A.size:
        raise InputError(f"--k {args.k} and the {_SMALLEST} smallest are more than the {A.size} eigenvalues there are")
    begun = time.perf_counter()
    solution = eigsh(A, (args.k, _SMALLEST), which="BE", seed=args.seed, progress=True, throw=False)
    seconds = time.perf_counter() - begun
    extra = {}
    if args.model == "mlp":
        print(f"solved in {seconds:.1f} s; now the dense float64 matrix, {A.size} × {A.size}, to compare with")
        truth = _dense_truth(A, args.k)
        extra["off the truth by"] = [f"{gap:.1e}" for gap in (solution.values - truth).abs().tolist()]
    return _finish(args, solution, A, {"model": args.model, "smallest": _SMALLEST}, extra)


def _dense_truth(A: LinearOperator, k: int) -> Tensor:
    falling = torch.linalg.eigvalsh(A.to_dense().double().cpu()).flip(0)
    return torch.cat([falling[:k], falling[-_SMALLEST:]])


def _run(args: argparse.Namespace) -> int:
    if args.resume and args.checkpoint is None:
        raise InputError("--resume needs --checkpoint PATH, the file to go on from")
    with launched(args.timeout) as team, redirect_stdout(io.StringIO()) if team.rank else nullcontext():
        with problem.traced(args.problem):
            A = _operator(args.problem, team.rank, team.size)
            wanted: dict[str, Any] = {"which": args.which, "tol": args.tol, "group": team.group}
            wanted |= {"memory_budget": args.memory_budget, "basis_path": args.basis_path}
            jsonlog.tell("start", problem=str(args.problem), k=args.k, n=A.size, operator=A.describe())
            if not (args.resume and first(partial(_saved, args.checkpoint, team))):  # that run has its plan already
                planned = plan(A, args.k, **wanted)
                print(planned)
                sizes = {"memory_bytes": planned.memory_bytes, "basis_bytes": planned.basis_bytes}
                jsonlog.tell("plan", **planned._asdict(), **sizes, expected_matvecs=planned.expected_matvecs)
                wanted["block_size"] = planned.block_size  # as printed: measured again it may come out otherwise
            with signals.saving(args.checkpoint, args.resume, team) as checkpoint:
                shown, wanted["seed"] = not team.rank and not args.log_json, args.seed
                solution = eigsh(A, args.k, **wanted, progress=shown, checkpoint=checkpoint, throw=False)
            jsonlog.tell("end", **solution.report())
        return first(partial(_finish, args, solution, A, {"problem": str(args.problem)}, {}))


def _saved(path: Path, team: Team) -> bool:
    return path.exists() if team.group is None else part_of(path, team.rank).exists()


def _density(args: argparse.Namespace) -> int:
    if args.probes < 1 or args.steps < 2:
        raise InputError(f"--probes must be at least 1 and --steps at least 2, got {args.probes} and {args.steps}")
    with problem.traced(args.problem):
        A = _operator(args.problem)
        pairs, success = None, True
        if args.k != 0:
            solution = eigsh(A, args.k, tol=args.tol, seed=args.seed, progress=True, throw=False)
            print(solution.table())
            pairs, success = _certified(solution), solution.success
        found = spectral_density(
            A, num_probes=args.probes, num_steps=args.steps, pairs=pairs, seed=args.seed, progress=True
        )
    print(f"\n{found}")
    record = {name: x.tolist() if isinstance(x, Tensor) else x for name, x in vars(found).items()}
    about = {**_about(args, A), "problem": str(args.problem), "probes": args.probes, "steps": args.steps}
    archive.write_json(args.out / "density.json", {**record, **about})
    _draw(plot.density(found), args.out / "density.png")
    return _end(args.out, "density.json and density.png", success)


def _certified(solution: Solution) -> EigenPairs | None:
    """The pairs that have converged: the others are left to the estimate."""
    ok = solution.converged
    if not ok.any():
        return None
    vectors = tree.tree_map(lambda leaf: leaf[ok.to(leaf.device)], solution.vectors)
    return EigenPairs(solution.values[ok], vectors, solution.residuals[ok])


def _layers(args: argparse.Namespace) -> int:
    with problem.traced(args.problem):
        A = _operator(args.problem)
        found = eigsh_blocks(
            A, args.k, by=args.by, which=args.which, tol=args.tol, seed=args.seed, progress=True, throw=False
        )
    for name, solution in found.items():
        print(f"\n{name or 'the module itself'}\n{solution.table()}")
    whole = sum(solution.success for solution in found.values())
    print(f"\n{whole} of {len(found)} layers converged")
    about = {**_about(args, A), "problem": str(args.problem), "by": args.by}
    reports = {name: solution.report() for name, solution in found.items()}
    archive.write_json(args.out / "layers.json", {"layers": reports, **about})
    _draw(plot.layers(found), args.out / "layers.png")
    return _end(args.out, "layers.json and layers.png", whole == len(found))


def _report(args: argparse.Namespace) -> int:
    if args.source.is_file() or args.source.suffix == ".jsonl":
        _require(("matplotlib",))
        run = runlog.read_run(args.source)
        page = report.write_report(args.source)
        print(f"{len(run.records)} records and {len(run.alerts)} alerts; wrote {page}")
        return CONVERGED if run.certified else NOT_CONVERGED
    _require(("safetensors",))
    solution = Solution.load(args.source)
    print(solution.table())
    return CONVERGED if solution.success else NOT_CONVERGED


def _operator(path: Path, rank: int = 0, size: int = 1) -> LinearOperator:
    """The Hessian over the data of all processes, for a command that torchrun spreads or that runs in one."""
    if size == 1 and not alone():
        raise InputError("of all commands torchrun spreads `run` alone over its processes; start this one without it")
    loss, params, data = problem.load(path)
    if callable(data):
        data = data(rank, size)
    elif size > 1:
        data = share(data, rank, size)
    A = hessian(loss, params, data) if size == 1 else data_parallel(hessian, loss, params, data)
    print(A.describe())
    return A


def _finish(
    args: argparse.Namespace,
    solution: Solution,
    A: LinearOperator,
    about: dict[str, Any],
    extra: dict[str, list[str]],
) -> int:
    """Print the table, write report.json, eigenvectors.safetensors and spectrum.png, and choose the exit code."""
    print(solution.table(extra))
    solution.save(args.out, _about(args, A) | about)
    _draw(plot.spectrum(solution), args.out / "spectrum.png")
    return _end(args.out, "report.json, eigenvectors.safetensors and spectrum.png", solution.success)


def _about(args: argparse.Namespace, A: LinearOperator) -> dict[str, Any]:
    """What a report says beside the results; the peak memory is printed too."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"peak memory of the process {tree.gibibytes(peak)}")
    return {"k": args.k, "n": A.size, "operator": A.describe(), "peak_memory_bytes": peak, "version": __version__}


def _draw(axes: Any, path: Path) -> None:
    try:
        axes.figure.savefig(path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error}") from None


def _end(folder: Path, files: str, success: bool) -> int:
    print(f"wrote {files} to {folder}")
    return CONVERGED if success else NOT_CONVERGED
