"""Vectors cut into columns, one part on each process of a group: what a basis takes on each is 1/size of the whole."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from eigenfunc.distributed.team import Group, team_of


class Columns:
    """How flat vectors of n entries lie on the processes of a group, padded with zeros to parts of equal length."""

    def __init__(self, n: int, group: Group) -> None:
        self.team = team_of(group)
        self.n = n
        self.width = -(-n // self.team.size)

    def cut(self, whole: Tensor) -> Tensor:
        """This process's part (p, width) of vectors (p, n) that all have, in memory of its own."""
        begin = self.team.rank * self.width
        part = whole.new_zeros(len(whole), self.width)
        own = whole[:, begin : begin + self.width]
        part[:, : own.shape[1]] = own
        return part

    def whole(self, part: Tensor) -> Tensor:
        """The vectors (p, n) of which each process has its part (p, width)."""
        parts = list(part.new_empty(self.team.size, *part.shape))
        with self.team.reached():
            dist.all_gather(parts, part.contiguous(), group=self.team.group)
        return torch.cat(parts, dim=1)[:, : self.n]

    def total(self, part: Tensor) -> Tensor:
        """Sums over entries, of which each process has those of its columns."""
        total = part.contiguous().clone()
        with self.team.reached():
            dist.all_reduce(total, group=self.team.group)
        return total

    def agreed(self, seed: int | None) -> int | None:
        """The seed of the first process, since parts of different random vectors make none."""
        return self.team.gather(seed)[0]
