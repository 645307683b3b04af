"""`eigenfunc run` under torchrun. The larger part, all that goes wrong: `pytest -m slow tests/test_torchrun.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from eigenfunc.cli import main
from tests.helpers import wanted
from tests.ranks import ROOT, truth

PROBLEM = """
import os, signal, time
import torch
from eigenfunc import Batches
from tests import ranks
from torch import nn
from eigenfunc import functional_loss

def make_problem():
    print("made", flush=True)
    model, inputs, targets = ranks.problem()
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
"""
DATA = {
    "function": """
    def data(rank, world_size):
        stops = [0, 7, 64] if world_size == 2 else [0, 64]
        return inputs[stops[rank]:stops[rank + 1]], targets[stops[rank]:stops[rank + 1]]
    return loss, params, data
""",
    "list": """
    return loss, params, Batches(list(zip(inputs.split(9), targets.split(9))))
""",
    "loader": """
    samples = torch.utils.data.TensorDataset(inputs, targets)
    return loss, params, torch.utils.data.DataLoader(samples, batch_size=10)
""",
    "one batch": """
    return loss, params, (inputs, targets)
""",
    "hard": """
    slopes = torch.linspace(0, 1, 20_000).double() ** 4
    params = torch.ones(20_000).double()
    return lambda p, batch: (slopes * p**2).sum() / 2, params, Batches([torch.zeros(1)] * 4)
""",
    "dies": """
    calls = []
    def dying(params, batch):
        calls.append(1)
        if len(calls) > 60 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(params, batch)
    return dying, params, Batches([(inputs, targets)] * 200)
""",
    "hangs": """
    calls = []
    def hanging(params, batch):
        calls.append(1)
        if len(calls) > 60 and os.environ["RANK"] == "1":
            time.sleep(3600)
        return loss(params, batch)
    return hanging, params, Batches([(inputs, targets)] * 200)
""",
    "saved": """
    from pathlib import Path
    from eigenfunc import checkpoint
    checkpoint.SHARE, replace, saves = 1e9, os.replace, []
    def replacing(source, target):
        saves.append(target)
        if len(saves) == 3 and os.environ["RANK"] == "1":
            event = Path("event").read_text()
            if event == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "stopped":
                os.kill(os.getppid(), signal.SIGTERM)
        replace(source, target)
    checkpoint.os.replace = replacing
    slopes = torch.linspace(0, 1, 3_000).double() ** 4
    params = torch.ones(3_000).double()
    return lambda p, batch: (slopes * p**2).sum() / 2, params, Batches([torch.zeros(1)] * 4)
""",
    "fails": """
    def failing(params, batch):
        if os.environ["RANK"] == "1":
            raise ValueError("out of luck")
        return loss(params, batch)
    return failing, params, Batches([(inputs, targets)] * 4)
""",
}


def torchrun(tmp_path: Path, kind: str, *options: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "problem.py"
    path.write_text(PROBLEM + DATA[kind])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "eigenfunc", "run", str(path), "--k", "4", "--tol", "1e-8", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(
        [*command, *options],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as started:
        try:
            said = started.communicate(timeout=180)
        finally:
            with suppress(ProcessLookupError):  # its workers with it
                os.killpg(started.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, started.returncode, *said)


def check_report(tmp_path: Path) -> None:
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    values = torch.tensor(report["values"], dtype=torch.float64)
    expected = wanted(torch.linalg.eigvalsh(truth("mean")), 4, "LM")
    assert ((values - expected).abs() <= torch.tensor(report["bounds"]).double() + 1e-12).all()


def test_a_function_for_data_is_called_in_one_process(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "problem.py"
    path.write_text(PROBLEM + DATA["function"])
    assert main(["run", str(path), "--k", "4", "--tol", "1e-8", "--out", str(tmp_path / "out")]) == 0
    check_report(tmp_path)


@pytest.mark.parametrize("command", ["density", "layers"])
def test_the_other_commands_call_a_function_for_data_too(tmp_path: Path, command: str) -> None:
    path = tmp_path / "problem.py"
    path.write_text(PROBLEM + DATA["function"])
    more = ["--probes", "2", "--steps", "5"] if command == "density" else ["--by", "parameter"]
    assert main([command, str(path), "--k", "2", "--tol", "1e-8", "--out", str(tmp_path / "out"), *more]) == 0
    if command == "density":
        found = json.loads((tmp_path / "out" / "density.json").read_text())["values"]
        expected = wanted(torch.linalg.eigvalsh(truth("mean")), 2, "LM")
    else:
        found = json.loads((tmp_path / "out" / "layers.json").read_text())["layers"]["0.bias"]["values"]
        expected = wanted(torch.linalg.eigvalsh(truth("mean")[:5, :5]), 2, "LM")
    assert torch.allclose(torch.tensor(found).double().sort().values, expected.sort().values, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["density"], "torchrun spreads `run` alone"),
        (["layers"], "torchrun spreads `run` alone"),
    ],
)
def test_what_one_process_alone_can_do_is_refused_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], words: str
) -> None:
    path = tmp_path / "problem.py"
    path.write_text(PROBLEM + DATA["function"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*arguments, str(path), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind", ["function", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("list", "loader"))]
)
def test_run_under_torchrun_speaks_and_writes_once(tmp_path: Path, kind: str) -> None:
    done = torchrun(tmp_path, kind)
    assert done.returncode == 0, done.stderr
    check_report(tmp_path)
    assert done.stdout.count("made") == done.stdout.count("wrote report.json") == 1
    assert "sum over 2 processes, rank 0" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("one batch", "cannot be dealt out to 2 processes"),
        ("dies", "Signal 9 (SIGKILL) received by PID"),
        ("hangs", "no longer reaches the others"),
        ("fails", "another process failed. rank 1: ValueError: out of luck"),
    ],
)
def test_failures_under_torchrun_end_it(tmp_path: Path, kind: str, words: str) -> None:
    done = torchrun(tmp_path, kind, "--timeout", "15")
    assert done.returncode == 1
    assert words in done.stderr, done.stderr
    assert not (tmp_path / "out" / "report.json").exists()


def saved(tmp_path: Path, event: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A run that saves itself, of which a process is killed while it does so, or all are told to end, or nothing."""
    (tmp_path / "event").write_text(event)
    options = ("--checkpoint", "run.ckpt", "--seed", "3", "--memory-budget", "1GB", *options)
    return torchrun(tmp_path, "saved", *options)


def resumed(tmp_path: Path) -> dict[str, Any]:
    done = saved(tmp_path, "", "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on from run.ckpt") == 1
    report: dict[str, Any] = json.loads((tmp_path / "out" / "report.json").read_text())
    values, bounds = (torch.tensor(report[name], dtype=torch.float64) for name in ("values", "bounds"))
    truth = torch.linspace(0, 1, 3_000).double().pow(4).flip(0)[:4]
    assert report["converged"] == [True] * 4
    assert ((values - truth).abs() <= bounds + 1e-12).all()
    return report


def test_a_run_under_torchrun_that_is_killed_while_it_saves_can_be_resumed(tmp_path: Path) -> None:
    done = saved(tmp_path, "killed")
    assert done.returncode == 1
    assert "Signal 9 (SIGKILL) received by PID" in done.stderr
    assert not (tmp_path / "out").exists()
    assert "the part of one of 2 processes" in done.stdout
    resumed(tmp_path)


@pytest.mark.slow
def test_a_run_that_torchrun_is_told_to_end_is_saved_by_all_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    done = saved(tmp_path, "stopped")
    assert done.returncode == 1
    assert done.stderr.count("go on from there with --resume") == 2, done.stderr
    found = resumed(tmp_path)
    for part in tmp_path.glob("run.ckpt*"):
        part.unlink()
    assert saved(tmp_path, "").returncode == 0
    whole = json.loads((tmp_path / "out" / "report.json").read_text())
    for report in (found, whole):
        del report["seconds"], report["peak_memory_bytes"], report["operator"]
    assert found == whole


@pytest.mark.slow
def test_not_converged_under_torchrun_is_told_by_the_report(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "hard", "--which", "SA", "--tol", "1e-9")
    assert done.returncode == 1
    assert "exitcode  : 3" in done.stderr
    assert not json.loads((tmp_path / "out" / "report.json").read_text())["converged"][-1]
