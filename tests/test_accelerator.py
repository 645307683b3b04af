"""A basis in the main memory, and vectors on an accelerator: one that is none, but knows what is where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from eigenfunc import completeness, storage, tree
from eigenfunc.checkpoint import Checkpoint
from eigenfunc.eigsh import eigsh
from eigenfunc.errors import InputError, Stopped, StorageError
from eigenfunc.krylov import basis
from eigenfunc.operator import LinearOperator, aslinearoperator
from eigenfunc.plan import plan
from tests.accelerator import FAR, Accelerator, Far
from tests.helpers import never
from tests.test_storage import PIECE, N, spectrum, stacked

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces, and nothing that is held because it is small."""
    monkeypatch.setattr(storage, "PIECE", PIECE)
    monkeypatch.setitem(plan.__globals__, "PIECE", PIECE)
    monkeypatch.setitem(plan.__globals__, "FIXED", 0)
    monkeypatch.setattr(completeness, "_HELD", 0)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with Accelerator() as mode:
        yield mode


def diagonal(values: Tensor) -> LinearOperator:
    there = values.to(FAR)
    return aslinearoperator(lambda v: there * v, there)


def test_it_tells_the_two_sides_apart(accelerator: Accelerator) -> None:
    x = torch.zeros(1000)
    there = x.to(FAR)
    assert isinstance(there, Far)
    assert isinstance(there[2:] + 1, Far)
    assert not isinstance(there.cpu(), Far)
    with pytest.raises(RuntimeError, match="on meta and cpu"):
        there + x
    accelerator.begin()
    y = there + 1
    assert (accelerator.most("meta"), accelerator.most("cpu")) == (4000, 0)
    del y
    assert (there + 2).device == FAR
    assert accelerator.most("meta") == 4000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [3, PIECE, N])
def test_every_kernel_gives_the_same_numbers(accelerator: Accelerator, columns: int, dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    close = {"rtol": 1e-5 if wide == torch.float32 else 1e-12, "atol": 1e-4 if wide == torch.float32 else 1e-10}
    v, w, c = stacked(3, columns, dtype), stacked(2, columns, wide, 1), torch.randn(3, 2, dtype=torch.float64)
    far, weights = w.to(FAR), c.to(FAR)
    pairs = {
        "gram": (tree.gram(v, far), tree.gram(v, w)),
        "subtract": (basis.subtract(far, weights, v), basis.subtract(w, c, v)),
        "combine": (tree.combine(weights.mT, v, wide), tree.combine(c.mT, v, wide)),
    }
    for name, (found, expected) in pairs.items():
        assert found.device == FAR, name
        assert torch.allclose(found.cpu(), expected, **close), name
    rotated = basis.rotate(v.clone(), weights[:2, :1], 1)
    assert rotated.device == CPU
    assert torch.allclose(rotated.to(wide), basis.rotate(v.clone(), c[:2, :1], 1).to(wide), rtol=1e-2, atol=1e-2)
    assert torch.equal(rotated[1], v[2])
    assert torch.equal(basis.write(v.clone(), 1, far), basis.write(v.clone(), 1, w.to(dtype)))


HOW: dict[str, dict[str, Any]] = {
    "LM": {},
    "BE": {"which": "BE", "basis_size": 30},
    "blocks": {"block_size": 4, "basis_size": 40},
    "half": {"basis_dtype": torch.float16, "tol": 1e-3},
}


@pytest.mark.parametrize("how", HOW)
def test_the_pairs_are_true_and_the_accelerator_holds_no_basis(accelerator: Accelerator, how: str) -> None:
    values = spectrum(N)
    A, asked = diagonal(values), {"basis_size": 24, "basis_device": "cpu", **HOW[how]}
    planned = plan(A, 3, **asked)
    accelerator.begin()
    found = eigsh(A, 3, seed=0, **asked)
    held, beside = accelerator.most("meta"), accelerator.most("cpu")
    rising = values.double().sort().values
    truth = values.double()[values.abs().argsort(descending=True)][:3]
    truth = torch.stack([rising[-1], rising[-2], rising[0]]) if "which" in asked else truth
    assert ((found.values - truth).abs() <= found.bounds).all()
    assert found.vectors.device == FAR
    assert held <= planned.memory_bytes == planned.working_bytes
    drawn, projected = 3 * 4 * N, 2**16  # random vectors come from the CPU, and small problems are solved there
    assert planned.basis_bytes <= beside <= planned.host_bytes + drawn + projected
    del found
    accelerator.begin()
    eigsh(A, 3, seed=0, **{**asked, "basis_device": None})
    assert accelerator.most("meta") >= held + planned.basis_bytes / 2
    assert accelerator.most("cpu") <= drawn + projected


def test_a_run_goes_on_from_its_checkpoint(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = diagonal(spectrum(N))
    asked = {"seed": 3, "basis_size": 20, "basis_device": "cpu", "tol": 1e-3}
    whole = eigsh(A, 5, **asked)
    for count, proving in ((6, False), (16, True)):
        left, path = iter([False] * count + [True]), tmp_path / str(count)
        with pytest.raises(Stopped):
            eigsh(A, 5, checkpoint=Checkpoint(path, stop=lambda: next(left)), **asked)  # noqa: B023
        with safe_open(path, "pt") as saved:
            assert ("probe" in saved.keys()) == proving  # noqa: SIM118
        again = eigsh(A, 5, checkpoint=path, **asked)
        assert torch.equal(again.vectors.inner, whole.vectors.inner)
    del again, whole
    monkeypatch.setattr(storage, "PIECE", 4096)
    accelerator.begin()
    with pytest.raises(Stopped):
        eigsh(A, 5, checkpoint=Checkpoint(path, stop=lambda: True), **asked)
    assert accelerator.most("meta") <= 8 * 4 * N  # a step, a piece, and not the 14 vectors of the basis


def test_page_locked_memory_is_asked_for_beside_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert storage._pinned(torch.device("cuda"))
    assert not storage._pinned(FAR)
    x = torch.zeros(1, 3, device="meta")
    assert storage.allocate_like(x, 2, torch.float16, CPU).shape == (2, 3)
    monkeypatch.setattr(storage, "_pinned", lambda device: True)
    with pytest.raises(StorageError, match=r"cannot lock .* of main memory for 2 vectors"):  # there is no CUDA here
        storage.allocate_like(x, 2, place=CPU)


def huge(n: int, device: str = "meta") -> LinearOperator:
    return aslinearoperator(never, torch.zeros((), device=device).expand(n))


def test_a_budget_puts_the_basis_into_the_main_memory_where_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    A, tight = huge(10**8), {"block_size": 1, "tol": 1e-6}
    monkeypatch.setattr(storage, "available", lambda: 2**40)
    free = plan(A, 10, **tight)
    assert free.basis_device is None
    assert free.host_bytes == 0
    smaller = plan(A, 10, memory_budget=free._replace(probes=1).memory_bytes - 1, **tight)
    assert (smaller.basis_device, smaller.basis_size) == (None, free.basis_size - 1)
    aside = plan(A, 10, memory_budget=free.working_bytes, **tight)
    assert (aside.basis_device, aside.basis_size, aside.basis_path) == ("cpu", free.basis_size, None)
    assert "in the main memory" in str(aside)
    monkeypatch.setattr(storage, "available", lambda: aside.host_bytes - 1)
    with pytest.raises(InputError, match="too small"):
        plan(A, 10, memory_budget=free.working_bytes, **tight)
    with pytest.raises(StorageError, match=r"the main memory has .* free, and the run needs"):
        plan(A, 10, basis_device="cpu", **tight)


def test_on_the_cpu_it_is_where_it_already_was(tmp_path: Path) -> None:
    A = huge(10_000, "cpu")
    assert plan(A, 3, basis_device="cpu") == plan(A, 3)
    assert plan(A, 3, basis_device=CPU, basis_path=tmp_path) == plan(A, 3, basis_path=tmp_path)


@pytest.mark.parametrize("device", ["meta", "cuda", 3, FAR])
def test_other_devices_are_refused(device: Any) -> None:
    with pytest.raises(InputError, match="basis_device must be 'cpu'"):
        plan(huge(10_000), 3, basis_device=device)
