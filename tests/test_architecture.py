"""The house keeps its shape: who imports whom, pure kernels without host reads, files and functions of bounded size."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "eigenfunc"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports only from floors below its own.
FLOORS = [
    {"errors", "jsonlog", "_version", "chance", "choices"},
    {"storage"},
    {"tree"},
    {"scope", "archive", "bridge", "canvas", "runlog", "selection"},
    {"objective", "data", "operator", "preconditioners", "records", "budget"},
    {"krylov", "solution", "curvature", "alerts", "courses"},
    {"distributed"},
    {"certificate", "checkpoint", "landscape", "overlap", "perturbation", "sampling", "testing"},
    {"plan", "implicit", "funm", "solve"},
    {"completeness", "stochastic"},
    {"thick_restart", "nearby", "trust_region"},
    {"verdict", "endgame", "resume"},
    {"block_loop"},
    {"eigsh", "lobpcg", "power_iteration", "subspace_iteration"},
    {"compat", "demo", "flatness", "layers", "plot", "problem", "report", "signals", "streaming", "tracking"},
    {"track"},
    {"callbacks"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def house(path: Path) -> str:
    """The name under which FLOORS lists a file: its own, or that of its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(path: Path) -> set[str]:
    """Dotted names of everything the file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_downwards(path: Path) -> None:
    own = house(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "eigenfunc" or len(parts) < 2:
            continue
        other = parts[1] if parts[1] in FLOOR else None
        assert other is not None, f"{name} is on no floor"
        assert other == own or FLOOR[other] < FLOOR[own], f"{own} imports {other}"


def test_one_module_knows_optree() -> None:
    users = {house(path) for path in FILES for name in imported(path) if name.split(".")[0] == "optree"}
    assert users == {"tree"}


def test_run_time_packages_are_few() -> None:
    core = {"torch", "numpy", "optree", "tqdm", "eigenfunc"}
    extras = {"cli": {"resource"}, "plot": {"matplotlib"}, "canvas": {"matplotlib"}, "demo": {"sklearn"}}
    extras |= {"testing": {"hypothesis"}, "archive": {"safetensors"}, "checkpoint": {"safetensors"}}
    extras |= {"bridge": {"scipy", "pandas"}, "solution": {"pandas"}}
    import sys

    for path in FILES:
        allowed = core | extras.get(house(path), set()) | set(sys.stdlib_module_names)
        assert {name.split(".")[0] for name in imported(path)} <= allowed, path


@pytest.mark.parametrize("path", sorted((PACKAGE / "krylov").glob("*.py")), ids=module_of)
def test_kernels_read_nothing_back_and_draw_nothing(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name):
                assert called.id not in {"float", "int", "bool", "print"}, f"line {node.lineno}"
            if isinstance(called, ast.Attribute):
                assert called.attr not in {"item", "tolist", "cpu", "numpy", "rand", "randn"}, f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_seeds_or_draws_from_the_global_random_state(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in {"randn", "rand", "randint", "randperm", "normal"}:
                assert "generator" in ast.unparse(node), f"line {node.lineno}"
            owner = node.func.value
            seeds = node.func.attr == "manual_seed" and isinstance(owner, ast.Name) and owner.id == "torch"
            assert not seeds, f"line {node.lineno}"


@pytest.mark.parametrize("path", [*FILES, *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/**/*.py")], ids=module_of)
def test_files_and_functions_stay_readable(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, node.name


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/test_*.py")), ids=module_of)
def test_every_test_asserts(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            text = ast.unparse(node)
            assert any(word in text for word in ("assert", "raises", "warns")), node.name


def test_all_public_names_have_a_docstring() -> None:
    import eigenfunc

    for name in eigenfunc.__all__:
        if name != "__version__":
            assert (getattr(eigenfunc, name).__doc__ or "").strip(), name


def test_top_level_holds_what_it_should() -> None:
    entries = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and path.suffix != ".egg-info"}
    expected = {"eigenfunc", "tests", "benchmarks", "docs", "pyproject.toml", "README.md", "LICENSE"}
    assert entries - {"eigenfunc-out", "__pycache__", "build"} <= expected
