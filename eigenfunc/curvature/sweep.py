"""Sweeps over the data: the weighted sum of one product a batch, as many graphs kept between sweeps as fit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from eigenfunc import scope, storage, tree
from eigenfunc.curvature.mends import mended
from eigenfunc.curvature.products import Product, embedded
from eigenfunc.data import Reader, average
from eigenfunc.operator import MatVec, Part
from eigenfunc.tree import Tree

Prepare = Callable[[int, Any], Product]  # index of the batch, batch -> its product

_SHARE = 0.5  # of the free memory that kept graphs may take by themselves
_BLOCK = 8  # vectors multiplied at once, if that is faster than one by one
_GAIN = 0.8  # and takes less than this share of the time: a closer choice would be another one in each run


class Kept(NamedTuple):
    weight: float
    product: Product
    size: int  # bytes


class Sweep:
    """The matrix over all batches as products with trees shaped as `point`.

    remake   forms the product of a batch that is not kept
    way      its name
    error    of products of an earlier run, if any is known of
    chunk    vectors multiplied at once; None: measured when a stack of vectors first comes in
    """

    def __init__(self, reader: Reader, point: Tree, remake: Prepare, chunk: int | None) -> None:
        self.reader = reader
        self.remake = remake
        self.chunk = chunk
        self.kept: dict[int, Kept] = {}
        self.way = ""
        self.error = 0.0
        self.complete = False
        self.largest_bytes = 0
        self._point = point
        self._rebuild = tree.flatten(point)[1]
        self._narrow: dict[tuple[tuple[int, ...], bool], bool] = {}  # (leaves, kept) -> their own product proves right

    def keep(self, prepare: Prepare, budget: int, *, in_order: bool) -> None:
        """Keep the graphs of the first batches, as many as fit into `budget` bytes.

        Where batches do not come in the same order each time, all are kept or none.
        """
        self.complete = True
        with scope.untouched(self.reader.device), mended(), _counted(tree.leaves(self._point)) as saved:
            for index, weight, batch in self.reader.one_pass():
                if weight == 0:
                    continue
                before = sum(saved.values())
                try:
                    product = prepare(index, batch)
                except RuntimeError as error:
                    if "saved tensor hooks" not in str(error):
                        raise
                    self.complete = False  # the loss has hooks of its own, so that nothing can be counted
                    break
                size = sum(saved.values()) - before if product.held is None else product.held
                size += product.beside
                self.largest_bytes = max(self.largest_bytes, size)
                if self.kept_bytes + size > budget:
                    self.complete = False
                    break
                self.kept[index] = Kept(weight, product, size)
        if not self.complete and not in_order:
            self.kept = {}

    @property
    def kept_bytes(self) -> int:
        return sum(kept.size for kept in self.kept.values())

    @property
    def start(self) -> int:
        """The number of the first batch that is not kept: those before it are, unless they have no weight."""
        return 1 + max(self.kept, default=-1)

    def forget(self, start: int) -> None:
        """Drop the graphs of the batches from number `start` on."""
        if start < self.start:
            self.kept = {index: kept for index, kept in self.kept.items() if index < start}
            self.complete = False

    def parts(self) -> Iterator[tuple[float, Callable[[], Product]]]:
        """(weight, function that hands out the product) of each batch."""
        if self.complete:
            yield from ((kept.weight, partial(_same, kept.product)) for kept in self.kept.values())
            return
        for index, weight, batch in self.reader.one_pass():
            if index in self.kept:
                yield self.kept[index].weight, partial(_same, self.kept[index].product)
            else:
                yield weight, partial(self.remake, index, batch)

    def total(self, use: Callable[[Product], Sequence[Tensor]]) -> Tree:
        """The weighted mean, or sum, of `use(product)` over the batches."""
        return self._rebuild(self._mean(use))

    def _mean(self, use: Callable[[Product], Sequence[Tensor]]) -> list[Tensor]:
        with self._scope():
            mean = average(((w, partial(_used, use, make)) for w, make in self.parts()), self.reader.batches.reduction)
        return _distinct(mean)

    @contextmanager
    def _scope(self) -> Iterator[None]:
        if self.complete:  # nothing but backward passes: no random numbers, nothing to mend
            with scope.full_precision(self.reader.device), torch.inference_mode(False), torch.enable_grad():
                yield
            return
        with scope.untouched(self.reader.device), mended():
            yield

    def matvec(self, v: Tree) -> Tree:
        flat = tree.leaves(v)
        return self.total(lambda product: product.single(flat))

    def matmat(self, vs: Tree) -> Tree:
        flat = tree.leaves(vs)
        if self.chunk is None and flat[0].shape[0] > 1:
            self.chunk = self._best_chunk(flat)
        return self.total(lambda product: self._in_chunks(product, flat))

    def principal(self, parts: Sequence[Part]) -> list[list[Tensor]]:
        """As `LinearOperator.principal`: the batches are read, and their graphs made, once for all parts."""

        held = {id(kept.product) for kept in self.kept.values()}

        def use(product: Product) -> list[Tensor]:
            kept = id(product) in held
            return [x for chosen, vs in parts for x in self._in_chunks(self._within(product, chosen, kept), vs)]

        images = iter(self._mean(use))
        return [[next(images) for _ in chosen] for chosen, _ in parts]

    def _within(self, product: Product, chosen: tuple[int, ...], kept: bool) -> Product:
        """The product of some leaves by themselves where there is one that agrees, once, with the whole product."""
        whole = embedded(product, tree.leaves(self._point), chosen)
        if product.within is None:
            return whole
        key = chosen, kept
        if key not in self._narrow:
            generator = torch.Generator().manual_seed(3)
            v = [tree.randn(tree.leaves(self._point)[i], generator) for i in chosen]
            expected = whole.single(v)
            try:
                self._narrow[key] = _close(product.within(chosen).single(v), expected)
            except Exception:  # user code and torch raise whatever they like
                self._narrow[key] = False
        return product.within(chosen) if self._narrow[key] else whole

    def block_ratio(self) -> float:
        """Seconds of a block of eight products with the first batch over those of eight single ones, each with its
        own set-up; 1 where graphs are kept."""
        if self.kept:
            return 1.0
        vs = [
            torch.ones(_BLOCK, *leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in tree.leaves(self._point)
        ]
        if self.chunk is None:
            self.chunk = self._best_chunk(vs)
        with scope.untouched(self.reader.device), mended():
            make = partial(self.remake, *self.reader.first())
            single = seconds(lambda: make().single([v[0] for v in vs]), self.reader.device)
            return seconds(lambda: self._in_chunks(make(), vs), self.reader.device) / (_BLOCK * single)

    def minibatches(self) -> Iterator[MatVec]:
        """One batch after the other, for ever, each scaled so that its mean over a pass is the whole matrix."""
        weights = [weight for weight, _ in self.parts()]
        whole = sum(weights) if self.reader.batches.reduction == "mean" else 1.0

        def one(make: Callable[[], Product], share: float, v: Tree) -> Tree:
            with scope.untouched(self.reader.device), mended():
                return tree.scale(share, self._rebuild(make().single(tree.leaves(v))))

        while True:
            for weight, make in self.parts():
                yield partial(one, make, weight * len(weights) / whole)

    def _in_chunks(self, product: Product, vs: list[Tensor]) -> list[Tensor]:
        """Products with a stack, `chunk` vectors at a time; half as many each time the memory does not suffice."""
        count, start = vs[0].shape[0], 0
        out = [torch.empty_like(v) for v in vs]
        while start < count:
            chunk = self.chunk or 1
            try:
                block = _multiplied(product, [v[start : start + chunk] for v in vs])
            except (RuntimeError, MemoryError) as error:
                if chunk == 1 or not _out_of_memory(error):
                    raise
                self.chunk = chunk // 2
                continue
            for whole, part in zip(out, block, strict=True):
                whole[start : start + chunk] = part
            start += chunk
        return out

    def _best_chunk(self, vs: list[Tensor]) -> int:
        """`_BLOCK` vectors at once, and four times as many, where the first batch is faster so and as right."""
        with scope.untouched(self.reader.device), mended():
            product = next(make() for weight, make in self.parts() if weight > 0)
            best = 1
            single = product.single([v[0] for v in vs])
            fastest = min(seconds(lambda: product.single([v[0] for v in vs]), self.reader.device) for _ in range(3))
            roomy = self.largest_bytes * 4 < available(self.reader.device)
            for chunk in (_BLOCK, 4 * _BLOCK) if roomy else ():
                if vs[0].shape[0] < chunk:
                    break
                piece = [v[:chunk] for v in vs]
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("error")  # vmap warns of operations that it can only loop over
                        block = product.block(piece)
                except (RuntimeError, MemoryError, Warning):
                    break
                spent = seconds(partial(product.block, piece), self.reader.device) / chunk
                if spent > _GAIN * fastest or not _close([x[0] for x in block], single):
                    break
                best, fastest = chunk, spent
        return best

    def describe(self) -> str:
        if not self.kept:
            kept = "graphs recomputed for each product"
        else:
            size, count = tree.gibibytes(self.kept_bytes), len(self.kept)
            which = "all batches" if self.complete else f"the first {count}, and no others,"
            kept = f"graphs of {which} kept ({size})"
        whole = sum(not own for own in self._narrow.values())
        blocks = f", {whole} blocks by whole products" if whole else ""
        return kept + ("" if self.chunk is None else f", vectors {self.chunk} at once") + blocks


def seconds(f: Callable[[], Any], device: torch.device) -> float:
    """The time of one call, on accelerators until its work is done."""
    synchronise = getattr(torch.get_device_module(device), "synchronize", lambda: None)
    synchronise()
    begun = time.perf_counter()
    f()
    synchronise()
    return time.perf_counter() - begun


def _same(product: Product) -> Product:
    return product


def _distinct(blocks: Sequence[Tensor]) -> list[Tensor]:
    """Blocks in memory of their own: a backward pass may hand out one tensor twice, or an expanded number."""
    out, taken = [], set()
    for x in blocks:
        own = x if x.data_ptr() not in taken and 0 not in x.stride() else x.clone(memory_format=torch.contiguous_format)
        taken.add(own.data_ptr())
        out.append(own)
    return out


def _used(use: Callable[[Product], Sequence[Tensor]], make: Callable[[], Product]) -> list[Tensor]:
    return list(use(make()))


def _multiplied(product: Product, piece: list[Tensor]) -> list[Tensor]:
    if piece[0].shape[0] == 1:
        return [x[None] for x in product.single([v[0] for v in piece])]
    return product.block(piece)


def _close(a: list[Tensor], b: list[Tensor]) -> bool:
    """In the largest entries, for squares of small numbers may be zero."""
    off, size = (torch.stack([x.abs().amax().double() for x in v if x.numel()]).max() for v in (tree.sub(a, b), b))
    return bool(off <= tree.coarsest_eps(a) ** 0.5 * size)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error)


def budget_for(cache: int | str, device: torch.device) -> int:
    """Bytes that kept graphs may take: as given, or half of what is free."""
    return int(_SHARE * available(device)) if cache == "auto" else int(cache)


def available(device: torch.device) -> int:
    """Free bytes on the device, by its own word; those of the main memory on the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else storage.available()


@contextmanager
def _counted(known: Sequence[Tensor]) -> Iterator[dict[int, int]]:
    """Collects the storages that autograd saves, other than those of `known`: address -> bytes."""
    storages: dict[int, int] = {}
    own = {leaf.untyped_storage().data_ptr() for leaf in known}

    def pack(x: Tensor) -> Tensor:
        for part in (x._indices(), x._values()) if x.is_sparse else (x,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # a saved output that knew its own node would keep it alive for ever

    with saved_tensors_hooks(pack, lambda x: x):
        yield storages
