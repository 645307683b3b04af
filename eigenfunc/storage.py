"""Stacks of vectors too large for the memory: in a file that is mapped into it, or in the main memory beside an
accelerator, a few columns at a time.

A stack on disk is an ordinary tensor on the CPU. Whoever goes through one does so in `pieces`, which drop what they
leave behind from the memory of the process; the system keeps as much of the file as it has memory to spare. What is
made of such a stack, row for row, goes to a file in the same folder.

A stack beside the accelerator is an ordinary tensor on the CPU too, in page-locked memory. Pieces of it are copied to
where the vectors are, `near` them, and what is made of them is there.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenfunc.errors import InputError, StorageError

PIECE = 1_048_576  # columns that are worked on at a time: bounds the memory for scratch
Place = str | torch.device | None  # a folder; a device; or where the vectors are
POSSIBLE = hasattr(os, "posix_fallocate") and hasattr(mmap, "MADV_DONTNEED")
_IN_MEMORY = ("tmpfs", "ramfs")


def allocate(folder: str | os.PathLike[str], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A zero matrix in a file of its own in `folder`, which has no name: it goes when the last tensor on it does.

    Its blocks are reserved at once, since a disk that is full later on would kill the process. `StorageError` where
    the disk refuses, `InputError` where the system cannot do this.
    """
    check()
    size = max(rows * columns * dtype.itemsize, 1)
    try:
        handle, name = tempfile.mkstemp(prefix="eigenfunc-", suffix=".basis", dir=folder)
        try:
            os.posix_fallocate(handle, 0, size)
            flat = torch.from_file(name, shared=True, size=rows * columns, dtype=dtype)
        finally:
            os.close(handle)
            os.unlink(name)
    except (OSError, RuntimeError) as error:
        raise StorageError(f"cannot keep {rows} vectors ({size / 2**30:.3g} GiB) in {folder}: {error}") from None
    return flat.reshape(rows, columns)


def check() -> None:
    """`InputError` where the system cannot keep vectors on disk."""
    if not POSSIBLE:
        raise InputError("basis_path needs posix_fallocate and madvise, which this system lacks: leave it out")


def allocate_like(x: Tensor, rows: int, dtype: torch.dtype | None = None, place: Place = None) -> Tensor:
    """A zero stack of `rows` vectors shaped as those of the stack x: at the place, or else where x is, on its device or
    on disk beside it.

    Elsewhere from `x.new_zeros`, so that under vmap the memory carries the batch dimension too.
    """
    shape, dtype = (rows, *x.shape[1:]), dtype or x.dtype
    place = place or folder_of(x)
    if isinstance(place, str):
        return allocate(place, rows, x.shape[1:].numel(), dtype).reshape(shape)
    if place is None or place == x.device:
        return x.new_zeros(shape, dtype=dtype)
    try:
        return torch.zeros(shape, dtype=dtype, device=place, pin_memory=_pinned(x.device))
    except RuntimeError as error:
        size = math.prod(shape) * dtype.itemsize
        raise StorageError(f"cannot lock {size / 2**30:.3g} GiB of main memory for {rows} vectors: {error}") from None


def _pinned(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()


def place_of(x: Tensor, device: torch.device) -> Place:
    """The place of a stack, for vectors on the device."""
    return folder_of(x) or (x.device if x.device != device else None)


def near(part: Tensor, device: torch.device) -> Tensor:
    """A part of a matrix as it is, or from another device a copy on this one: row by row, since those are contiguous.

    Copies from page-locked memory are not waited for. Nothing overwrites it too early: to write there from the device,
    as everything here does, waits for what was asked of it before.
    """
    if part.device == device:
        return part
    out = part.new_empty(part.shape, device=device)
    for own, row in zip(out, part, strict=True):
        own.copy_(row, non_blocking=_pinned(device))
    return out


def folder_of(x: Tensor) -> str | None:
    """Where the file of a tensor on disk lies, or None for any other tensor."""
    functorch: Any = torch._C._functorch
    if torch.compiler.is_compiling() or type(x) is not Tensor or functorch.is_functorch_wrapped_tensor(x):
        return None
    if x.device.type != "cpu" or x.layout != torch.strided:
        return None
    name = x.untyped_storage().filename  # there is one for shared mappings only
    return None if name is None else os.path.dirname(name)


def pieces(*matrices: Tensor) -> Iterator[slice]:
    """The columns of matrices (p, columns) of one length, `PIECE` at a time."""
    on_disk = [x for x in matrices if folder_of(x)]
    for start in range(0, max(matrices[0].shape[1], 1), PIECE):
        columns = slice(start, start + PIECE)
        yield columns
        for x in on_disk:
            drop(x[:, columns])


def drop(matrix: Tensor) -> None:
    """Take a part of a matrix on disk out of the memory of the process. It stays in the file, or on its way there."""
    if matrix.shape[1] == 0 or not folder_of(matrix):
        return
    page = mmap.PAGESIZE
    length = (matrix.shape[1] - 1) * matrix.stride(1) * matrix.element_size() + matrix.element_size()
    for row in range(matrix.shape[0]):
        begin = matrix.data_ptr() + row * matrix.stride(0) * matrix.element_size()
        start = begin - begin % page
        _library().madvise(ctypes.c_void_p(start), ctypes.c_size_t(begin + length - start), mmap.MADV_DONTNEED)


def put(target: Tensor, source: Tensor) -> None:
    """source into a part of a matrix, of the same shape, from another device row by row."""
    if target.device == source.device:
        target.copy_(source)
        return
    for own, row in zip(target, source, strict=True):
        own.copy_(row)


def copy(target: Tensor, source: Tensor) -> None:
    """source into the matrix `target`, of the same shape."""
    for columns in pieces(target, source):
        target[:, columns] = source[:, columns]


def joined(parts: Iterator[Tensor], length: int, like: Tensor) -> Tensor:
    """Matrices side by side in one of `length` columns, on disk where `like` is."""
    first = next(parts)
    folder = folder_of(like)
    if first.shape[1] == length and folder is None:
        return first
    if torch.compiler.is_compiling():
        return torch.cat([first, *parts], dim=1)
    shape = first.shape[0], length
    out = first.new_empty(shape) if folder is None else allocate(folder, *shape, first.dtype)
    start = 0
    for part in itertools.chain([first], parts):
        place = out[:, start : start + part.shape[1]]
        place.copy_(part)
        drop(place)
        start += part.shape[1]
    return out


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a matrix, copied to where it is."""
    if not folder_of(x):
        return x[index]
    out = allocate_like(x, len(index))
    for columns in pieces(x, out):
        out[:, columns] = x[index, columns]
    return out


def in_memory(folder: str | os.PathLike[str]) -> bool:
    """Whether the files of a folder take up main memory instead of a disk, as far as the system says."""
    place, mounts = Path(folder).resolve(), Path("/proc/mounts")
    if not mounts.exists():
        return False
    found = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    over = [(len(at), kind) for at, kind in found if place.is_relative_to(at)]
    return max(over, default=(0, ""))[1] in _IN_MEMORY


def free(folder: str | os.PathLike[str]) -> int:
    """Bytes that files in a folder may still take."""
    try:
        figures = os.statvfs(folder)
    except OSError as error:
        raise StorageError(f"cannot keep vectors in {folder}: {error}") from None
    return figures.f_bavail * figures.f_frsize


def available() -> int:
    """Free bytes of the main memory, by the word of the operating system and of its limits."""
    found = [4 * 2**30]  # where nothing is known
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = [int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        found.append(int(limit.read_text()) - int(used.read_text()))
    return max(min(found), 0)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
