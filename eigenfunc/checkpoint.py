"""The state of a long run in a file: written whole or not at all, and checked to the last bit when it is read.

A file is in the safetensors format, which other tools read too: tensors, and in its header the numbers as JSON and a
checksum of all the rest of the file. It is written aside, synchronised to the disk and then renamed, so that a process
or machine that dies leaves the file before or the new one.

Processes of a group write one file each, with their part of the basis. None is renamed before all are written, and
what was written aside counts when they are read: so whenever the processes die, there are parts of one step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc._version import __version__
from eigenfunc.distributed.team import Team
from eigenfunc.errors import CheckpointError, CheckpointWarning, InputError, Stopped

FORMAT = 3
SHARE = 0.05  # of the time that saving may take
_CHUNK = 2**24  # bytes hashed at a time
_CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{64})"')
_LONGEST_HEADER = 10**8  # what safetensors itself accepts


class Saved(NamedTuple):
    tensors: dict[str, Tensor]
    facts: dict[str, Any]  # plain values, for JSON

    def along(self, other: Saved) -> Saved:
        """Both in one."""
        return Saved({**self.tensors, **other.tensors}, {**self.facts, **other.facts})


@dataclass(frozen=True)
class Checkpoint:
    """Where a run of `eigsh` is saved, how often, and what to do with what is there.

    path     the file, one for each run; its folder must exist
    minutes  after which the run is saved again, at the next product; also at the start and at restarts. Whatever is
             asked for, saving takes no more than a twentieth of the time: it has to wait for twenty times what it took
    resume   go on from the file if it is there; False starts afresh, and replaces a file of the same problem only
    stop     asked after each product; once it is true the run is saved and `Stopped` raised

    A call that finds the file ends as the first one would have ended, bit for bit: values, vectors, residuals and
    counts of products, in which those that were lost and done again, and one that shows that the matrix is the same, do
    not appear. A run killed at any moment loses what it did since it was last saved, no more than `minutes` or what the
    twentieth asks for. The tree, `which`, `k`, `tol` and `basis_dtype` must be those of the file, the sizes and the
    seed too where they are given; `max_matvecs` may differ, `v0` is not looked at. Products that repeat up to rounding
    only (another machine, another number of threads) are a `CheckpointWarning`: the result is as true, but may differ
    in its last digits. A file that is damaged, of another matrix or asked for otherwise is a `CheckpointError`, and
    never written over. The file stays when the run is over.

    Each process of a group saves its part, all at the same step, to `path` + ".rank" and its number: a wish of one to
    stop stops all, and they save where it is time for all. Parts of different steps, runs or numbers of processes are a
    `CheckpointError`. The folder may be one that all see, or one on each machine.

    It takes as much disk as the part of the basis that is in use and, during the proof, its chain; twice that while it
    is replaced (`path` + ".partial" beside it); in memory one vector more, and for an operator on an accelerator that
    much main memory during a save.
    """

    path: str | os.PathLike[str]
    minutes: float = 10.0
    resume: bool = True
    stop: Callable[[], bool] = bool

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)):
            raise InputError(f"a checkpoint's path must be a path, got {self.path!r}")
        if not (isinstance(self.minutes, (int, float)) and self.minutes >= 0):
            raise InputError(f"minutes between checkpoints must be a number of at least 0, got {self.minutes!r}")


class Journal:
    """Saves a run when that is due, or asked for.

    constant  what goes into every file beside the state
    begun     when the run began, by `time.perf_counter`
    team      processes that save together
    saves     how often it was saved before
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        constant: Callable[[], Saved],
        begun: float,
        team: Team | None = None,
        saves: int = 0,
    ) -> None:
        self.checkpoint = checkpoint
        self.constant = constant
        self.begun = begun
        self.team = team
        self.saves = saves
        self.cost = 0.0
        self.last = begun

    def save(self, state: Callable[[], Saved]) -> None:
        """Save now; `CheckpointError` if that fails."""
        before = time.perf_counter()
        self.saves += 1
        facts = Saved({}, {"seconds": self.seconds, "saves": self.saves})
        write(Path(self.checkpoint.path), self.constant().along(state()).along(facts), self.team)
        self.last = time.perf_counter()
        self.cost = self.last - before

    def tick(self, state: Callable[[], Saved], *, early: bool = False) -> None:
        """Between two products: save if it is time, or if it may be (`early`); on request stop. A disk that is full in
        the middle of a run is no reason to lose it: that is a `CheckpointWarning`."""
        away = time.perf_counter() - self.last
        due = away * SHARE >= self.cost and (early or away >= 60 * self.checkpoint.minutes)
        stop, due = self._agreed(self.checkpoint.stop(), due)
        if stop:
            self.save(state)
            raise Stopped(
                f"stopped on request after {self.seconds:.0f} s; the state is saved in {self.checkpoint.path}"
            )
        if not due:
            return
        try:
            self.save(state)
        except CheckpointError as error:
            warnings.warn(f"the run goes on without being saved: {error}", CheckpointWarning, stacklevel=2)
            self.last = time.perf_counter()

    def _agreed(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """Whether any process is to stop, and whether it is time to save for all."""
        if self.team is None:
            return stop, due
        told = self.team.gather((bool(stop), due))
        return any(stop for stop, _ in told), all(due for _, due in told)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun


def require() -> None:
    """`CheckpointError` where the package that writes the files is missing."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise CheckpointError("checkpoints need safetensors: pip install 'eigenfunc[cli]'") from None


def write(path: Path, saved: Saved, team: Team | None = None) -> None:
    """Put `saved` into the file, whole or not at all, and with a team into the files of all or none. `CheckpointError`
    where a disk refuses."""
    aside = _aside(path)
    try:
        _by_all(lambda: _write(path, saved), team)
    except CheckpointError:
        aside.unlink(missing_ok=True)
        raise
    try:
        _by_all(lambda: _rename(aside, path), team)
    except CheckpointError:
        if team is None:
            aside.unlink(missing_ok=True)
        raise
    _synchronise(path.parent)


def _by_all(do: Callable[[], None], team: Team | None) -> None:
    """`CheckpointError` on every process where one of them cannot do it."""
    failed = ""
    try:
        do()
    except CheckpointError as error:
        failed = str(error)
    if team is not None:
        others = team.gather(failed)
        failed = failed or next((f"rank {rank}: {said}" for rank, said in enumerate(others) if said), "")
    if failed:
        raise CheckpointError(failed)


def _rename(aside: Path, path: Path) -> None:
    try:
        os.replace(aside, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from None


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _write(path: Path, saved: Saved) -> None:
    """Into the file aside, to the last byte."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    versions = {"format": FORMAT, "torch": torch.__version__, "eigenfunc": __version__}
    header = {"eigenfunc": json.dumps({**versions, **saved.facts}), "checksum": "0" * 64}
    aside = _aside(path)
    try:
        aside.touch()
        mode = aside.stat().st_mode  # safetensors would hide the file from all but its owner
        save_file({name: tensor.detach().contiguous() for name, tensor in saved.tensors.items()}, aside, header)
        aside.chmod(mode)
        with aside.open("r+b") as file:
            digest, at = _digest(file)
            file.seek(at)
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in saved.tensors.values())
        raise CheckpointError(
            f"cannot write {path} ({tree.gibibytes(size)}, and as much again while it is replaced): {error}"
        ) from None


def part_of(path: Path, rank: int) -> Path:
    """The file of one process of a group."""
    return path.with_name(f"{path.name}.rank{rank}")


def read(path: Path, team: Team | None = None) -> Saved | None:
    """What was written, or None where there is no file; with a team, this process's part of the last step that all
    have. `CheckpointError` for anything but a whole, sound file of this version, and where parts do not fit together.
    """
    return _read(path) if team is None else _read_part(path, team)


def _read_part(path: Path, team: Team) -> Saved | None:
    found = team.attempt(lambda: [(path, _read(path)), (_aside(path), _whole(_aside(path)))])
    places, own = [place for place, saved in found if saved], [saved for _, saved in found if saved]
    steps = [(saved.facts["saves"], saved.facts["products"]["passes"], _told(saved)) for saved in own]
    told = team.gather((steps, [saved.facts["asked"]["processes"] for saved in own]))
    sizes = {size for _, processes in told for size in processes}
    remedy = "Bring back the files of one step, or delete those of all processes to start afresh"
    if not sizes:
        return None
    if sizes != {team.size}:
        raise CheckpointError(
            f"{path} and those beside it are of {' and '.join(map(str, sorted(sizes)))} processes, and here are "
            f"{team.size}: each has its part of the basis. Take as many, or delete the files to start afresh"
        )
    common = set.intersection(*(set(steps) for steps, _ in told))
    if not common:
        saves = ", ".join(
            f"{max(steps)[0] if steps else 'none'} of rank {rank}" for rank, (steps, _) in enumerate(told)
        )
        raise CheckpointError(f"{path} and those beside it are not of one step of one run (saves {saves}). {remedy}")
    index = steps.index(max(common))
    os.replace(places[index], path)  # as it was about to be: the next save is written aside
    return own[index]


def _whole(aside: Path) -> Saved | None:
    """A file that was written aside, if wholly."""
    try:
        return _read(aside)
    except CheckpointError:
        return None


def _told(saved: Saved) -> str:
    return json.dumps(saved.facts["asked"], sort_keys=True)


def _read(path: Path) -> Saved | None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    remedy = "Give another path, or delete the file to start afresh"
    try:
        with path.open("rb") as file:
            digest, at = _digest(file)
            file.seek(at)
            if file.read(len(digest)) != digest:
                raise CheckpointError(
                    f"{path} is damaged: its checksum does not fit its contents. {remedy}, or bring back a sound copy"
                )
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise CheckpointError(f"there is no folder {path.parent} to write {path.name} to: make it first") from None
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}. {remedy}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is {error}. {remedy}") from None
    with safe_open(path, "pt") as opened:
        facts = json.loads(opened.metadata()["eigenfunc"])
    if facts["format"] != FORMAT:
        raise CheckpointError(
            f"{path} was written by eigenfunc {facts['eigenfunc']} in format {facts['format']}; this is {__version__}, "
            f"which reads format {FORMAT}. Go on with that version, or {remedy[0].lower()}{remedy[1:]}"
        )
    return Saved(load_file(path), facts)


def _digest(file: Any) -> tuple[bytes, int]:
    """The checksum of a file, its own place taken as zeros, and that place; `ValueError` says what else it is."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    header = file.read(length) if len(start) == 8 and length <= _LONGEST_HEADER else b""
    found = _CHECKSUM.search(header)
    if found is None or len(header) < length:
        raise ValueError("no checkpoint of eigenfunc, or has lost its beginning")
    digest = hashlib.sha256(start)
    digest.update(header[: found.start(1)] + b"0" * 64 + header[found.end(1) :])
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest().encode(), 8 + found.start(1)


def _synchronise(folder: Path) -> None:
    """Make a renaming last, where folders can be synchronised."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
