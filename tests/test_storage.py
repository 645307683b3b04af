"""Vectors on disk: the same numbers, little memory, clean refusals."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eigenfunc import storage, tree
from eigenfunc.certificate import Products
from eigenfunc.checkpoint import Checkpoint
from eigenfunc.eigsh import eigsh
from eigenfunc.errors import InputError, Stopped, StorageError
from eigenfunc.krylov import basis, lanczos as kernel
from eigenfunc.operator import LinearOperator, aslinearoperator
from tests.helpers import never
from tests.stopped import diagonal

PIECE = 16_384
N = 2 * PIECE + 1_234  # three pieces, the last one short


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PIECE", PIECE)


def spectrum(n: int) -> Tensor:
    """Outliers 1, 1/2, 1/3, … of either sign above a bulk."""
    values = 0.01 * torch.rand(n, generator=torch.Generator().manual_seed(1))
    values[:12] = 1 / torch.arange(1, 13)
    values[3] *= -1
    return values[torch.randperm(n, generator=torch.Generator().manual_seed(2))]


def stacked(rows: int, columns: int = N, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_disk(x: Tensor, folder: Path) -> Tensor:
    out = storage.allocate(folder, len(x), x.shape[1], x.dtype)
    storage.copy(out, x)
    return out


def same(a: object, b: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [3, PIECE, N])
def test_every_kernel_gives_the_same_bits_on_disk(columns: int, dtype: torch.dtype, tmp_path: Path) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    v, w, c = stacked(3, columns, dtype), stacked(2, columns, wide, 1), torch.randn(3, 2, dtype=torch.float64)
    d = on_disk(v, tmp_path)
    assert storage.folder_of(d) == storage.folder_of(d[1:]) == str(tmp_path)
    assert torch.equal(tree.gram(d, w), tree.gram(v, w))
    assert torch.equal(tree.exact_gram(d, w), tree.exact_gram(v, w))
    assert torch.equal(tree.norms(d), tree.norms(v))
    assert torch.equal(basis.subtract(w, c, d), basis.subtract(w, c, v))
    mixed = tree.combine(c.mT, d, wide)
    assert storage.folder_of(mixed)
    assert torch.equal(mixed, tree.combine(c.mT, v, wide))
    assert torch.equal(storage.rows_of(d, torch.tensor([2, 0])), v[[2, 0]])
    assert torch.equal(basis.rotate(d, c[:2, :1], 1), basis.rotate(v, c[:2, :1], 1))
    assert torch.equal(basis.write(d, 1, w.to(dtype)), basis.write(v, 1, w.to(dtype)))


def test_a_long_inner_product_keeps_its_digits() -> None:
    x = stacked(2)
    assert (tree.gram(x, x) - x.double() @ x.double().mT).abs().max() < 1e-7 * N
    assert (tree.norms(x) - torch.linalg.vector_norm(x.double(), dim=1)).abs().max() < 1e-9


def test_a_long_random_vector_is_a_unit_vector() -> None:
    """A norm summed in float32 is off by 1e-5 at a million entries, and by a hundredth at a hundred million."""
    products = Products(LinearOperator(lambda v: v, torch.zeros(1_000_000)))
    u = products.random(torch.Generator().manual_seed(0))
    assert u.dtype == torch.float32
    assert abs(float(torch.linalg.vector_norm(u.double())) - 1) < 1e-7


def test_coming_rows_are_exchanged_on_disk(tmp_path: Path) -> None:
    x = stacked(4)
    zero = torch.zeros((), dtype=torch.float64)
    state = kernel.State(on_disk(x, tmp_path), torch.eye(4).double(), torch.arange(4).double(), zero, zero, zero == 0)
    swapped = kernel.swap(state, 1, 3)
    assert torch.equal(swapped.basis, x[[0, 3, 2, 1]])
    assert swapped.alive.tolist() == [0, 3, 2, 1]
    assert torch.equal(swapped.t, torch.eye(4).double()[[0, 3, 2, 1]])


def test_files_have_no_names_and_dropped_pages_keep_their_contents(tmp_path: Path) -> None:
    x = stacked(2)
    d = on_disk(x, tmp_path)
    assert not list(tmp_path.iterdir())
    for columns in storage.pieces(d):
        storage.drop(d[:, columns])
    assert torch.equal(d, x)


def test_memory_is_never_dropped() -> None:
    x = stacked(2)
    before = x.clone()
    storage.drop(x)
    assert storage.folder_of(x) is None
    assert torch.equal(x, before)


@pytest.mark.parametrize("which", ["LM", "LA", "BE"])
@pytest.mark.parametrize("n", [900, N])
def test_the_solution_is_the_same_bit_for_bit(n: int, which: str, tmp_path: Path) -> None:
    A, sizes = diagonal(spectrum(n)), {"which": which, "seed": 3, "basis_size": 20, "tol": 1e-3}
    plain, mapped = eigsh(A, 3, **sizes), eigsh(A, 3, basis_path=tmp_path, **sizes)
    assert mapped.success
    assert plain.stats.restarts == mapped.stats.restarts
    for name in ("values", "residuals", "bounds", "vectors"):
        assert same(getattr(mapped, name), getattr(plain, name)), name
    assert storage.folder_of(mapped.vectors)
    assert storage.folder_of(plain.vectors) is None


def test_several_leaves_blocks_and_half_precision_on_disk(tmp_path: Path) -> None:
    values = spectrum(700)
    like = {"b": values[:100].reshape(10, 10), "a": values[100:]}
    A = aslinearoperator(lambda v: {name: like[name] * v[name] for name in v}, like)
    sizes = {"seed": 1, "basis_size": 40, "block_size": 4}
    plain, mapped = eigsh(A, 4, **sizes), eigsh(A, 4, basis_path=tmp_path, **sizes)
    assert plain.success
    assert same(mapped.values, plain.values)
    assert same(mapped.vectors, plain.vectors)
    half = {"basis_dtype": torch.float16, "tol": 1e-3, **sizes}
    coarse = eigsh(A, 4, basis_path=tmp_path, **half)
    assert coarse.success
    assert same(coarse.values, eigsh(A, 4, **half).values)
    truth = values.double()[values.abs().argsort(descending=True)][:4]
    for found in (plain, coarse):
        assert ((found.values - truth).abs() <= found.bounds).all()


def test_a_run_on_disk_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    A, calls = diagonal(spectrum(900)), iter([False] * 12 + [True])
    sizes = {"seed": 3, "basis_size": 20, "basis_path": tmp_path}
    whole = eigsh(A, 5, **sizes)
    with pytest.raises(Stopped):
        eigsh(A, 5, checkpoint=Checkpoint(tmp_path / "run", stop=lambda: next(calls)), **sizes)
    assert same(eigsh(A, 5, checkpoint=tmp_path / "run", **sizes).vectors, whole.vectors)


def test_a_full_disk_is_an_error_before_the_first_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"31 vectors .* No space left"):
        storage.allocate(tmp_path, 31, 1000, torch.float32)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StorageError, match="No space left"):
        eigsh(diagonal(spectrum(900)), basis_path=tmp_path)


def test_a_disk_that_is_too_small_is_found_out_before_any_product(tmp_path: Path) -> None:
    A = aslinearoperator(never, torch.zeros((), dtype=torch.float32).expand(10**14))
    with pytest.raises(StorageError, match="free, and the run needs"):
        eigsh(A, 1, basis_path=tmp_path)


@pytest.mark.parametrize("folder", ["missing", 3])
def test_a_path_that_is_no_folder_is_refused(folder: object) -> None:
    with pytest.raises(InputError, match="basis_path must be a folder"):
        eigsh(diagonal(spectrum(900)), basis_path=folder)


RESIDENT = """
import resource, sys, torch
from eigenfunc.eigsh import eigsh
from eigenfunc.operator import aslinearoperator
torch.set_num_threads(1)
def diagonal(n):
    values = 0.01 * torch.rand(n, generator=torch.Generator().manual_seed(1))
    values[:12] = 1 / torch.arange(1, 13)
    return aslinearoperator(lambda v: values * v, values)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
eigsh(diagonal(1000), 2)  # what is loaded at first use
A = diagonal(4_000_000)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = resident()
found = eigsh(A, 2, seed=0, throw=False, **eval(sys.argv[1]))
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak - before, int(found.success))
"""


def resident(**options: object) -> int:
    """Bytes that a process needs beside what it had, for two pairs of n = 4e6."""
    command = [sys.executable, "-W", "ignore", "-c", RESIDENT, repr(options)]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    printed = subprocess.run(command, check=True, capture_output=True, env=here, timeout=120).stdout.split()
    assert printed[1] == b"1"
    return int(printed[0])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_a_basis_on_disk_stays_out_of_memory(tmp_path: Path) -> None:
    """30 + 1 vectors are 473 MiB; of those on disk no more than a piece of 124 MiB is held at a time."""
    basis, piece = 31 * 4 * 4_000_000, 31 * 4 * 2**20
    assert resident(basis_path=str(tmp_path), basis_size=30) < resident(basis_size=30) - (basis - piece)
