"""The loss tried out on the data before the first product: finite, repeatable, and without side effects."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eigenfunc import scope, tree
from eigenfunc.curvature import products
from eigenfunc.curvature.mends import mended
from eigenfunc.curvature.products import Function, Loss
from eigenfunc.data import Batches, Reader, average, mapped
from eigenfunc.errors import DataError, DataWarning, ObjectiveError
from eigenfunc.tree import Tree


def rehearse(loss: Loss, point: Tree, reader: Reader) -> bool:
    """Read the data twice, forward only. Returns whether the batches come in the same order each time.

    Raises `DataError` for a loss that is not finite, naming the batch, or for a model that cutting into
    micro-batches changes, and `ObjectiveError` for a loss that writes into its parameters or its batch; warns where
    the two passes have different means.
    """
    with scope.untouched(reader.device), mended() as seen:
        _check_in_place(loss, point, reader.first()[1])
        passes = [_losses(loss, point, reader) for _ in range(2)]
        first, second = (float(average(_parts(losses), reader.batches.reduction)) for losses in passes)
        slack = 100 * max(tree.coarsest_eps(point), seen.eps)
        if abs(first - second) > slack * max(abs(first), abs(second)):
            warnings.warn(
                f"two passes over the data give different losses ({first:.8g} and {second:.8g}): the matrix changes "
                "between products. Batches may be shuffled where the model's dropout or BatchNorm depends on the cut, "
                "or samples augmented at random: pass a loader with shuffle=False, freeze the data with "
                "Batches(list(loader)), or switch the model to eval()",
                DataWarning,
                stacklevel=5,
            )
        if reader.batches.microbatch is not None:
            _check_cut(loss, point, reader.batches, reader.seed, slack)
    return len(passes[0]) == len(passes[1]) and all(
        w1 == w2 and bool((a - b).abs() <= slack * a.abs())
        for (w1, a), (w2, b) in zip(passes[0], passes[1], strict=True)
    )


def _parts(losses: list[tuple[float, Tensor]]) -> Iterator[tuple[float, Callable[[], Tensor]]]:
    for weight, value in losses:
        yield weight, partial(torch.clone, value)


def _losses(loss: Loss, point: Tree, reader: Reader) -> list[tuple[float, Tensor]]:
    """(weight, loss in float64) of each batch that counts."""
    found = []
    for index, weight, batch in reader.one_pass():
        if weight == 0:
            continue
        value = _value(products.of_leaves(loss, batch, point, reader.seed + index), tree.leaves(point))
        if not bool(torch.isfinite(value)):
            raise DataError(
                f"the loss of batch {index} is {value.item()}: no derivative exists there. Look for bad samples in "
                "the batch, or for an overflow in the model at these parameters"
            )
        found.append((weight, value))
    return found


def _value(f: Function, refs: list[Tensor]) -> Tensor:
    """The loss in float64; with a graph only for losses that differentiate by the parameters themselves."""
    try:
        return f(refs).detach().double()
    except RuntimeError as error:
        if "require grad" not in str(error):
            raise
    return f([leaf.detach().requires_grad_() for leaf in refs]).detach().double()


def _check_in_place(loss: Loss, point: Tree, batch: Any) -> None:
    """Run the loss on copies and see whether it writes into them."""
    copies: list[Tensor] = []

    def copied(leaf: Tensor) -> Tensor:
        copies.append(leaf.clone())
        return copies[-1]

    params = tree.tree_map(copied, point)
    count = len(copies)
    try:
        own = mapped(copied, batch)
    except DataError:
        own = batch
    _value(products.of_leaves(loss, own, params), tree.leaves(params))
    written = [i for i, copy in enumerate(copies) if copy._version > 0]
    if written:
        what = f"parameter '{tree.names(point)[written[0]]}'" if written[0] < count else "a tensor of its batch"
        raise ObjectiveError(
            f"the loss writes into {what} in place, so that it is no function of it, and a second product would see "
            "other numbers; use the out-of-place operation, or clone the tensor first"
        )


def _check_cut(loss: Loss, point: Tree, batches: Batches, seed: int, slack: float) -> None:
    """The first piece has the loss that its halves have together; of two samples at least, where pieces have one."""
    assert batches.microbatch is not None
    size = max(batches.microbatch, 2)
    for whole in replace(batches, microbatch=None):
        piece = next(iter(replace(batches, data=[whole], microbatch=size)))
        halves = list(replace(batches, data=[piece], microbatch=size // 2))
        if len(halves) < 2:
            continue
        together = _value(products.of_leaves(loss, piece, point, seed), tree.leaves(point))
        if scope.drawn_since_reseed(seed, tree.device(point)):
            return  # random masks differ with the cut, though their distribution does not
        values = [
            (batches.weigh(half, 0), _value(products.of_leaves(loss, half, point), tree.leaves(point)))
            for half in halves
        ]
        apart = float(average(_parts(values), batches.reduction))
        if abs(float(together) - apart) > slack * max(abs(float(together)), abs(apart)):
            raise DataError(
                f"cutting a batch changes its loss from {float(together):.8g} to {apart:.8g}: the model mixes samples "
                "(BatchNorm in train mode, a contrastive loss), or the weights are not those of the loss. Leave "
                "microbatch out, call eval(), or pass weight="
            )
        return
