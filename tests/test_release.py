"""What a user meets first: an import that is quiet and loads little, and names that mean to be public."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"hypothesis", "matplotlib", "pandas", "safetensors", "scipy", "sklearn", "transformers", "lightning"}
SLOW_PARTS = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.export", "torch.onnx"}
# What README, pages and examples take from a module of its own, not from `eigenfunc`.
MODULES = ("alerts", "callbacks", "errors", "landscape", "plot", "testing")


def loaded(code: str) -> set[str]:
    """The modules that a fresh process holds after `code`, which may not warn."""
    code = f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return set(json.loads(done.stdout))


def test_an_import_is_quiet_and_loads_little_beyond_torch() -> None:
    own = loaded("import eigenfunc") - loaded("import torch")
    assert "eigenfunc.eigsh" in own
    assert not HEAVY & {name.partition(".")[0] for name in own}
    assert not {name for name in own for part in SLOW_PARTS if f"{name}.".startswith(f"{part}.")}


def test_dir_shows_what_is_public_and_all_of_it_is_there() -> None:
    shown = "import eigenfunc as e, sys\nfor name in dir(e): getattr(e, name); sys.modules['shown ' + name] = e\n"
    modules, names = set(MODULES), set(importlib.import_module("eigenfunc").__all__)
    for code, wanted in ((shown, modules - {"testing"}), (f"import eigenfunc.testing\n{shown}", modules)):
        assert {name[6:] for name in loaded(code) if name.startswith("shown ")} == names | wanted


def public(module: ModuleType) -> set[str]:
    """What a reader takes for public: `__all__`, or what has no underscore and was defined there."""
    defined = {name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__}
    return set(getattr(module, "__all__", {name for name in defined if not name.startswith("_")}))


@pytest.mark.parametrize("name", MODULES)
def test_what_public_modules_show_is_in_the_reference(name: str) -> None:
    shown = public(importlib.import_module(f"eigenfunc.{name}"))
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    listed = re.findall(r"^::: eigenfunc\.(\S+)", pages, re.MULTILINE)
    named = {entry.rpartition(".")[2] for entry in listed if entry.startswith(f"{name}.")}
    named |= {word for word in re.findall(r"`(\w+)`", pages) if word.isupper()}  # tables of names
    assert shown
    assert name in listed or shown <= named  # as a whole, or each of them


def test_the_changelog_begins_with_this_version() -> None:
    from eigenfunc import __version__

    heads = re.findall(r"^## (\S+?)[,\n]", (ROOT / "docs" / "changelog.md").read_text(), re.MULTILINE)
    assert heads[0] == __version__
