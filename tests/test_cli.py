"""The command line as a user meets it: what it prints, writes and returns."""

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
import torch
from safetensors.torch import load_file

import eigenfunc
from eigenfunc import checkpoint, cli
from eigenfunc.cli import main
from tests.helpers import dense_hessian, wanted

PROBLEM = """
import torch
from eigenfunc import Batches, functional_loss

def make_problem():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(30, 4).double(), torch.randint(0, 3, (30,))
    loss, params = functional_loss(model, torch.nn.CrossEntropyLoss())
    return loss, params, Batches(list(zip(inputs.split(20), targets.split(20))))
"""


@pytest.fixture
def problem(tmp_path: Path) -> Path:
    path = tmp_path / "problem.py"
    path.write_text(PROBLEM)
    return path


def truth() -> torch.Tensor:
    scope: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(PROBLEM, scope)
        loss, params, data = scope["make_problem"]()
    batches = list(data)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    return torch.linalg.eigvalsh(dense_hessian(lambda p: loss(p, whole), params))


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_run_writes_a_report_with_the_dense_eigenvalues(problem: Path, which: str, capsys: Any) -> None:
    out = problem.parent / "out" / "deep"
    state = torch.get_rng_state()
    code = main(["run", str(problem), "--k", "4", "--which", which, "--tol", "1e-8", "--seed", "7", "--out", str(out)])
    torch.set_rng_state(state)
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    values = torch.tensor(report["values"], dtype=torch.float64)
    assert ((values - wanted(truth(), 4, which)).abs() <= torch.tensor(report["bounds"]).double()).all()
    assert (report["which"], report["k"], report["tol"], report["seed"]) == (which, 4, 1e-8, 7)
    assert report["n"] == 4 * 5 + 5 + 5 * 3 + 3
    assert report["converged"] == [True] * 4
    assert len(report["residuals"]) == 4
    assert report["status"] == "converged"
    assert report["version"] == eigenfunc.__version__
    assert 4 <= report["matvecs"] < 200
    vectors = load_file(out / "eigenvectors.safetensors")
    assert vectors["0.weight"].shape == (4, 5, 4)
    flat = torch.cat([x.flatten(1) for x in vectors.values()], dim=1)
    assert (flat @ flat.mT - torch.eye(4)).abs().max() < 1e-12
    assert (out / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for word in ("rank", "λ", "true residual", "bound", "verdict", "matvecs", "passes", " s,", "peak memory"):
        assert word in printed


HARD = """
import torch

def make_problem():
    slopes = torch.linspace(0, 1, 20_000).double() ** 4
    return lambda p, batch: (slopes * p**2).sum() / 2, torch.ones(20_000).double(), torch.zeros(1)
"""


def test_what_has_not_converged_is_said_and_is_exit_code_3(problem: Path, capsys: Any) -> None:
    problem.write_text(HARD)
    out = problem.parent / "out"
    assert (
        main(["run", str(problem), "--k", "2", "--which", "SA", "--tol", "1e-9", "--seed", "0", "--out", str(out)]) == 3
    )
    report = json.loads((out / "report.json").read_text())
    assert False in report["converged"]
    assert report["status"] == "not converged"
    printed = capsys.readouterr().out
    assert "NOT converged" in printed
    assert "raise max_matvecs" in printed


WRONG: dict[str, tuple[str, str]] = {
    "no function": ("x = 1", "does not define make_problem"),
    "not three": ("def make_problem(): return 1, 2", "returned 2 items"),
    "not a tuple": ("def make_problem(): return None", "returned a NoneType"),
    "loss is no function": ("def make_problem(): return 1, 2, 3", "is a int, not a function"),
    "fails": ("def make_problem(): 1 / 0", "ZeroDivisionError"),
    "fails on import": ("import nothing_of_that_name", "ModuleNotFoundError"),
    "no Python": ("def (", "SyntaxError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_problem_file_is_bad_input_and_says_why(name: str, problem: Path, capsys: Any) -> None:
    source, message = WRONG[name]
    problem.write_text(source)
    assert main(["run", str(problem), "--out", str(problem.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    if "fails" not in name and name != "no Python":
        assert "def make_problem():" in error  # an example
    assert not (problem.parent / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "missing.py"],
        ["run"],
        ["unknown"],
        [],
        ["demo", "--k", "0"],
        ["demo", "--seed", "-1"],
        ["demo", "--model", "transformer"],
    ],
)
def test_bad_arguments_are_exit_code_2(arguments: list[str]) -> None:
    assert main(arguments) == 2


@pytest.mark.parametrize("more", [["--k", "0"], ["--k", "1000"], ["--tol", "0"], ["--which", "SM"], ["--seed", "-3"]])
def test_bad_numbers_for_a_good_problem_are_exit_code_2(problem: Path, more: list[str]) -> None:
    assert main(["run", str(problem), *more, "--out", str(problem.parent / "out")]) == 2
    assert not (problem.parent / "out").exists()


def test_python_dash_m_is_the_same_command(problem: Path) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(Path(eigenfunc.__file__).parents[1])}
        return subprocess.run(
            [*command, "run", problem.name, "--k", "2", "--seed", "1"],
            cwd=problem.parent, env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    done = run(sys.executable, "-m", "eigenfunc")
    assert done.returncode == 0, done.stderr
    assert json.loads((problem.parent / "eigenfunc-out" / "report.json").read_text())["k"] == 2


def test_the_demo_holds_itself_against_the_dense_matrix(tmp_path: Path, capsys: Any) -> None:
    assert main(["demo", "--k", "3", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["k"], report["smallest"], report["model"], report["seed"]) == (3, 5, "mlp", 0)
    assert len(report["values"]) == 8
    assert "off the truth by" in capsys.readouterr().out


# ---- checkpoints

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
