"""Plans: bytes that hold, products that are about right, budgets kept, or refused with the least that would do."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from eigenfunc import completeness, storage
from eigenfunc.checkpoint import Checkpoint
from eigenfunc.cli import main
from eigenfunc.curvature.hessian import hessian
from eigenfunc.eigsh import eigsh
from eigenfunc.errors import BudgetError, InputError, Stopped
from eigenfunc.objective import functional_loss
from eigenfunc.operator import LinearOperator, aslinearoperator
from eigenfunc.plan import Plan, plan
from tests.accelerator import Accelerator
from tests.helpers import never
from tests.test_storage import diagonal, resident, spectrum

BIG = 10**8


def huge(dtype: torch.dtype = torch.float32, n: int = BIG) -> LinearOperator:
    """An operator of any size that takes no memory and is never multiplied with."""
    return aslinearoperator(never, torch.zeros((), dtype=dtype).expand(n))


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary folder on a disk of any size."""
    monkeypatch.setattr(storage, "free", lambda folder: 2**50)
    monkeypatch.setattr(storage, "in_memory", lambda folder: False)


@pytest.fixture
def diskless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "free", lambda folder: 0)


def test_the_basis_is_counted_to_the_byte() -> None:
    found = plan(huge(), 5, basis_size=30, block_size=1)
    assert found.basis_bytes == 31 * 4 * BIG
    assert plan(huge(torch.float64), 5, basis_size=30, block_size=1).basis_bytes == 2 * found.basis_bytes
    assert plan(huge(), 5, basis_size=30, block_size=1, basis_dtype=torch.float16).basis_bytes == found.basis_bytes / 2
    small = eigsh(diagonal(spectrum(900)), 3, basis_size=30)
    assert small.stats.basis_bytes == plan(diagonal(spectrum(900)), 3, basis_size=30).basis_bytes


@pytest.mark.usefixtures("roomy")
def test_on_disk_it_takes_no_memory(tmp_path: Path) -> None:
    found = plan(huge(), 1, basis_size=30, basis_path=tmp_path)
    assert found.memory_bytes == found.working_bytes < 25 * 4 * BIG
    assert found.disk_bytes >= found.basis_bytes == 31 * 4 * BIG


def test_the_plan_is_what_eigsh_does() -> None:
    A = diagonal(spectrum(1500))
    for arguments in ({"k": 3}, {"k": 4, "which": "BE"}, {"k": 2, "which": "SA"}, {"k": 12, "block_size": 4}):
        found, stats = plan(A, **arguments), eigsh(A, **arguments, seed=0, max_matvecs=20, throw=False).stats
        assert (found.basis_size, found.basis_bytes) == (stats.basis_size, stats.basis_bytes)


@pytest.mark.parametrize(("k", "which"), [(1, "LA"), (5, "LM"), (10, "LA"), (20, "LA"), (5, "SA")])
def test_the_products_are_about_as_expected(k: int, which: str) -> None:
    from benchmarks.spectra import diagonal as shuffled, hess

    A = shuffled(hess(10_000).float())
    low, high = plan(A, k, which=which).expected_matvecs
    assert low <= eigsh(A, k, which=which, seed=0).stats.matvecs <= high < 4 * low + 60


def test_a_matrix_whose_whole_space_is_spanned_expects_no_more_products_than_that() -> None:
    A = diagonal(spectrum(40))
    assert eigsh(A, 10, seed=0).stats.matvecs <= plan(A, 10).expected_matvecs[1] == 40 + 10 + 2


def test_the_operator_tells_what_it_keeps() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)), torch.randn(30, 5)
    loss, params = functional_loss(model, nn.functional.mse_loss)
    A, bare = (hessian(loss, params, (x, torch.zeros(30, 2)), cache=cache) for cache in ("auto", 0))
    kept = plan(A, 2).kept_bytes
    assert kept >= 30 * 7 * 4  # the hidden layer
    assert bare.kept_bytes() == 0
    for derived in (2 * A, A.shift(1.0), A.restrict("0"), A - bare, A.precondition(params_like(A))):
        assert derived.kept_bytes() == kept
    assert (A + A).kept_bytes() == 2 * kept
    assert f"{kept / 1024:.3g} KiB by the operator" in str(plan(A, 2))


def params_like(A: LinearOperator) -> object:
    return {name: torch.ones_like(x) for name, x in A.like.items()}


def test_the_table_says_it_in_short(tmp_path: Path) -> None:
    lines = str(plan(diagonal(spectrum(2000)), 3, basis_path=tmp_path)).splitlines()
    assert len(lines) == 4
    assert "23 + 1 vectors of 2,000 in float32" in lines[0]
    assert str(tmp_path) in lines[0]
    assert all(len(line) < 120 + len(str(tmp_path)) for line in lines)


def budgeted(share: float, k: int = 10, **arguments: object) -> Plan:
    """With so many bytes for the basis beside the work, of those that it would take by itself."""
    free = plan(huge(), k, block_size=1)._replace(probes=1)
    return plan(huge(), k, block_size=1, memory_budget=free.working_bytes + int(share * free.basis_bytes), **arguments)


@pytest.mark.usefixtures("roomy")
def test_a_budget_makes_the_basis_smaller_then_half_then_puts_it_on_disk() -> None:
    free = plan(huge(), 10, block_size=1)
    assert (free.basis_size, free.basis_path) == (30, None)
    assert budgeted(1.0)._replace(probes=free.probes) == free
    smaller = budgeted(0.8)
    assert (smaller.basis_size, smaller.basis_dtype, smaller.basis_path) == (23, None, None)
    half = budgeted(0.55, k=1)  # of many pairs it takes more at the end than it saves
    assert (half.basis_dtype, half.basis_path) == (torch.float16, None)
    assert 12 <= half.basis_size <= 21
    spilt = plan(huge(), 10, block_size=1, memory_budget=free.working_bytes)
    assert spilt.basis_path is not None
    assert (spilt.basis_size, spilt.basis_dtype) == (30, None)


@pytest.mark.usefixtures("roomy")
def test_what_was_asked_for_is_left_alone() -> None:
    assert budgeted(0.8, basis_size=30).basis_size == 30
    assert budgeted(0.6, tol=1e-6).basis_dtype is None  # half precision would not reach that
    assert budgeted(0.6, which="SA").basis_dtype is None


@pytest.mark.usefixtures("diskless")
def test_a_refusal_names_the_least_that_fits() -> None:
    with pytest.raises(BudgetError, match=r"n = 100,000,000: the least that would do is [\d.]+ GiB") as refusal:
        plan(huge(), 10, memory_budget=10**9)
    least = refusal.value.smallest
    assert plan(huge(), 10, memory_budget=least).memory_bytes == least
    with pytest.raises(BudgetError):
        plan(huge(), 10, memory_budget=least - 1)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 60),
    st.sampled_from(["LM", "LA", "SA", "BE"]),
    st.sampled_from([1e-2, 1e-4, 1e-7]),
    st.integers(10**4, 10**9),
    st.floats(0.01, 2.0),
    st.sampled_from([None, 1, 4]),
)
def test_a_budget_is_never_exceeded(k: int, which: str, tol: float, n: int, share: float, block: int | None) -> None:
    A = huge(n=n)
    arguments = {"which": which, "tol": tol, "block_size": block}
    free = plan(A, k, **arguments)
    budget, refused = int(share * free.memory_bytes) + 1, 0
    try:
        found = plan(A, k, memory_budget=budget, **arguments)
    except BudgetError as error:
        refused, budget = budget, error.smallest
        found = plan(A, k, memory_budget=budget, **arguments)
    assert refused < found.memory_bytes <= budget
    assert (found == free) == (free.memory_bytes <= budget)
    assert found.basis_size >= min(1.5 * k + 4, free.basis_size)


def test_a_budget_spares_random_vectors_of_a_proof_before_the_basis() -> None:
    free = plan(huge(), 1)
    assert (free.tried, free.retried) == (1, 4)
    less = plan(huge(), 1, memory_budget=free.memory_bytes - 1)
    assert less == free._replace(probes=3)
    least = free._replace(probes=1)
    assert plan(huge(), 1, memory_budget=least.memory_bytes) == least
    assert plan(huge(), 1, memory_budget=least.memory_bytes - 1).basis_size == free.basis_size - 1


HELD: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ten": (10, {}),
    "blocks": (10, {"block_size": 4}),
    "half": (3, {"basis_dtype": torch.float16}),
    "half in blocks": (10, {"basis_dtype": torch.float16, "block_size": 4}),
}


@pytest.mark.parametrize("budgeted", [False, True])
@pytest.mark.parametrize("name", HELD)
def test_no_more_is_held_than_planned_where_a_proof_is_tried_twice(
    name: str, budgeted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completeness, "SHARES", (1e-280, 0.1, 0.1))  # the first proves nothing
    monkeypatch.setattr(completeness, "_HELD", 0)
    monkeypatch.setattr(storage, "PIECE", 16_384)
    for constant, value in (("PIECE", 16_384), ("FIXED", 0)):
        monkeypatch.setitem(plan.__globals__, constant, value)
    values = 0.001 * torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    values[:40] = 0.8 ** torch.arange(40)
    k, asked = HELD[name][0], {"tol": 1e-2, **HELD[name][1]}
    A, free = diagonal(values), plan(diagonal(values), k, **asked)
    if budgeted:
        asked["memory_budget"] = free._replace(probes=free.tried).memory_bytes
    planned = plan(A, k, **asked)
    with Accelerator() as mode:
        found = eigsh(A, k, seed=0, **asked)
    assert found.success
    assert mode.most("cpu") <= planned.memory_bytes <= asked.get("memory_budget", free.memory_bytes)
    assert mode.most("cpu") >= 0.7 * planned.memory_bytes


@pytest.mark.parametrize("budget", [0, -1, 1.5, "1 GB", True])
def test_a_budget_is_a_number_of_bytes(budget: object) -> None:
    with pytest.raises(InputError, match="memory_budget must be an integer of at least 1"):
        plan(huge(), 3, memory_budget=budget)


def test_eigsh_refuses_before_the_first_product() -> None:
    with pytest.raises(BudgetError):
        eigsh(huge(n=10**6), 3, memory_budget=10**6)


def test_the_bar_counts_up_to_what_is_expected(capsys: pytest.CaptureFixture[str]) -> None:
    A = diagonal(spectrum(3000))
    eigsh(A, 3, seed=0, progress=True)
    shown = capsys.readouterr().err
    assert f"/{sum(plan(A, 3).expected_matvecs) // 2} [" in shown
    assert "λ₁ 1, residual" in shown


PROBLEM = """
import torch
from eigenfunc import functional_loss

def make_problem():
    torch.manual_seed(0)
    loss, params = functional_loss(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss())
    return loss, params, (torch.randn(30, 4), torch.randint(0, 3, (30,)))
"""


def test_the_command_line_prints_the_plan_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "problem.py"
    path.write_text(PROBLEM)
    assert main(["run", str(path), "--k", "2", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split()[0] for line in lines[1:6]]
    assert heads == ["basis", "at", "kept", "products", "rank"]
    assert "15 + 1 vectors of 15 in float32" in lines[1]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_process_stays_within_its_budget() -> None:
    """Of n = 4e6, on a smaller basis than it would take; beside the budget, one vector that the product takes."""
    vector = 4 * 4_000_000
    assert plan(huge(n=4_000_000), 2).memory_bytes > 43 * vector
    assert resident(memory_budget=43 * vector) <= 44 * vector


def test_a_run_within_a_budget_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("eigenfunc.plan"), "FIXED", 0)
    A, calls = diagonal(spectrum(4000)), iter([False] * 12 + [True])
    arguments = {"tol": 1e-3, "seed": 1, "memory_budget": int(0.76 * plan(A, 5)._replace(probes=1).memory_bytes)}
    whole = eigsh(A, 5, **arguments)
    assert whole.stats.basis_size == 16 < plan(A, 5).basis_size
    with pytest.raises(Stopped):
        eigsh(A, 5, checkpoint=Checkpoint(tmp_path / "run", stop=lambda: next(calls)), **arguments)
    assert torch.equal(eigsh(A, 5, checkpoint=tmp_path / "run", **arguments).values, whole.values)
