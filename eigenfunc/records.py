"""What is known of a training run: spectra seen at some steps, what was observed at each step, alerts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

from eigenfunc import archive
from eigenfunc.errors import FileError

Certainty = Literal["certified", "one-sided", "observed"]


@dataclass(frozen=True)
class Alert:
    """One rule's finding.

    rule       its name
    step       the training step at which it was raised
    message    what was seen, when, and against what
    value      the number that was judged, and
    threshold  what it was held against, in the same units
    certainty  "certified": the eigenvalue lies within its bound; "one-sided": it lies at least as far out as was seen,
               by the variational principle, but may lie further (a glance); "observed": no eigenvalue is involved
    """

    rule: str
    step: int
    message: str
    value: float
    threshold: float
    certainty: Certainty

    def __str__(self) -> str:
        return f"step {self.step}: {self.rule}: {self.message} [{self.certainty}]"


@dataclass(frozen=True)
class Record:
    """A spectrum seen at a step of training; plain numbers, ready for JSON.

    step       training steps taken before
    values     (k,) eigenvalues (look) or Ritz values (glance), ordered as `which` says
    bounds     (k,) each value lies within its bound of an eigenvalue. Only a look that is `certified` proves of which
               rank; otherwise top values are at most, and bottom values at least, the eigenvalues of their ranks
    residuals  (k,) true norms ‖A v − λ v‖, from fresh products
    converged  (k,) the verdict of `eigsh`; all False at a glance, which proves nothing about ranks
    noise      of the products, measured at looks: no residual can be told from less
    kind       "look": `eigsh` with its certificate; "glance": one block product with the earlier vectors, Rayleigh–Ritz
    status     how the look ended, "glance", or the error
    matrix     "hessian", or "preconditioned hessian" for adaptive optimisers
    ids        (k,) a number for each pair that stays with it from record to record, whatever its rank: a pair continues
               the earlier one with which its overlap is over √½, of which there is one at most
    overlaps   (k,) the largest |⟨v, w⟩| with an earlier vector w; empty where there is none
    trace, trace_stderr   of the matrix, estimated
    gradient_share        of the squared gradient norm in the span of the vectors, between 0 and 1
    rate, limit           learning rate, and the largest eigenvalue that it allows
    matvecs, verification, passes   products spent (all told; those of them that certify), sweeps over the data
    seconds    spent on this record
    finite     whether parameters and products were
    alerts     raised by this record
    """

    step: int
    values: tuple[float, ...] = ()
    bounds: tuple[float, ...] = ()
    residuals: tuple[float, ...] = ()
    converged: tuple[bool, ...] = ()
    noise: float = 0.0
    kind: Literal["look", "glance"] = "look"
    which: str = "LA"
    status: str = ""
    matrix: str = "hessian"
    ids: tuple[int, ...] = ()
    overlaps: tuple[float, ...] = ()
    trace: float | None = None
    trace_stderr: float | None = None
    gradient_share: float | None = None
    rate: float | None = None
    limit: float | None = None
    matvecs: int = 0
    verification: int = 0
    passes: int = 0
    seconds: float = 0.0
    finite: bool = True
    alerts: tuple[Alert, ...] = ()

    @property
    def certified(self) -> bool:
        return len(self.converged) > 0 and all(self.converged)

    @property
    def top(self) -> tuple[float, float] | None:
        """The largest eigenvalue and its bound, where `which` asks for it (LM: only where it is positive)."""
        found = None if self.which == "SA" else self._end(max)
        return None if found is not None and self.which == "LM" and found[0] <= 0 else found

    @property
    def bottom(self) -> tuple[float, float] | None:
        """The smallest eigenvalue and its bound, where `which` asks for it (LM: only where it is negative)."""
        found = None if self.which == "LA" or (self.which == "BE" and len(self.values) == 1) else self._end(min)
        return None if found is not None and self.which == "LM" and found[0] >= 0 else found

    def _end(self, end: Callable[..., tuple[float, float]]) -> tuple[float, float] | None:
        bounds = self.bounds or (0.0,) * len(self.values)
        return end(zip(self.values, bounds, strict=True), default=None)

    def report(self) -> dict[str, Any]:
        return asdict(self)


class Observation(NamedTuple):
    """What was seen at one training step; None where nothing was."""

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    rate: float | None = None  # of the step to come
    limit: float | None = None  # the largest eigenvalue that it allows
    batch: int | str | None = None  # a hash
    stride: float | None = None  # length of the step to come for a rate of 1, in the metric of the matrix


class History(NamedTuple):
    """In order of time. `now` is the step at which rules are asked."""

    records: Sequence[Record] = ()
    observations: Sequence[Observation] = ()

    @property
    def now(self) -> int:
        return max([x.step for x in self.records[-1:]] + [x.step for x in self.observations[-1:]], default=0)


Rule = Callable[[History], Alert | None]
Log = Callable[[Record | Alert], None]


def jsonl(path: str | PathLike[str]) -> Log:
    """A function that appends each record and each alert to the file `path`, one line of strict JSON each.

    Raises `FileError` where it cannot be written.
    """
    target = Path(path)

    def write(entry: Record | Alert) -> None:
        line = {"type": type(entry).__name__.lower(), **asdict(entry)}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("a", encoding="utf-8") as file:
                file.write(json.dumps(archive.strict(line), allow_nan=False) + "\n")
        except OSError as error:
            raise FileError(f"cannot write {target}: {error}") from None

    return write


def read_jsonl(path: str | PathLike[str]) -> tuple[list[Record], list[Alert]]:
    """The records and the alerts that `jsonl` wrote; raises `FileError` where the file is missing or damaged."""
    target = Path(path)
    records, alerts = [], []
    with archive.reading(target):
        for line in target.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry.pop("type") == "alert":
                alerts.append(_alert(entry))
            else:
                records.append(_record(entry))
    return records, alerts


def _alert(entry: dict[str, Any]) -> Alert:
    return Alert(**entry | {name: float(entry[name]) for name in ("value", "threshold")})


def _record(entry: dict[str, Any]) -> Record:
    """Lists become tuples again, and the strings that stand for NaN and infinities numbers."""
    read: dict[str, Any] = {}
    for field in fields(Record):
        value = entry[field.name]
        if field.name == "alerts":
            value = tuple(_alert(alert) for alert in value)
        elif field.name in ("values", "bounds", "residuals", "overlaps"):
            value = tuple(float(x) for x in value)
        elif isinstance(value, list):
            value = tuple(value)
        elif field.name in ("trace", "trace_stderr", "gradient_share", "rate", "limit") and value is not None:
            value = float(value)
        read[field.name] = value
    return Record(**read)
