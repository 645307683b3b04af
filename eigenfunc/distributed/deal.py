"""Data dealt out to processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, Subset

from eigenfunc.data import Batches
from eigenfunc.errors import DataError


def share(data: Any, rank: int, world_size: int) -> Any:
    """The share of one process in data that every process has in the same order: every world_size-th batch.

    data  a DataLoader over a data set with an index, or `Batches` of one or of a list

    Raises `DataError` where the order is not known to be the same, for a loader that shuffles or an iterable, and for
    what is one batch.
    """
    batches = data if isinstance(data, Batches) else Batches(data) if isinstance(data, DataLoader) else None
    if batches is None:
        raise DataError(
            f"the data is a single batch, a {type(data).__name__}, which cannot be dealt out to {world_size} "
            "processes; use Batches([...]) or a DataLoader, or a function data(rank, world_size) that returns the "
            "share of each"
        )
    if not batches.sequential:
        raise DataError(
            f"batches from a {type(batches.data).__name__} are not known to come in the same order on all "
            f"{world_size} processes; pass a list or a loader with shuffle=False, or a function data(rank, world_size) "
            "that returns the share of each"
        )
    source = batches.data
    dealt = _part_of_loader(source, rank, world_size) if isinstance(source, DataLoader) else source[rank::world_size]  # type: ignore[index]
    return replace(batches, data=dealt)


def _part_of_loader(loader: DataLoader[Any], rank: int, world_size: int) -> DataLoader[Any]:
    """A loader that reads the batches rank, rank + world_size, … of another and nothing else."""
    cutter: Any = loader.batch_sampler  # None where each item of the data set is a batch
    size = 1 if cutter is None else cutter.batch_size
    count = len(loader.dataset)  # type: ignore[arg-type]
    stop = count - count % size if cutter is not None and cutter.drop_last else count
    mine = [i for i in range(stop) if i // size % world_size == rank]
    return DataLoader(
        Subset(loader.dataset, mine),
        batch_size=None if cutter is None else size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def refuse_padding(data: Any) -> None:
    sampler = getattr(data, "sampler", None)
    if isinstance(sampler, DistributedSampler) and sampler.total_size != len(sampler.dataset):  # type: ignore[arg-type]
        raise DataError(
            f"a DistributedSampler deals out {sampler.total_size} samples where there are {len(sampler.dataset)}: "  # type: ignore[arg-type]
            "some count twice or not at all. Use share(loader, rank, world_size) on a plain loader"
        )
