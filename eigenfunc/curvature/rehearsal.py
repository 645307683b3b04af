"""The loss tried out on the data before the first product: finite, repeatable, and without side effects."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from eigenfunc import scope, tree
from eigenfunc.curvature import products
from eigenfunc.curvature.denominators import Denominator
from eigenfunc.curvature.likelihoods import known
from eigenfunc.curvature.mends import mended
from eigenfunc.curvature.products import Function, Loss
from eigenfunc.data import Batches, Reader, average, mapped, samples
from eigenfunc.errors import DataError, DataWarning, ObjectiveError
from eigenfunc.objective import AS_PAIRS, Composition, guarded, pair
from eigenfunc.tree import Tree


def rehearse(loss: Loss, point: Tree, reader: Reader) -> bool:
    """Read the data twice, forward only. Returns whether the batches come in the same order each time.

    Raises `DataError` for a loss that is not finite, naming the batch, or for a model that cutting into
    micro-batches changes, and `ObjectiveError` for a loss that writes into its parameters or its batch; warns where
    the two passes have different means.
    """
    with scope.untouched(reader.device), mended() as seen:
        if reader.batches.microbatch is not None:
            _check_cut(loss, point, reader.batches, reader.seed, 100 * tree.coarsest_eps(point))
        seen.verify = True
        _check_purity(loss, point, reader.first()[1], reader.seed)
        seen.verify = False
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
        if len(passes[0]) > 1 and reader.batches.microbatch is None:
            _check_weights(loss, point, reader, slack)
    return (
        reader.batches.sequential
        and len(passes[0]) == len(passes[1])
        and all(
            w1 == w2 and bool((a - b).abs() <= slack * a.abs())
            for (w1, a), (w2, b) in zip(passes[0], passes[1], strict=True)
        )
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
        value = evaluated(products.of_leaves(loss, batch, point, reader.seed + index), tree.leaves(point))
        if not bool(torch.isfinite(value)):
            raise DataError(
                f"the loss of batch {index} is {value.item()}: no derivative exists there. Look for bad samples in "
                "the batch, or for an overflow in the model at these parameters"
            )
        found.append((weight, value))
    return found


def evaluated(f: Function, refs: list[Tensor]) -> Tensor:
    """The loss in float64; with a graph only for losses that differentiate by the parameters themselves."""
    try:
        return f(refs).detach().double()
    except RuntimeError as error:
        if "require grad" not in str(error):
            raise
    return f([leaf.detach().requires_grad_() for leaf in refs]).detach().double()


def _check_purity(loss: Loss, point: Tree, batch: Any, seed: int) -> None:
    """Run the loss on copies: it may neither write into them nor reach the parameters by another way."""
    copies: list[Tensor] = []

    def copied(leaf: Tensor) -> Tensor:
        copies.append(leaf.clone())
        return copies[-1]

    params = tree.tree_map(copied, point)
    count = len(copies)
    try:
        if isinstance(loss, Composition) and known(loss.parts.criterion):  # which only reads its targets
            inputs, targets = pair(batch, AS_PAIRS)
            own = mapped(copied, inputs), targets
        else:
            own = mapped(copied, batch)
    except DataError:
        own = batch
    evaluated(products.of_leaves(guarded(loss), own, params, seed), tree.leaves(params))
    written = [i for i, copy in enumerate(copies) if copy._version > 0]
    if written:
        what = f"parameter '{tree.names(point)[written[0]]}'" if written[0] < count else "a tensor of its batch"
        raise ObjectiveError(
            f"the loss writes into {what} in place, so that it is no function of it, and a second product would see "
            "other numbers; use the out-of-place operation, or clone the tensor first"
        )
    leaves = [leaf.detach().requires_grad_() for leaf in tree.leaves(point)]
    remedy = "take it from `params`, or in a module from its own attribute"
    if isinstance(loss, Composition):
        remedy += ". A penalty in the criterion is no function of the outputs: leave it out, and add its own Hessian"
    f, numbers = products.of_leaves(loss, batch, point, seed), _Numbers()
    with numbers:
        value = f(leaves)
    _check_aliases(value, leaves, tree.names(point), remedy)
    if numbers.taken:
        _check_numbers(f, leaves, numbers.taken)


class _Numbers(TorchFunctionMode):
    """Notes the numbers taken out of tensors that are to be differentiated, or gives out those of another run."""

    def __init__(self, given: list[float] | None = None) -> None:
        super().__init__()
        self.given = given
        self.taken: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (Tensor.item, Tensor.__float__) or not args[0].requires_grad:
            return func(*args, **(kwargs or {}))
        self.taken.append(func(args[0].detach()))
        return self.taken[-1] if self.given is None else self.given[len(self.taken) - 1]


def _check_numbers(f: Function, leaves: list[Tensor], taken: list[float]) -> None:
    """Nearby, the loss is the same with the numbers of this point: they are no part of it, but written into a log, say.

    Nothing is said where another number of them is taken there.
    """
    moved = [(x + 1e-3 * (x.abs() + x.abs().mean())).detach().requires_grad_() for x in leaves]
    found = []
    for mode in (_Numbers(), _Numbers(taken)):
        try:
            with mode:
                value = f(moved)
        except IndexError:
            return
        found.append(float(value.detach()))
    slack = 100 * tree.coarsest_eps(leaves) * max(map(abs, found))  # of kernels that do not repeat to the last bit
    if len(mode.taken) == len(taken) and abs(found[0] - found[1]) > slack:
        raise ObjectiveError(
            "the loss computes with a number that float() or .item() takes out of a tensor which depends on the "
            f"parameters: derivatives take it for a constant, but at a nearby point the loss is {found[0]:.8g} with "
            f"it, and {found[1]:.8g} with the number from here. Compute with the tensor itself, or with .detach() "
            "where a constant is meant"
        )


def _check_aliases(value: Tensor, leaves: list[Tensor], names: list[str], remedy: str) -> None:
    """No other tensor that requires grad, in the graph of the loss, may share its memory with a parameter."""
    places = {leaf.data_ptr(): name for leaf, name in zip(leaves, names, strict=True) if leaf.numel() > 0}
    own = {id(leaf) for leaf in leaves}
    stack, seen = [value.grad_fn], {value.grad_fn}
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own and variable.data_ptr() in places:
            raise ObjectiveError(
                f"the loss reads parameter '{places[variable.data_ptr()]}' not from the `params` it is given but from "
                f"elsewhere (a list, a closure, a second reference), where it counts as a constant; {remedy}"
            )
        for following, _ in () if node is None else node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def _check_weights(loss: Loss, point: Tree, reader: Reader, slack: float) -> None:
    """Warn where the loss of the first batch is not made of those of its two parts as the whole is made of batches.

    Not where the user weighs batches, who so defines the whole; nor where BatchNorm in train mode is known to mix
    samples, where random numbers differ with the cut, or where batches cannot be cut.
    """
    batches = reader.batches
    if not (batches.weight is None or isinstance(batches.weight, Denominator)):
        return
    index, batch = reader.first()
    count = samples(batch)
    if isinstance(count, str) or count < 2:
        return
    try:
        parts = list(replace(batches, data=[batch], microbatch=(count + 1) // 2))
        found = []
        for piece in (batch, *parts):
            with _Undropped() as seen:
                value = evaluated(products.of_leaves(loss, piece, point, reader.seed), tree.leaves(point))
            if seen.mixing or scope.drawn_since_reseed(reader.seed, reader.device):
                return
            found.append((batches.weigh(piece, index), value))
    except Exception:  # a loss need not take half a batch
        return
    found = [(weight, value) for weight, value in found if weight > 0]
    whole, apart = float(found[0][1]), float(average(_parts(found[1:]), batches.reduction))
    size = max(abs(float(value)) for _, value in found)
    if not abs(whole - apart) > slack * size:
        return
    if abs(whole - sum(float(value) for _, value in found[1:])) <= slack * size:
        remedy = "It is their sum: pass Batches(data, reduction='sum')"
    else:
        remedy = (
            "Say what the loss divides by: Batches(data, weight=lambda batch: ...). Where it compares the samples of a "
            "batch with one another, batches are part of its definition: any weight= says that this is meant"
        )
    warnings.warn(
        f"batches count by {'what the criterion divides by' if batches.weight else 'their number of samples'}, but by "
        f"that the loss of the first, {whole:.8g}, is not made of those of its two halves, which give {apart:.8g}: "
        f"another cut of the data is another matrix. {remedy}",
        DataWarning,
        stacklevel=6,
    )


class _Undropped(TorchFunctionMode):
    """Dropout as the identity, so that losses can be compared across cuts; sees BatchNorm that mixes samples."""

    mixing = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            self.mixing |= bool((kwargs or {}).get("training", args[5] if len(args) > 5 else False))
        return args[0] if func in _DROPOUTS else func(*args, **(kwargs or {}))


_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}


def _check_cut(loss: Loss, point: Tree, batches: Batches, seed: int, slack: float) -> None:
    """Two ways of cutting the data, into pieces and into their halves, have the same loss."""
    assert batches.microbatch is not None
    sizes = (max(batches.microbatch, 2), max(batches.microbatch, 2) // 2)
    found = []
    for size in sizes:
        losses = []
        for _, weight, piece in Reader(replace(batches, microbatch=size), tree.device(point)).one_pass():
            try:
                with _Undropped():
                    value = evaluated(products.of_leaves(loss, piece, point, seed), tree.leaves(point))
            except ValueError as error:  # batch norm of one sample
                raise DataError(
                    f"the model cannot take pieces of {size} samples: {error}; leave microbatch out"
                ) from error
            if scope.drawn_since_reseed(seed, tree.device(point)):
                return  # random numbers that differ with the cut, though their distribution does not
            losses.append((weight, value))
        found.append(float(average(_parts(losses), batches.reduction)))
    together, apart = found
    if abs(together - apart) > slack * max(abs(together), abs(apart)):
        raise DataError(
            f"cutting batches changes the loss from {together:.8g} to {apart:.8g}: the model mixes samples (BatchNorm "
            "in train mode, a contrastive loss), or the weights are not those of the loss. Leave microbatch out, call "
            "eval(), or pass weight="
        )
