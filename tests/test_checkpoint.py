"""Files of runs: when they are written, what is refused, and what is left when a process is killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

import eigenfunc
from eigenfunc import checkpoint, eigsh
from eigenfunc.checkpoint import Checkpoint, Journal, Saved
from eigenfunc.errors import CheckpointError, CheckpointWarning, InputError
from eigenfunc.operator import LinearOperator
from tests.stopped import assert_same, diagonal, quick_disk, spectrum, stopped

__all__ = ["quick_disk"]


# ---- when it is saved


@given(product=st.floats(0.1, 100), cost=st.floats(0.001, 300), minutes=st.floats(0, 20), every=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_saving_takes_a_twentieth_at_most_and_little_is_lost(
    product: float, cost: float, minutes: float, every: int
) -> None:
    now, saves = 0.0, [0.0]

    def write(path: Path, saved: Saved, team: None) -> None:
        nonlocal now
        now += cost
        saves.append(now)
        assert saved.facts == {"seconds": pytest.approx(now - cost), "a": 1, "b": 2, "saves": len(saves) - 1}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "time", SimpleNamespace(perf_counter=lambda: now))
        patch.setattr(checkpoint, "write", write)
        journal = Journal(Checkpoint("x", minutes), lambda: Saved({}, {"a": 1}), 0.0)
        journal.save(lambda: Saved({}, {"b": 2}))
        for i in range(400):
            now += product
            journal.tick(lambda: Saved({}, {"b": 2}), early=i % every == 0)
    assert cost * (len(saves) - 2) <= 0.05 * (now + 1e-6)
    longest = max(60 * minutes, 20 * cost) + product + cost + 1e-6
    assert all(b - a <= longest for a, b in zip(saves, [*saves[1:], now], strict=True))
    if every * product >= 20 * cost:
        assert len(saves) >= 2 + 399 // every  # at each restart


def test_a_restart_is_saved_and_a_run_that_stands_still_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    written: list[Saved] = []
    monkeypatch.setattr(checkpoint, "write", lambda path, saved, team: written.append(saved))
    A = diagonal(spectrum("bulk"))
    stats = eigsh(A, 4, which="LA", basis_size=10, seed=0, checkpoint=tmp_path / "run").stats
    assert [saved.facts["run"]["restarts"] for saved in written] == list(range(stats.restarts + 1))
    written.clear()
    stats = eigsh(A, 4, which="LA", basis_size=10, seed=0, checkpoint=Checkpoint(tmp_path / "run", minutes=0)).stats
    assert len(written) >= stats.passes - 5  # but for the two that calibrate, and the fresh ones at the end


def test_files_are_written_aside_and_synchronised_before_they_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "run", []
    replace = os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: done.append("synchronised"))
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (done.append((Path(a).name, b)), replace(a, b)))
    checkpoint.write(path, Saved({"x": torch.ones(3)}, {"y": 1.5}))
    assert done == ["synchronised", ("run.partial", path), "synchronised"]
    assert list(tmp_path.iterdir()) == [path]
    saved = checkpoint.read(path)
    assert saved is not None
    assert torch.equal(saved.tensors["x"], torch.ones(3))
    assert saved.facts["y"] == 1.5
    assert (saved.facts["torch"], saved.facts["eigenfunc"]) == (torch.__version__, eigenfunc.__version__)
    assert checkpoint.read(tmp_path / "none") is None


def test_a_full_disk_is_an_error_at_the_start_and_a_warning_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    A, path, left = diagonal(spectrum("bulk")), tmp_path / "run", 0
    replace = os.replace

    def full(a: Any, b: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        replace(a, b)

    asked: dict[str, Any] = {"k": 4, "which": "LA", "basis_size": 10, "seed": 0}
    monkeypatch.setattr(checkpoint.os, "replace", full)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)  # whatever it costs
    with pytest.raises(CheckpointError, match="No space left"):
        eigsh(A, **asked, checkpoint=path)
    assert list(tmp_path.iterdir()) == []
    left = 2
    with pytest.warns(CheckpointWarning, match="goes on without being saved.*No space left"):
        solution = eigsh(A, **asked, checkpoint=Checkpoint(path, minutes=0))
    assert_same(solution, eigsh(A, **asked))
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]  # the last one that was whole
    left = 10
    assert_same(eigsh(A, **asked, checkpoint=path), solution)


# ---- what is refused


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "run"
    assert stopped(diagonal(spectrum("bulk", 40)), path, 15, **SMALL) is not None
    return path


SMALL: dict[str, Any] = {"k": 2, "which": "LA", "basis_size": 10, "seed": 0}


def assert_refused(path: Path, match: str, A: Any = None, checkpoint: Any = None, **other: Any) -> None:
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=match) as caught:
        eigsh(diagonal(spectrum("bulk", 40)) if A is None else A, **{**SMALL, **other}, checkpoint=checkpoint or path)
    assert str(path) in str(caught.value)
    assert "another path" in str(caught.value)  # the remedy
    assert path.read_bytes() == before
    assert not path.with_name(path.name + ".partial").exists()


def test_a_file_with_any_byte_changed_or_cut_off_is_refused(saved_run: Path, tmp_path: Path) -> None:
    whole, path, chance = saved_run.read_bytes(), tmp_path / "run", random.Random(0)
    assert checkpoint.read(saved_run) is not None
    length = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(12), *(chance.randrange(length) for _ in range(100))]
    places += [chance.randrange(len(whole)) for _ in range(100)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= chance.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="delete the file"):
            checkpoint.read(path)
    for place in [0, 1, 7, 8, length, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(50))]:
        path.write_bytes(whole[:place])
        with pytest.raises(CheckpointError, match="delete the file"):
            checkpoint.read(path)
    for text in (whole + b"\0", whole[:length], whole[:-100] + bytes(100), whole.replace(b"checksum", b"Checksum")):
        path.write_bytes(text)
        assert_refused(path, "damaged|no checkpoint")
        assert_refused(path, "damaged|no checkpoint", checkpoint=Checkpoint(path, resume=False))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for text in (b"", b"\0" * 100, b"\xff" * 100, b"import torch\n" * 50):
        path.write_bytes(text)
        assert_refused(path, "no checkpoint of eigenfunc")
    save_file({"weight": torch.ones(3)}, path)
    assert_refused(path, "no checkpoint of eigenfunc")
    with pytest.raises(CheckpointError, match="directory"):
        eigsh(diagonal(spectrum("bulk", 40)), **SMALL, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match=r"no folder .*make it first"):
        eigsh(diagonal(spectrum("bulk", 40)), **SMALL, checkpoint=tmp_path / "none" / "run")


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    checkpoint.write(path, Saved({"x": torch.ones(1)}, {}))
    monkeypatch.undo()
    assert_refused(path, f"in format {checkpoint.FORMAT + 1}; this is .* Go on with that version")


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "k": ("k was 2 there and is 3 here", {"k": 3}),
    "which": ("which was LA there and is LM here", {"which": "LM"}),
    "tol": ("tol was 0.0001 there and is 0.001 here", {"tol": 1e-3}),
    "seed": ("seed was 0 there and is 1 here", {"seed": 1}),
    "basis_size": ("basis_size was 10 there and is 12 here", {"basis_size": 12}),
    "block_size": ("block_size was 1 there and is 2 here", {"block_size": 2}),
    "basis_dtype": ("basis_dtype was None there and is torch.float16 here", {"basis_dtype": torch.float16}),
    "matrix": ("another matrix", {"A": diagonal(spectrum("bulk", 40) * (1 + 1e-9))}),
    "zero matrix": ("another matrix", {"A": diagonal(spectrum("zero", 40))}),
    "size": ("tree was  .40,. .* and is  .41,.", {"A": diagonal(spectrum("bulk", 41))}),
    "dtype": ("tree was .*float64 .*float32", {"A": diagonal(spectrum("bulk", 40, torch.float32))}),
    "name": ("tree was .* and is w ", {"A": LinearOperator(lambda v: v, {"w": spectrum("bulk", 40)})}),
    "leaves": ("tree was", {"A": LinearOperator(lambda v: v, [torch.ones(20).double(), torch.ones(20).double()])}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_problem_is_refused_and_left_alone(name: str, saved_run: Path) -> None:
    match, other = OTHERS[name]
    assert_refused(saved_run, match, **other)
    if name not in ("seed", "basis_size", "block_size"):
        assert_refused(saved_run, match, checkpoint=Checkpoint(saved_run, resume=False), **other)


def test_to_start_afresh_replaces_a_file_of_the_same_problem(saved_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_bytes(saved_run.read_bytes())
    A = diagonal(spectrum("bulk", 40))
    solution = eigsh(A, **{**SMALL, "seed": 7}, checkpoint=Checkpoint(path, resume=False))
    assert_same(solution, eigsh(A, **{**SMALL, "seed": 7}))
    assert_same(eigsh(A, **{**SMALL, "seed": None}, checkpoint=path), solution)


def test_what_was_left_open_is_what_it_was(saved_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_bytes(saved_run.read_bytes())
    A = diagonal(spectrum("bulk", 40))
    assert_same(eigsh(A, 2, which="LA", checkpoint=path), eigsh(A, **SMALL))


def test_products_that_repeat_up_to_rounding_are_said_and_give_a_true_result(saved_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_bytes(saved_run.read_bytes())
    values = spectrum("bulk", 40)
    near = LinearOperator(lambda v: values * v * (1 + 2**-52), values)
    with pytest.warns(CheckpointWarning, match="not bit for bit"):
        solution = eigsh(near, **SMALL, checkpoint=path)
    assert ((solution.values - values.sort(descending=True).values[:2]).abs() <= solution.bounds).all()


def test_arguments_and_packages_are_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (3, {"path": "x"}):
        with pytest.raises(InputError, match="must be a path"):
            eigsh(diagonal(spectrum("bulk", 40)), checkpoint=wrong)  # type: ignore[arg-type]
    for minutes in (-1, "often", float("nan")):
        with pytest.raises(InputError, match="minutes"):
            Checkpoint(tmp_path, minutes=minutes)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match=r"pip install 'eigenfunc\[cli\]'"):
        eigsh(diagonal(spectrum("bulk", 40)), checkpoint=tmp_path / "run")


# ---- processes that are killed


def killed(kills: int, seed: int) -> dict[str, int]:
    environment = {**os.environ, "PYTHONPATH": str(Path(eigenfunc.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(kills), str(seed)],
        cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_always_goes_on_to_the_same_bits(kills: int) -> None:
    """The long version: `python -m pytest -m slow tests/test_checkpoint.py`."""
    result = killed(kills, kills)
    assert (result["killed"], result["different"]) == (kills, 0)
    assert result["midway"] >= kills // 2
    assert result["ended"] >= 1
    assert result["lost"] <= 2  # the product that was saved after, and the one under way
