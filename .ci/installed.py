"""Each archive works when it is installed: `python .ci/installed.py build/release/*`.

A wheel or sdist goes into an empty folder, without what it depends on. Away from the source tree, with warnings as
errors, and with nothing importable but the packages that the core names and those that they need in turn, it must
compute an eigenvalue, start its command line and hold py.typed. Its version must be that of the source and head the
changelog.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path

ROOT = Path(__file__).parent.parent


def needed(name: str, seen: set[str]) -> set[str]:
    """The distributions that one needs in turn, with no extras, itself among them."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name not in seen:
        seen.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            requirements = []  # for another platform or Python
        for requirement in requirements:
            if "extra ==" not in requirement:
                needed(re.split(r"[^\w.-]", requirement, maxsplit=1)[0], seen)
    return seen


class Hidden(MetaPathFinder):
    """Makes modules look absent."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> None:
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def inside(folder: Path, version: str) -> None:
    """The check itself, in a process whose first path is `folder`."""
    homes = metadata.packages_distributions()
    core = needed("eigenfunc", set())
    hidden = {top for top, owners in homes.items() if not core & {re.sub(r"[-_.]+", "-", x).lower() for x in owners}}
    assert {"pytest", "scipy", "matplotlib"} <= hidden, "run in an environment with the extra `test`"
    assert not {"torch", "numpy", "optree", "tqdm", "eigenfunc"} & hidden
    sys.meta_path.insert(0, Hidden(hidden))

    import torch

    import eigenfunc
    from eigenfunc import cli

    home = Path(eigenfunc.__file__).parent
    assert home == folder / "eigenfunc", home
    assert (home / "py.typed").is_file(), "no py.typed"
    assert eigenfunc.__version__ == metadata.version("eigenfunc") == version
    diagonal = torch.tensor([3.0, 2.0, 1.0, 0.5])
    A = eigenfunc.hessian(lambda x, batch: (batch * x**2).sum() / 2, torch.ones(4), diagonal)
    solution = eigenfunc.eigsh(A, k=2, seed=0)
    assert torch.allclose(solution.values.float(), diagonal[:2], rtol=1e-4), solution
    cli.main(["--help"])  # exits with 0


def main(archives: list[str]) -> None:
    version = runpy.run_path(str(ROOT / "eigenfunc" / "_version.py"))["__version__"]
    heads = re.findall(r"^## (\S+?)[,\n]", (ROOT / "docs" / "changelog.md").read_text(), re.MULTILINE)
    assert heads[0] == version, f"the changelog begins with {heads[0]}, this is {version}"
    assert {Path(name).suffix for name in archives} == {".whl", ".gz"}, archives
    for archive in archives:
        assert Path(archive).name.startswith(f"eigenfunc-{version}"), archive
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder).resolve() / "site"
            install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(place), str(Path(archive).resolve())]
            subprocess.run([sys.executable, *install], check=True)
            check = ["-W", "error", str(Path(__file__).resolve()), "--inside", str(place), version]
            environment = os.environ | {"PYTHONPATH": str(place), "PYTHONSAFEPATH": "1"}
            done = subprocess.run(
                [sys.executable, *check], check=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
            )
            assert done.stdout.startswith("usage: eigenfunc"), done.stdout
        print(f"{Path(archive).name}: works")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]), sys.argv[3])
    else:
        main(sys.argv[1:])
