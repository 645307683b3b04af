"""Signals that ask a run of the command line to end: it saves itself first."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eigenfunc.checkpoint import Checkpoint, part_of
from eigenfunc.distributed.team import ALONE, Team
from eigenfunc.errors import Stopped

_ENDING = (signal.SIGINT, signal.SIGTERM)


class Ended(SystemExit):
    """The run is saved, and over: its code is 128 and the number of the signal."""


@contextmanager
def saving(path: Path | None, resume: bool, team: Team = ALONE) -> Iterator[Checkpoint | None]:
    """What `eigsh` is to be given, so that a first SIGINT or SIGTERM lets it finish its product, save itself and raise
    `Ended`, and a second one has its usual effect at once. Only for the main thread; without a path nothing is done.

    Processes of a team all stop where one was told to. They take no notice of a second signal, since torchrun may send
    the same one twice; it ends them by itself half a minute after the first.
    """
    if path is None:
        yield None
        return
    own = path if team.group is None else part_of(path, team.rank)
    print(f"going on from {path}" if resume and own.exists() else f"starting afresh, saved in {path}")
    with _noted(team.group is None) as came:
        try:
            yield Checkpoint(path, resume=resume, stop=lambda: bool(came))
        except Stopped as stopped:
            print(f"eigenfunc: {stopped}; go on from there with --resume", file=sys.stderr)
            raise Ended(128 + (came or [signal.SIGTERM])[0]) from None


@contextmanager
def _noted(alone: bool) -> Iterator[list[int]]:
    """A list that the first such signal is added to. The handlers that were there are put back at the end."""
    then, words = (signal.SIG_DFL, "; once more to stop at once, without saving") if alone else (signal.SIG_IGN, "")
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        for ending in _ENDING:
            signal.signal(ending, then)
        os.write(2, f"\nstopping after this product{words}\n".encode())  # print may be busy

    before = {ending: signal.signal(ending, note) for ending in _ENDING}
    try:
        yield came
    finally:
        for ending, handler in before.items():
            signal.signal(ending, handler)
