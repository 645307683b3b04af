"""The registry of the zoo: what a case is, and how one is put on the list."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import seeded
from tests.zoo.thirdparty import in_double, quiet, torchvision_schemas

Problem = tuple[nn.Module, Callable[[nn.Module, Any], Tensor], Any]  # model, loss_fn(model, batch) -> (), batch
Make = Callable[[], Problem]
SEED = 5


@dataclass(frozen=True)
class Case:
    """One model with its loss and batch, made anew and the same at each call of `problem`.

    refusable  no correct second derivative can be had from it, so that a refusal is the right answer
    needs      packages beyond torch
    truth      the same function, written so that plain differentiation sees it: constants held as constants
               rather than under no_grad, attention in elementary operations
    tolerance  relative accuracy asked of float32 products, and of float64 ones where torch's own constants are coarser
    """

    name: str
    make: Make
    refusable: bool = False
    needs: tuple[str, ...] = ()
    truth: Make | None = None
    tolerance: tuple[float, float] = (1e-3, 1e-8)

    def problem(self, dtype: torch.dtype = torch.float32) -> Problem:
        return self._problem(self.make, dtype)

    def truthful(self) -> Problem:
        """What the reference differentiates, in float64."""
        return self._problem(self.truth or self.make, torch.float64)

    def missing(self) -> list[str]:
        return [package for package in self.needs if importlib.util.find_spec(package) is None]

    def _problem(self, make: Make, dtype: torch.dtype) -> Problem:
        with seeded(SEED), quiet():
            if self.needs:
                torchvision_schemas()
            model, loss_fn, batch = make()
        if dtype is torch.float64:
            model, batch = model.double(), doubled(batch)
            if self.needs:
                loss_fn = in_double(loss_fn)
        return model, loss_fn, batch


CASES: dict[str, Case] = {}


def case(name: str, make: Make | None = None, **options: Any) -> Callable[[Make], Make]:
    """Register a function that makes a problem, as a decorator or at once."""

    def register(make: Make) -> Make:
        if name in CASES:
            raise ValueError(f"two cases are called {name!r}")
        CASES[name] = Case(name, make, **options)
        return make

    if make is not None:
        register(make)
    return register


def doubled(batch: Any) -> Any:
    """The batch with its floating-point tensors in float64."""
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: doubled(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(doubled(value) for value in batch)
    return batch


def supervised(model: nn.Module, criterion: Callable[[Any, Any], Tensor], x: Any, y: Any) -> Problem:
    """The usual problem: a criterion of the outputs and the targets."""
    return model, lambda model, batch: criterion(model(batch[0]), batch[1]), (x, y)
