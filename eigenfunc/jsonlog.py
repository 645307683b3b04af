"""What the command line tells, as lines of JSON instead of words and bars."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

LOG = logging.getLogger("eigenfunc")


def tell(event: str, **facts: Any) -> None:
    """An event of a run, with plain values; heard by nobody unless the level of the log "eigenfunc" is INFO."""
    LOG.info(event, extra={"facts": facts})


@contextmanager
def json_lines(stream: TextIO) -> Iterator[None]:
    """Within, each event is a line {"time": seconds since 1970, "event": name, …} of strict JSON; numbers that are not
    finite are strings."""
    handler, level = logging.StreamHandler(stream), LOG.level
    handler.setFormatter(_Lines())
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = getattr(record, "facts", {})
        return json.dumps({"time": record.created, "event": record.getMessage(), **_strict(facts)}, allow_nan=False)


def _strict(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(name): _strict(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_strict(value) for value in x]
    if isinstance(x, float):
        return x if math.isfinite(x) else str(x)
    return x if x is None or isinstance(x, (bool, int, str)) else str(x)
