"""Hessian-vector products in float64 that owe nothing to the library, block by block, each with its error.

Two truths: differences of ordinary gradients, extrapolated (Ridders), which ask no second derivative of autograd;
and plain double backward, which is more accurate where it is right. It is taken where the differences confirm it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.helpers import seeded
from tests.zoo.cases import SEED, Case
from tests.zoo.thirdparty import quiet

Blocks = dict[str, Tensor]
Accurate = tuple[Blocks, dict[str, float]]  # blocks, and how far off each may be


@dataclass(frozen=True)
class Reference:
    blocks: Blocks
    errors: dict[str, float]  # estimated norm of the error of each block
    source: str

    def scale(self, name: str, floor: float) -> float:
        """What the error of a block is relative to: its norm, or a share of the whole where it is smaller."""
        return max(_norm(self.blocks[name]), floor * whole(self.blocks))


def whole(blocks: Blocks) -> float:
    return sum(_norm(block) ** 2 for block in blocks.values()) ** 0.5


def direction(case: Case) -> Blocks:
    """A random vector that float32 holds exactly, so that it is the same in both precisions."""
    generator = torch.Generator().manual_seed(11)
    model = case.problem()[0]
    return {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters() if p.requires_grad}


def reference(case: Case) -> Reference:
    model, loss_fn, batch = case.truthful()
    v = {name: u.double() for name, u in direction(case).items()}
    with quiet(), torch.enable_grad():
        twin = _Twin(model, loss_fn, batch)
        differences, coarse = _ridders(twin.slopes, v, twin.size() / whole(v))
        try:
            exact, fine = _double_backward(twin, v)
        except (RuntimeError, NotImplementedError) as error:
            why = str(error).strip().splitlines()[0][:80]
            return Reference(differences, coarse, f"differences, as double backward raises: {why}")
    if _confirmed(exact, fine, differences, coarse):
        return Reference(exact, fine, "double backward, as differences confirm")
    return Reference(differences, coarse, "differences, as double backward disagrees")


class _Twin:
    """A model that is put back before each evaluation, whatever its forward pass writes into it."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any) -> None:
        self.model, self.loss_fn, self.batch = model, loss_fn, batch
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._held = [(x, x.detach().clone()) for x in (*model.parameters(), *model.buffers())]

    def size(self) -> float:
        return whole({name: p.detach() for name, p in self.params.items()})

    def value(self, step: float = 0.0, v: Blocks | None = None) -> Tensor:
        with torch.no_grad():
            for x, held in self._held:
                x.copy_(held)
            for name, u in (v or {}).items():
                self.params[name].add_(u, alpha=step)
        with seeded(SEED):
            return self.loss_fn(self.model, self.batch).reshape(())

    def slopes(self, step: float, v: Blocks) -> Blocks:
        """The gradient at params + step v, by backward(), which every model supports."""
        self.model.zero_grad(set_to_none=True)
        self.value(step, v).backward()
        slopes = {n: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for n, p in self.params.items()}
        self.model.zero_grad(set_to_none=True)
        return {name: slope.detach().clone() for name, slope in slopes.items()}


def _ridders(slopes: Callable[[float, Blocks], Blocks], v: Blocks, scale: float, levels: int = 10) -> Accurate:
    """Central differences at steps that fall by 4, extrapolated to 0; for each block the entry that moved least."""
    best: Blocks = {}
    errors: dict[str, float] = {}
    row: list[Blocks] = []
    for level in range(levels):
        step = 5e-3 * scale / 4**level
        ahead, behind = slopes(step, v), slopes(-step, v)
        before, row = row, [{name: (ahead[name] - behind[name]) / (2 * step) for name in v}]
        for order, previous in enumerate(before, start=1):
            weight = 16.0**order
            row.append({n: (weight * row[-1][n] - previous[n]) / (weight - 1) for n in v})
            for name in v:
                moved = max(_norm(row[-1][name] - row[-2][name]), _norm(row[-1][name] - previous[name]))
                if moved < errors.get(name, float("inf")):
                    best[name], errors[name] = row[-1][name], moved
    return best, errors


def _double_backward(twin: _Twin, v: Blocks) -> Accurate:
    """autograd.grad twice; its rounding error is read off H v1 + H v2 against H (v1 + v2)."""
    leaves = list(twin.params.values())
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    with sdpa_kernel(SDPBackend.MATH):
        slopes = torch.autograd.grad(twin.value(), leaves, create_graph=True, **options)
        live = [(slope, name) for slope, name in zip(slopes, twin.params, strict=True) if slope.requires_grad]

        def image(u: Blocks) -> Blocks:
            outputs, along = [slope for slope, _ in live], [u[name] for _, name in live]
            pulled = torch.autograd.grad(outputs, leaves, along, retain_graph=True, **options)
            return {name: block.detach() for name, block in zip(twin.params, pulled, strict=True)}

        generator = torch.Generator().manual_seed(13)
        part = {n: u * torch.rand(u.shape, generator=generator, dtype=torch.float64) for n, u in v.items()}
        exact, first, rest = image(v), image(part), image({n: v[n] - part[n] for n in v})
    eps = torch.finfo(torch.float64).eps
    return exact, {n: _norm(x - first[n] - rest[n]) + eps * _norm(x) for n, x in exact.items()}


def _confirmed(exact: Blocks, fine: dict[str, float], differences: Blocks, coarse: dict[str, float]) -> bool:
    """Whether the two agree within their errors, where these are small enough to show a wrong formula."""
    total = whole(differences)
    for name, block in exact.items():
        scale = max(_norm(block), 1e-3 * total)
        apart = _norm(differences[name] - block)  # in this order, for the block of an embedding may be sparse
        if coarse[name] > 1e-5 * scale or apart > max(10 * (coarse[name] + fine[name]), 1e-8 * scale):
            return False
    return True


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))
