"""Fisher matrices of a model and its likelihood over a data set, as linear operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from eigenfunc.curvature.losses import Kind, check_kind, output_fisher
from eigenfunc.curvature.sandwich import OutputMap, check_parts, pure_product, sandwich
from eigenfunc.data import as_batches
from eigenfunc.errors import DataError, InputError
from eigenfunc.operator import LinearOperator
from eigenfunc.tree import Tree


def fisher(
    objective: Any,
    params: Tree,
    data: Any,
    kind: Kind = "exact",
    *,
    num_samples: int = 1,
    seed: int | None = None,
    product: str = "auto",
    cache: int | Literal["auto"] = "auto",
    chunk: int | None = None,
    compile: bool = False,
    check: bool = True,
) -> LinearOperator:
    """The Fisher matrix Σ w_t E g_t g_tᵀ of `objective` over `data` with respect to `params`, never formed.

    The criterion is Σ w_t ℓ_t with ℓ_t the negative log-likelihood of one observation and w_t its weight, which holds
    the reduction; g_t is the gradient of ℓ_t by the parameters. `output_fisher` says what an observation is, and how
    the matrix scales: as the loss, so that the mean of an MSE over N samples of K outputs has the exact Fisher matrix
    2/(NK) JᵀJ.

    objective    an `Objective` from `functional_loss(model, criterion)`, or any object with predict and criterion. The
                 criterion is one of CrossEntropyLoss, MSELoss, BCEWithLogitsLoss, PoissonNLLLoss, GaussianNLLLoss
    kind         "exact" takes the expectation over targets drawn from the model's own distribution, in closed form:
                 the Gauss–Newton matrix, other than for rates of a Poisson distribution (log_input=False).
                 "monte-carlo" estimates it by `num_samples` draws an observation. "empirical" takes the targets of
                 the data: that is no estimate of the others, nor of the Hessian, unless the model is right
    seed         of the draws; default: a fresh one, told by `describe()`. The draws of a batch depend on the seed and
                 on its place in the data, so that all products are with one matrix, which has the exact one as its
                 expectation, and another cut of the data draws anew
    params, data, product, cache, chunk, compile, check as for `ggn`

    BatchNorm in train mode makes g_t the gradient of a term of the whole batch, through the statistics that it shares
    with others. Inside a torch.func transform no check is made and every product is `fishervp`.

    Raises what `ggn` raises; `ObjectiveError` for a criterion that is not known to be a likelihood; for
    "monte-carlo" also `DataError` where the batches may come in another order each time, and `InputError` with
    compile=True. J. Martens, JMLR 21 (2020); F. Kunstner, L. Balles and P. Hennig, NeurIPS 2019.
    """
    check_kind(kind, num_samples)
    check_parts(objective, _NAMES[kind])
    name = _NAMES[kind]
    if kind == "monte-carlo":
        if compile:
            raise InputError("the draws of a Monte-Carlo Fisher matrix cannot be compiled; leave compile out")
        if not as_batches(data).sequential:
            raise DataError(
                "a Monte-Carlo Fisher matrix needs batches that come in the same order each time, which is known of "
                "lists and of DataLoaders without shuffling: pass Batches(list(loader)), or shuffle=False"
            )
        seed = _seed(seed)
        name += f", {num_samples} draw{'s' if num_samples > 1 else ''} an observation from seed {seed}"
    origin = torch.initial_seed()  # what the engine counts batches from, in the random state that it hands on
    return sandwich(
        name,
        objective,
        params,
        data,
        _of(objective.criterion, kind, num_samples, seed, lambda: (torch.initial_seed() - origin) % 2**63),
        product=product,
        cache=cache,
        chunk=chunk,
        compile=compile,
        check=check,
    )


def fishervp(
    objective: Any,
    params: Tree,
    batch: Any,
    v: Tree,
    kind: Kind = "exact",
    *,
    num_samples: int = 1,
    seed: int | None = None,
) -> Tree:
    """The Fisher matrix of `objective` on one batch (inputs, targets), times `v`; see `fisher`.

    Pure, and composes with torch.func as `ggnvp` does; draws are constants to derivatives, and the same for all models
    and vectors of a vmap. A Monte-Carlo estimate needs its `seed`, and does not go through torch.compile. Raises
    `InputError` without it, `TreeError` and `ObjectiveError` as `ggnvp` and `fisher` do.
    """
    check_kind(kind, num_samples)
    if kind == "monte-carlo" and seed is None:
        raise InputError("a Monte-Carlo Fisher product needs a seed, or each would be with a matrix of its own")
    check_parts(objective, _NAMES[kind])
    output_map = _of(objective.criterion, kind, num_samples, None if seed is None else _seed(seed), lambda: 0)
    return pure_product(_NAMES[kind], objective, params, batch, v, output_map)


_NAMES: dict[Kind, str] = {"exact": "Fisher", "monte-carlo": "Monte-Carlo Fisher", "empirical": "empirical Fisher"}


def _seed(seed: int | None) -> int:
    if seed is None:
        return torch.Generator().seed() % 2**31
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed must be an integer of at least 0, got {seed!r}")
    return seed


def _of(criterion: Any, kind: Kind, num_samples: int, seed: int | None, place: Callable[[], int]) -> OutputMap:
    """The Fisher matrix in output space, with noise of its own for each place in the data."""

    def output_map(outputs: Tree, targets: Any) -> Callable[[Tree], Tree]:
        noise = np.random.default_rng([seed, place()]) if kind == "monte-carlo" and seed is not None else None
        return output_fisher(criterion, outputs, targets, kind, num_samples=num_samples, noise=noise, overwrite=True)

    return output_map
