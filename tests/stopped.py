"""Runs that are stopped on purpose, and a comparison to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eigenfunc import checkpoint, eigsh, tree
from eigenfunc.checkpoint import Checkpoint, Saved
from eigenfunc.errors import Stopped
from eigenfunc.operator import LinearOperator
from eigenfunc.solution import Solution


@pytest.fixture(autouse=True, scope="module")
def quick_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", lambda handle: None)
        yield


def diagonal(values: Tensor) -> LinearOperator:
    return LinearOperator(lambda v: values * v, values)


def spectrum(kind: str, n: int = 100, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(5)
    bulk = (2 * torch.rand(n, generator=g, dtype=torch.float64) - 1) ** 3
    values = {
        "bulk": bulk,
        "copies": torch.cat([torch.ones(4).double(), 0.7 * bulk])[:n],  # that the start vector cannot find
        "few": (torch.arange(n) % 3).double(),  # so that the Krylov space is soon exhausted
        "zero": torch.zeros(n).double(),
        "huge": 1e200 * bulk,
    }[kind]
    return values.to(dtype)


class After:
    """Says stop at one call, counted from 1."""

    def __init__(self, call: int) -> None:
        self.left = call

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def assert_same(a: Solution, b: Solution) -> None:
    for name in ("values", "residuals", "bounds", "sharp", "angles", "converged"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for x, y in zip(tree.leaves(a.vectors), tree.leaves(b.vectors), strict=True):
        assert torch.equal(x, y)
    assert {**asdict(a.stats), "seconds": 0} == {**asdict(b.stats), "seconds": 0}
    assert (a.status, a.message, a.noise) == (b.status, b.message, b.noise)


def stopped(A: Any, path: Path, call: int, **asked: Any) -> Saved | None:
    """What is saved of a run that is stopped after some products, or None if it ends before."""
    try:
        eigsh(A, **asked, checkpoint=Checkpoint(path, stop=After(call)), throw=False)
    except Stopped:
        return checkpoint.read(path)
    return None
