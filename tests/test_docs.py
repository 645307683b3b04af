"""The README and every page of the documentation run as they stand, each as one script."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.__main__ import run
from benchmarks.report import BENCHMARKS, Benchmark, write
from eigenfunc import cli
from tests.zoo.thirdparty import quiet, torchvision_schemas

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = {"hessian_eigenthings", "pyhessian", "curvlinops", "transformers", "timm"}
SHOWN = {"python", "console", "text", "bash"}  # what is run, run, what it prints, and the README's two commands

FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    language: str
    line: int  # of its first line in the page
    body: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(FENCE.findall(text)), f"{page}: an open block"
    return [Block(m["info"], text.count("\n", 0, m.start("body")) + 1, m["body"]) for m in FENCE.finditer(text)]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def parsed(block: Block, page: Path) -> ast.Module:
    return ast.parse("\n" * (block.line - 1) + block.body, str(page))


def foreign(trees: Iterable[ast.Module]) -> set[str]:
    """The packages of other projects that are imported, which may be missing."""
    names = {alias.name for tree in trees for x in ast.walk(tree) if isinstance(x, ast.Import) for alias in x.names}
    names |= {x.module or "" for tree in trees for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)}
    return {name.split(".")[0] for name in names} & OTHERS


@contextmanager
def forgiving(others: set[str]) -> Iterator[None]:
    """Leaves out the warnings that other projects give, where they are there; skips the test where they are not."""
    if absent := sorted(name for name in others if importlib.util.find_spec(name) is None):
        pytest.skip(f"needs {', '.join(absent)}")
    if not others:
        yield
        return
    torchvision_schemas()
    with quiet():
        warnings.filterwarnings("ignore", r"Using backward\(\) with create_graph=True")  # PyHessian's
        yield


def typed(line: str) -> int:
    """The exit code of a line `$ eigenfunc ...`, run in this process."""
    words = shlex.split(line.removeprefix("$ "))
    assert words[0] == "eigenfunc", f"{line}: only the command line of this project is run"
    return cli.main(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_its_language(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= SHOWN - (set() if page == README else {"bash"})


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
def test_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trees = {block: parsed(block, page) for block in blocks(page) if block.language == "python"}
    monkeypatch.chdir(tmp_path)
    module: dict[str, Any] = {"__name__": "page"}
    printed = ""
    with torch.random.fork_rng(), forgiving(foreign(trees.values())):
        for block in blocks(page):
            if block.language == "python":
                if block.body.startswith("# problem.py"):
                    Path("problem.py").write_text(block.body)
                exec(compile(trees[block], str(page), "exec"), module)
                printed = capsys.readouterr().out
            elif block.language == "text":
                assert block.body == printed, "what the block before prints"
            elif block.language == "console":
                for line in block.body.splitlines():
                    assert typed(line) in (0, 3), capsys.readouterr().err


def test_the_readme_has_the_two_commands_of_the_continuous_checks() -> None:
    commands = "".join(block.body for block in blocks(README) if block.language == "bash").splitlines()
    assert len(commands) == 2
    assert all(".ci/constraints.txt" in command for command in commands)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m ((?:benchmarks|tests|docs)(?:\.\w+)*)", text):
        assert importlib.util.find_spec(module) is not None, module
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_public_name_is_in_the_reference() -> None:
    import eigenfunc

    reference = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", reference, re.MULTILINE)}
    errors = {"EigenfuncError", "NotConverged", "__version__"}  # on the page of `eigenfunc.errors`
    assert set(eigenfunc.__all__) - errors <= listed
    assert "eigenfunc.errors" in reference
    assert "errors" in listed
    for name in re.findall(r"^::: (\S+)", reference, re.MULTILINE):
        module, _, last = name.rpartition(".")
        home = importlib.import_module(module if module != "eigenfunc" else name)
        assert hasattr(home, last) or home.__name__ == name, name


def test_the_page_on_design_shows_the_floors_as_they_are() -> None:
    floors = runpy.run_path(str(ROOT / "docs" / "tools" / "floors.py"))
    page: Path = floors["PAGE"]
    assert page.read_text() == floors["written"](page.read_text()), "run python docs/tools/floors.py"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"^ *- (?:.*: )?([\w/-]+\.md)$", (ROOT / "docs" / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {str(page.relative_to(ROOT / "docs")) for page in PAGES if page != README} <= listed


def test_docstrings_with_columns_become_definition_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))
    markdown = runpy.run_path(str(ROOT / "docs" / "tools" / "columns.py"))["markdown"]
    text = "What.\n\nlonger_name of (k, *leaf)\n            vectors\nk           how many\n\nRaises."
    wanted = "What.\n\n`longer_name`\n:   of (k, \\*leaf)\n    vectors\n\n`k`\n:   how many\n\nRaises."
    assert re.sub(r"\n{3,}", "\n\n", markdown(text)) == wanted


def test_benchmarks_become_a_page_whatever_becomes_of_them(tmp_path: Path) -> None:
    common = {"quick": True, "machine": "a machine", "load": 0.0, "date": "2026-01-01", "seconds": 1.0}
    failed = {"exit_code": 1, "ended": "exit code 1", "output": "words\n\n| a | b |\n|---|---|\n| 1 | 2 |"}
    rows = [{"n": 10**i, "place": "in memory", "seconds": 1.0, "matvecs": 5, "peak": 2**20} for i in (3, 4)]
    fine = {"exit_code": 0, "ended": "exit code 0", "output": "| c |\n|---|"}
    results = {
        "fuzz": {"command": "python -m benchmarks.fuzz_solver", "numbers": None, **common, **failed},
        "scaling": {"command": "python -m benchmarks.scaling", "numbers": {"rows": rows}, **common, **fine},
        "density": {"command": "python -m benchmarks.density", "numbers": {"no": "figures"}, **common, **fine},
    }
    write(results, tmp_path)
    path = tmp_path / "benchmarks.md"
    assert [block.body for block in blocks(path)] == ["words\n"]
    assert "\n| 1 | 2 |\n" in path.read_text()
    assert "**Failed**: exit code 1." in path.read_text()
    assert "](figures/benchmarks_scaling.png)" in path.read_text()
    assert (tmp_path / "figures" / "benchmarks_scaling.png").stat().st_size > 1000
    assert "*No figure: KeyError.*" in path.read_text()
    assert {importlib.util.find_spec(f"benchmarks.{each.module}") is None for each in BENCHMARKS.values()} == {False}


def test_a_benchmark_that_fails_or_does_not_end_says_so_and_stops_nothing() -> None:
    absent = run(Benchmark("", "no_such_module", "", ()), quick=True)
    assert absent["exit_code"] == 1
    assert "no_such_module" in absent["output"]
    endless = run(Benchmark("", "fuzz_solver", "", ("--examples", "1000000000"), limit=0.5), quick=True)
    assert (endless["exit_code"], endless["ended"]) == (124, "stopped after 0 s")


def test_the_page_of_benchmarks_is_that_of_its_numbers(tmp_path: Path) -> None:
    docs = ROOT / "docs"
    write(json.loads((docs / "benchmarks.json").read_text()), tmp_path)
    assert (tmp_path / "benchmarks.md").read_text() == (docs / "benchmarks.md").read_text(), (
        "python -m benchmarks.report"
    )
    for figure in re.findall(r"\]\(figures/(\S+)\)", (docs / "benchmarks.md").read_text()):
        assert (docs / "figures" / figure).exists()
