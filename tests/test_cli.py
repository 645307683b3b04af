"""The command line as a user meets it: what it prints, writes and returns."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import eigenfunc
from eigenfunc import Solution, eigsh
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


def truth_matrix() -> torch.Tensor:
    scope: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(PROBLEM, scope)
        loss, params, data = scope["make_problem"]()
    batches = list(data)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    return dense_hessian(lambda p: loss(p, whole), params)


def truth() -> torch.Tensor:
    return torch.linalg.eigvalsh(truth_matrix())


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


def test_a_saved_run_loads_as_a_solution_and_prints_its_table_again(problem: Path, capsys: Any) -> None:
    out = problem.parent / "out"
    assert main(["run", str(problem), "--k", "2", "--seed", "0", "--out", str(out)]) == 0
    first = capsys.readouterr().out
    assert main(["report", str(out)]) == 0
    again = capsys.readouterr().out
    assert again.strip() in first
    solution = Solution.load(out)
    assert again == f"{solution}\n"
    assert solution.stats.seed == 0
    record = json.loads((out / "report.json").read_text())
    assert (record["n"], record["format"]) == (43, 1)


def test_the_report_of_a_run_that_did_not_converge_is_exit_code_3(tmp_path: Path, capsys: Any) -> None:
    eigsh(torch.diag(torch.linspace(0, 1, 500).double()), 3, max_matvecs=5, seed=0, throw=False).save(tmp_path)
    assert main(["report", str(tmp_path)]) == 3
    assert "NOT converged" in capsys.readouterr().out
    (tmp_path / "eigenvectors.safetensors").write_bytes(b"")
    assert main(["report", str(tmp_path)]) == 2
    assert "checksum" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2


def test_a_density_takes_out_the_largest_pairs_and_counts_the_rest(problem: Path, capsys: Any) -> None:
    out = problem.parent / "out"
    more = ["--k", "4", "--probes", "6", "--steps", "39", "--seed", "3", "--out", str(out)]
    assert main(["density", str(problem), *more]) == 0
    record = json.loads((out / "density.json").read_text())
    values = truth()
    largest = values[values.abs().argsort(descending=True)[:4]].sort().values
    assert torch.allclose(torch.tensor(record["values"]).double(), largest, atol=1e-6)
    assert (record["n"], record["k"], record["probes"], record["steps"], record["seed"]) == (43, 4, 6, 39, 3)
    nodes, weights = (torch.tensor(record[name], dtype=torch.float64) for name in ("nodes", "weights"))
    assert nodes.shape == weights.shape == (6, 39)
    assert torch.allclose(weights.sum(1), torch.full((6,), 39 / 43).double())
    trace = float((weights * nodes).sum(1).mean() + torch.tensor(record["values"]).double().sum() / 43)
    rest = values[values.abs().argsort(descending=True)[4:]]
    spread = float((2 * (rest - rest.mean()).square().mean() / (39 * 6)) ** 0.5)
    assert abs(trace - float(values.mean())) < 4 * spread
    assert len(record["band"]) == 2
    assert (out / "density.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "all 4 pairs certified" in printed
    assert "share of eigenvalues" in printed


def test_a_density_without_pairs_and_one_whose_pairs_have_not_converged(
    problem: Path, capsys: Any, monkeypatch: Any
) -> None:
    out = problem.parent / "out"
    assert main(["density", str(problem), "--k", "0", "--probes", "2", "--steps", "5", "--out", str(out)]) == 0
    assert json.loads((out / "density.json").read_text())["values"] == []
    problem.write_text(CLOSE)
    monkeypatch.setattr("eigenfunc.cli.eigsh", partial(eigsh, max_matvecs=25))
    more = ["--k", "3", "--probes", "2", "--steps", "5", "--seed", "0", "--out", str(out)]
    assert main(["density", str(problem), *more]) == 3
    kept = json.loads((out / "density.json").read_text())["values"]
    assert "NOT converged" in capsys.readouterr().out
    assert len(kept) == 1
    assert abs(kept[0] - 2) < 1e-9


@pytest.mark.parametrize("by", ["module", "parameter"])
def test_layers_are_those_of_the_dense_blocks(problem: Path, by: str, capsys: Any) -> None:
    out = problem.parent / "out"
    assert (
        main(["layers", str(problem), "--k", "3", "--by", by, "--tol", "1e-8", "--seed", "0", "--out", str(out)]) == 0
    )
    record = json.loads((out / "layers.json").read_text())
    H = truth_matrix()
    spans = {"0.bias": range(5), "0.weight": range(5, 25), "2.bias": range(25, 28), "2.weight": range(28, 43)}
    groups = (
        {name: [name] for name in spans}
        if by == "parameter"
        else {"0": ["0.bias", "0.weight"], "2": ["2.bias", "2.weight"]}
    )
    assert set(record["layers"]) == set(groups)
    for name, members in groups.items():
        index = [i for member in members for i in spans[member]]
        block = torch.linalg.eigvalsh(H[index][:, index])
        report = record["layers"][name]
        values = torch.tensor(report["values"], dtype=torch.float64)
        sizes = wanted(block, 3, "LM").abs()
        assert ((values.abs() - sizes).abs() <= torch.tensor(report["bounds"]).double() + 1e-15).all()
        assert report["status"] == "converged"
    assert (record["n"], record["k"], record["by"], record["version"]) == (43, 3, by, eigenfunc.__version__)
    assert (out / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert f"{len(groups)} of {len(groups)} layers converged" in capsys.readouterr().out


CLOSE = """
import torch

def make_problem():
    slopes = torch.cat([torch.linspace(0, 1, 2_000), torch.tensor([2.0])]).double()
    return lambda p, batch: (slopes * p**2).sum() / 2, torch.ones(2_001).double(), torch.zeros(1)
"""


HALF = """
import torch

def make_problem():
    slopes = torch.linspace(0, 1, 1_000).double() ** 4

    def loss(p, batch):
        return (slopes * p["hard.w"] ** 2).sum() / 2 + (torch.arange(5) * p["easy.w"] ** 2).sum()

    return loss, {"hard.w": torch.ones(1_000).double(), "easy.w": torch.ones(5).double()}, torch.zeros(1)
"""


def test_layers_that_have_not_converged_are_exit_code_3(problem: Path, capsys: Any) -> None:
    problem.write_text(HALF)
    out = problem.parent / "out"
    more = ["--k", "2", "--which", "SA", "--tol", "1e-9", "--seed", "0", "--out", str(out)]
    assert main(["layers", str(problem), *more]) == 3
    assert "1 of 2 layers converged" in capsys.readouterr().out
    found = json.loads((out / "layers.json").read_text())["layers"]
    assert found["easy"]["status"] == "converged"
    assert found["hard"]["status"] != "converged"


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
        ["layers"],
        ["density"],
        ["density", "missing.py"],
        ["density", "missing.py", "--probes", "0"],
        ["layers", "missing.py"],
        ["report", "missing"],
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


def test_lines_of_json_tell_the_plan_each_look_and_the_end(problem: Path, capsys: Any) -> None:
    out = str(problem.parent / "out")
    assert main(["run", str(problem), "--k", "2", "--which", "LA", "--seed", "0", "--log-json", "--out", out]) == 0
    lines = [json.loads(line, parse_constant=pytest.fail) for line in capsys.readouterr().err.splitlines()]
    events = [line["event"] for line in lines]
    assert events == ["start", "plan", *["look"] * (len(lines) - 3), "end"]
    assert len(events) > 4
    times, products = [line["time"] for line in lines], [line["products"] for line in lines[2:-1]]
    assert times == sorted(times)
    assert products == sorted(products)
    assert lines[1]["basis_size"] >= 2
    assert lines[-1]["matvecs"] >= products[-1]
    assert lines[-1]["values"] == pytest.approx(truth().flip(0)[:2].tolist(), rel=1e-6)
    assert main(["run", str(problem), "--k", "0", "--log-json", "--out", out]) == 2
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (last["event"], "k must be" in last["message"]) == ("error", True)
    assert not logging.getLogger("eigenfunc").handlers


@pytest.mark.parametrize(
    ("text", "number"),
    [("1000", 1000), ("4GB", 4 * 10**9), ("500MiB", 500 * 2**20), ("1.5 kib", 1536), ("2e9", 2 * 10**9)],
)
def test_a_memory_budget_is_a_number_of_bytes(text: str, number: int, problem: Path, capsys: Any) -> None:
    code = main(
        ["run", str(problem), "--k", "1", "--log-json", "--memory-budget", text, "--out", str(problem.parent / "out")]
    )
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert code == (0 if number > 10**8 else 2)
    if code:
        assert "the least that would do" in lines[-1]["message"]
    else:
        assert next(line for line in lines if line["event"] == "plan")["memory_bytes"] <= number


def test_a_basis_goes_to_the_disk_where_a_path_is_given(problem: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["run", str(problem), "--k", "1", "--basis-path", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert f"on disk in {tmp_path}" in capsys.readouterr().out
    assert main(["run", str(problem), "--basis-path", str(tmp_path / "missing"), "--out", str(tmp_path / "out")]) == 2


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
