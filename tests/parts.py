"""What each of several processes does in tests/test_parts.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from eigenfunc import LinearOperator, checkpoint, completeness, eigsh, functional_loss, hessian, storage, tree
from eigenfunc.checkpoint import Checkpoint
from eigenfunc.distributed.parallel import data_parallel
from eigenfunc.errors import EigenfuncError
from eigenfunc.plan import plan
from tests.accelerator import Accelerator
from tests.ranks import COUNT, _said, batches, problem
from tests.test_storage import spectrum

PARTED: dict[str, dict[str, Any]] = {
    "LM": {"k": 3, "tol": 1e-8, "basis_size": 12},
    "BE": {"k": 3, "tol": 1e-6, "which": "BE", "basis_size": 16},
    "blocks": {"k": 3, "basis_size": 16, "block_size": 3},
    "half": {"k": 2, "basis_size": 14, "tol": 1e-2, "basis_dtype": torch.bfloat16},
}


def _shared() -> LinearOperator:
    """The Hessian over all of the data, of which rank 0 has 20 samples."""
    rank = dist.get_rank()
    model, inputs, targets = problem()
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
    return data_parallel(hessian, loss, params, batches(inputs, targets, 20 * rank, (20, COUNT)[rank]))


def _bits(solution: Any) -> Any:
    facts = {**solution.report(), "seconds": 0.0}
    tensors = [solution.values, solution.residuals, solution.bounds, *tree.leaves(solution.vectors)]
    return json.dumps(facts, default=str), [x.tolist() for x in tensors]


def parted(rank: int, size: int) -> dict[str, Any]:
    """Runs of a basis in parts, stopped and taken up; and files that do not fit together."""
    A, world, found = _shared(), dist.group.WORLD, dict[str, Any]()
    for name, how in PARTED.items():
        asked = {**how, "seed": 1, "group": world, "throw": False}
        whole = eigsh(A, **asked)
        same = []
        for call in range(1, whole.stats.passes, 5):
            path, left = Path(f"{name}{call}"), [call]

            def stop(left: list[int] = left) -> bool:
                left[0] -= 1
                return rank == 1 and left[0] == 0

            if _said(lambda: eigsh(A, **asked, checkpoint=Checkpoint(path, stop=stop)))[0] == "Stopped":  # noqa: B023
                same.append(_bits(eigsh(A, **asked, checkpoint=path)) == _bits(whole))
        found[name] = same
    path, asked = Path("LM6"), {**PARTED["LM"], "seed": 1, "group": world, "throw": False}
    own = path.with_name(f"LM6.rank{rank}")
    kept, later = own.read_bytes(), Path(f"LM1.rank{rank}").read_bytes()

    def put(content: bytes | None, aside: bytes | None = None) -> None:
        for place, what in ((own, content), (own.with_name(own.name + ".partial"), aside)):
            place.unlink(missing_ok=True)
            if what is not None:
                place.write_bytes(what)
        dist.barrier()

    again = partial(eigsh, A, **asked, checkpoint=path)
    put(later if rank == 1 else kept)
    found["other steps"] = _said(again)
    put(None if rank == 1 else kept)
    found["one missing"] = _said(again)
    put(kept[:-100] if rank == 1 else kept)
    found["one damaged"] = _said(again)
    put(kept)
    found["other problem"] = _said(partial(eigsh, A, **{**asked, "tol": 1e-3}, checkpoint=path))
    found["other matrix"] = _said(partial(eigsh, 2.0 * A, **asked, checkpoint=path))
    found["other matrix, afresh"] = _said(partial(eigsh, 2.0 * A, **asked, checkpoint=Checkpoint(path, resume=False)))
    found["no group"] = _said(partial(eigsh, torch.eye(4), 2, checkpoint=path))
    group = dist.new_group([0])
    if rank == 0:
        found["fewer processes"] = _said(partial(eigsh, torch.eye(4), 2, group=group, checkpoint=path))
    dist.barrier()
    Path("single").touch()
    found["of one process"] = _said(partial(eigsh, A, **asked, checkpoint=Path("single")))
    whole = _bits(eigsh(A, **asked))
    put(*((later, kept) if rank == 1 else (kept,)))  # it died when some files had been renamed
    found["renamed in part"] = _bits(again()) == whole
    put(kept, later[:-50] if rank == 1 else None)  # and here when not all had been written
    found["written in part"] = _bits(again()) == whole
    found["left aside"] = own.with_name(own.name + ".partial").exists()
    return found


def budgeted(rank: int, size: int) -> dict[str, Any]:
    """Budgets of a group, and what its processes hold; small pieces, and nothing that is held because it is small."""
    storage.PIECE = plan.__globals__["PIECE"] = 16_384
    plan.__globals__["FIXED"] = completeness._HELD = 0  # type: ignore[assignment]
    values, world = spectrum(60_001), dist.group.WORLD
    A, asked = LinearOperator(lambda v: values * v, values), {"tol": 1e-3, "group": world}
    found: dict[str, Any] = {"alone": plan(A, 3, tol=1e-3), "free": plan(A, 3, **asked)}
    budget = found["budget"] = int((0.9, 0.95)[rank] * found["free"]._replace(probes=1).memory_bytes)
    for name, how in BUDGETED.items():
        asked = {"tol": 1e-3, "group": world, **how}
        own = budget if name == "smaller" else None
        planned = plan(A, 3, **asked, memory_budget=own)
        with Accelerator() as mode:
            solution = eigsh(A, 3, **asked, seed=rank, memory_budget=own)
        off = (solution.values - values.double().sort(descending=True).values[:3]).abs()
        held = mode.most("cpu"), planned.memory_bytes
        found[name] = (planned, held, solution.stats.basis_size, bool((off <= solution.bounds).all()))
    found["one has a budget"] = plan(A, 3, **asked, memory_budget=budget if rank else None).basis_size
    found["refused"] = _said(lambda: plan(A, 3, **asked, memory_budget=10**12 if rank else 1000))
    return found


BUDGETED: dict[str, dict[str, Any]] = {
    "smaller": {},
    "blocks": {"block_size": 3},
    "half": {"basis_dtype": torch.float16},
}


def unrenamed(rank: int, size: int) -> dict[str, Any]:
    """Files that cannot be renamed on rank 1: the first, and then a later one, after which the run is stopped."""
    A, asked, renames = _shared(), {**PARTED["LM"], "seed": 1, "group": dist.group.WORLD}, [0]
    replaced, checkpoint.SHARE = os.replace, 1e9

    def refused(source: Any, target: Any) -> None:
        renames[0] += 1
        if rank == 1 and renames[0] == at:
            raise PermissionError(13, "Permission denied")
        replaced(source, target)

    found: dict[str, Any] = {}
    for at in (1, 3):
        renames[0], checkpoint.os.replace = 0, refused
        store = Checkpoint(f"run{at}", minutes=0, stop=lambda: renames[0] == 6)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            said = _said(partial(eigsh, A, **asked, checkpoint=store))
        found[at] = (*said, [str(warning.message) for warning in caught])
    checkpoint.os.replace = replaced
    found["same"] = _bits(eigsh(A, **asked, checkpoint="run3")) == _bits(eigsh(A, **asked))
    return found


def killed(rank: int, size: int) -> dict[str, Any]:
    """A run that saves itself at all times, and kills rank 1 where the folder's file `kill` says so."""
    calls, replaces, told = [0], [0], json.loads(Path("kill").read_text())
    B = _shared()

    def counted(v: Any) -> Any:
        calls[0] += 1
        if rank == 1 and calls[0] == told.get("product"):
            os.kill(os.getpid(), signal.SIGKILL)
        return B.matvec(v)

    def replace_(source: Any, target: Any) -> None:
        replaces[0] += 1
        if rank == 1 and replaces[0] == told.get("save"):
            os.kill(os.getpid(), signal.SIGKILL)
        replaced(source, target)

    replaced, checkpoint.os.replace, checkpoint.SHARE = os.replace, replace_, 1e9
    A = replace(B, matvec=counted)
    asked = {**PARTED["LM"], "seed": 1, "group": dist.group.WORLD}
    try:
        solution = eigsh(A, **asked, checkpoint=Checkpoint("run", minutes=0))
    except EigenfuncError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(7)
    count = calls[0]
    return {"calls": count, "bits": _bits(solution), "whole": _bits(eigsh(B, **asked))}
