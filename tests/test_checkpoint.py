"""Runs that are saved, stopped, killed and taken up again: the same bits at the end, or a refusal with its reason."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import Tensor

import eigenfunc
from eigenfunc import checkpoint, completeness, eigsh, tree
from eigenfunc.certificate import Products
from eigenfunc.checkpoint import Checkpoint, Journal, Saved
from eigenfunc.errors import CheckpointError, CheckpointWarning, InputError, NotConverged, Stopped
from eigenfunc.operator import LinearOperator
from eigenfunc.plan import plan_for
from eigenfunc.solution import Solution
from eigenfunc.thick_restart import Run
from tests.helpers import rotated


@pytest.fixture(autouse=True, scope="module")
def _quick_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", lambda handle: None)
        yield


def diagonal(values: Tensor) -> LinearOperator:
    return LinearOperator(lambda v: values * v, values)


def spectrum(kind: str, n: int = 100, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(5)
    bulk = (2 * torch.rand(n, generator=g, dtype=torch.float64) - 1) ** 3
    values = {
        "bulk": bulk,
        "copies": torch.cat([torch.ones(4).double(), 0.7 * bulk])[:n],  # that the start vector cannot find
        "few": (torch.arange(n) % 3).double(),  # so that the Krylov space is soon exhausted
        "zero": torch.zeros(n).double(),
        "huge": 1e200 * bulk,
    }[kind]
    return values.to(dtype)


class After:
    """Says stop at one call, counted from 1."""

    def __init__(self, call: int) -> None:
        self.left = call

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def assert_same(a: Solution, b: Solution) -> None:
    for name in ("values", "residuals", "bounds", "sharp", "angles", "converged"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for x, y in zip(tree.leaves(a.vectors), tree.leaves(b.vectors), strict=True):
        assert torch.equal(x, y)
    assert {**asdict(a.stats), "seconds": 0} == {**asdict(b.stats), "seconds": 0}
    assert (a.status, a.message, a.noise) == (b.status, b.message, b.noise)


def stopped(A: Any, path: Path, call: int, **asked: Any) -> Saved | None:
    """What is saved of a run that is stopped after some products, or None if it ends before."""
    try:
        eigsh(A, **asked, checkpoint=Checkpoint(path, stop=After(call)), throw=False)
    except Stopped:
        return checkpoint.read(path)
    return None


CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "restarts": ("bulk", torch.float64, {"k": 4, "which": "LA", "basis_size": 10}),
    "both ends": ("bulk", torch.float64, {"k": (2, 1), "which": "BE", "basis_size": 14, "tol": 1e-6}),
    "probes that find something": ("copies", torch.float64, {"k": 4, "which": "LM", "basis_size": 12, "tol": 1e-7}),
    "blocks": ("copies", torch.float32, {"k": 4, "basis_size": 14, "block_size": 3}),
    "half-precision basis": ("copies", torch.float32, {"k": 2, "basis_size": 14, "tol": 1e-2}),
    "breakdown": ("few", torch.float64, {"k": 3, "which": "LA", "basis_size": 30}),
    "blocks that break down": ("few", torch.float32, {"k": 3, "which": "SA", "basis_size": 20, "block_size": 4}),
    "zero": ("zero", torch.float64, {"k": 2, "which": "SA", "basis_size": 10}),
    "scaled": ("huge", torch.float64, {"k": 3, "which": "LM", "basis_size": 12}),
    "whole space": ("bulk", torch.float64, {"k": 3, "which": "SA", "basis_size": 100}),
    "out of budget": (
        "bulk",
        torch.float64,
        {"k": 3, "which": "SA", "basis_size": 10, "tol": 1e-12, "max_matvecs": 40},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_stopped_anywhere_ends_like_one_that_was_not(name: str, tmp_path: Path) -> None:
    kind, dtype, asked = CASES[name]
    if "half" in name:
        asked = {**asked, "basis_dtype": torch.bfloat16}
    A, path = diagonal(spectrum(kind, dtype=dtype)), tmp_path / "run"
    truth = eigsh(A, **asked, seed=3, throw=False)
    halfway = 0
    for call in range(1, truth.stats.passes, max(1, truth.stats.passes // 14)):
        path.unlink(missing_ok=True)
        saved = stopped(A, path, call, **asked, seed=3)
        if saved is None:
            break
        halfway += "probe" in saved.facts
        assert_same(eigsh(A, **asked, checkpoint=path, throw=False), truth)
    assert_same(eigsh(A, **asked, checkpoint=path, throw=False), truth)  # from a file that a finished run left
    assert halfway > 0 or name in ("whole space", "zero", "breakdown", "blocks that break down", "scaled")


@given(data=st.data(), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_run_stopped_again_and_again_ends_like_one_that_was_not(data: st.DataObject, seed: int) -> None:
    kind, dtype, asked = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    A = diagonal(spectrum(kind, dtype=dtype))
    truth = eigsh(A, **asked, seed=seed, throw=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        for _ in range(10):
            call = data.draw(st.integers(1, max(2, truth.stats.passes // 3)))
            if stopped(A, path, call, **asked, seed=seed) is None:
                break
        assert_same(eigsh(A, **asked, checkpoint=path, throw=False), truth)


def test_a_search_for_missing_values_goes_on_in_any_of_its_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completeness._Evidence, "drowned", lambda self, chain: chain.length >= 4)
    n = 60
    values = torch.linspace(-1, 0.999, n).double()
    A, plan = diagonal(values), plan_for(1, "LA", 1e-6, n)
    basis = torch.eye(n).double()[-3:].flip(0)
    span = completeness.Span(basis[:1], basis[1:2], values[-1:], torch.ones(1, 1).double(), torch.zeros(1, 1).double())
    slack = torch.full((2, 1), 1e-9, dtype=torch.float64)

    def search(products: Products, keep: Any = lambda halfway: None, halfway: Any = None) -> completeness.Finding:
        g = torch.Generator().manual_seed(0)
        return completeness.search(plan, products, span, values[-1:], slack, 1.0, g, 50, keep, halfway)

    cuts: list[completeness.Halfway] = []
    whole = Products(A)
    truth = search(whole, lambda halfway: cuts.append(halfway()))
    assert {cut.chain for cut in cuts} == {0, 1, 2}
    for cut in cuts:
        products = Products(A)
        finding = search(products, halfway=cut)
        assert finding.limits == truth.limits
        assert (products.matvecs, products.passes) == (whole.matvecs, whole.passes)
        assert (finding.direction is None) == (truth.direction is None)
        assert finding.direction is None or torch.equal(finding.direction, truth.direction)


def test_more_products_may_be_spent_when_a_run_goes_on(tmp_path: Path) -> None:
    A, path = diagonal(spectrum("bulk")), tmp_path / "run"
    asked: dict[str, Any] = {"k": 3, "which": "SA", "basis_size": 12, "tol": 1e-9, "seed": 0}
    with pytest.raises(NotConverged):
        eigsh(A, **asked, max_matvecs=40, checkpoint=Checkpoint(path, minutes=0))
    truth = eigsh(A, **asked)
    assert_same(eigsh(A, **asked, checkpoint=path), truth)
    probed = 0
    for call in range(36, 49, 4):  # the budget is spent, and the probe that comes then is of no use with a larger one
        path.unlink()
        saved = stopped(A, path, call, **asked, max_matvecs=40)
        assert saved is not None
        probed += "probe" in saved.facts
        assert_same(eigsh(A, **asked, checkpoint=path), truth)
    assert probed > 0


def test_nothing_that_a_run_knows_is_forgotten(tmp_path: Path) -> None:
    A, plan, path = diagonal(spectrum("bulk")), plan_for(3, "LA", 1e-6, 100, basis_size=20), tmp_path / "run"

    def made(seed: int) -> Run:
        run = Run(plan, Products(A), torch.Generator().manual_seed(seed), None)
        run.start(*run.products.calibrate(run.generator))
        return run

    run, other = made(0), made(1)
    for _ in range(7):
        run.advance()
    run.look()
    run.restarts, run.rounds, run.stop, run.verification, run.strictness, run.asym = 3, 2, 77, 5, 0.25, 1e-9
    run.limits = completeness.Limits({1: 0.1 + 0.2, -1: float("inf")}, True)
    run.products.scale, run.products.noise, run.products.passes = 2.0**-40, 1e-15, 99
    checkpoint.write(path, run.snapshot())
    saved = checkpoint.read(path)
    assert saved is not None
    other.restore(saved)
    apart = ("state", "products", "generator", "plan", "bar", "journal")
    kept = [{k: v for k, v in vars(each).items() if k not in apart} for each in (run, other)]
    assert kept[0] == kept[1]
    plain = [{k: v for k, v in vars(each.products).items() if isinstance(v, (int, float))} for each in (run, other)]
    assert plain[0] == plain[1]
    assert torch.equal(run.generator.get_state(), other.generator.get_state())
    for name in run.state._fields:
        assert torch.equal(getattr(run.state, name), getattr(other.state, name)), name


# ---- when it is saved


@given(product=st.floats(0.1, 100), cost=st.floats(0.001, 300), minutes=st.floats(0, 20), every=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_saving_takes_a_twentieth_at_most_and_little_is_lost(
    product: float, cost: float, minutes: float, every: int
) -> None:
    now, saves = 0.0, [0.0]

    def write(path: Path, saved: Saved) -> None:
        nonlocal now
        now += cost
        saves.append(now)
        assert saved.facts == {"seconds": pytest.approx(now - cost), "a": 1, "b": 2}

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
    monkeypatch.setattr(checkpoint, "write", lambda path, saved: written.append(saved))
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


def test_a_dense_matrix_goes_on_bit_for_bit(tmp_path: Path) -> None:
    A = rotated(spectrum("bulk", 60), 0).float()
    A, path = (A + A.mT) / 2, tmp_path / "run"
    asked: dict[str, Any] = {"k": 4, "which": "BE", "basis_size": 16, "seed": 2}
    truth = eigsh(A, **asked)
    assert stopped(A, path, 21, **asked) is not None
    assert_same(eigsh(A, **asked, checkpoint=str(path)), truth)


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
