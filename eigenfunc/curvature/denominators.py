"""What batches are weighed by: the denominator of the mean that the criterion takes over the data of a batch.

With it, means over batches add up to the mean over all data, wherever the data is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eigenfunc.curvature.likelihoods import altered
from eigenfunc.data import Batches, as_batches, samples
from eigenfunc.objective import Composition

Count = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Denominator:
    """(inputs, targets) -> the number of terms, or the sum of their weights; of samples, where it is no such pair."""

    count: Count

    def __call__(self, batch: Any) -> Any:
        targets = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
        return self.count(targets) if isinstance(targets, Tensor) else samples(batch)


def batches_of(loss: Any, data: Any) -> Batches:
    """The data as batches, weighed as the criterion of `loss` averages, or added up where it adds up.

    For the losses of torch.nn themselves and of torch.nn.functional, as a criterion of `functional_loss` or of any
    object that has one, unless the batches have a `weight` of their own. All others count by their samples.
    """
    return _weighed(as_batches(data), getattr(loss.parts if isinstance(loss, Composition) else loss, "criterion", None))


def _weighed(batches: Batches, criterion: Any) -> Batches:
    if batches.weight is not None or batches.reduction == "sum":
        return batches
    kind, options = _read(criterion)
    if options.get("reduction") == "sum":
        return replace(batches, reduction="sum")
    if options.get("reduction") != "mean" or kind not in _BY_CLASSES | _BY_ENTRIES:
        return batches
    if kind in _BY_ENTRIES:
        return replace(batches, weight=Denominator(Tensor.numel))
    weight, ignored = options.get("weight"), options.get("ignore_index", -100)
    return replace(batches, weight=Denominator(partial(_classes, weight=weight, ignored=ignored)))


def _read(criterion: Any) -> tuple[Any, dict[str, Any]]:
    """The type of a loss module, or a function, of torch's own, and its options; None for others."""
    given: dict[str, Any] = {}
    if type(criterion) is partial and not criterion.args:
        criterion, given = criterion.func, criterion.keywords
    if type(criterion).__module__ == nn.CrossEntropyLoss.__module__:
        names = ("reduction", "weight", "ignore_index")
        return (None, {}) if altered(criterion) else (type(criterion), {x: getattr(criterion, x, None) for x in names})
    legacy = any(given.get(old) is not None for old in ("size_average", "reduce"))
    if legacy or getattr(criterion, "__module__", None) != F.__name__:
        return None, {}
    return criterion, {"reduction": "mean", **given}


def _classes(targets: Tensor, *, weight: Tensor | None, ignored: int) -> Any:
    """Σ w_y over the targets that count; every distribution over classes counts as one."""
    if targets.is_floating_point():
        return targets.numel() / targets.shape[min(targets.ndim - 1, 1)]
    counted = targets != ignored
    if weight is None:
        return counted.sum()
    own = weight.detach().to(targets.device)[torch.where(counted, targets.long(), 0)]
    return own.double()[counted].sum()


_BY_CLASSES: set[Any] = {nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss}
_BY_ENTRIES: set[Any] = {
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.KLDivLoss, nn.SoftMarginLoss),
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div, F.soft_margin_loss),
    *(nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss, nn.GaussianNLLLoss),
    *(F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.gaussian_nll_loss),
}
