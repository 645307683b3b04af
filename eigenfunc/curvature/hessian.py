"""The Hessian of a loss over a data set, as a linear operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from eigenfunc import scope, tree
from eigenfunc.curvature import products
from eigenfunc.curvature.mends import mended
from eigenfunc.curvature.products import WAYS, Loss, Product
from eigenfunc.data import Batches, Reader, as_batches, average
from eigenfunc.errors import DataError, DataWarning, InputError, ObjectiveError
from eigenfunc.operator import LinearOperator, MatVec
from eigenfunc.tree import Tree


def hessian(
    loss: Loss,
    params: Tree,
    data: Any,
    *,
    product: str = "auto",
    cache: int = 2**30,
    chunk: int = 8,
    check: bool = True,
) -> LinearOperator:
    """The Hessian of `loss(params, batch)` over `data` with respect to `params`, never formed.

    loss     (params, batch) -> (): an `Objective` from `functional_loss`, or any function
    params   pytree of real floating-point tensors on one device: the point, held by reference. Its values may not
             change while the operator is in use
    data     one batch, a DataLoader, or `Batches`: the mean (or sum) over all of it, whatever the cut
    product  "auto" takes the fastest way that a second, different way confirms on the first batch; "graph" (kept
             gradient graph), "jvp" (forward over reverse) or "vjp" forces one
    cache    bytes of gradient graphs that may be kept between products, for all batches or for none
    chunk    vectors multiplied at once in `matmat`
    check    read the data twice at set-up, forward only, to see that it repeats, and prove the product

    Dropout draws the same mask for a batch in every product; BatchNorm in train mode uses each batch's statistics
    and changes no buffer. Inside a torch.func transform no check is made and every product is `hvp`.

    Raises `ObjectiveError` (not a scalar, no parameter in it, parameters that are NaN), `DataError` (no batch,
    cannot be weighed, or a non-finite loss, naming the batch), `ProductError` (no two ways agree); warns with
    `DataWarning` where two passes over the data disagree.
    """
    if product != "auto" and product not in WAYS:
        raise InputError(f"product must be 'auto' or one of {', '.join(map(repr, WAYS))}; got {product!r}")
    if chunk < 1:
        raise InputError(f"chunk must be at least 1, got {chunk}")
    tree.check_vector_space(params, "params")
    device = tree.device(params)
    batches = as_batches(data)
    if scope.inside_transform():
        return LinearOperator(_pure(loss, params, batches), params, description="Hessian by hvp, inside a transform")
    with scope.untouched(device):
        point = scope.usable(tree.tree_map(lambda leaf: leaf.detach(), params))
    reader = Reader(batches.on(device), device)
    if not all(bool(torch.isfinite(leaf).all()) for leaf in tree.leaves(point)):
        bad = [n for n, leaf in zip(tree.names(point), tree.leaves(point), strict=True) if not leaf.isfinite().all()]
        raise ObjectiveError(f"parameter '{bad[0]}' holds NaN or infinity")
    words = f"way '{product}', as asked"
    if check:
        _check_data(loss, point, reader)
    if check or product == "auto":
        proof = _prove(loss, point, reader)
        if product == "auto":
            product, words = proof.way, proof.words
    return _assemble(loss, point, reader, product, cache, chunk, words)


def _assemble(loss: Loss, point: Tree, reader: Reader, way: str, cache: int, chunk: int, words: str) -> LinearOperator:
    refs, rebuild = tree.flatten(point)

    def prepare(index: int, batch: Any) -> Product:
        return WAYS[way](products.of_leaves(loss, batch, point, reader.seed + index), refs)

    kept = _keep(reader, prepare, cache) if way == "graph" and cache > 0 else None

    def parts() -> Iterator[tuple[float, Callable[[], Product]]]:
        if kept is not None:
            yield from ((weight, partial(_same, made)) for weight, made in kept)
            return
        for index, weight, batch in reader.one_pass():
            yield weight, partial(prepare, index, batch)

    def total(use: Callable[[Product], Tree]) -> Tree:
        with scope.untouched(reader.device), mended():
            return average(((w, partial(_applied, use, make)) for w, make in parts()), reader.batches.reduction)

    pure = _pure(loss, point, reader.batches)

    def matvec(v: Tree) -> Tree:
        if scope.inside_transform():
            return pure(v)
        return total(lambda product: rebuild(product(tree.leaves(v))))

    def block(vs: Tree) -> Tree:
        return total(lambda product: rebuild(_in_chunks(product, tree.leaves(vs), chunk, way)))

    def minibatches() -> Iterator[MatVec]:
        """One batch after the other, for ever, each scaled so that its mean over a pass is the whole matrix."""
        weights = [weight for weight, _ in parts()]
        whole = sum(weights) if reader.batches.reduction == "mean" else 1.0
        while True:
            for weight, make in parts():
                share = weight * len(weights) / whole
                yield partial(one, make, share)

    def one(make: Callable[[], Product], share: float, v: Tree) -> Tree:
        with scope.untouched(reader.device), mended():
            return tree.scale(share, rebuild(make()(tree.leaves(v))))

    held = "graphs of all batches kept" if kept is not None else "recomputed for each product"
    return LinearOperator(matvec, point, block, minibatches, f"Hessian, {words}, {held}")


def _pure(loss: Loss, params: Tree, batches: Batches) -> MatVec:
    def matvec(v: Tree) -> Tree:
        def parts() -> Iterator[tuple[float, Callable[[], Tree]]]:
            for index, batch in enumerate(batches):
                weight = batches.weigh(batch, index)
                yield weight, partial(products.hvp, loss, params, batch, v)

        return average(parts(), batches.reduction)

    return matvec


def _in_chunks(product: Any, vs: list[Tensor], chunk: int, way: str) -> list[Tensor]:
    count = vs[0].shape[0]
    out: list[list[Tensor]] = []
    for start in range(0, count, chunk):
        piece = [v[start : start + chunk] for v in vs]
        if chunk == 1:
            out.append([x[None] for x in product([x[0] for x in piece])])
        elif way == "graph":
            out.append(product(piece, batched=True))
        else:
            out.append(list(torch.func.vmap(product, randomness="same")(piece)))
    return [torch.cat(blocks) for blocks in zip(*out, strict=True)]


def _same(product: Product) -> Product:
    return product


def _applied(use: Callable[[Product], Tree], make: Callable[[], Product]) -> Tree:
    return use(make())


def _keep(reader: Reader, prepare: Callable[[int, Any], Product], budget: int) -> list[tuple[float, Product]] | None:
    """The products of all batches with their graphs, or None where those would not fit into `budget` bytes."""
    kept: list[tuple[float, Product]] = []
    used = 0
    with scope.untouched(reader.device), mended():
        for index, weight, batch in reader.one_pass():
            if weight == 0:
                continue
            with _counted() as storages:
                try:
                    made = prepare(index, batch)
                except RuntimeError as error:
                    if "saved tensor hooks" in str(error):
                        return None
                    raise
            used += sum(storages.values())
            if used > budget:
                return None
            kept.append((weight, made))
    return kept


@contextmanager
def _counted() -> Iterator[dict[int, int]]:
    """Collects the storages that autograd saves: address -> bytes."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield storages


def _check_data(loss: Loss, point: Tree, reader: Reader) -> None:
    """Read the data twice: every loss finite, and the same mean in both passes."""

    def mean() -> Tensor:
        def parts() -> Iterator[tuple[float, Callable[[], Tensor]]]:
            for index, weight, batch in reader.one_pass():
                yield weight, partial(value, index, batch)

        out: Tensor = average(parts(), reader.batches.reduction)
        return out

    def value(index: int, batch: Any) -> Tensor:
        f = products.of_leaves(loss, batch, point, reader.seed + index)
        with torch.no_grad():
            out = f(tree.leaves(point)).double()
        if not bool(torch.isfinite(out)):
            raise DataError(
                f"the loss of batch {index} is {out.item()}: no derivative exists there. Look for bad samples in the "
                "batch, or for an overflow in the model at these parameters"
            )
        return out

    with scope.untouched(reader.device), mended():
        first, second = float(mean()), float(mean())
    if abs(first - second) > 100 * tree.coarsest_eps(point) * max(abs(first), abs(second)):
        warnings.warn(
            f"two passes over the data give different losses ({first:.8g} and {second:.8g}): the matrix changes "
            "between products. Batches may be shuffled where the model's dropout or BatchNorm depends on the cut, or "
            "samples augmented at random: pass a loader with shuffle=False, freeze the data with "
            "Batches(list(loader)), or switch the model to eval()",
            DataWarning,
            stacklevel=4,
        )


def _prove(loss: Loss, point: Tree, reader: Reader) -> products.Proof:
    for index, weight, batch in reader.one_pass():
        if weight == 0:
            continue
        f = products.of_leaves(loss, batch, point, reader.seed + index)
        with scope.untouched(reader.device), mended():
            return products.prove(f, tree.leaves(point), tree.names(point))
    raise DataError("the data is empty: no batch, or none with a positive weight")
