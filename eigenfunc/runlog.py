"""The log of a tracked training run, as it is read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from eigenfunc.errors import FileError


class End(NamedTuple):
    """One end of a spectrum at a step. Unless it is certified, the eigenvalue may lie further out."""

    value: float
    bound: float
    certified: bool


class Run(NamedTuple):
    """The lines of a tracker's log: what was seen, the alerts, and whether the last line was cut short."""

    records: list[dict[str, Any]]
    alerts: list[dict[str, Any]]
    cut: bool

    @property
    def certified(self) -> bool:
        """Whether each look, glances apart, carries its certificate."""
        return all(certified(record) for record in self.records if record.get("kind") == "look")


def read_run(path: str | PathLike[str]) -> Run:
    """The log that `SpectrumTracker(log=path)` has written, one object of JSON a line.

    A last line that was cut short, as by the end of the process, is left out. Raises `FileError` where the file is
    missing, empty, or holds something else.
    """
    source = Path(path)
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {source}: {error}") from None
    found: dict[str, list[dict[str, Any]]] = {"record": [], "alert": []}
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    cut = False
    for number, line in filled:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            cut = number == filled[-1][0] and number > 1
            if not cut:
                raise FileError(
                    f"line {number} of {source} is no JSON, so it is no log of a tracker: {error}"
                ) from None
            continue
        try:
            found[entry["type"]].append(_numeric(entry))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise FileError(f"line {number} of {source} is no record or alert of a tracker: {error!r}") from None
    if not found["record"] and not found["alert"]:
        raise FileError(f"{source} holds no record of a tracker")
    return Run(found["record"], found["alert"], cut)


def _numeric(entry: dict[str, Any]) -> dict[str, Any]:
    """Strings that stand for NaN and infinities become numbers, in the fields that are used here."""
    out = {**entry, "step": int(entry["step"])}
    if entry["type"] == "record":
        for name in ("values", "bounds"):
            out[name] = [float(x) for x in entry.get(name) or []]
        if len(out["bounds"]) != len(out["values"]):
            raise ValueError(f"{len(out['values'])} values and {len(out['bounds'])} bounds")
    for name in ("trace", "trace_stderr", "gradient_share", "rate", "limit", "seconds", "value", "threshold"):
        if entry.get(name) is not None:
            out[name] = float(entry[name])
    if any(error < 0 for error in (*out.get("bounds", ()), out.get("trace_stderr") or 0.0)):
        raise ValueError("a negative bound or error")
    return out


def certified(record: dict[str, Any]) -> bool:
    converged = record.get("converged") or []
    return record.get("kind") == "look" and len(converged) > 0 and all(converged)


def top(record: dict[str, Any]) -> End | None:
    """The largest eigenvalue, where `which` asks for it; of those of largest magnitude, only where it is positive."""
    which = record.get("which")
    found = None if which == "SA" else _end(record, max)
    return None if found is not None and which == "LM" and not found.value > 0 else found


def bottom(record: dict[str, Any]) -> End | None:
    which = record.get("which")
    found = None if which == "LA" or (which == "BE" and len(record["values"]) == 1) else _end(record, min)
    return None if found is not None and which == "LM" and not found.value < 0 else found


def _end(record: dict[str, Any], choose: Callable[..., Any]) -> End | None:
    pairs = list(zip(record["values"], record["bounds"], strict=True))
    if not pairs:
        return None
    value, bound = choose(pairs)
    return End(value, bound, certified(record))


def of_limit(record: dict[str, Any]) -> float | None:
    """The largest eigenvalue seen over the largest that the learning rate allows, where both are known."""
    end, limit = top(record), record.get("limit")
    return end.value / limit if end is not None and limit is not None and 0 < limit < float("inf") else None
