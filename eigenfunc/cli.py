"""The command line: `eigenfunc demo` and `eigenfunc run PROBLEM.py`."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eigenfunc import demo, plot, tree
from eigenfunc._version import __version__
from eigenfunc.certificate import seeded
from eigenfunc.curvature.hessian import hessian
from eigenfunc.distributed.deal import share
from eigenfunc.distributed.parallel import data_parallel
from eigenfunc.distributed.team import first, launched
from eigenfunc.eigsh import eigsh
from eigenfunc.errors import DistributedError, EigenfuncError, InputError
from eigenfunc.operator import LinearOperator
from eigenfunc.solution import Solution

CONVERGED, NOT_CONVERGED, BAD_INPUT, LOST = 0, 3, 2, 4

_SMALLEST = 5  # eigenpairs at the lower end that the demo adds
_EXAMPLE = """A problem file defines make_problem(), which returns (loss, params, data):

    import torch
    from eigenfunc import functional_loss

    def make_problem():
        model = torch.nn.Linear(4, 3)
        inputs, targets = torch.randn(100, 4), torch.randint(0, 3, (100,))
        loss, params = functional_loss(model, torch.nn.CrossEntropyLoss())
        return loss, params, (inputs, targets)   # data: one batch, a DataLoader, or Batches([...])

With torchrun --nproc-per-node N -m eigenfunc run PROBLEM.py the batches of a DataLoader or of Batches are dealt out to
N processes. Where data is a function, data(rank, world_size) gives the share of a process; alone it is data(0, 1).
"""


class _Wrong(InputError):
    """Bad input whose message says it all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 all converged, 3 not all converged, 2 bad input, 4 another
    process of the same run failed, died or hangs."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or printed the help
        return int(stop.code or 0)
    with warnings.catch_warnings():
        warnings.showwarning = _plainly  # type: ignore[assignment]
        try:
            _require(args.needs)
            return int(args.command(args))
        except EigenfuncError as error:
            print(f"eigenfunc: {error}", file=sys.stderr)
            return LOST if isinstance(error, DistributedError) else BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eigenfunc",
        description="Certified eigenpairs of the Hessian of a PyTorch loss. "
        "Exit codes: 0 all converged, 3 finished but not all converged, 2 bad input, 4 another process of the run "
        "failed; torchrun makes 1 of all but 0.",
    )
    parser.add_argument("--version", action="version", version=f"eigenfunc {__version__}")
    commands = parser.add_subparsers(required=True)
    show = commands.add_parser("demo", help="train a small network on handwritten digits and take its spectrum")
    show.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    show.add_argument("--k", type=int, default=20, help=f"largest eigenpairs, beside the {_SMALLEST} smallest")
    show.add_argument("--seed", type=int, default=0)
    show.set_defaults(command=_demo, needs=("matplotlib", "safetensors", "sklearn"))
    run = commands.add_parser("run", help="the spectrum of your own model", epilog=_EXAMPLE)
    run.formatter_class = argparse.RawDescriptionHelpFormatter
    run.add_argument("problem", type=Path, metavar="PROBLEM.py")
    run.add_argument("--k", type=int, default=6)
    run.add_argument("--which", choices=("LM", "LA", "SA", "BE"), default="LM")
    run.add_argument("--tol", type=float, default=1e-4, help="relative to each eigenvalue")
    run.add_argument("--seed", type=int, default=None)
    wait = "under torchrun, seconds after which a process gives up waiting for another"
    run.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help=wait)
    run.set_defaults(command=_run, needs=("matplotlib", "safetensors"))
    for command in (show, run):
        command.add_argument("--out", type=Path, default=Path("eigenfunc-out"), metavar="DIR")
    return parser


def _plainly(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    if issubclass(category, DeprecationWarning):
        return
    print(f"warning: {message}", file=sys.stderr)


def _require(packages: Sequence[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise _Wrong(f"the command line needs {', '.join(missing)}: pip install 'eigenfunc[cli]'")


def _demo(args: argparse.Namespace) -> int:
    epochs = 30
    if args.k < 1 or args.seed < 0:
        raise _Wrong(f"--k must be at least 1 and --seed at least 0, got {args.k} and {args.seed}")
    print(f"training the {args.model} on 1,797 handwritten digits")
    with tqdm(total=epochs, unit=" epochs", leave=False) as bar:
        loss, params, data = demo.make_problem(args.model, args.seed, epochs=epochs, report=bar.update)
    A = hessian(loss, params, data)
    print(A.describe())
    if args.k + _SMALLEST > A.size:
        raise _Wrong(f"--k {args.k} and the {_SMALLEST} smallest are more than the {A.size} eigenvalues there are")
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
    with launched(args.timeout) as (rank, size), redirect_stdout(io.StringIO()) if rank else nullcontext():
        loss, params, data = _problem(args.problem)
        with _Traced(args.problem):
            if callable(data):
                data = data(rank, size)
            elif size > 1:
                data = share(data, rank, size)
            A = hessian(loss, params, data) if size == 1 else data_parallel(hessian, loss, params, data)
            print(A.describe())
            wanted = {"which": args.which, "tol": args.tol, "seed": first(lambda: seeded(args.seed)[1])}
            solution = eigsh(A, args.k, **wanted, progress=not rank, throw=False)
        return first(partial(_finish, args, solution, A, {"problem": str(args.problem)}, {}))


class _Traced:
    """Turns an exception from the user's own code into bad input, after printing where it came from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, EigenfuncError):
            traceback.print_exception(error)
            raise _Wrong(f"{self.path} failed with {type(error).__name__}; see above") from None


def _problem(path: Path) -> tuple[Any, Any, Any]:
    if not path.is_file():
        raise _Wrong(f"there is no file {path}\n{_EXAMPLE}")
    spec = importlib.util.spec_from_file_location("eigenfunc_problem", path)
    if spec is None or spec.loader is None:
        raise _Wrong(f"{path} is no Python file\n{_EXAMPLE}")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with _Traced(path):
            spec.loader.exec_module(module)
            make = getattr(module, "make_problem", None)
            if not callable(make):
                raise _Wrong(f"{path} does not define make_problem()\n{_EXAMPLE}")
            made = make()
    finally:
        sys.path[:] = before
    if not isinstance(made, tuple) or len(made) != 3:
        what = f"{len(made)} items" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise _Wrong(f"make_problem() in {path} must return (loss, params, data), it returned {what}\n{_EXAMPLE}")
    if not callable(made[0]):
        raise _Wrong(
            f"the loss that make_problem() in {path} returns is a {type(made[0]).__name__}, not a function "
            f"(params, batch) -> ()\n{_EXAMPLE}"
        )
    return made


def _finish(
    args: argparse.Namespace,
    solution: Solution,
    A: LinearOperator,
    about: dict[str, Any],
    extra: dict[str, list[str]],
) -> int:
    """Print the table, write report.json, eigenvectors.safetensors and spectrum.png, and choose the exit code."""
    from safetensors.torch import save_file

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(solution.table(extra))
    print(f"peak memory of the process {tree.gibibytes(peak)}")
    out: Path = args.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        report = {
            **solution.report(),
            **about,
            "k": args.k,
            "n": A.size,
            "operator": A.describe(),
            "peak_memory_bytes": peak,
            "version": __version__,
        }
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        leaves = zip(tree.names(solution.vectors), tree.leaves(solution.vectors), strict=True)
        save_file(
            {name or "vector": leaf.contiguous().cpu() for name, leaf in leaves}, out / "eigenvectors.safetensors"
        )
        figure: Any = plot.spectrum(solution).figure
        figure.savefig(out / "spectrum.png")
    except OSError as error:
        raise _Wrong(f"cannot write to {out}: {error}") from None
    print(f"wrote report.json, eigenvectors.safetensors and spectrum.png to {out}")
    return CONVERGED if solution.success else NOT_CONVERGED
