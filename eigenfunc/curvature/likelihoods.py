"""What torch's losses are: Σ w ℓ, with ℓ the negative log-likelihood of an observation and w ≥ 0 its weight.

The weight holds all that only says how often an observation counts: the reduction, class weights, `ignore_index`,
`pos_weight`, the total of a soft target. So a sum and a mean are the same likelihood, with other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Noise = np.random.Generator  # rather than torch's, whose numbers transforms would not let pass


def cuts(shape: Sequence[int], other: int, piece: int) -> Iterator[tuple[slice, ...]]:
    """Cuts of an array along axis 0, and along another one where need be, into pieces of about so many entries."""
    each = math.prod(shape[1:])
    inner = shape[other] if len(shape) > other else 1
    if each <= piece or inner == 1:
        count = max(piece // max(each, 1), 1)
        yield from ((slice(i, i + count),) for i in range(0, shape[0], count))
        return
    count = max(piece * inner // each, 1)
    between = (slice(None),) * (other - 1)
    for i in range(shape[0]):
        yield from ((slice(i, i + 1), *between, slice(j, j + count)) for j in range(0, inner, count))


class Softening(NamedTuple):
    """Targets t w / Σ t w: t the target, smoothed by a share that goes to all classes alike, w the class weights."""

    smoothing: float
    along: Tensor  # the class weights, on the axis of classes


class Tokens(NamedTuple):
    """Categorical observations with probabilities softmax(logits): −log p_y, or −Σ τ_c log p_c for soft targets τ.

    logits    (C,) or (N, C, d…), in the dtype the loss has them
    weights   of each observation: shaped as the logits, with one entry on the axis of classes
    targets   classes, with any number of them on the axis of classes (several observations of the same weight, which
              share it); or distributions over them, floating-point and shaped as the logits
    softening makes τ of the targets, where they are soft; only when asked to, for τ takes the memory of the logits
    """

    logits: Tensor
    weights: Tensor
    targets: Tensor
    softening: Softening | None = None

    @property
    def axis(self) -> int:
        return min(self.logits.ndim - 1, 1)

    def parts(self, piece: int) -> Iterator[tuple[slice, ...]]:
        """Cuts along the axes of observations into pieces of about so many logits."""
        return cuts(self.logits.shape, 2, piece) if self.logits.ndim > 1 else iter([(slice(None),)])

    def part(self, where: tuple[slice, ...]) -> Tokens:
        return self._replace(logits=self.logits[where], weights=self.weights[where], targets=self.targets[where])

    def soft(self) -> Tensor | None:
        """τ, or None where the targets are classes."""
        if self.softening is None:
            return None
        smoothing, along = self.softening
        even = along * (smoothing / self.logits.shape[self.axis])
        if self.targets.is_floating_point():
            smoothed = self.targets.to(along.dtype) * along * (1 - smoothing) + even
        else:
            own = along.flatten()[self.targets] * (1 - smoothing)
            smoothed = even.expand(self.logits.shape).scatter_add(self.axis, self.targets, own)
        counts = smoothed.sum(self.axis, keepdim=True)
        return _over(smoothed, counts, counts == 0)


class Numbers(NamedTuple):
    """What the likelihood of single numbers comes to, in arrays of the size of the outputs.

    weights      of each entry, to be broadcast to the outputs
    targets      those of the data
    curvature    ∂²ℓ/∂z² at the targets
    information  E (∂ℓ/∂z)² over targets drawn from the likelihood
    score        targets -> ∂ℓ/∂z
    draw         targets from the likelihood: constants, and functions of noise that does not depend on the outputs
    """

    weights: Tensor
    targets: Tensor
    curvature: Tensor
    information: Tensor
    score: Callable[[Tensor], Tensor]
    draw: Callable[[Noise], Tensor]


class Entries(NamedTuple):
    """Observations of single numbers, one an output. All entries of a sample, what lies beyond axis 0, are one term.

    outputs  in the dtype the loss has them, and
    targets  shaped alike
    beside   what else an entry depends on, to be broadcast to the outputs, or None
    read     (outputs, targets, *beside) -> `Numbers`, entry by entry: only when asked to, for each takes memory
    """

    outputs: Tensor
    targets: Tensor
    beside: tuple[Tensor | None, ...]
    read: Callable[..., Numbers]

    def numbers(self) -> Numbers:
        z = wide(self.outputs)
        return self.read(z, self.targets.to(z), *(None if x is None else x.to(z) for x in self.beside))

    def parts(self, piece: int) -> Iterator[tuple[slice, ...]]:
        return cuts(self.outputs.shape, 1, piece)

    def part(self, where: tuple[slice, ...]) -> Entries:
        shape = self.outputs.shape
        beside = tuple(None if x is None else x.expand(shape)[where] for x in self.beside)
        return self._replace(outputs=self.outputs[where], targets=self.targets[where], beside=beside)


Likelihood = Tokens | Entries


def likelihood(criterion: Any, outputs: Any, targets: Any) -> Likelihood | None:
    """The likelihood that `criterion(outputs, targets)` is made of, or None where that is not known for certain.

    Known are the modules `CrossEntropyLoss`, `MSELoss`, `BCEWithLogitsLoss`, `PoissonNLLLoss` and `GaussianNLLLoss`
    of torch.nn themselves (a subclass may do anything), without hooks, their counterparts in torch.nn.functional, and
    functools.partial of either with keywords, which is how a Gaussian is given its `var`.
    """
    found = _call(criterion)
    if found is None or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if not outputs.is_floating_point():
        return None
    reader, options = found
    legacy = options.pop("size_average", None), options.pop("reduce", None)
    if legacy != (None, None) or options["reduction"] not in ("mean", "sum"):
        return None
    return reader(outputs, targets, **options)


def known(criterion: Any) -> bool:
    """Whether the criterion is one of torch's own losses that have a likelihood, for suitable outputs and targets."""
    return _call(criterion) is not None


Reader = Callable[..., Likelihood | None]


def _call(criterion: Any) -> tuple[Reader, dict[str, Any]] | None:
    """Which loss it is, with all its options; None if it has others."""
    given: Mapping[str, Any] = {}
    if type(criterion) is partial:
        if criterion.args:
            return None
        criterion, given = criterion.func, criterion.keywords
    if isinstance(criterion, nn.Module):
        if type(criterion) not in _MODULES or altered(criterion):
            return None
        reader, attributes, arguments = _MODULES[type(criterion)]
        options = {name: getattr(criterion, name) for name in attributes}
        if set(given) - set(arguments):
            return None
    else:
        found = [(reader, dict(defaults)) for f, reader, defaults in _FUNCTIONS if f is criterion]
        if not found:
            return None
        reader, options = found[0]
        if set(given) - set(options) - {"var"}:
            return None
    options.update(given)
    return reader, options


def altered(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(len(getattr(module, name)) > 0 for name in hooks)


def levels(noise: Noise, shape: Sequence[int], device: torch.device) -> Tensor:
    """Uniform on [0, 1), in float64."""
    return torch.from_numpy(np.asarray(noise.random(tuple(shape)))).to(device)


def wide(x: Tensor) -> Tensor:
    """Half precision in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _over(x: Tensor, total: Tensor, nothing: Tensor) -> Tensor:
    """x / total, and 0 where there is nothing, whatever the total."""
    return torch.where(nothing, 0.0, x / torch.where(nothing, 1.0, total))


def _categorical(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tokens | None:
    """A target is a class, or a distribution over them; smoothing makes a class into one.

    The terms of the loss are −Σ_c t_c w_c log p_c, with t the smoothed target and w the class weights: observations
    of weight Σ t w with soft targets t w / Σ t w.
    """
    axis = min(logits.ndim - 1, 1)
    if axis < 0 or not 0 <= label_smoothing <= 1:
        return None
    classes = logits.shape[axis]
    soft = targets.shape == logits.shape
    if soft != targets.is_floating_point() or (soft and ignore_index >= 0) or targets.dtype == torch.bool:
        return None
    if not soft and targets.shape != logits.shape[:axis] + logits.shape[axis + 1 :]:
        return None
    dtype = torch.promote_types(logits.dtype, torch.float32)
    class_weights = torch.ones(classes, dtype=dtype, device=logits.device) if weight is None else weight.to(dtype)
    along = class_weights.reshape([classes if i == axis else 1 for i in range(logits.ndim)])
    even = class_weights.mean() * label_smoothing
    if soft:
        counts = even + (1 - label_smoothing) * torch.tensordot(
            targets.to(dtype), class_weights, dims=([axis], [0])
        ).unsqueeze(axis)
        weights = counts / (logits.numel() // classes) if reduction == "mean" else counts
        return Tokens(logits, weights, targets, Softening(label_smoothing, along))
    counted = (targets != ignore_index).unsqueeze(axis)
    labels = torch.where(counted, targets.long().unsqueeze(axis), 0)
    own = torch.where(counted, 1.0 if weight is None else class_weights[labels], 0.0).to(dtype)
    total, counts, softening = own.sum(), own, None
    if label_smoothing > 0:
        counts = torch.where(counted, own * (1 - label_smoothing) + even, 0.0)
        softening = Softening(label_smoothing, along)
    weights = _over(counts, total, counts == 0) if reduction == "mean" else counts
    return Tokens(logits, weights, labels, softening)


def _gaussian(z: Tensor, y: Tensor, weights: Tensor, variance: Tensor) -> Numbers:
    def draw(noise: Noise) -> Tensor:
        return z.detach() + variance.detach().sqrt() * torch.from_numpy(
            np.asarray(noise.standard_normal(tuple(z.shape)))
        ).to(z)

    return Numbers(weights, y, 1 / variance, 1 / variance, lambda y: (z - y) / variance, draw)


def _mean_or_sum(z: Tensor, reduction: str) -> Tensor:
    """The weight of each entry."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    return torch.full((), 1 / max(z.numel(), 1) if reduction == "mean" else 1.0, dtype=dtype, device=z.device)


def _mse(outputs: Tensor, targets: Tensor, *, reduction: str, weight: Tensor | None) -> Entries | None:
    """(z − y)² is a Gaussian of variance ½."""
    if targets.shape != outputs.shape or (weight is not None and weight.shape != outputs.shape):
        return None
    each = _mean_or_sum(outputs, reduction)
    if weight is not None:
        each = 1 / wide(weight).sum() if reduction == "mean" else torch.ones_like(each)

    def read(z: Tensor, y: Tensor, weight: Tensor | None) -> Numbers:
        variance = torch.full((), 0.5, dtype=z.dtype, device=z.device)
        return _gaussian(z, y, each if weight is None else each * weight, variance)

    return Entries(outputs, targets, (weight,), read)


def _gaussian_nll(
    outputs: Tensor, targets: Tensor, *, var: Any = None, full: bool, eps: float, reduction: str
) -> Entries | None:
    """½ log v + (z − y)²/2v at given variances v: in the mean alone."""
    z = outputs
    if isinstance(var, float):
        var = torch.full((), var, dtype=torch.float64, device=z.device)
    elif not isinstance(var, Tensor):
        return None
    elif var.shape == z.shape[:-1] != z.shape:
        var = var.unsqueeze(-1)
    elif var.ndim != z.ndim or sum(a != b for a, b in zip(z.shape, var.shape, strict=True)) > 1 or not _fits(var, z):
        return None
    if targets.shape != z.shape:
        return None
    each = _mean_or_sum(z, reduction)
    return Entries(z, targets, (var,), lambda z, y, var: _gaussian(z, y, each, var.clamp(min=eps)))


def _bernoulli(
    outputs: Tensor, targets: Tensor, *, weight: Tensor | None, reduction: str, pos_weight: Tensor | None
) -> Entries | None:
    """−y log σ(z) − (1−y) log σ(−z); a positive weight q counts an observation 1 + (q−1) y times."""
    if targets.shape != outputs.shape:
        return None
    if not all(w is None or _fits(w, outputs) for w in (weight, pos_weight)):
        return None
    each = _mean_or_sum(outputs, reduction)

    def read(z: Tensor, y: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> Numbers:
        weights = each if weight is None else each * weight
        if pos_weight is not None:
            times = 1 + (pos_weight - 1) * y
            weights, y = weights * times, _over(pos_weight * y, times, times == 0)
        p = torch.sigmoid(z)
        spread = p * torch.sigmoid(-z)

        def draw(noise: Noise) -> Tensor:
            return (levels(noise, z.shape, z.device) < p.detach()).to(z)

        return Numbers(weights, y, spread, spread, lambda y: p - y, draw)

    return Entries(outputs, targets, (weight, pos_weight), read)


def _fits(x: Tensor, like: Tensor) -> bool:
    """Whether x is broadcast to the shape of `like`, and not the other way round."""
    lead = like.ndim - x.ndim
    return lead >= 0 and all(a in (1, b) for a, b in zip(x.shape, like.shape[lead:], strict=True))


def _counts(level: Tensor, rate: Tensor) -> Tensor:
    """The least k with P(count ≤ k) > level, by bisection; the distribution function is an incomplete gamma."""
    low, high = torch.full_like(rate, -1), (rate + 20 * rate.sqrt() + 60).ceil()
    for _ in range(_BISECTIONS):
        middle = ((low + high) / 2).ceil()  # below high until that is next to low
        enough = torch.special.gammaincc(middle + 1, rate) > level
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high


_BISECTIONS = 32  # for rates up to 10^16


def _poisson(
    outputs: Tensor, targets: Tensor, *, log_input: bool, full: bool, eps: float, reduction: str
) -> Entries | None:
    """Rate exp(z), or z + eps: z − y log(z + eps) differs from the negative log-likelihood of that by a constant."""
    if targets.shape != outputs.shape:
        return None
    each = _mean_or_sum(outputs, reduction)

    def read(z: Tensor, y: Tensor) -> Numbers:
        rate = z.exp() if log_input else z + eps

        def draw(noise: Noise) -> Tensor:
            return _counts(levels(noise, z.shape, z.device), rate.detach().double()).to(z)

        if log_input:
            return Numbers(each, y, rate, rate, lambda y: rate - y, draw)
        return Numbers(each, y, y / rate**2, 1 / rate, lambda y: 1 - y / rate, draw)

    return Entries(outputs, targets, (), read)


_OLD = {"size_average": None, "reduce": None, "reduction": "mean"}
_FUNCTIONS: tuple[tuple[Any, Reader, dict[str, Any]], ...] = (
    (F.cross_entropy, _categorical, {**_OLD, "weight": None, "ignore_index": -100, "label_smoothing": 0.0}),
    (F.mse_loss, _mse, {**_OLD, "weight": None}),
    (F.binary_cross_entropy_with_logits, _bernoulli, {**_OLD, "weight": None, "pos_weight": None}),
    (F.poisson_nll_loss, _poisson, {**_OLD, "log_input": True, "full": False, "eps": 1e-8}),
    (F.gaussian_nll_loss, _gaussian_nll, {"full": False, "eps": 1e-6, "reduction": "mean"}),
)
# reader, attributes that are its options, arguments of a call beyond outputs and targets
_MODULES: dict[type, tuple[Reader, tuple[str, ...], tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (_categorical, ("weight", "ignore_index", "reduction", "label_smoothing"), ()),
    nn.MSELoss: (partial(_mse, weight=None), ("reduction",), ()),
    nn.BCEWithLogitsLoss: (_bernoulli, ("weight", "pos_weight", "reduction"), ()),
    nn.PoissonNLLLoss: (_poisson, ("log_input", "full", "eps", "reduction"), ()),
    nn.GaussianNLLLoss: (_gaussian_nll, ("full", "eps", "reduction"), ("var",)),
}
