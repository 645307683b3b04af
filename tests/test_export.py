"""What leaves the library comes back the same: files, SciPy operators, data frames."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections import OrderedDict, UserDict
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optree
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from eigenfunc import Batches, Solution, Status, aslinearoperator, eigsh, functional_loss, hessian, tree
from eigenfunc.errors import EigenfuncError, FileError, InputError, TreeError
from eigenfunc.solution import Stats
from eigenfunc.testing.layouts import LAYOUTS, Layer, parameter_tree
from tests.helpers import cut, dense_hessian, labelled, mlp, normal, rotated

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLAIN = (dict, OrderedDict, list, tuple)


def made(vectors: Any, k: int, seed: int = 0) -> Solution:
    """A solution with numbers of every make in its fields, and random entries in the given vectors (k, *leaf)."""
    g = torch.Generator().manual_seed(seed)
    columns = [torch.randn(k, generator=g, dtype=torch.float64) * 10.0 ** (30 * i - 60) for i in range(5)]
    if k > 2:
        columns[0][0], columns[1][1], columns[2][2] = -0.0, 5e-324, math.inf
        columns[3][0], columns[3][1] = -math.inf, math.nan
    stats = Stats(7, 3, 5, 0, 0.1, 12, 2**40, 1 / 3, math.inf, 1e-300, 2**31 - 1)
    return Solution(
        values=columns[0],
        vectors=tree.randn(vectors, g),
        residuals=columns[1],
        bounds=columns[2],
        sharp=columns[3],
        angles=columns[4],
        converged=torch.rand(k, generator=g) < 0.5,
        noise=0.1 + 0.2,
        which="LM",
        tol=1e-4,
        status=Status.STAGNATED,
        message='with "quotes", ≤ and\na line',
        stats=stats,
    )


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.ndim and x.numel() else x.reshape(-1)


def assert_same(found: Any, given: Any) -> None:
    """Bitwise, types included: the whole tree."""
    assert type(found) is type(given)
    if isinstance(given, Tensor):
        assert (found.dtype, found.shape, found.device.type) == (given.dtype, given.shape, "cpu")
        assert torch.equal(bits(found), bits(given))
    elif isinstance(given, dict):
        assert list(found) == list(given)
        for key in given:
            assert_same(found[key], given[key])
    elif isinstance(given, (list, tuple)):
        assert len(found) == len(given)
        for a, b in zip(found, given, strict=True):
            assert_same(a, b)
    else:
        assert repr(found) == repr(given)


def assert_same_solution(found: Solution, given: Solution) -> None:
    for field in fields(Solution):
        a, b = getattr(found, field.name), getattr(given, field.name)
        if field.name == "stats":
            assert repr(a) == repr(b)
        else:
            assert_same(a, b)


def stacked(like: Any, k: int) -> Any:
    return tree.tree_map(lambda leaf: leaf.new_zeros((k, *leaf.shape)), like)


def plain(node: Any) -> bool:
    if isinstance(node, Tensor) or node is None:
        return True
    return type(node) in PLAIN and all(map(plain, node.values() if isinstance(node, dict) else node))


@given(
    n=st.integers(1, 30),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**16),
    k=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_every_field_comes_back_bitwise(n: int, layout: str, seed: int, k: int, dtype: torch.dtype) -> None:
    like = parameter_tree(n, layout, seed, dtype)
    solution = made(stacked(like, k), k, seed)
    with tempfile.TemporaryDirectory() as folder:
        solution.save(folder)
        assert_same_solution(Solution.load(folder, like=like), solution)
        if plain(like):
            assert_same_solution(Solution.load(folder), solution)
        else:
            with pytest.raises(InputError, match="like=params"):
                Solution.load(folder)


TREES: dict[str, Any] = {
    "two names that read the same": {"a": {"b": torch.zeros(2)}, "a.b": torch.zeros(3)},
    "a word that safetensors keeps": {"__metadata__": torch.zeros(2)},
    "the name of the bare tensor": {"vector": torch.zeros(2), "": torch.zeros(1)},
    "numbers as keys": {10: torch.zeros(2), 9: torch.zeros(1)},
    "keys out of order": {"z": torch.zeros(2), "a": torch.zeros(1)},
    "empty containers and None": {"a": (), "b": [], "c": {}, "d": None, "e": (torch.zeros(2),)},
    "an ordered dict": OrderedDict(z=torch.zeros(2), a=torch.zeros(1)),
    "several dtypes": [torch.zeros(2).double(), torch.zeros(2).bfloat16(), torch.zeros(2).half()],
    "leaves of one memory": list(torch.zeros(6).split(2)),
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", TREES)
def test_odd_trees_come_back(name: str, k: int, tmp_path: Path) -> None:
    solution = made(stacked(TREES[name], k), k)
    solution.save(tmp_path)
    assert_same_solution(Solution.load(tmp_path), solution)
    assert_same_solution(Solution.load(str(tmp_path), like=TREES[name]), solution)


def test_vectors_that_are_views_of_one_memory_come_back(tmp_path: Path) -> None:
    """As solvers make them: rows of a flat stack cut into leaves, without a copy."""
    like = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    for k in (1, 2):
        vectors = tree.unravel(normal(k, 7, seed=k, dtype=torch.float32), like)
        solution = replace(made(stacked(like, k), k), vectors=vectors)
        solution.save(tmp_path)
        assert_same_solution(Solution.load(tmp_path), solution)


class Bag(UserDict):  # type: ignore[type-arg]
    """A container of the user's own."""


optree.register_pytree_node(
    Bag,
    lambda bag: ([bag[key] for key in sorted(bag)], tuple(sorted(bag)), tuple(sorted(bag))),
    lambda keys, leaves: Bag(zip(keys, leaves, strict=True)),
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)


def test_containers_of_ones_own_are_saved_and_come_back_by_like(tmp_path: Path) -> None:
    like = Bag(a=torch.zeros(2), b=torch.zeros(3))
    solution = made(stacked(like, 2), 2)
    solution.save(tmp_path)
    with pytest.raises(InputError, match="like=params"):
        Solution.load(tmp_path)
    found = Solution.load(tmp_path, like=like).vectors
    assert type(found) is Bag
    assert torch.equal(found["b"], solution.vectors["b"])
    assert set(load_file(tmp_path / "eigenvectors.safetensors")) == {"a", "b"}
    with pytest.raises(TreeError, match="leaves"):
        Solution.load(tmp_path, like=Bag(a=torch.zeros(2), c=torch.zeros(3)))
    with pytest.raises(TreeError, match=r"'b' has shape \(4,\)"):
        Solution.load(tmp_path, like=Bag(a=torch.zeros(2), b=torch.zeros(4)))


def test_like_may_be_another_container_of_the_same_names(tmp_path: Path) -> None:
    solution = made(Layer(torch.zeros(2, 3), torch.zeros(2, 1)), 2)
    solution.save(tmp_path)
    assert type(Solution.load(tmp_path, like=Layer(torch.zeros(3), torch.zeros(1))).vectors) is Layer


def test_a_solution_of_a_solver_comes_back_and_the_report_is_strict_json(tmp_path: Path) -> None:
    solution = eigsh(rotated(1 / torch.arange(1, 31).double(), 0), 3, seed=0)
    folder = tmp_path / "new" / "folder"
    solution.save(folder, {"model": "none", "worst": math.inf})
    assert_same_solution(Solution.load(folder), solution)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    report = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    assert (report["model"], report["worst"], report["format"]) == ("none", "inf", 1)
    assert report["values"] == solution.values.tolist()
    assert sorted(path.name for path in folder.iterdir()) == ["eigenvectors.safetensors", "report.json"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    with pytest.raises(InputError, match="'values' is a field"):
        solution.save(folder, {"values": 1})


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Any, str]] = {
    "no folder": (shutil.rmtree, "report.json"),
    "no report": (lambda d: (d / "report.json").unlink(), "report.json"),
    "no vectors": (lambda d: (d / "eigenvectors.safetensors").unlink(), "eigenvectors"),
    "half a report": (lambda d: (d / "report.json").write_text((d / "report.json").read_text()[:100]), "damaged"),
    "not text": (lambda d: (d / "report.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
    "another report": (lambda d: (d / "report.json").write_text("{}"), "'format'"),
    "a list": (lambda d: (d / "report.json").write_text("[]"), "damaged"),
    "one bit of the vectors": (lambda d: flip(d / "eigenvectors.safetensors"), "checksum"),
    "half of the vectors": (
        lambda d: (d / "eigenvectors.safetensors").write_bytes((d / "eigenvectors.safetensors").read_bytes()[:90]),
        "checksum",
    ),
    "vectors of another save": (
        lambda d: save_file({"a": torch.ones(3, 2)}, d / "eigenvectors.safetensors"),
        "another save",
    ),
    "a later format": (lambda d: edited(d, format=2, version="9.0"), r"9\.0 in format 2"),
    "a short column": (lambda d: edited(d, bounds=[0.0]), "lengths"),
    "no number": (lambda d: edited(d, values=["x", 1, 2]), "damaged"),
    "no such status": (lambda d: edited(d, status="fine"), "fine"),
    "no such leaf": (lambda d: edited(d, leaves=["b"]), "'b'"),
    "no such container": (lambda d: edited(d, structure=["bag", [0]]), "bag"),
    "a leaf too many": (lambda d: edited(d, structure=["list", [0, 1]]), "damaged"),
    "a figure missing": (lambda d: edited(d, norm=None), "damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_missing_or_damaged_is_told(name: str, tmp_path: Path) -> None:
    made({"a": torch.zeros(3, 2)}, 3).save(tmp_path / "run")
    harm, message = DAMAGE[name]
    harm(tmp_path / "run")
    with pytest.raises(FileError, match=message):
        Solution.load(tmp_path / "run")


def test_a_save_that_is_cut_short_is_no_save(tmp_path: Path, monkeypatch: Any) -> None:
    """Killed between the two files, over an older save: the pieces of two runs are not taken for one."""
    made(torch.zeros(3, 2), 3, seed=0).save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("eigenfunc.archive.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(torch.zeros(3, 2), 3, seed=1).save(tmp_path)
    with pytest.raises(FileError, match="another save"):
        Solution.load(tmp_path)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        made(torch.zeros(3, 2), 3).save(tmp_path / "file")


@pytest.mark.parametrize(
    ("package", "remedy"), [("safetensors", r"eigenfunc\[export\]"), ("pandas", "pandas"), ("scipy", "scipy")]
)
def test_missing_packages_are_named_with_the_remedy(
    package: str, remedy: str, tmp_path: Path, monkeypatch: Any
) -> None:
    solution = made(torch.zeros(3, 2), 3)
    calls = {
        "safetensors": [lambda: solution.save(tmp_path / "x"), lambda: Solution.load(tmp_path / "x")],
        "pandas": [solution.to_dataframe],
        "scipy": [aslinearoperator(torch.eye(3)).to_scipy],
    }[package]
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for call in calls:
        with pytest.raises(InputError, match=f"pip install '?{remedy}"):
            call()
    assert not (tmp_path / "x").exists()


def test_a_data_frame_has_a_row_for_each_pair() -> None:
    pandas = pytest.importorskip("pandas")
    solution = eigsh(rotated(1 / torch.arange(1, 31).double(), 0), 3, seed=0)
    frame = solution.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.index) == [1, 2, 3]
    assert frame["value"].tolist() == solution.values.tolist()
    assert frame["converged"].tolist() == [True] * 3


def test_the_columns_of_a_data_frame_are_those_of_the_solution(monkeypatch: Any) -> None:
    """With a stand-in for pandas, which the tests can do without."""
    stand_in = SimpleNamespace(
        DataFrame=lambda columns, index: (columns, index), RangeIndex=lambda start, stop, name: (start, stop, name)
    )
    monkeypatch.setitem(sys.modules, "pandas", stand_in)
    solution = made(torch.zeros(4, 2), 4)
    columns, index = solution.to_dataframe()
    assert index == (1, 5, "rank")
    assert list(columns) == ["value", "residual", "bound", "sharp", "angle", "converged"]
    given = (solution.values, solution.residuals, solution.bounds, solution.sharp, solution.angles, solution.converged)
    for column, tensor in zip(columns.values(), given, strict=True):
        assert isinstance(column, np.ndarray)
        np.testing.assert_array_equal(column, tensor.numpy())


def problem(dtype: torch.dtype) -> tuple[Any, Any, Batches, Tensor]:
    """A small network whose leaves the tree sorts otherwise than the module lists them, with its dense Hessian."""
    inputs, targets = labelled(12)
    inputs = inputs.to(dtype)
    loss, params = functional_loss(mlp().to(dtype), torch.nn.CrossEntropyLoss())
    truth = dense_hessian(lambda p: loss(p, (inputs, targets)), params)
    return loss, params, Batches(cut((inputs, targets), 8)), truth


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_scipy_sees_the_same_matrix(dtype: torch.dtype, tolerance: float) -> None:
    loss, params, data, truth = problem(dtype)
    A = hessian(loss, params, data).to_scipy()
    H = truth.double().numpy()
    assert isinstance(A, scipy.sparse.linalg.LinearOperator)
    assert A.shape == H.shape
    assert A.dtype == torch.zeros(0, dtype=dtype).numpy().dtype
    rng = np.random.default_rng(0)
    X = rng.standard_normal((len(H), 5))
    for found, x in [
        (A @ X, X),
        (A.matmat(X[:, :1]), X[:, :1]),
        (A @ X[:, 0], X[:, 0]),
        (A.matvec(X[:, :1]), X[:, :1]),
        (A.H @ X, X),
        (A.T @ X[:, 1], X[:, 1]),
        (A @ X[::-1, ::2], X[::-1, ::2]),
        (A @ (X + 1j * X[::-1]), X + 1j * X[::-1]),
        (A @ (X[:, 0] * 1j), X[:, 0] * 1j),
    ]:
        assert found.shape == x.shape
        assert np.abs(found - H @ x).max() <= tolerance * np.abs(H).max() * np.abs(x).max() * len(H)
        assert found.dtype == A.dtype or np.iscomplexobj(x)
    values = scipy.sparse.linalg.eigsh(A, 3, which="LM", v0=np.ones(len(H)), return_eigenvectors=False)
    sizes = np.sort(np.abs(np.linalg.eigvalsh(H)))[-3:]
    assert np.abs(np.sort(np.abs(values)) - sizes).max() < 100 * tolerance


def test_what_scipy_gets_shares_no_memory_and_comes_back() -> None:
    matrix = rotated(1 / torch.arange(1, 9).double(), 0)
    A = aslinearoperator(lambda v: v, torch.zeros(8).double()).to_scipy()
    x = np.ones(8)
    y = A @ x
    y[:] = 5
    assert (x == 1).all()
    again = aslinearoperator(aslinearoperator(matrix).to_scipy())
    assert (again.to_dense() - matrix).abs().max() < 1e-15


def test_half_precision_leaves_come_out_as_float32() -> None:
    like = {"a": torch.zeros(2).bfloat16(), "b": torch.zeros(1)}
    A = aslinearoperator(lambda v: v, like).to_scipy()
    assert A.dtype == np.float32
    assert (A @ np.array([1.0, 2.0, 3.0])).tolist() == [1.0, 2.0, 3.0]
    assert issubclass(FileError, EigenfuncError)
