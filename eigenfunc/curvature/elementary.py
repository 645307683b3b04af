"""Formulas in elementary operations for functions whose fused kernels cannot be differentiated twice, or wrongly.

Each takes the arguments of the function it stands for, as far as it knows them: `SWAPS` maps one to the other, and a
call with other arguments is left alone. Where a formula would be wrong, it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eigenfunc.errors import ObjectiveError

_NEVER = -1e30  # log of a probability of zero that does not turn gradients into NaN


def _reduced(x: Tensor, reduction: str) -> Tensor:
    return x.mean() if reduction == "mean" else x.sum() if reduction == "sum" else x


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return _reduced((input - target) ** 2, reduction)


def huber_loss(input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0) -> Tensor:
    error = input - target
    size = error.abs()
    return _reduced(torch.where(size <= delta, error**2 / 2, delta * (size - delta / 2)), reduction)


def soft_margin_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return _reduced(F.softplus(-target * input), reduction)


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    rows, labels = (input[None], target.reshape(1)) if input.ndim == 1 else (input, target)
    own = rows.gather(1, labels[:, None])
    excess = (margin - own + rows).clamp_min(0) ** p
    if weight is not None:
        excess = excess * weight[labels][:, None]
    others = torch.ones_like(rows, dtype=torch.bool).scatter(1, labels[:, None], False)
    losses = torch.where(others, excess, 0.0).sum(1) / rows.shape[1]
    return _reduced(losses if input.ndim > 1 else losses[0], reduction)


def multilabel_margin_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    rows, labels = (input[None], target[None]) if input.ndim == 1 else (input, target)
    named = (labels < 0).cumsum(1) == 0  # the labels before the first negative entry
    index = labels.clamp_min(0)
    positive = torch.zeros_like(rows, dtype=torch.long).scatter_add(1, index, named.long()) > 0
    excess = (1 - rows.gather(1, index)[:, :, None] + rows[:, None, :]).clamp_min(0)
    counted = named[:, :, None] & ~positive[:, None, :]
    losses = torch.where(counted, excess, 0.0).sum((1, 2)) / rows.shape[1]
    return _reduced(losses if input.ndim > 1 else losses[0], reduction)


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """The forward recursion of A. Graves et al., Connectionist Temporal Classification, ICML 2006."""
    single = log_probs.ndim == 2
    log_probs = log_probs[:, None] if single else log_probs
    steps, count, classes = log_probs.shape
    lengths = torch.as_tensor(target_lengths, device=log_probs.device).reshape(count)
    durations = torch.as_tensor(input_lengths, device=log_probs.device).reshape(count)
    rows = _padded(targets, lengths) if targets.ndim == 1 and not single else targets.reshape(count, -1)
    states = torch.full((count, 2 * rows.shape[1] + 1), blank, device=log_probs.device)
    states[:, 1::2] = rows.clamp(0, classes - 1)
    skips = torch.zeros_like(states, dtype=torch.bool)
    skips[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
    scores = log_probs.gather(2, states.expand(steps, -1, -1))
    order = torch.arange(states.shape[1], device=log_probs.device)
    alpha = torch.where((order < 2) & (order <= 2 * lengths[:, None]), scores[0], _NEVER)
    for t in range(1, steps):
        one = F.pad(alpha[:, :-1], (1, 0), value=_NEVER)
        two = torch.where(skips, F.pad(alpha, (2, 0), value=_NEVER)[:, : alpha.shape[1]], _NEVER)
        following = torch.logsumexp(torch.stack([alpha, one, two]), 0) + scores[t]
        alpha = torch.where(t < durations[:, None], following, alpha)
    ends = (order == 2 * lengths[:, None]) | (order == 2 * lengths[:, None] - 1)
    losses = -torch.logsumexp(torch.where(ends, alpha, _NEVER), 1)
    impossible = losses > -_NEVER / 2
    losses = torch.where(impossible, 0.0 if zero_infinity else float("inf"), losses)
    if reduction == "mean":
        losses = losses / lengths.clamp_min(1)
    return _reduced(losses[0] if single else losses, reduction)


def _padded(targets: Tensor, lengths: Tensor) -> Tensor:
    pieces = torch.split(targets, [int(n) for n in lengths])
    return torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return (input + 3).clamp(0, 6) / 6


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    difference = (x1[..., :, None, :] - x2[..., None, :, :]).abs()
    if p == float("inf"):
        return difference.amax(-1)
    if p == 0:
        return (difference > 0).to(x1.dtype).sum(-1)
    total = (difference**p).sum(-1)
    apart = total > 0
    return torch.where(apart, torch.where(apart, total, 1.0) ** (1 / p), 0.0)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    i, j = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return cdist(input, input, p)[i, j]


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """The padding row is a constant, as torch's gradient has it, for tangents too."""
    _refuse_rewriting(max_norm, scale_grad_by_freq)
    rows = F.embedding(input, weight)
    if padding_idx is None:
        return rows
    padding = (input == padding_idx % weight.shape[0])[..., None]
    return torch.where(padding, rows.detach(), rows)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    _refuse_rewriting(max_norm, scale_grad_by_freq)
    if offsets is None:
        count = input.shape[0]
        bag = torch.arange(count, device=input.device).repeat_interleave(input.shape[1])
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        count = len(starts)
        bag = torch.bucketize(torch.arange(len(input), device=input.device), starts, right=True) - 1
    entries = input.reshape(-1)
    counted = (
        torch.ones_like(entries, dtype=torch.bool) if padding_idx is None else entries != padding_idx % len(weight)
    )
    rows, bag = weight[entries[counted]], bag[counted]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1)[counted][:, None]
    if mode == "max":
        return _largest(rows, bag, count)
    total = rows.new_zeros(count, weight.shape[1]).index_add(0, bag, rows)
    if mode == "sum":
        return total
    return total / torch.bincount(bag, minlength=count).clamp_min(1)[:, None]


def _largest(rows: Tensor, bag: Tensor, count: int) -> Tensor:
    members = [rows[bag == i] for i in range(count)]
    firsts = [m.gather(0, m.argmax(0, keepdim=True))[0] if len(m) else rows.new_zeros(rows.shape[1]) for m in members]
    return torch.stack(firsts)


def _refuse_rewriting(max_norm: float | None, scale_grad_by_freq: bool) -> None:
    if max_norm is not None:
        raise ObjectiveError(
            "an embedding with max_norm rewrites its weights in the forward pass, so that the loss is no function of "
            "them; renormalise the weights once, then set max_norm=None"
        )
    if scale_grad_by_freq:
        raise ObjectiveError(
            "an embedding with scale_grad_by_freq=True has a gradient that is not the derivative of the loss, so "
            "there is no Hessian; set scale_grad_by_freq=False"
        )


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """The mask that eager mode draws, in the memory order of the input; torch.func draws it in another."""
    if not training or p == 0 or input.numel() == 0:
        return input
    if p == 1:
        return input * 0
    order = sorted(range(input.ndim), key=lambda axis: -input.stride()[axis])
    mask = torch.empty([input.shape[axis] for axis in order], dtype=input.dtype, device=input.device)
    mask = mask.permute([order.index(axis) for axis in range(input.ndim)])
    return input * mask.bernoulli_(1 - p).div_(1 - p)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The composite kernel, whatever backend the model asks for around the call."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return out


def lstm(*args: Any) -> Sequence[Tensor]:
    """oneDNN's LSTM has no forward AD; the plain kernels do."""
    switch: Any = torch._C
    before = switch._get_mkldnn_enabled()
    switch._set_mkldnn_enabled(False)
    try:
        out: Sequence[Tensor] = torch.lstm(*args)
    finally:
        switch._set_mkldnn_enabled(before)
    return out


SWAPS: dict[Any, Callable[..., Any]] = {
    F.mse_loss: mse_loss,
    F.huber_loss: huber_loss,
    F.soft_margin_loss: soft_margin_loss,
    F.multi_margin_loss: multi_margin_loss,
    F.multilabel_margin_loss: multilabel_margin_loss,
    F.ctc_loss: ctc_loss,
    F.hardsigmoid: hardsigmoid,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    F.dropout: dropout,
    F.scaled_dot_product_attention: attention,
    F.pdist: pdist,
    torch.cdist: cdist,
    torch.lstm: lstm,
    torch._weight_norm: weight_norm,
}
RANDOM = frozenset({F.dropout})
FORWARD = frozenset({F.mse_loss})  # what is wrong for tangents only, and in reverse takes less memory as it is
