"""The command line with a checkpoint: signals save the run, and it is resumed to the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import eigenfunc
from eigenfunc import checkpoint, cli
from eigenfunc.cli import main
from tests.test_cli import HARD, PROBLEM, problem

__all__ = ["problem"]

LONG = HARD.replace("20_000", "2_000")  # some thousand products


def numbers(out: Path) -> tuple[Any, bytes]:
    report = json.loads((out / "report.json").read_text())
    del report["seconds"], report["peak_memory_bytes"], report["operator"]
    return report, (out / "eigenvectors.safetensors").read_bytes()


def interrupting(call: int, send: Callable[[], None]) -> Any:
    """`eigsh` on an operator that sends a signal at one of its products."""

    def solve(A: Any, *rest: Any, **asked: Any) -> Any:
        left = call

        def matvec(v: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                send()
            return A.matvec(v)

        return eigenfunc.eigsh(replace(A, matvec=matvec), *rest, **asked)

    return solve


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_run_which_can_be_resumed(
    number: int, code: int, problem: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = problem.parent, problem.parent / "run.ckpt"
    command = ["run", str(problem), "--k", "3", "--which", "LA", "--tol", "1e-9", "--seed", "2", "--out"]
    assert main([*command, str(folder / "whole")]) == 0
    handlers = [signal.getsignal(ending) for ending in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(cli, "eigsh", interrupting(12, lambda: os.kill(os.getpid(), number)))
    assert main([*command, str(folder / "out"), "--checkpoint", str(path)]) == code
    monkeypatch.undo()
    assert [signal.getsignal(ending) for ending in (signal.SIGINT, signal.SIGTERM)] == handlers
    printed = capsys.readouterr()
    assert f"saved in {path}; go on from there with --resume" in printed.err
    assert f"starting afresh, saved in {path}" in printed.out
    assert not (folder / "out").exists()
    saved = checkpoint.read(path)
    assert saved is not None
    assert saved.facts["products"]["matvecs"] == 12  # that one was finished, and none begun
    command = [part for part in command if part not in ("--seed", "2")]
    assert main([*command, str(folder / "out"), "--checkpoint", str(path), "--resume"]) == 0
    assert f"going on from {path}" in capsys.readouterr().out
    assert numbers(folder / "out") == numbers(folder / "whole")


def test_without_resume_a_run_starts_afresh_but_only_over_its_own_problem(problem: Path, capsys: Any) -> None:
    path = problem.parent / "run.ckpt"
    command = ["run", str(problem), "--k", "2", "--out", str(problem.parent / "out"), "--checkpoint", str(path)]
    assert main([*command, "--seed", "1"]) == 0
    before = path.read_bytes()
    assert main([*command, "--seed", "1", "--resume"]) == 0  # from the file of a run that is over
    assert main([*command, "--seed", "2"]) == 0
    fresh = path.read_bytes()
    assert fresh != before
    capsys.readouterr()
    assert main([*command, "--k", "3"]) == 2
    assert "k was 2 there and is 3 here" in capsys.readouterr().err
    problem.write_text(PROBLEM.replace("manual_seed(0)", "manual_seed(1)"))
    for more in ([], ["--resume"]):
        assert main([*command, *more]) == 2
        assert "another matrix" in capsys.readouterr().err
    assert path.read_bytes() == fresh
    path.unlink()
    assert main([*command, "--resume"]) == 0  # killed before it was first saved
    assert "starting afresh" in capsys.readouterr().out
    assert main(["run", str(problem), "--resume"]) == 2
    assert "--resume needs --checkpoint" in capsys.readouterr().err


def started(folder: Path, *command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(eigenfunc.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_process_of_a_long_run_ends_with_the_code_of_the_signal(problem: Path) -> None:
    problem.write_text(LONG)
    wanted = ("--k", "2", "--which", "SA", "--tol", "1e-9", "--checkpoint", "run.ckpt")
    with started(problem.parent, "-m", "eigenfunc", "run", problem.name, *wanted) as process:
        begun = time.monotonic()
        while not (problem.parent / "run.ckpt").exists():
            assert process.poll() is None
            assert time.monotonic() - begun < 120
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "saved in run.ckpt; go on from there with --resume" in printed
    assert "Traceback" not in printed
    assert checkpoint.read(problem.parent / "run.ckpt") is not None


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    script = """
import time
from pathlib import Path
from eigenfunc.signals import saving

with saving(Path("run.ckpt"), False):
    print("within", flush=True)
    time.sleep(600)  # a long product
"""
    with started(tmp_path, "-c", script) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "starting afresh, saved in run.ckpt\n"
        assert process.stdout.readline() == "within\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "\n"
        assert "once more to stop at once" in process.stderr.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM
