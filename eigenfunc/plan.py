"""What a run of the solver is asked for, and the sizes chosen for it."""

from __future__ import annotations

import math
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenfunc import storage, tree
from eigenfunc.certificate import check_tolerance, whole
from eigenfunc.distributed.team import Group, Team, team_of
from eigenfunc.errors import BudgetError, InputError, StorageError
from eigenfunc.operator import aslinearoperator
from eigenfunc.storage import PIECE

SMALL = 400  # sizes at which a basis of the whole space costs nothing
ROOMY = 2**27  # entries of a basis that are had without asking
BLOCK = 8
HALF = 1e-4  # the least tolerance at which a basis in half precision may do
PROBE = 8  # products of a proof of completeness after which a limit within the tolerance will do; vectors it holds
PROBES = 4  # random vectors that such a proof takes at once, at most: more of them save next to no passes
SMALLEST = 12  # vectors of a basis: with fewer, a cluster of five values can keep one pair from converging for ever
FIXED = 64 * 2**20  # what a first product loads
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
    dtype: torch.dtype = torch.float32  # of the products
    basis_dtype: torch.dtype | None = None  # a shorter one for the basis
    basis_path: str | None = None  # the folder that holds the basis, instead of the memory
    basis_device: str | None = None  # "cpu" for a basis in the main memory, beside vectors on an accelerator
    kept_bytes: int = 0  # what the operator keeps between products
    processes: int = 1  # of a group, each of which holds a part of the vectors
    probes: int = PROBES  # random vectors that a proof takes at once where a first try has left it open

    @property
    def width(self) -> int:
        """Entries of the part of a vector that a process holds."""
        return -(-self.n // self.processes)

    @property
    def place(self) -> storage.Place:
        """Where the basis is, if not where the vectors are."""
        return torch.device(self.basis_device) if self.basis_path is None and self.basis_device else self.basis_path

    @property
    def basis_bytes(self) -> int:
        """Of the basis, wherever it is."""
        rows = self.basis_size + self.block_size
        return rows * self.width * (self.basis_dtype or self.dtype).itemsize

    @property
    def working_bytes(self) -> int:
        """Of memory beside the basis and the products' own, at most: a step, the proof of completeness, the end."""
        probes = self.retried
        vector = self.width * self.dtype.itemsize
        rows = self.basis_size + self.block_size
        scratch = 2 * rows * min(PIECE, self.width) * self.dtype.itemsize + FIXED
        if self.processes > 1:  # whole vectors, gathered for a product, or drawn, or returned
            together = max(self.block_size, probes + (self.k if self.block_size > 1 else 0), self.k)
            scratch += max(2 * together, 3) * self.n * self.dtype.itemsize
        step, proof, held, end = 4 * self.block_size + 2, 6 * probes, PROBE * probes, 5 * self.k + 3
        if self.block_size > 1 or self.basis_dtype is not None:
            proof += 4 * self.k  # what its first product takes along, or pairs that are certified before it
        if self.basis_dtype is not None:
            end = 7 * self.k + 5  # those pairs become a basis of their own
        if self.basis_device is not None:
            return scratch + vector * max(step, proof, end)
        if self.basis_path is None or self.basis_dtype is not None:
            return scratch + vector * max(step, proof + held, end)
        return scratch + vector * max(step, proof)

    @property
    def tried(self) -> int:
        """Random vectors that a proof takes at first."""
        return min(self.block_size, PROBES)

    @property
    def retried(self) -> int:
        """Those that it takes where the first have left it open."""
        return max(self.probes, self.tried)

    @property
    def memory_bytes(self) -> int:
        """At most, of the solver: beside the model, what the operator keeps, and what its products need. In a group
        that is for each process, which holds a part of the vectors. For vectors on an accelerator it is memory of that,
        see `host_bytes`."""
        return self.working_bytes + (self.basis_bytes if self.place is None else 0)

    @property
    def host_bytes(self) -> int:
        """At most, of the main memory beside an accelerator, page-locked: for the basis, and what a proof holds."""
        held = PROBE * self.retried * self.width * self.dtype.itemsize
        return 0 if self.basis_device is None else self.basis_bytes + held

    @property
    def disk_bytes(self) -> int:
        """At most, in files without a name that go with the solution at the latest."""
        vectors = (PROBE * self.retried + 3 * self.k) * self.width * self.dtype.itemsize
        return 0 if self.basis_path is None else self.basis_bytes + vectors

    @property
    def expected_matvecs(self) -> tuple[int, int]:
        """The fewest and the most products, verification included, that runs of this kind take as a rule: so it was in
        nine of ten of 249 runs on spectra with outliers above a bulk, as trained networks have. Clusters of values
        take more, up to `max_matvecs` and what verifies."""
        return _expected(self)

    def __str__(self) -> str:
        """A short table: what it takes in memory, on disk, in products."""
        low, high = self.expected_matvecs
        expected = str(low) if low == high else f"{low} to {high}"
        dtype = str(self.basis_dtype or self.dtype).removeprefix("torch.")
        place = "in memory" if self.basis_path is None else f"on disk in {self.basis_path}"
        place = "in the main memory" if self.basis_device else place
        share = "" if self.processes == 1 else f", the part of one of {self.processes} processes"
        block = "" if self.block_size == 1 else f", in blocks of {self.block_size}"
        lines = {
            "basis": f"{tree.gibibytes(self.basis_bytes)} {place}: {self.basis_size} + {self.block_size} vectors of "
            f"{self.n:,} in {dtype}{share}",
            "at work": f"{tree.gibibytes(self.working_bytes)} at most, the proof and the end with its vectors included",
            "kept": f"{tree.gibibytes(self.kept_bytes)} by the operator, graphs of the gradient",
            "products": f"{expected} as a rule{block}, {self.max_matvecs} at most beside those that verify",
        }
        return "\n".join(f"{name:<10}{text}" for name, text in lines.items())

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
    check_tolerance(tol, "each eigenvalue")
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


def plan(
    A: Any,
    k: int | Sequence[int] = 6,
    *,
    which: str = "LM",
    tol: float = 1e-4,
    basis_size: int | None = None,
    block_size: int | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_path: str | os.PathLike[str] | None = None,
    basis_device: str | torch.device | None = None,
    max_matvecs: int | None = None,
    memory_budget: int | None = None,
    group: Group = None,
) -> Plan:
    """What `eigsh` would do with these arguments, before it does it: sizes, bytes, and how many products to expect.

    Printed it is a short table. No product is formed, but where k ≥ 10 and nothing is cached the operator is timed, in
    blocks and one by one. The bytes are upper limits. How many products it takes depends on the spectrum, which nobody
    knows yet: the range is that of measured runs (see `Plan.expected_matvecs`), and no promise.

    With a group it is called by every process, and the plan is the same on each, as it has to be: the smallest budget
    counts, and the least main memory and disk that are there for one.

    Raises `InputError` for arguments out of range, `BudgetError` where nothing fits into the budget, `StorageError`
    where the disk or the main memory is too small.
    """
    A = aslinearoperator(A)
    tree.check_vector_space(A.like, "the operator's `like`")
    if basis_dtype not in (None, torch.float16, torch.bfloat16):
        raise InputError(f"basis_dtype must be torch.float16 or torch.bfloat16, or left out, got {basis_dtype!r}")
    team = None if group is None else team_of(group)
    sizes = {"basis_size": basis_size, "block_size": block_size, "max_matvecs": max_matvecs}
    chosen = plan_for(k, which, tol, A.size, block_ratio=_agreed(A.block_ratio, team), **sizes)._replace(
        dtype=tree.work_dtype(A.like), basis_dtype=basis_dtype, kept_bytes=A.kept_bytes()
    )
    chosen = chosen._replace(processes=1 if team is None else team.size)
    on_cpu = tree.device(A.like).type == "cpu"
    if basis_device is not None:
        if str(basis_device) != "cpu":
            raise InputError(f"basis_device must be 'cpu', the main memory, or left out, got {basis_device!r}")
        chosen = chosen._replace(basis_device=None if on_cpu else "cpu")
    if basis_path is not None:
        if not on_cpu or not os.path.isdir(basis_path):
            what = "needs vectors on the CPU" if os.path.isdir(basis_path) else f"must be a folder, got {basis_path!r}"
            raise InputError(f"basis_path {what}")
        storage.check()
        chosen = chosen._replace(basis_path=os.fspath(basis_path))
    budget = math.inf if memory_budget is None else whole(memory_budget, "memory_budget", 1)
    room = None if memory_budget is None and team is None else _room(budget, on_cpu, team)
    if room is not None and room.budget < math.inf:
        chosen = _within(chosen, room, sized=basis_size is not None)
    check = partial(_check_room, chosen)
    if team is None:
        check()
    else:
        team.attempt(check)
    return chosen


def _agreed(measure: Callable[[], float] | None, team: Team | None) -> Callable[[], float] | None:
    """A measurement, the largest of all processes."""
    if measure is None or team is None:
        return measure
    return lambda: max(team.gather(measure()))


class _Room(NamedTuple):
    """Bytes that a process may take, the same on each."""

    budget: float  # infinite where none is given
    aside: float  # of the main memory beside an accelerator
    disk: float  # of the temporary folder


def _room(budget: float, on_cpu: bool, team: Team | None) -> _Room:
    """What every process has; what is there of a machine is divided by those that run on it."""
    folder = tempfile.gettempdir()
    disk = storage.free(folder) if on_cpu and storage.POSSIBLE and not storage.in_memory(folder) else 0
    own = _Room(budget, 0 if on_cpu else storage.available(), disk)
    if team is None:
        return own
    told = team.gather((socket.gethostname(), own))
    machines = [machine for machine, _ in told]
    fair = [(room.budget, *(part / machines.count(at) for part in room[1:])) for at, room in told]
    return _Room(*map(min, zip(*fair, strict=True)))


def _check_room(chosen: Plan) -> None:
    """`StorageError` where a place that was asked for is too small."""
    if storage.available() < chosen.host_bytes:
        raise StorageError(
            f"the main memory has {tree.gibibytes(storage.available())} free, and the run needs "
            f"{tree.gibibytes(chosen.host_bytes)} there: leave out basis_device, or take a smaller basis_size"
        )
    if chosen.basis_path is not None and storage.free(chosen.basis_path) < chosen.disk_bytes:
        raise StorageError(
            f"{chosen.basis_path} has {tree.gibibytes(storage.free(chosen.basis_path))} free, and the run needs "
            f"{tree.gibibytes(chosen.disk_bytes)} there: take another basis_path, or a smaller basis_size"
        )


def _within(chosen: Plan, room: _Room, *, sized: bool) -> Plan:
    """The first that fits: as chosen, a smaller basis, one in half precision, one in the main memory beside an
    accelerator, one on disk. Of these none is given up for the random vectors of later tries at a proof: those are as
    many as the memory then allows."""
    most, chosen = chosen.probes, chosen._replace(probes=chosen.tried)
    options, budget = [chosen], room.budget
    if chosen.place is None:
        options += [] if sized else [_shrunk(chosen, budget)]
        if chosen.basis_dtype is None and chosen.which in ("LM", "LA") and chosen.tol >= HALF:
            half = chosen._replace(basis_dtype=torch.float16)
            options += [half] if sized else [half, _shrunk(half, budget)]
        aside = chosen._replace(basis_device="cpu")
        if room.aside >= aside._replace(probes=most).host_bytes:
            options.append(aside)
        spilt = chosen._replace(basis_path=tempfile.gettempdir())
        if room.disk >= spilt._replace(probes=most).disk_bytes:
            options.append(spilt)
    for option in options:
        if option.memory_bytes <= budget:
            counts = (option._replace(probes=probes) for probes in range(most, option.tried, -1))
            return next((plan for plan in counts if plan.memory_bytes <= budget), option)
    least = min(options, key=lambda option: option.memory_bytes)
    raise BudgetError(
        f"memory_budget {tree.gibibytes(budget)} is too small for k = {chosen.k} and n = {chosen.n:,}: the least that "
        f"would do is {tree.gibibytes(least.memory_bytes)} ({least.memory_bytes} bytes). Raise it, or ask for a "
        "smaller k or fewer parameters (`restrict`)",
        least.memory_bytes,
    )


def _shrunk(chosen: Plan, budget: float) -> Plan:
    """The largest basis that fits, or the smallest that makes sense."""
    k, block = chosen.k, chosen.block_size
    least = min(max(math.ceil(1.5 * k) + 4, k + 3 + block, SMALLEST), chosen.basis_size)
    sizes = range(chosen.basis_size, least, -1)
    plans = (chosen._replace(basis_size=size) for size in sizes)
    fits = (plan for plan in plans if plan.memory_bytes <= budget)
    return next(fits, chosen._replace(basis_size=least))


def ends(k: int | Sequence[int], which: str) -> tuple[int, int]:
    """How many values are wanted at the top and at the bottom."""
    if which not in ("LM", "LA", "SA", "BE"):
        raise InputError(f"which must be 'LM', 'LA', 'SA' or 'BE', got {which!r}")
    if isinstance(k, (tuple, list)) and which == "BE" and len(k) == 2:
        return whole(k[0], "k", 0), whole(k[1], "k", 0)
    count = whole(k, "k", 1)
    return {"BE": ((count + 1) // 2, count // 2), "SA": (0, count)}.get(which, (count, 0))


def _expected(plan: Plan) -> tuple[int, int]:
    """Straight lines around the counts of measured runs. The top end takes the same whatever the basis and for any
    tolerance from 1e-2 to 1e-6; the bottom, a dense edge, depends on the basis."""
    low, high = 0.0, 0.0
    if top := plan.top:
        low, high = 3.4 * top + 10, 5.5 * top + 20
    if bottom := plan.bottom:
        low, high = low + 15 * bottom + 40, high + (19 * bottom + 280) * max(1.0, 60 / plan.basis_size)
    if plan.block_size > 1:
        high /= min(WORTH.values())  # a block pays where it does not take more than that
    most = plan.n + plan.k + 2 if plan.basis_size == plan.n else math.inf
    return round(min(low, most)), round(min(high, most))


def _block_for(k: int, which: str, measure: Callable[[], float] | None) -> int:
    """1, or `BLOCK` where `measure` finds blocks of products so much cheaper that they make up for needing more."""
    if measure is None or k < min(WORTH) or which in ("SA", "BE"):
        return 1  # there a block would have to be cheaper than any is
    return BLOCK if measure() <= max(share for least, share in WORTH.items() if k >= least) else 1
