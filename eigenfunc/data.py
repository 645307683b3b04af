"""Batches: data that can be read again and again, and the weighted sum of an operator over it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from eigenfunc import scope, tree
from eigenfunc.errors import DataError
from eigenfunc.tree import Tree

Weight = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class Batches:
    """A data set as batches that can be iterated any number of times, each with its weight.

    data       a DataLoader, a list of batches, or any iterable that starts anew each time. A DataLoader with
               `num_workers` reads ahead while products are formed, and nothing else does; with `pin_memory` too, its
               batches go to a GPU without waiting
    weight     batch -> number of terms its loss averages over; default: what the criterion divides by, where it is
               one of torch's losses (targets that are not ignored, by their class weights; entries for MSE), else
               the number of samples, read off the first axis of the batch's tensors. For any other loss that
               averages over tokens, say, pass their count: `weight=lambda batch: (batch["labels"] != -100).sum()`
    reduction  "mean" where the loss averages over the batch, "sum" where it adds, as one of torch's losses with
               reduction="sum" is known to do without a word
    device     where batches are moved to; default: where the parameters are
    microbatch largest number of samples handled at once: larger batches are cut along the first axis of their
               tensors, which bounds the memory of a product. For models that treat samples apart; `weight` is
               then asked about the pieces

    The matrix over the data is Σ w_b A_b / Σ w_b for "mean" and Σ A_b for "sum", so that it does not depend on how
    the data is cut into batches.
    """

    data: Iterable[Any]
    weight: Weight | None = None
    reduction: Literal["mean", "sum"] = "mean"
    device: torch.device | str | None = None
    microbatch: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.data, (Tensor, Mapping, str)) or not hasattr(self.data, "__iter__"):
            raise DataError(
                f"Batches takes an iterable of batches, got a {type(self.data).__name__}; "
                "a single batch is passed to hessian(...) as it is, or as Batches([batch])"
            )
        if hasattr(self.data, "__next__"):
            raise DataError(
                f"the data is a {type(self.data).__name__} that can be read only once, and every product needs a pass "
                "over it; pass list(data), a DataLoader, or an object whose __iter__ starts anew"
            )
        if self.reduction not in ("mean", "sum"):
            raise DataError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}")
        if self.reduction == "sum" and self.weight is not None:
            raise DataError("weights have no meaning for reduction='sum', where every batch's loss counts as it is")
        if self.microbatch is not None and (not isinstance(self.microbatch, int) or self.microbatch < 1):
            raise DataError(f"microbatch must be an integer of at least 1, got {self.microbatch!r}")
        if self.weight is not None and not callable(self.weight):
            raise DataError(f"weight must be a function of the batch, got a {type(self.weight).__name__}")

    def __iter__(self) -> Iterator[Any]:
        """The batches on `device`. DataLoader workers, samplers and data sets draw from the global random state.

        No thread reads ahead. One would draw from that state while the model and the user's own threads do, in an order
        that depends on timing, and while a product holds it swapped for its own; whether a data set draws cannot be
        known. Workers of a DataLoader are processes, with states of their own.
        """
        pinned = isinstance(self.data, DataLoader) and self.data.pin_memory
        for batch in self.data:
            moved = batch if self.device is None else _moved(batch, torch.device(self.device), pinned)
            if self.microbatch is None:
                yield moved
            else:
                yield from _pieces(moved, self.microbatch)

    @property
    def sequential(self) -> bool:
        """Whether the batches are known to come in the same order each time."""
        data = self.data
        if isinstance(data, DataLoader):
            cutter = data.batch_sampler
            plain = cutter is None or type(cutter) is BatchSampler
            return plain and isinstance(getattr(cutter, "sampler", data.sampler), SequentialSampler)
        return isinstance(data, (list, tuple))

    def on(self, device: torch.device) -> Batches:
        """The same batches, moved to `device` unless another was asked for."""
        return self if self.device is not None else replace(self, device=device)

    def weigh(self, batch: Any, index: int) -> float:
        """The weight of a batch: a positive number, or 0 for a batch that is to be left out."""
        if self.reduction == "sum":
            return 1.0
        count = samples(batch) if self.weight is None else self.weight(batch)
        if isinstance(count, str):
            raise DataError(
                f"cannot read the number of samples off batch {index}, a {type(batch).__name__} with {count}; "
                "say how much it counts: Batches(data, weight=lambda batch: ...)"
            )
        value = float(count)
        if not 0 <= value < float("inf"):
            raise DataError(f"the weight of batch {index} is {value}; it must be a finite number, not negative")
        return value


class Reader:
    """Passes over the data that draw random numbers from a stream of their own, not from the user's.

    A shuffling loader so sees another order in each pass, as in training, and the user's generators, the global
    one and the loader's, stand afterwards where they stood before. `seed` plus the index of a batch seeds what the
    model draws at random on it.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches = batches
        self.device = device
        self.seed = torch.initial_seed()
        self._sources = _random_sources(batches.data)
        self._states = [read() for read, _ in self._sources]

    def one_pass(self) -> Iterator[tuple[int, float, Any]]:
        """(index, weight, batch) of each batch."""
        with self._stream():
            iterator = iter(self.batches)
        index = 0
        while True:
            with self._stream():
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                weight = self.batches.weigh(batch, index)
            yield index, weight, _apart(batch)
            index += 1

    def first(self) -> tuple[int, Any]:
        """Index and batch of the first that counts; `DataError` where there is none."""
        for index, weight, batch in self.one_pass():
            if weight > 0:
                return index, batch
        raise DataError("the data is empty: no batch, or none with a positive weight")

    @contextmanager
    def _stream(self) -> Iterator[None]:
        theirs = [read() for read, _ in self._sources]
        for (_, write), state in zip(self._sources, self._states, strict=True):
            write(state)
        try:
            yield
        finally:
            self._states = [read() for read, _ in self._sources]
            for (_, write), state in zip(self._sources, theirs, strict=True):
                write(state)


def _apart(batch: Any) -> Any:
    """The batch as views of its own, so that a loss that sets `requires_grad` on its inputs leaves no trace in it."""
    try:
        return mapped(lambda leaf: leaf.detach() if leaf.is_floating_point() else leaf, batch)
    except DataError:
        return batch


def _random_sources(data: Any) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """How to read and write the state of each generator that reading the data may draw from."""
    cutter = getattr(data, "batch_sampler", None)
    holders = (data, getattr(data, "sampler", None), cutter, getattr(cutter, "sampler", None))
    found = {id(g): g for g in (getattr(holder, "generator", None) for holder in holders)}
    own = [g for g in found.values() if isinstance(g, torch.Generator) and g is not torch.default_generator]
    sources: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
    ]
    sources += [(g.get_state, g.set_state) for g in (torch.default_generator, *own)]
    return sources


def fresh(batch: Any) -> Any:
    """The batch in dicts and lists of its own, for losses that take items out of them."""
    if torch.compiler.is_compiling():
        return _refreshed(batch)
    if isinstance(batch, (MutableMapping, list)):
        try:
            copied = copy.copy(batch)
            for key in list(copied) if isinstance(copied, MutableMapping) else range(len(copied)):
                copied[key] = fresh(copied[key])
        except Exception:  # a container of the user's own making
            return batch
        return copied
    if type(batch) is tuple:
        return tuple(fresh(part) for part in batch)
    return batch


def _refreshed(batch: Any) -> Any:
    """`fresh` without `copy`, which compilers do not trace; containers of other types stay as they are."""
    if type(batch) is dict:
        return {key: _refreshed(part) for key, part in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)([_refreshed(part) for part in batch])
    return batch


def as_batches(data: Any) -> Batches:
    """`Batches` as they are, a DataLoader wrapped, anything else taken as one batch."""
    if isinstance(data, Batches):
        return data
    if isinstance(data, DataLoader):
        return Batches(data)
    if hasattr(data, "__next__"):
        raise DataError(
            f"the data is a {type(data).__name__} that can be read only once; pass a DataLoader or Batches(list(data))"
        )
    return Batches([data], weight=lambda batch: 1.0)


def average(parts: Iterable[tuple[float, Callable[[], Tree]]], reduction: str) -> Tree:
    """Σ w_b x_b / Σ w_b, or Σ x_b for "sum"; parts without weight are not computed. `DataError` if none is left."""
    counted = ((weight, compute()) for weight, compute in parts if weight != 0)
    first = next(counted, None)
    if first is None:
        raise DataError("the data is empty: no batch, or none with a positive weight")
    weights, total = first
    for i, (weight, part) in enumerate(counted):
        if i == 0 and reduction == "mean":
            total = tree.scale(weights, total)
        total = tree.add(total, part) if reduction == "sum" else tree.add(total, tree.scale(weight, part))
        weights += weight
    return total if reduction == "sum" or total is first[1] else tree.scale(1 / weights, total)


def _children(batch: Any) -> Iterable[Any] | None:
    if isinstance(batch, Mapping):
        return batch.values()
    if isinstance(batch, (tuple, list)):
        return batch
    if is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in fields(batch)]
    return None


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    for child in _children(batch) or ():
        yield from _tensors(child)


def samples(batch: Any) -> int | str:
    """The common length of the first axes of the batch's tensors, or what stands in the way of one."""
    sizes = {leaf.shape[0] for leaf in _tensors(batch) if leaf.ndim > 0}
    if len(sizes) != 1:
        return f"lengths {sorted(sizes)}" if sizes else "no tensor with a first axis"
    return int(sizes.pop())


def head(batch: Any, share: float) -> Any:
    """The first samples of a batch, that share of them and at least one; the batch itself if it cannot be cut."""
    count = samples(batch)
    if isinstance(count, str):
        return batch
    try:
        return next(_pieces(batch, max(1, round(share * count))))
    except DataError:
        return batch


def _pieces(batch: Any, size: int) -> Iterator[Any]:
    count = samples(batch)
    if isinstance(count, str):
        raise DataError(f"cannot cut a {type(batch).__name__} with {count} into pieces; leave microbatch out")
    if count <= size:
        yield batch
        return
    if uncut := next(
        (part for part in _parts_of(batch) if isinstance(part, (list, tuple)) and len(part) == count), None
    ):
        raise DataError(
            f"cannot cut a batch that holds a {type(uncut).__name__} with one entry a sample; make it a tensor"
        )
    for start in range(0, count, size):
        yield mapped(partial(_rows, start, start + size), batch)


def _parts_of(batch: Any) -> Iterator[Any]:
    """The containers in a batch that hold no tensors."""
    children = list(_children(batch) or ())
    if children and not any(True for _ in _tensors(batch)):
        yield batch
    for child in children:
        yield from _parts_of(child)


def _rows(start: int, stop: int, leaf: Tensor) -> Tensor:
    return leaf[start:stop] if leaf.ndim else leaf


def _moved(batch: Any, device: torch.device, pinned: bool) -> Any:
    """The batch on the device. Copies from memory that a loader has pinned are not waited for: the GPU makes them in
    order with its work. Other pinned memory is the user's, who may fill it anew before such a copy is made."""
    ahead = pinned and device.type == "cuda"
    return mapped(lambda leaf: scope.usable(leaf.to(device, non_blocking=ahead)), batch)


def mapped(f: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with f applied to its tensors; itself where nothing changes. `DataError` if it cannot be rebuilt."""
    if isinstance(batch, Tensor):
        return f(batch)
    children = _children(batch)
    if children is None:
        return batch
    made = [mapped(f, child) for child in children]
    if all(new is old for new, old in zip(made, children, strict=True)):
        return batch
    try:
        return _rebuilt(batch, made)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"cannot rebuild a batch of type {type(batch).__name__} with its tensors moved or cut; do it in the loader"
        ) from error


def _rebuilt(batch: Any, made: list[Any]) -> Any:
    if isinstance(batch, Mapping):
        return type(batch)(dict(zip(batch.keys(), made, strict=True)))  # type: ignore[call-arg]
    if is_dataclass(batch):
        return replace(batch, **dict(zip((f.name for f in fields(batch)), made, strict=True)))  # type: ignore[type-var]
    if hasattr(batch, "_fields"):
        return type(batch)(*made)
    return type(batch)(made)
