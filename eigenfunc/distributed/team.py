"""The processes of a group: what they tell one another, and how one that fails ends the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from eigenfunc import tree
from eigenfunc.errors import DistributedError, InputError
from eigenfunc.tree import Tree

T = TypeVar("T")
Group = Any  # torch.distributed.ProcessGroup, which exists only where torch was built with it

_MODULUS = 2**24  # of checksums: the integers below are exact in float32


class Team(NamedTuple):
    """The processes of a group."""

    group: Group
    rank: int
    size: int

    def gather(self, own: T, error: BaseException | None = None) -> list[T]:
        """What each process hands in."""
        everything: list[Any] = [None] * self.size
        with self.reached(error):
            dist.all_gather_object(everything, own, group=self.group)
        return everything

    def attempt(self, f: Callable[[], T]) -> T:
        """f(), once it is known to have gone well on every process; if not, its own exception or `DistributedError`."""
        own: BaseException | None = None
        try:
            result = f()
        except BaseException as error:
            own = error
        self.settle(own)
        return result

    def settle(self, own: BaseException | None) -> None:
        """Raise the own exception, or `DistributedError` where others have one; called by every process."""
        words = self.gather("" if own is None else f"{type(own).__name__}: {own}"[:1000], own)
        if own is not None:
            raise own
        failed = [f"rank {rank}: {said}" for rank, said in enumerate(words) if said]
        if failed:
            raise DistributedError("another process failed. " + "; ".join(failed))

    def same(self, values: list[Any], what: str) -> None:
        """`InputError`, on every process, unless all have the same value."""
        for rank, value in enumerate(values):
            if value != values[0]:
                raise InputError(f"{what} differs between processes: that of rank {rank} is not that of rank 0")

    @contextmanager
    def reached(self, own: BaseException | None = None) -> Iterator[None]:
        """Around communication: what torch raises there means that the group is gone. An exception that this process
        was about to tell comes first."""
        try:
            yield
        except RuntimeError as error:
            if own is not None:
                raise own from None
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise DistributedError(
                f"rank {self.rank} of {self.size} no longer reaches the others ({said}): a process has died, or is "
                "behind by more than the timeout of the group. Its own output says why; this group is of no more use"
            ) from error


ALONE = Team(None, 0, 1)


def team_of(group: Group) -> Team:
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            "there is no process group: start the program with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise InputError("this process is not in the group that it was given")
    return Team(group, rank, dist.get_world_size(group))


def checksum(x: Tree) -> Tensor:
    """A number below 2²⁴ of the bits of all entries, and of some of them so that signs and order tell."""
    total = torch.zeros((), dtype=torch.int64, device=tree.device(x))
    for leaf in tree.leaves(x):
        bits = leaf.detach().reshape(-1).contiguous()
        bits = bits.view(torch.int16 if bits.element_size() == 2 else torch.int32)
        total = 1_000_003 * total + bits.sum(dtype=torch.int64) + 8_191 * bits[::3].sum(dtype=torch.int64)
    return (total ^ (total >> 24) ^ (total >> 48)).remainder(_MODULUS)


def alone() -> bool:
    """Whether torchrun did not start this program, or started it once."""
    return not (dist.is_available() and dist.is_torchelastic_launched()) or os.environ["WORLD_SIZE"] == "1"


@contextmanager
def launched(timeout: float) -> Iterator[Team]:
    """All processes, joined in a group, if torchrun started this program; a team of one without a group if not.

    timeout  seconds after which processes give up waiting for another
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield ALONE
        return
    own = not dist.is_initialized()
    if own:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group(timeout=timedelta(seconds=timeout))
    try:
        yield team_of(dist.group.WORLD) if dist.get_world_size() > 1 else ALONE
    finally:
        if own:
            dist.destroy_process_group()


def first(f: Callable[[], T]) -> T:
    """f() of rank 0, on every process; called by all of them. Without a group simply f()."""
    if not (dist.is_available() and dist.is_initialized()):
        return f()
    team = team_of(None)
    result = team.attempt(lambda: f() if team.rank == 0 else None)
    found: T = team.gather(result)[0]  # type: ignore[assignment]
    return found
