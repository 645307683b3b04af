"""A run of the solver and its checkpoint: whether what was saved is of the same problem, and going on from it."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenfunc import checkpoint as files, scope, tree
from eigenfunc.certificate import Products
from eigenfunc.checkpoint import Checkpoint, Journal, Saved
from eigenfunc.errors import CheckpointError, CheckpointWarning, InputError
from eigenfunc.thick_restart import Run

Asked = dict[str, Any]  # by name: what a file must agree with, plain values


class Witness(NamedTuple):
    """By which a matrix is known again: a product with a random vector, in a run of blocks the last of block + 1."""

    drawn: Tensor  # the state of the generator that gives the vector
    image: Tensor  # (1, n), over the scale of the run


def opened(
    checkpoint: str | os.PathLike[str] | Checkpoint | None, products: Products, asked: Asked
) -> tuple[Checkpoint | None, Saved | None]:
    """Where to save to, this process's part if there are several, and what is there to go on from, if anything.

    `CheckpointError` for a file that does not agree with what is asked, to which the tree is added; if the run is to
    start afresh, for one of another matrix too, because it would be overwritten. `InputError` for a sum over processes
    without their group.
    """
    if checkpoint is None:
        return None, None
    leaves = zip(tree.names(products.A.like), tree.leaves(products.A.like), strict=True)
    asked["tree"] = [f"{name} {tuple(leaf.shape)} {leaf.dtype}" for name, leaf in leaves]
    asked["processes"] = 1 if products.columns is None else products.columns.team.size
    store = products.attempt(lambda: _store(checkpoint, products))
    saved = files.read(Path(store.path), None if products.columns is None else products.columns.team)
    if saved is None:
        return store, None
    products.attempt(lambda: _compare(store, saved, asked))
    if store.resume:
        return store, saved
    with scope.full_precision(products.device), torch.no_grad(), products.summed():
        _multiply_again(store, saved, products.again())
    return store, None


def _store(checkpoint: str | os.PathLike[str] | Checkpoint, products: Products) -> Checkpoint:
    files.require()
    store = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    path = Path(store.path)
    if products.columns is not None:
        if path.exists():
            raise CheckpointError(f"{path} is of one process. Leave out group, or give another path")
        return replace(store, path=files.part_of(path, products.columns.team.rank))
    if products.A.choices.shared:
        raise InputError(
            "this operator is a sum over processes, each of which would save at times of its own, so that the files of "
            "a run that was killed would not fit together. Give their group too, and they save together"
        )
    if files.part_of(path, 0).exists():
        raise CheckpointError(f"{path} is of several processes. Give their group, or another path")
    return store


def defaults(saved: Saved, basis_size: int | None, block_size: int | None, seed: int | None) -> list[int]:
    """As given, or as they were."""
    given = {"basis_size": basis_size, "block_size": block_size, "seed": seed}
    return [saved.facts["asked"][name] if value is None else value for name, value in given.items()]


def restore(store: Checkpoint, saved: Saved, run: Run, asked: Asked) -> Witness:
    """Go on from the file, having made sure that it is of the same matrix."""
    _compare(store, saved, asked)
    run.products.attempt(lambda: run.products.A.choices.take(saved.facts["choices"]))
    if not _multiply_again(store, saved, run.products):
        warnings.warn(
            f"products repeat those behind {store.path} up to rounding, but not bit for bit: the result is as true as "
            "without a stop, and may differ in its last digits. For the same digits take the same machine, number of "
            f"threads and versions (then torch {saved.facts['torch']}, now {torch.__version__})",
            CheckpointWarning,
            stacklevel=4,
        )
    run.restore(saved)
    return Witness(saved.tensors["drawn"], saved.tensors["image"])


def journal(store: Checkpoint, run: Run, asked: Asked, witness: Witness, begun: float, saves: int) -> Journal:
    """Saves the run, now and from now on: a disk that does not take the file is found out at once."""
    choices, columns = run.products.A.choices, run.products.columns

    def constant() -> Saved:
        return Saved(witness._asdict(), {"asked": asked, "choices": choices.tell()})

    made = Journal(store, constant, begun, None if columns is None else columns.team, saves)
    made.save(run.snapshot)
    return made


def _compare(store: Checkpoint, saved: Saved, asked: Asked) -> None:
    for what, now in json.loads(json.dumps(asked, default=str)).items():
        then = saved.facts["asked"][what]
        if then != now:
            if isinstance(now, list):
                then, now = next((a, b) for a, b in zip_longest(then, now, fillvalue="none") if a != b)
            raise CheckpointError(
                f"{store.path} is of another problem: {what} was {then} there and is {now} here. Ask for the same as "
                "then, or give another path"
            )


def _multiply_again(store: Checkpoint, saved: Saved, products: Products) -> bool:
    """Whether a product repeats bit for bit; `CheckpointError` if not even up to rounding."""
    facts = saved.facts["products"]
    products.scale = facts["scale"]
    then = saved.tensors["image"].to(products.device)
    vector, block = products.random(_generator(saved.tensors["drawn"])), saved.facts["asked"]["block_size"]
    # in as large a stack, in which it matters to no other row what a row holds
    now = products(vector.expand(block + 1 if block > 1 else 1, -1).contiguous())[-1:]
    if products.every(torch.equal(now, then)):
        return True
    length = float(tree.norm(then))
    off = float(tree.norm(now - then))
    rounding = 10 * max(products.eps, facts["noise"]) * length + 2 * products.declared
    if off <= rounding:
        return False
    raise CheckpointError(
        f"{store.path} is of another matrix: a product of norm {length:.3g} differs from what it was by {off:.1e}, and "
        f"rounding explains {rounding:.1e}. Take the loss, the parameters and the data of then, or give another path"
    )


def _generator(state: Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator
