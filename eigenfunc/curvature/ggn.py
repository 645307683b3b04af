"""The generalised Gauss–Newton matrix of a model and its loss over a data set, as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor

from eigenfunc import scope, tree
from eigenfunc.curvature import products
from eigenfunc.curvature.likelihoods import likelihood
from eigenfunc.curvature.losses import output_hessian
from eigenfunc.curvature.mends import Seen
from eigenfunc.curvature.products import HESSIAN, Product
from eigenfunc.curvature.proof import prove
from eigenfunc.curvature.sandwich import OutputMap, check_parts, floating, pure_product, sandwich
from eigenfunc.data import fresh
from eigenfunc.errors import ObjectiveError
from eigenfunc.objective import judged
from eigenfunc.operator import LinearOperator
from eigenfunc.tree import Tree

_NAME = "Gauss–Newton"
_PIECE = 2**18  # outputs of the rows that bear witness: so few that their derivatives take next to no memory


def ggn(
    objective: Any,
    params: Tree,
    data: Any,
    *,
    product: str = "auto",
    cache: int | Literal["auto"] = "auto",
    chunk: int | None = None,
    compile: bool = False,
    check: bool = True,
) -> LinearOperator:
    """The generalised Gauss–Newton matrix Jᵀ H J of `objective` over `data` with respect to `params`, never formed.

    J is the Jacobian of the outputs z = predict(params, inputs) by the parameters, H the Hessian of
    criterion(z, targets) by the outputs, reduction and all. It is the Hessian of the loss with the model replaced by
    its linearisation: positive semi-definite where the criterion is convex in z, and equal to the Hessian where the
    model is linear in its parameters or fits exactly. It depends on where model and criterion are cut apart: a
    criterion linear in z, as `NLLLoss` is in log-probabilities, makes it zero, so let the model return logits.

    objective  an `Objective` from `functional_loss(model, criterion)`, or any object with predict(params, inputs) and
               criterion(outputs, targets) -> (); outputs are any pytree of real tensors
    params     pytree of real floating-point tensors on one device: the point, held by reference. Its values may not
               change while the operator is in use
    data       batches (inputs, targets): one, a DataLoader, or `Batches`, weighted as for `hessian`
    product    "auto" takes the fastest of the ways that agree with one another on the first batch; "graph" (kept
               graphs of the model, nothing run again), "dual" or "jvp" (forward mode, then back) or "vjp" forces one
    cache, chunk, compile, check as for `hessian`; the proof covers J and H

    Dropout draws the same mask for a batch in every product, BatchNorm in train mode uses each batch's statistics.
    Inside a torch.func transform no check is made and every product is `ggnvp`.

    Raises `ObjectiveError` (no predict and criterion, a criterion that draws random numbers or reads the parameters,
    not a scalar, parameters that are NaN), `DataError` (no batch, cannot be weighed or cut, or a non-finite loss,
    naming the batch), `ProductError` (no two ways agree); warns with `DataWarning` where two passes over the data
    disagree. N. Schraudolph, Neural Computation 14 (2002); J. Martens, JMLR 21 (2020).
    """
    check_parts(objective, _NAME)
    return sandwich(
        _NAME,
        objective,
        params,
        data,
        _of(objective.criterion),
        product=product,
        cache=cache,
        chunk=chunk,
        compile=compile,
        check=check,
        confirm=partial(_confirm, objective.criterion),
    )


def ggnvp(objective: Any, params: Tree, batch: Any, v: Tree) -> Tree:
    """Generalised Gauss–Newton matrix of `objective` on one batch (inputs, targets), times `v`; see `ggn`.

    Pure, and composes with torch.func: under vmap over v, over params and v (stacked models), under grad and jvp.
    `v` is shaped as `params`, any pytree of real floating-point tensors. Raises `TreeError` where they do not match,
    `ObjectiveError` for an objective without predict and criterion. N. Schraudolph, Neural Computation 14 (2002).
    """
    check_parts(objective, _NAME)
    return pure_product(_NAME, objective, params, batch, v, _of(objective.criterion))


def _of(criterion: Callable[[Any, Any], Tensor], piece: int | None = None) -> OutputMap:
    """The Hessian of the criterion as an output map, by pieces of so many entries; outputs that are no floats are
    constants."""

    def output_map(outputs: Tree, targets: Any) -> Callable[[Tree], Tree]:
        live, whole = floating(outputs)
        if isinstance(targets, Tensor) and len(live) == len(tree.leaves(outputs)):
            return output_hessian(criterion, outputs, targets, overwrite=True, piece=piece)
        product = output_hessian(lambda zs, targets: judged(criterion, whole(zs), fresh(targets)), live, targets)
        return lambda u: whole(product(floating(u)[0]))

    return output_map


def _confirm(criterion: Callable[[Any, Any], Tensor], outputs: Tree, targets: Any, seen: Seen) -> None:
    """Prove the output map against derivatives of the criterion, as a Hessian of its own.

    Of a likelihood with many outputs, whose closed form treats rows alike, the first rows bear witness for all, because
    its derivatives take several times the memory of a training step. Raises `ObjectiveError` for a criterion that draws
    random numbers.
    """
    piece = None
    if isinstance(outputs, Tensor) and outputs.ndim > 1 and outputs.numel() > 16 * _PIECE:
        count = _PIECE // outputs[0].numel() + 2  # more than are handled at once
        if likelihood(criterion, outputs, targets) is not None:
            few = outputs[:count].clone(), targets[:count]  # tangents of a part are those of the whole
            if likelihood(criterion, *few) is not None:  # not where weights of all rows would no longer fit
                (outputs, targets), piece = few, _PIECE
    zs, whole = floating(outputs)
    scope.reseed(0, zs[0].device)
    criterion(outputs, fresh(targets))
    if scope.drawn_since_reseed(0, zs[0].device):
        raise ObjectiveError(
            "the criterion draws random numbers, so that it has another Hessian at each call; draw them once, with the "
            "targets, or in the model"
        )
    product = _of(criterion, piece)(outputs, fresh(targets))

    def single(u: Sequence[Tensor]) -> list[Tensor]:
        return floating(product(whole([x.clone() for x in u])))[0]  # which may be overwritten

    f = products.of_leaves(lambda zs, targets: criterion(whole(zs), targets), targets, zs)
    ways = HESSIAN._replace(
        matrix="criterion's Hessian",
        each={"output map": lambda f, zs: Product(single, products.looped(single)), **HESSIAN.each},
        remedy="check=False takes it without proof",
    )
    prove(f, ways, zs, [f"output {i}" for i in range(len(zs))], seen, "output map")
