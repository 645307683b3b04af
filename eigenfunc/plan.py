"""What a run of the solver is asked for, and the sizes chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc.certificate import whole
from eigenfunc.errors import InputError

SMALL = 400  # sizes at which a basis of the whole space costs nothing
ROOMY = 2**27  # entries of a basis that are had without asking
BLOCK = 8
WORTH = {10: 0.45, 20: 0.5, 50: 0.65}  # from this k on a block pays if its products take less than this share


class Side(NamedTuple):
    """One end of the spectrum that holds wanted values: those beyond the innermost of them, `sign` times outwards."""

    sign: int
    order: Tensor  # indices into the wanted values, from the innermost outwards


class Plan(NamedTuple):
    """What is wanted, checked, and the sizes chosen for it."""

    which: str
    top: int
    bottom: int
    tol: float
    n: int
    basis_size: int
    block_size: int
    max_matvecs: int

    @property
    def k(self) -> int:
        return self.top + self.bottom

    def wanted(self, theta: Tensor) -> Tensor:
        """Indices into the rising values `theta` of the wanted ones, in the order in which they are reported."""
        return self._ends(theta, self.top, self.bottom)

    def sides(self) -> list[Side]:
        rising = torch.arange(self.k)
        if self.which == "LM":
            return [Side(1, rising.flip(0)), Side(-1, rising.flip(0))]
        if self.which == "SA":
            return [Side(-1, rising.flip(0))]
        both = [Side(1, rising[: self.top].flip(0)), Side(-1, rising[self.top :])]
        return [side for side in both if len(side.order)]

    def outward(self, values: Tensor, sign: int) -> Tensor:
        """`values` as distances outwards, to one side."""
        return values.abs() if self.which == "LM" else sign * values

    def reported(self, values: Tensor) -> Tensor:
        """Indices of k rising values in the order in which they are reported."""
        if self.which == "LM":
            return torch.argsort(values.abs(), descending=True, stable=True)
        return torch.arange(self.k) if self.which == "SA" else torch.arange(self.k - 1, -1, -1)

    def kept(self, theta: Tensor, count: int) -> Tensor:
        """Indices of the `count` pairs to keep at a restart: the wanted and the next in line."""
        extra = count - self.k
        up = extra if self.bottom == 0 else 0 if self.top == 0 else extra - extra // 2
        return self._ends(theta, self.top + up, self.bottom + extra - up)

    def _ends(self, theta: Tensor, top: int, bottom: int) -> Tensor:
        if self.which == "LM":
            return torch.argsort(theta.abs(), descending=True, stable=True)[:top]
        falling = torch.arange(len(theta) - 1, -1, -1)
        if self.which == "SA":
            return torch.arange(bottom)
        return torch.cat([falling[:top], falling[len(theta) - bottom :]])


def plan_for(
    k: int | Sequence[int],
    which: str,
    tol: float,
    n: int,
    *,
    basis_size: int | None = None,
    block_size: int | None = None,
    block_ratio: Callable[[], float] | None = None,
    max_matvecs: int | None = None,
) -> Plan:
    """Check what is asked for and choose what is not; `InputError` says what is wrong."""
    top, bottom = ends(k, which)
    wanted = top + bottom
    if not 1 <= wanted <= n:
        raise InputError(f"k = {k} eigenpairs of a matrix of size {n}: k must lie between 1 and n")
    if not (isinstance(tol, (int, float)) and 0 < tol < 1):
        raise InputError(f"tol must lie between 0 and 1 (it is relative to each eigenvalue), got {tol!r}")
    if block_size is None:
        block_size = _block_for(wanted, which, None if basis_size else block_ratio)
    block = min(whole(block_size, "block_size", 1), n)
    if basis_size is None:
        edge = 120 if 120 * n <= ROOMY else min(max(4 * wanted + 20, 60), 120)  # a dense edge wants a large basis
        basis_size = max(2 * wanted + 10, 16) if which in ("LM", "LA") else edge
        basis_size = max(basis_size, wanted + 20, wanted + 6 * block if block > 1 else 0)
        if n <= max(2 * basis_size, SMALL):
            basis_size = n
    least = min(wanted + 3 + block, n)
    size = min(whole(basis_size, "basis_size", 1), n)
    if size < least:
        raise InputError(
            f"basis_size must be at least {least} for k = {wanted}, blocks of {block} and n = {n}, got {basis_size}"
        )
    budget = max(1000, 50 * wanted) if max_matvecs is None else whole(max_matvecs, "max_matvecs", 1)
    return Plan(which, top, bottom, tol, n, size, block, budget)


def ends(k: int | Sequence[int], which: str) -> tuple[int, int]:
    """How many values are wanted at the top and at the bottom."""
    if which not in ("LM", "LA", "SA", "BE"):
        raise InputError(f"which must be 'LM', 'LA', 'SA' or 'BE', got {which!r}")
    if isinstance(k, (tuple, list)) and which == "BE" and len(k) == 2:
        return whole(k[0], "k", 0), whole(k[1], "k", 0)
    count = whole(k, "k", 1)
    return {"BE": ((count + 1) // 2, count // 2), "SA": (0, count)}.get(which, (count, 0))


def _block_for(k: int, which: str, measure: Callable[[], float] | None) -> int:
    """1, or `BLOCK` where `measure` finds blocks of products so much cheaper that they make up for needing more."""
    if measure is None or k < min(WORTH) or which in ("SA", "BE"):
        return 1  # there a block would have to be cheaper than any is
    return BLOCK if measure() <= max(share for least, share in WORTH.items() if k >= least) else 1
