"""When to look: the measured cost of looks against the training time that went by."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Depth = Literal["look", "glance"]

_RATIO = 4.0  # a glance that costs over a quarter of a look tells too little for its price


class Ledger(NamedTuple):
    """Seconds, from the first call on.

    begun   the clock then; NaN before
    spent   by the tracker
    look    the cost of the dearer of the last two looks, or a guess; NaN before the first
    before  that of the last look
    glance  the cost of the last glance, or a guess
    kept    credit left after the last look, which waits for a dearer one
    marked  that after the last look or glance
    """

    begun: float = math.nan
    spent: float = 0.0
    look: float = math.nan
    before: float = 0.0
    glance: float = math.nan
    kept: float = 0.0
    marked: float = 0.0

    def started(self, now: float) -> Ledger:
        return self._replace(begun=now) if math.isnan(self.begun) else self

    def training(self, now: float) -> float:
        """Seconds of everything else."""
        return now - self.begun - self.spent

    def credit(self, now: float, share: float) -> float:
        """Seconds that may be spent now for the overhead to stay at `share` of the training time."""
        return share * self.training(now) - self.spent

    def needed(self, now: float) -> float:
        """The smallest share at which one more look could be paid for now; NaN where its cost is unknown."""
        training = self.training(now)
        return (self.spent + self.look) / training if training > 0 else math.nan

    def affordable(self, now: float, share: float, known: bool) -> Depth | None:
        """What may be done now. Half of the credit goes into glances, where there are vectors, half is saved."""
        credit = self.credit(now, share)
        if credit - self.kept >= self.look:
            return "look"
        worth = known and _RATIO * self.glance <= self.look
        return "glance" if worth and credit >= self.glance and credit - self.marked >= 2 * self.glance else None

    def charged(self, now: float, since: float, share: float, depth: Depth | None) -> Ledger:
        """After the tracker was at work from `since` until `now`, at what `depth` says."""
        seconds = now - since
        paid = self._replace(spent=self.spent + seconds)
        if depth == "look":
            paid = paid._replace(look=max(seconds, self.before), before=seconds)
        elif depth == "glance":
            paid = paid._replace(glance=seconds)
        left = paid.credit(now, share)
        if depth == "look":
            paid = paid._replace(kept=max(left, 0.0))
        return paid if depth is None else paid._replace(marked=left)
