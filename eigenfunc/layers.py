"""Curvature layer by layer: principal blocks of a matrix, and the eigenpairs of all of them for the sweeps of one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eigenfunc import scope, tree
from eigenfunc.certificate import seeded, whole
from eigenfunc.curvature.hessian import hessian
from eigenfunc.eigsh import Which, eigsh
from eigenfunc.errors import NotConverged, TransformError
from eigenfunc.operator import LinearOperator, Part, aslinearoperator
from eigenfunc.selection import By, grouped
from eigenfunc.solution import Solution
from eigenfunc.tree import Tree

Count = int | tuple[int, int]
Multiply = Callable[[Part], list[Tensor]]
Solver = Generator[Part, list[Tensor] | None, Solution]


def blocks(loss: Any, params: Tree, data: Any, *, by: By = "module", **options: Any) -> dict[str, LinearOperator]:
    """The principal Hessian block of each layer, by the layer's name, in the order in which `params` was filled.

    loss, params, data, options   as `hessian` takes them, which is set up and proved once for all layers
    by   "module", one block a module (the dotted prefix of its parameters' names, "" for the root's own); "parameter";
         a function from a parameter's name to that of its group; or a list of names, prefixes or glob patterns, one
         block each

    A block's vectors are dicts from parameter name to tensor. A product with one pulls the layer's gradient back to
    the layer's own parameters, which costs less than a whole product. `hessian(...).blocks(by)` is the same, and goes
    with every other `LinearOperator`; `eigsh_blocks` takes the eigenpairs of all blocks at once.

    Raises what `hessian` raises, and `InputError` where `by` selects nothing.
    """
    return hessian(loss, params, data, **options).blocks(by)


def eigsh_blocks(
    A: Any,
    k: Count = 6,
    *,
    by: By = "module",
    which: Which = "LM",
    tol: float = 1e-4,
    seed: int | None = None,
    basis_size: int | None = None,
    block_size: int | None = None,
    basis_dtype: torch.dtype | None = None,
    max_matvecs: int | None = None,
    progress: bool = False,
    throw: bool = True,
) -> dict[str, Solution]:
    """The k extreme eigenpairs of the principal block of every layer, in as many sweeps as one layer needs.

    A    the whole matrix, `hessian(...)` say; layers are `A.blocks(by)`
    k    for each layer; a layer of fewer parameters yields as many pairs as it has
    by   as `blocks` takes it; the other arguments are those of `eigsh`, and serve every layer

    Returns the `Solution` of each layer, by name: what `eigsh` finds for the block alone with the same seed, but for
    rounding, and with the same verdict. The solvers run in lockstep. Each goes as far as its next product, then one
    sweep over the data multiplies the vectors of all, each by its own block, so that the number of passes over the
    data is that of the layer that needs most of them (`stats.passes` counts a layer's own share, `stats.seconds` the
    time until it was done, the others' work included).

    Memory: the bases of all layers together are those of one `eigsh` of the whole, except that a layer of up to 400
    parameters may keep as many vectors as it has parameters. Where A cannot multiply a block by itself (a dense matrix,
    a function), a sweep takes one whole vector a layer.

    Raises `InputError` for arguments out of range and `NonFiniteError` for a product with NaN, with a note that names
    the layer, `TransformError` inside a torch.func transform, and `NotConverged`, whose `solution` is the dict.
    """
    if scope.inside_transform():
        raise TransformError("eigsh_blocks reads values, which no torch.func transform allows; call it outside")
    A = aslinearoperator(A)
    tree.check_vector_space(A.like, "the operator's `like`")
    groups = grouped(A.like, by, "by")
    seed = seeded(seed)[1]
    device = tree.device(A.like)

    def solve(members: Sequence[str], multiply: Multiply) -> Solution:
        asking = replace(A, principal=lambda parts: [multiply(part) for part in parts])
        block = asking.restrict(set(members).__contains__)
        return eigsh(
            block,
            _clipped(k, block.size),
            which=which,
            tol=tol,
            seed=seed,
            basis_size=basis_size,
            block_size=block_size,
            basis_dtype=basis_dtype,
            max_matvecs=max_matvecs,
            throw=False,
        )

    solvers = {name: _stepwise(name, partial(solve, members), device) for name, members in groups.items()}
    with (
        scope.full_precision(device),
        torch.inference_mode(False),
        torch.no_grad(),
        tqdm(disable=not progress, desc=f"eigsh_blocks {which}", unit=" sweeps", leave=False) as bar,
    ):
        found = _in_lockstep(A, solvers, bar)
    failed = [name for name, solution in found.items() if not solution.success]
    if failed and throw:
        first = found[failed[0]]
        raise NotConverged(
            f"{len(failed)} of {len(found)} layers have not converged: {', '.join(map(repr, failed))}. "
            f"{failed[0]!r}: {first.message}",
            found,
        )
    return {name: found[name] for name in groups}


def _in_lockstep(A: LinearOperator, solvers: dict[str, Solver], bar: Any) -> dict[str, Solution]:
    found: dict[str, Solution] = {}
    images: dict[str, list[Tensor] | None] = dict.fromkeys(solvers)
    try:
        while images:
            waiting: dict[str, Part] = {}
            for name, image in images.items():
                try:
                    waiting[name] = solvers[name].send(image)
                except StopIteration as end:
                    found[name] = end.value
            bar.set_postfix_str(f"{len(found)} of {len(solvers)} layers done")
            images = dict(zip(waiting, A.blockwise(list(waiting.values())) if waiting else [], strict=True))
            bar.update(bool(waiting))
    finally:
        for solver in solvers.values():
            solver.close()
    return found


def _stepwise(name: str, solve: Callable[[Multiply], Solution], device: torch.device) -> Solver:
    """A solver as a generator: it yields what it needs multiplied, is sent the image, and returns its solution.

    It runs in a thread of its own, because a product is asked for deep inside, but never at the same time as anybody
    else: the results depend on no timing. Closing the generator ends the thread.
    """
    asked: SimpleQueue[Any] = SimpleQueue()
    given: SimpleQueue[list[Tensor] | None] = SimpleQueue()
    stream = _current_stream(device)

    def multiply(part: Part) -> list[Tensor]:
        asked.put(part)
        image = given.get()
        if image is None:
            raise _Closed
        return image

    def run() -> None:
        try:
            with stream:
                asked.put(solve(multiply))
        except BaseException as error:
            asked.put(error)

    thread = threading.Thread(target=run, name=f"eigsh {name}", daemon=True)
    thread.start()
    try:
        while True:
            answer = asked.get()
            if isinstance(answer, Solution):
                return answer
            if isinstance(answer, BaseException):
                answer.add_note(f"in the block of layer '{name}'")
                raise answer
            given.put((yield answer))
    finally:
        given.put(None)
        thread.join()


class _Closed(BaseException):
    """Ends a solver that nobody waits for any more."""


def _current_stream(device: torch.device) -> AbstractContextManager[Any]:
    """The work queue of this thread on the device, to be entered in another thread."""
    if device.type != "cuda":
        return nullcontext()
    stream: AbstractContextManager[Any] = torch.cuda.stream(torch.cuda.current_stream(device))
    return stream


def _clipped(k: Count, n: int) -> Count:
    """k, or as many pairs as there are, those at the top first."""
    if isinstance(k, (tuple, list)) and len(k) == 2:
        top, bottom = (whole(part, "k", 0) for part in k)
        return min(top, n), min(bottom, n - min(top, n))
    return min(whole(k, "k", 1), n)
