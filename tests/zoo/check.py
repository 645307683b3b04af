"""Runs a case through the library and says whether the answer is right, refused, or wrong."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from eigenfunc import functional_loss, hessian, hvp
from eigenfunc.errors import EigenfuncError
from tests.helpers import seeded, untouched
from tests.zoo.cases import CASES, SEED, Case
from tests.zoo.reference import Blocks, Reference, direction, reference, whole
from tests.zoo.thirdparty import quiet

FLOOR = {torch.float64: 1e-6, torch.float32: 1e-3}  # blocks below this share of the whole are held against it
Kind = Literal["hessian", "hvp"]
Verdict = Literal["right", "refused", "raised", "WRONG"]


@dataclass(frozen=True)
class Outcome:
    verdict: Verdict  # refused: a typed error of the library's; raised: any other
    worst: float  # largest relative error of a block
    words: str  # the way that was used, or the error
    seconds: float


@cache
def truth(name: str) -> Reference:
    return reference(CASES[name])


def tolerance(case: Case, dtype: torch.dtype) -> float:
    return case.tolerance[dtype is torch.float64]


def coarseness(name: str, dtype: torch.dtype) -> float:
    """The largest estimated error of a block of the reference, relative as the product's is."""
    known = truth(name)
    return max(_over(error, known.scale(block, FLOOR[dtype])) for block, error in known.errors.items())


@cache
def outcome(name: str, dtype: torch.dtype, kind: Kind) -> Outcome:
    """What the library's `hessian` or `hvp` does on a case; the model must be untouched whatever it is."""
    case = CASES[name]
    model, loss_fn, batch = case.problem(dtype)
    v = {n: u.to(dtype) for n, u in direction(case).items()}
    start = time.perf_counter()
    with quiet(), seeded(SEED), untouched(model):
        try:
            image, words = _PRODUCTS[kind](model, loss_fn, batch, v)
        except EigenfuncError as error:
            return Outcome("refused", 0.0, f"{type(error).__name__}: {error}", time.perf_counter() - start)
        except Exception as error:  # whatever torch or the model raises
            return Outcome("raised", 0.0, f"{type(error).__name__}: {error}", time.perf_counter() - start)
    seconds = time.perf_counter() - start
    worst, where = worst_block(image, truth(name), dtype)
    right = worst <= tolerance(case, dtype)
    return Outcome("right" if right else "WRONG", worst, words if right else f"block {where}; {words}", seconds)


def worst_block(image: Blocks, known: Reference, dtype: torch.dtype) -> tuple[float, str]:
    assert image.keys() == known.blocks.keys()
    errors = {
        name: _over(whole({name: block.double() - known.blocks[name]}), known.scale(name, FLOOR[dtype]))
        for name, block in image.items()
    }
    where = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return (errors[where] if errors[where] == errors[where] else float("inf")), where


def _over(error: float, scale: float) -> float:
    return error / scale if scale > 0 else 0.0 if error == 0 else float("inf")


def _by_hessian(model: Any, loss_fn: Any, batch: Any, v: Blocks) -> tuple[Blocks, str]:
    loss, params = functional_loss(model, loss_fn=loss_fn)
    A = hessian(loss, params, batch)
    return A(v), A.describe()


def _by_hvp(model: Any, loss_fn: Any, batch: Any, v: Blocks) -> tuple[Blocks, str]:
    loss, params = functional_loss(model, loss_fn=loss_fn)
    return hvp(loss, params, batch, v), "hvp"


_PRODUCTS = {"hessian": _by_hessian, "hvp": _by_hvp}
