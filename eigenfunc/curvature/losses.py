"""The curvature of a loss in the space of the model's outputs: its Hessian, and the Fisher matrices of its likelihood.

Each is returned as a function u ↦ M u of trees shaped as the outputs. Jᵀ M J, with J the derivative of the outputs by
the parameters, is then the Gauss-Newton or Fisher matrix of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from eigenfunc import scope, tree
from eigenfunc.curvature.likelihoods import Entries, Noise, Numbers, Tokens, levels, likelihood, wide
from eigenfunc.curvature.mends import Traceable, mended
from eigenfunc.curvature.products import forward_ad, scalar
from eigenfunc.errors import InputError, ObjectiveError
from eigenfunc.objective import judged
from eigenfunc.tree import Tree

Criterion = Callable[[Any, Any], Tensor]
Map = Callable[[Tree], Tree]
TensorMap = Callable[[Tensor], Tensor]
Known = TypeVar("Known", Tokens, Entries)
Kind = Literal["exact", "monte-carlo", "empirical"]

CHUNK = 2**21  # entries that are handled at once where a whole array of them would be large

KINDS: tuple[Kind, ...] = ("exact", "monte-carlo", "empirical")


def output_hessian(
    criterion: Criterion, outputs: Tree, targets: Any, *, overwrite: bool = False, piece: int | None = None
) -> Map:
    """u ↦ H u with the Hessian H of criterion(·, targets) at `outputs`, its reduction and its weights included.

    criterion  any (outputs, targets) -> (). In closed form for the losses that `likelihoods.likelihood` knows; by
               forward over reverse differentiation for all others, twice in reverse where a forward formula is missing
    outputs    a tensor, or any pytree of floating-point tensors; u is shaped alike
    overwrite  the result may be written into the memory of u, where nothing is differentiated or transformed
    piece      entries that are handled at once where memory is to be saved; default: `CHUNK`

    Pure, and composes with torch.func and torch.compile. In closed form, outside of transforms and with outputs that do
    not require grad, the temporaries are small however many outputs: no array of their size beside them and the result.
    For a cross-entropy the shift of u by its entry at the likeliest class, which H does not see, keeps small
    probabilities to full relative precision: that of a well-trained model is otherwise lost in float32.

    Raises `ObjectiveError` where the criterion does not return one real number.
    N. Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural Computation 14
    (2002).
    """
    known = likelihood(criterion, outputs, targets)
    if isinstance(known, Tokens):
        return _by_rows(_spread, known, overwrite, piece)
    if isinstance(known, Entries):
        return _scaling(known, lambda numbers: numbers.curvature, overwrite, piece)
    return _differentiated(criterion, outputs, targets)


def output_fisher(
    criterion: Criterion,
    outputs: Tree,
    targets: Any,
    kind: Kind = "exact",
    *,
    num_samples: int = 1,
    noise: Noise | None = None,
    overwrite: bool = False,
) -> Map:
    """u ↦ M u with the Fisher matrix of the likelihood behind the criterion, in output space.

    The loss is Σ w_t ℓ_t, with ℓ_t the negative log-likelihood of term t and w_t its weight, which holds the
    reduction. With g_t the gradient of ℓ_t by the outputs,

        exact        M = Σ w_t E g_t g_tᵀ over targets drawn from the model's own distribution
        monte-carlo  the same, with the mean over `num_samples` draws, made from `noise`, for the expectation
        empirical    the same, at the targets of the data

    A term of a cross-entropy is one token or pixel, whose class is drawn from softmax(outputs); a soft or smoothed
    target τ has g = softmax(outputs) − τ in `empirical`. (Whole sequences as terms, with the sums of these gradients,
    would have the same expectation, and another empirical matrix.) For the other losses a term is a sample: all
    outputs beyond axis 0 together. Weights, whether of classes, samples or positives, count how often something is
    observed, and so enter once; where the entries of one term have different weights, each enters by its root.

    MSELoss is the likelihood of a Gaussian of variance ½ about each output, so w_t = 1 for a sum; its mean, over
    samples and entries alike, has w_t = 1/(number of outputs), and the exact M is 2/(number of outputs) times the
    identity. All kinds scale as the loss does. The exact one is `output_hessian`, other than for `PoissonNLLLoss` with
    log_input=False. Draws count as constants to derivatives.

    Raises `InputError` for an unknown kind, a `num_samples` below 1, or a Monte-Carlo estimate without noise;
    `ObjectiveError` for a criterion that is not known to be a likelihood.
    J. Martens, New insights and perspectives on the natural gradient method, JMLR 21 (2020); F. Kunstner, L. Balles
    and P. Hennig, Limitations of the empirical Fisher approximation, NeurIPS 2019.
    """
    check_kind(kind, num_samples)
    known = likelihood(criterion, outputs, targets)
    if known is None:
        of = "" if isinstance(outputs, Tensor) else f" of a {type(outputs).__name__}, and not of one tensor,"
        raise ObjectiveError(
            f"{_named(criterion)}{of} is not known to be the negative log-likelihood of a distribution, so that it has "
            "no Fisher matrix; use CrossEntropyLoss, MSELoss, BCEWithLogitsLoss, PoissonNLLLoss or GaussianNLLLoss, "
            "reduced by a mean or a sum, the functions of the same names, or functools.partial of one with keywords; "
            "ggn takes any loss"
        )
    if kind == "exact":
        if isinstance(known, Tokens):
            return _by_rows(_spread, known, overwrite)
        return _scaling(known, lambda numbers: numbers.information, overwrite)
    if kind == "empirical":
        if isinstance(known, Tokens):
            return _by_rows(_squares, known, overwrite)
        numbers = known.numbers()
        return _outer(numbers.weights, [numbers.score(numbers.targets)])
    if noise is None:
        raise InputError("a Monte-Carlo estimate needs noise to draw from: numpy.random.default_rng(seed)")
    if isinstance(known, Tokens):
        drawn = known._replace(targets=_drawn(known, num_samples, noise), softening=None)
        return _by_rows(_squares, drawn, overwrite)
    numbers = known.numbers()
    return _outer(numbers.weights, [numbers.score(numbers.draw(noise)) for _ in range(num_samples)])


def check_kind(kind: str, num_samples: int) -> None:
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}")
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
        raise InputError(f"num_samples must be an integer of at least 1, got {num_samples!r}")


def _named(criterion: Any) -> str:
    name = getattr(criterion, "__name__", type(criterion).__name__)
    reduction = getattr(criterion, "reduction", None)
    return f"{name} with reduction={reduction!r}" if isinstance(reduction, str) else str(name)


def _probabilities(tokens: Tokens) -> Tensor:
    """Softmax, normalised by a sum in pairs: the fused kernel's float32 sum is off by 5e-6 for 50,000 classes."""
    z, axis = wide(tokens.logits), tokens.axis
    powers = torch.exp(z - z.detach().amax(axis, keepdim=True))
    return powers / powers.sum(axis, keepdim=True)


def _spread(tokens: Tokens) -> TensorMap:
    """w (diag p − p pᵀ), the Hessian of w log Σ exp and the covariance of a class."""
    p, axis = _probabilities(tokens), tokens.axis
    likeliest = p.argmax(axis, keepdim=True)

    def product(u: Tensor) -> Tensor:
        v = u.to(p.dtype)
        v = v - v.gather(axis, likeliest)
        return (tokens.weights * p * (v - (p * v).sum(axis, keepdim=True))).to(u.dtype)

    return product


def _squares(tokens: Tokens) -> TensorMap:
    """The mean over targets y of w (p − e_y)(p − e_y)ᵀ, or w (p − τ)(p − τ)ᵀ for a soft target."""
    p, axis = _probabilities(tokens), tokens.axis
    weights, targets, tau = tokens.weights, tokens.targets, tokens.soft()
    if tau is not None:
        slope = p - tau

        def soft(u: Tensor) -> Tensor:
            return (weights * slope * (slope * u.to(p.dtype)).sum(axis, keepdim=True)).to(u.dtype)

        return soft

    def hard(u: Tensor) -> Tensor:
        v = u.to(p.dtype)
        along = ((p * v).sum(axis, keepdim=True) - v.gather(axis, targets)) * (weights / targets.shape[axis])
        image: Tensor = (p * along.sum(axis, keepdim=True)).scatter_add(axis, targets, -along)
        return image.to(u.dtype)

    return hard


def _scaling(entries: Entries, by: Callable[[Numbers], Tensor], overwrite: bool, piece: int | None = None) -> TensorMap:
    """Each entry of u times its weight and its curvature; where these are one number for all, nothing else is kept."""

    def rule(entries: Entries) -> TensorMap:
        numbers = entries.numbers()
        return _diagonal(numbers.weights * by(numbers))

    first = entries.part((slice(0, 1),) * entries.outputs.ndim).numbers()
    factor = first.weights * by(first)
    if factor.ndim > 0:
        return _by_rows(rule, entries, overwrite, piece)

    def product(u: Tensor) -> Tensor:
        if overwrite and u.dtype == factor.dtype and 0 not in u.stride() and not _composing(u, factor):
            return u.mul_(factor)
        return (factor * u.to(factor.dtype)).to(u.dtype)

    return product


def _by_rows(rule: Callable[[Known], TensorMap], known: Known, overwrite: bool, piece: int | None = None) -> TensorMap:
    """The rule, which treats observations apart, on a few at a time where all at once would take much memory."""
    outputs = known.logits if isinstance(known, Tokens) else known.outputs
    count = piece or CHUNK
    whole = rule(known) if outputs.numel() <= count or _composing(outputs) else None

    def product(u: Tensor) -> Tensor:
        if whole is not None:
            return whole(u)
        if _composing(outputs, u):
            return rule(known)(u)
        out = u if overwrite and 0 not in u.stride() else torch.empty_like(u, memory_format=torch.contiguous_format)
        for where in known.parts(count):
            out[where] = rule(known.part(where))(u[where])
        return out

    return product


def _composing(*tensors: Tensor) -> bool:
    """Whether something is to be differentiated, batched or traced, so that nothing may be written in place."""
    if torch.compiler.is_compiling() or scope.inside_transform():
        return True
    return forward_ad._current_level >= 0 or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _drawn(tokens: Tokens, num_samples: int, noise: Noise) -> Tensor:
    """Classes drawn from softmax(logits) by inverting its distribution function, `num_samples` on their axis."""
    logits, axis = tokens.logits.detach(), tokens.axis
    shape = [num_samples if i == axis else length for i, length in enumerate(logits.shape)]
    level = levels(noise, shape, logits.device)

    def classes(z: Tensor, level: Tensor) -> Tensor:
        rising = torch.softmax(z.double(), axis).movedim(axis, -1).cumsum(-1)
        sought = level.movedim(axis, -1) * rising[..., -1:]
        found = torch.searchsorted(rising.contiguous(), sought.contiguous(), right=True)
        return found.clamp(max=z.shape[axis] - 1).movedim(-1, axis)

    if logits.numel() <= CHUNK or _composing(logits):
        return classes(logits, level)
    out = torch.empty(shape, dtype=torch.long, device=logits.device)
    for where in tokens.parts(CHUNK):
        out[where] = classes(logits[where], level[where])
    return out


def _diagonal(entries: Tensor) -> TensorMap:
    return lambda u: (entries * u.to(entries.dtype)).to(u.dtype)


def _outer(weights: Tensor, slopes: list[Tensor]) -> TensorMap:
    """The mean over slopes g of Σ (√w g)(√w g)ᵀ, with one summand for each entry of axis 0."""
    shape = slopes[0].shape
    roots = torch.stack([(weights.sqrt() * g).reshape(*shape[:1] or (1,), -1) for g in slopes])

    def product(u: Tensor) -> Tensor:
        along = torch.einsum("snk,nk->sn", roots, u.to(roots.dtype).reshape(roots.shape[1:]))
        return (torch.einsum("snk,sn->nk", roots, along) / len(slopes)).reshape(shape).to(u.dtype)

    return product


def _differentiated(criterion: Criterion, outputs: Tree, targets: Any) -> Map:
    refs, rebuild = tree.flatten(outputs)

    def slope(leaves: list[Tensor]) -> list[Tensor]:
        return list(torch.func.grad(lambda leaves: scalar(judged(criterion, rebuild(leaves), targets)))(leaves))

    def forward(u: list[Tensor]) -> list[Tensor]:
        return list(torch.func.jvp(slope, (refs,), (u,))[1])

    def reverse(u: list[Tensor]) -> list[Tensor]:
        pull: Any = torch.func.vjp(slope, refs)[1]
        return list(pull(u)[0])

    def product(u: Tree) -> Tree:
        flat = tree.leaves(u)
        if torch.compiler.is_compiling():
            with Traceable():
                return rebuild(reverse(flat))
        with mended():
            try:
                return rebuild(forward(flat))
            except RuntimeError:  # no forward formula; what else is wrong will be so in reverse
                return rebuild(reverse(flat))

    return product
