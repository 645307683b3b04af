"""What `eigsh` costs outside the products, one thread: `python -m benchmarks.overhead`.

k = 10 on the Hessians of the MLP and the GPT of `benchmarks.models`, float32. In each round the run is timed as a whole
and in its products alone, which gives the share outside them. A further run counts how often the basis is read: rows of
it that `tree.gram`, `tree.combine`, `basis.subtract` and `basis.rotate` read, over the rows that were
there summed over steps. One Gram–Schmidt pass reads each row twice (coefficients, then subtraction), so 2 is the least
of any full orthogonalisation in separate passes; local terms, second passes, restarts and the vectors at the end add.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks.models import Problem, problem
from benchmarks.products import machine, spread
from eigenfunc import LinearOperator, Solution, eigsh, functional_loss, hessian, tree
from eigenfunc.krylov import basis as vectors, lanczos

NAMES = ("MLP", "GPT")


def timed(A: LinearOperator) -> tuple[LinearOperator, list[float]]:
    """The operator, and the seconds of each of its products so far."""
    seconds: list[float] = []

    def clocked(product: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(v: Any) -> Any:
            begun = time.perf_counter()
            out = product(v)
            seconds.append(time.perf_counter() - begun)
            return out

        return call

    block = None if A.block is None else clocked(A.block)
    return dataclasses.replace(A, matvec=clocked(A.matvec), block=block), seconds


@dataclasses.dataclass
class Reads:
    """Rows of the basis read, and how many there were to read at each step."""

    rows: int = 0
    present: list[int] = dataclasses.field(default_factory=list)
    storage: int = 0
    state: lanczos.State | None = None

    @property
    def per_step(self) -> float:
        """How often a step reads each row, on average."""
        return self.rows / sum(self.present)

    @property
    def orthogonality(self) -> float:
        """max |⟨v_i, v_j⟩ − δ_ij| over the rows of the last basis."""
        assert self.state is not None
        stack = tree.rows(self.state.basis, 0, self.present[-1])
        off = tree.exact_gram(stack, stack) - torch.eye(self.present[-1], dtype=torch.float64)
        return float(off.abs().max())


@contextlib.contextmanager
def counted_reads() -> Iterator[Reads]:
    """Counts within the block; every stack that shares memory with the basis last allocated is part of it."""
    reads = Reads()
    allocate, absorb, rotate = vectors.allocate, lanczos.absorb, vectors.rotate

    def read(*stacks: torch.Tensor) -> None:
        reads.rows += sum(x.shape[0] for x in stacks if x.untyped_storage().data_ptr() == reads.storage)

    def watched(call: Callable[..., Any], *operands: int) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            read(*(args[i] for i in operands))
            return call(*args)

        return counting

    def allocated(*args: Any, **options: Any) -> Any:
        out = allocate(*args, **options)
        reads.storage = out.untyped_storage().data_ptr()
        return out

    def absorbed(state: lanczos.State, product: Any, j: int, width: int = 1, **options: Any) -> lanczos.State:
        reads.present.append(j + width)
        reads.state = absorb(state, product, j, width, **options)
        return reads.state

    def rotated(stack: Any, s: torch.Tensor, tail: int) -> Any:
        read(stack[: len(s) + tail])
        return rotate(stack, s, tail)

    with (
        mock.patch.object(vectors, "allocate", allocated),
        mock.patch.object(lanczos, "absorb", absorbed),
        mock.patch.object(vectors, "rotate", rotated),
        mock.patch.object(vectors, "subtract", watched(vectors.subtract, 2)),
        mock.patch.object(tree, "gram", watched(tree.gram, 0, 1)),
        mock.patch.object(tree, "combine", watched(tree.combine, 1)),
    ):
        yield reads


class Outcome(NamedTuple):
    outside: list[float]  # share of a run spent outside the products, one entry a round
    per_product: list[float]  # seconds outside over seconds of one product, for each product
    reads: Reads
    solution: Solution


def operator(p: Problem) -> LinearOperator:
    return hessian(*functional_loss(p.model, p.criterion), p.batch)


def solved(A: LinearOperator, k: int, which: str, tol: float) -> Solution:
    return eigsh(A, k, which=which, tol=tol, seed=0)  # type: ignore[arg-type]


def measure(p: Problem, k: int, which: str, tol: float, rounds: int, progress: tqdm[Any]) -> Outcome:
    A, seconds = timed(operator(p))
    with counted_reads() as reads:
        solution = solved(A, k, which, tol)
    progress.update()
    outside, per_product = [], []
    for _ in range(rounds):
        seconds.clear()
        begun = time.perf_counter()
        solved(A, k, which, tol)
        rest = time.perf_counter() - begun - sum(seconds)
        outside.append(rest / (rest + sum(seconds)))
        per_product.append(rest / sum(seconds))
        progress.update()
    return Outcome(outside, per_product, reads, solution)


def table(results: dict[str, Outcome]) -> str:
    lines = [
        "| model | products (to verify) | outside products | overhead of a product | rows read a step | rows there | "
        "reads of the basis a step | orthogonality: basis, vectors |",
        "|---" * 8 + "|",
    ]
    for name, (outside, per_product, reads, solution) in results.items():
        stats, steps = solution.stats, len(reads.present)
        lines.append(
            f"| {name} | {stats.matvecs} ({stats.verification}) | {statistics.median(outside):.0%} | "
            f"{spread(per_product)} | {reads.rows / steps:.1f} | {sum(reads.present) / steps:.1f} | "
            f"{reads.per_step:.2f} | {reads.orthogonality:.0e}, {stats.orthogonality:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--which", choices=("LM", "LA", "SA", "BE"), default="LA")
    parser.add_argument("--tol", type=float, default=1e-4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    problems = {name: problem(name) for name in args.models}
    with tqdm(total=len(problems) * (args.rounds + 1)) as progress:
        results = {
            name: measure(p, args.k, args.which, args.tol, args.rounds, progress) for name, p in problems.items()
        }
    print(
        f"{machine()}; {args.rounds} rounds, medians [quartiles]; float32, k = {args.k}, {args.which}, tol {args.tol:g}"
    )
    print(", ".join(f"{name}: {p.size:,} parameters" for name, p in problems.items()), table(results), sep="\n\n")


if __name__ == "__main__":
    main()
