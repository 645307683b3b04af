"""Signals that ask a run of the command line to end: it saves itself first."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eigenfunc.checkpoint import Checkpoint
from eigenfunc.errors import Stopped

_ENDING = (signal.SIGINT, signal.SIGTERM)


class Ended(SystemExit):
    """The run is saved, and over: its code is 128 and the number of the signal."""


@contextmanager
def saving(path: Path | None, resume: bool) -> Iterator[Checkpoint | None]:
    """What `eigsh` is to be given, so that a first SIGINT or SIGTERM lets it finish its product, save itself and raise
    `Ended`, and a second one has its usual effect at once. Only for the main thread; without a path nothing is done.
    """
    if path is None:
        yield None
        return
    print(f"going on from {path}" if resume and path.exists() else f"starting afresh, saved in {path}")
    with _noted() as came:
        try:
            yield Checkpoint(path, resume=resume, stop=lambda: bool(came))
        except Stopped as stopped:
            print(f"eigenfunc: {stopped}; go on from there with --resume", file=sys.stderr)
            raise Ended(128 + came[0]) from None


@contextmanager
def _noted() -> Iterator[list[int]]:
    """A list that the first such signal is added to. The handlers that were there are put back at the end."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        for ending in _ENDING:
            signal.signal(ending, signal.SIG_DFL)
        os.write(2, b"\nstopping after this product; once more to stop at once, without saving\n")  # print may be busy

    before = {ending: signal.signal(ending, note) for ending in _ENDING}
    try:
        yield came
    finally:
        for ending, handler in before.items():
            signal.signal(ending, handler)
