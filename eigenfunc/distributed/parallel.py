"""Several processes, each with its share of the data: the matrix over all of it, the same on every process.

The solvers run on every process, with the same numbers, so that they take the same decisions and nothing but products
is communicated. Each product is one all-reduce of one flat message: this process's part, already weighted, and behind
it a few figures from each process: whether it failed, whether it was asked to stop, the error of its product, and a
checksum of the vector it multiplied. So a process that fails still takes part in the sum, and ends the others with an
error in place of leaving them to wait, and processes that went different ways are found out.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from eigenfunc import scope, tree
from eigenfunc.choices import Choices
from eigenfunc.curvature.denominators import batches_of
from eigenfunc.curvature.sweep import budget_for
from eigenfunc.data import Batches, Reader
from eigenfunc.distributed.deal import refuse_padding
from eigenfunc.distributed.team import Group, Team, checksum, team_of
from eigenfunc.errors import DataError, DistributedError, InputError, TransformError
from eigenfunc.operator import LinearOperator, MatVec
from eigenfunc.tree import Tree


class Stop:
    """A wish to stop, made by any process and known to all of them from the next product on.

    own  says whether this process was asked to stop; read at each product. Calling the object says whether any was, and
         says the same on every process, where `own` would end them at different products.
    """

    def __init__(self, own: Callable[[], bool]) -> None:
        self.own = own
        self.agreed = False

    def __call__(self) -> bool:
        return self.agreed


def data_parallel(
    make: Callable[..., LinearOperator],
    loss: Any,
    params: Tree,
    data: Any,
    *,
    group: Group = None,
    stop: Stop | None = None,
    **options: Any,
) -> LinearOperator:
    """`make(loss, params, all the data, **options)`, where `data` is this process's share. Called by every process.

    make     `hessian`, `ggn` or `fisher`, or a function that takes what they take
    params   the same on every process
    data     any share, larger or smaller than those of others, or none: `Batches([])`. No sample may be in two of them
    group    of torch.distributed; default: all processes
    stop     carries a wish to stop to all processes
    options  for `make`. Set-up and its checks are made by each process on its share; `cache="auto"` is this process's
             part of the memory of its machine

    Products are Σ_r W_r A_r v / Σ_r W_r for losses that average and Σ_r A_r v for losses that sum, with A_r the matrix
    and W_r the weight of rank r, read from its share once, at set-up. They are those of one process up to rounding, and
    the same to the last bit on every process. Solvers and estimators are called by every process with the same
    arguments, `seed` among them, and give the same results on each. A mini-batch here is one mini-batch of each
    process.

    An exception on one process raises it there and `DistributedError`, naming the rank, on all others; so does a
    process that dies, or answers later than the timeout of the group, which is then of no more use. Raises
    `DistributedError` too where processes multiply different vectors, `InputError` where there is no group, where a run
    with this operator is given a checkpoint but no group, or parameters differ between processes, `DataError` where all
    shares are empty, and what `make` raises.
    """
    team = team_of(group)
    device, batches = _place(loss, params, data, team)
    if options.get("cache", "auto") == "auto":
        options["cache"] = _budget(device, team)

    def build() -> tuple[float, LinearOperator | None]:
        weight = _weight(batches.on(device), device)
        return weight, make(loss, params, batches, **options) if weight > 0 else None

    weight, local = team.attempt(build)
    told = team.gather((batches.reduction, weight))
    team.same([reduction for reduction, _ in told], "the reduction of the data")
    whole = sum(other for _, other in told)
    if whole == 0:
        raise DataError("the data is empty: no process has a batch with a positive weight")
    share = weight / whole if batches.reduction == "mean" else float(weight > 0)
    return _Summed(team, params, local, share, weight / whole, stop).operator()


def _place(loss: Any, params: Tree, data: Any, team: Team) -> tuple[torch.device, Batches]:
    """Where the parameters are, and the share as batches that are weighed; all have the same parameters."""

    def read() -> tuple[torch.device, Batches, Any]:
        if scope.inside_transform():
            raise TransformError("products of several processes cannot be formed inside a torch.func transform")
        tree.check_vector_space(params, "params")
        shapes = [
            (name, leaf.dtype, leaf.shape) for name, leaf in zip(tree.names(params), tree.leaves(params), strict=True)
        ]
        whole = isinstance(data, (Batches, DataLoader)) or hasattr(data, "__next__")
        batches = batches_of(loss, data if whole else Batches([data]))
        refuse_padding(batches.data)
        return tree.device(params), batches, (shapes, int(checksum(params)))

    device, batches, about = team.attempt(read)
    told = team.gather(about)
    team.same([shapes for shapes, _ in told], "the structure of the parameters")
    team.same([sum_ for _, sum_ in told], "the value of the parameters")
    return device, batches


def _budget(device: torch.device, team: Team) -> int:
    """Bytes that kept graphs may take here, where the memory is shared with other processes of the group."""
    own = (socket.gethostname(), str(device))
    told = team.gather((own, budget_for("auto", device)))
    here = [budget for place, budget in told if place == own]
    return min(here) // len(here)


def _weight(batches: Batches, device: torch.device) -> float:
    reader = Reader(batches, device)
    with scope.untouched(device):
        weights = (weight for _, weight, _ in reader.one_pass())
        return float(any(w > 0 for w in weights)) if batches.reduction == "sum" else sum(weights)


_FAILED, _STOP = 1, 2


class _Summed:
    """The sum over processes, and what it knows of them.

    share  what the local matrix counts for in the sum, weight / Σ weight or 1
    """

    def __init__(
        self,
        team: Team,
        like: Tree,
        local: LinearOperator | None,
        share: float,
        part: float,
        stop: Stop | None,
    ) -> None:
        self.team = team
        self.like = like
        self.local = local
        self.share = share
        self.part = part
        self.stop = stop
        self.noise = 0.0

    def operator(self) -> LinearOperator:
        local = self.local
        return LinearOperator(
            partial(self.product, None if local is None else local.matvec),
            self.like,
            partial(self.product, None if local is None else local.matmat),
            self.minibatches,
            self.describe,
            lambda: self.noise,
            self.block_ratio,
            choices=Choices(self.tell, self.take, shared=True),
            kept_bytes=int if local is None else local.kept_bytes,
        )

    def product(self, product: MatVec | None, v: Tree) -> Tree:
        """Σ over processes of share · product(v); `product` is None where there is no data."""
        if scope.inside_transform():
            raise TransformError("products of several processes cannot be formed inside a torch.func transform")
        flat = tree.ravel(v, self.like)
        own: BaseException | None = None
        part = torch.zeros_like(flat)
        try:
            if product is not None:
                part = self.share * tree.ravel(product(v), self.like)
        except BaseException as error:  # told to the others before it is raised here
            own = error
        total, figures = self._sum(part, self._figures(v, own), own)
        status = figures[:, 0].int()
        if bool((status & _FAILED).any()):
            self.team.settle(own)
        if differing := [rank for rank, found in enumerate(figures[:, 2].tolist()) if found != figures[0, 2]]:
            raise DistributedError(
                f"the processes multiply different vectors (rank {differing[0]} not that of rank 0). Call solvers with "
                "the same arguments on each, seed= and v0= among them; beyond that, processors and numbers of threads "
                "that differ give other last digits"
            )
        self.noise = max(self.noise, float(figures[:, 1].sum()))
        if self.stop is not None:
            self.stop.agreed = self.stop.agreed or bool((status & _STOP).any())
        return tree.unravel(total, self.like)

    def _figures(self, v: Tree, own: BaseException | None) -> Tensor:
        status = _FAILED * (own is not None) + _STOP * (self.stop is not None and self.stop.own())
        noise = 0.0 if self.local is None else self.share * self.local.noise()
        return torch.tensor([status, noise, checksum(v)], dtype=torch.float64)

    def _sum(self, part: Tensor, figures: Tensor, own: BaseException | None) -> tuple[Tensor, Tensor]:
        """The sum of all parts, and the figures (size, 3) of each process, in one message."""
        size, rank = self.team.size, self.team.rank
        table = part.new_zeros(size, len(figures))
        table[rank] = figures.to(table)
        message = torch.cat([part.flatten(), table.flatten()])
        with self.team.reached(own):
            dist.all_reduce(message, group=self.team.group)
        total, told = torch.split(message, [part.numel(), table.numel()])
        return total.reshape(part.shape), told.reshape(table.shape).double().cpu()

    def minibatches(self) -> Iterator[MatVec]:
        if self.local is None:
            while True:
                yield partial(self.product, None)
        if self.local.minibatches is None:
            raise InputError("this operator has no mini-batches")
        for product in self.local.minibatches():
            yield partial(self.product, product)

    def block_ratio(self) -> float:
        """The slowest process's, so that all decide alike."""
        local = self.local
        own = self.team.attempt(lambda: 0.0 if local is None or local.block_ratio is None else local.block_ratio())
        return max(self.team.gather(own)) or 1.0

    def tell(self) -> Any:
        """What this process decided; nothing where it has no data."""
        return None if self.local is None else self.local.choices.tell()

    def take(self, told: Any) -> None:
        if self.local is not None and told is not None:
            self.local.choices.take(told)

    def describe(self) -> str:
        held = f"with {100 * self.part:.3g}% of the weight" if self.local is not None else "without data"
        words = "" if self.local is None else f": {self.local._words()}"
        return f"sum over {self.team.size} processes, rank {self.team.rank} {held}{words}"
