"""Signals that ask a run to end: they are noted, so that it can save itself first."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPPED = 128  # added to the number of a signal: the exit code of what it ended

_ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def caught() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is added to; a second one has its usual effect, at once.

    Only for the main thread. The handlers that were there are put back at the end.
    """
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
