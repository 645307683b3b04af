"""Alarms about a training run: named rules, pure functions of its history, with thresholds that can be set.

A rule takes a `History` and returns an `Alert` about its latest entry, or None. Thresholds are keyword arguments:
`functools.partial(stability, ratio=0.5)` is a rule too, and so is any function of yours. What they need and do not
find makes them silent: without λ₁ no `stability`, without losses no `jump` of the loss.

What values prove. The largest Ritz value of any block is at most the largest eigenvalue (Rayleigh and Ritz: Parlett,
The Symmetric Eigenvalue Problem, section 10.2). So what even a glance finds above a threshold is above it, and is
called "one-sided"; that a value lies below, or fell, only a certified look can say. Rules compare with certified looks
alone, for a glance that lags behind would make the next look seem a jump.
"""

from __future__ import annotations

import math
from functools import partial
from operator import attrgetter
from typing import Literal

from torch.optim import SGD, Adagrad, Adam, NAdam, Optimizer, RAdam, RMSprop

from eigenfunc.errors import InputError
from eigenfunc.records import Alert, Certainty, History, Record, Rule

_CONSISTENT = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


def stability_limit(rate: float, momentum: float = 0.0, *, dampening: float = 0.0, nesterov: bool = False) -> float:
    """The largest eigenvalue of a quadratic on which a method with step size η = `rate` does not diverge.

    Gradient descent 2/η; heavy ball (2 + 2β)/η; with the gradient weighed by 1 − τ, τ = `dampening`, that over 1 − τ:
    Adam, on its preconditioned matrix, has τ = β₁, so (2 + 2β₁)/((1 − β₁)η), 38/η for β₁ = 0.9; Nesterov's momentum
    that over 1 + 2β. (J. Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability,
    ICLR 2021, appendix B; the same, Adaptive gradient methods at the edge of stability, 2022.) Infinite for
    a rate of 0.

    Raises `InputError` for a rate below 0, and momentum or dampening outside of [0, 1).
    """
    if not (rate >= 0 and 0 <= momentum < 1 and 0 <= dampening < 1):
        raise InputError(
            f"rate {rate}, momentum {momentum}, dampening {dampening}: need rate ≥ 0, the others in [0, 1)"
        )
    speed = rate * (1 - dampening) * (1 + 2 * momentum if nesterov else 1)
    return (2 + 2 * momentum) / speed if speed > 0 else math.inf


def is_adaptive(optimizer: Optimizer) -> bool:
    """Whether it divides its steps by a diagonal, so that the preconditioned matrix decides."""
    return isinstance(optimizer, (Adam, NAdam, RAdam, RMSprop, Adagrad))


def optimizer_limit(optimizer: Optimizer, rate: float | None = None) -> tuple[float, float | None]:
    """A learning rate, default the largest of its groups now, and the `stability_limit` there, None if not known.

    Known are torch's SGD (momentum, dampening, Nesterov; L2 weight decay adds to each eigenvalue and is taken off),
    Adam, AdamW and RAdam, RMSprop and Adagrad (both of those on the preconditioned matrix too).
    """
    group = max(optimizer.param_groups, key=lambda g: float(g["lr"]))
    rate = float(group["lr"]) if rate is None else rate
    if isinstance(optimizer, SGD):
        dampening = group["dampening"] if group["momentum"] else 0.0
        limit = stability_limit(rate, group["momentum"], dampening=dampening, nesterov=group["nesterov"])
        return rate, limit - float(group["weight_decay"])
    if isinstance(optimizer, (Adam, RAdam)):
        beta = float(group["betas"][0])
        return rate, stability_limit(rate, beta, dampening=beta)
    if isinstance(optimizer, RMSprop):
        return rate, stability_limit(rate, float(group["momentum"]))
    return rate, stability_limit(rate) if isinstance(optimizer, Adagrad) else None


def stability(history: History, *, ratio: float = 1.0) -> Alert | None:
    """The last λ₁ over the stability limit of the current rate exceeds `ratio`: the largest since a certified look.

    It is asked at every training step, so a jump of the rate fires at once, before the step is taken. At 1 a quadratic
    would diverge. Training at the edge of stability (full batch, mean squared error) hovers there for long and thrives;
    momentum can blow up from about 0.2 on if the rate jumps, for the velocity of before overshoots: `overshoot` sees
    that. docs/science.md says what each catches, and at what price in false alarms.
    """
    now = next((x for x in reversed(history.observations) if x.limit is not None), None)
    seen = _highest(history)
    if seen is None or seen.top is None or now is None or now.limit is None:
        return None
    value, threshold = seen.top[0], ratio * now.limit
    if not value > threshold:
        return None
    rate = "" if now.rate is None else f" of the rate {now.rate:g}"
    text = f"{_words(seen, 'λ₁', *seen.top)} is {value / now.limit:.3g} × the stability limit {now.limit:.4g}{rate}"
    return Alert("stability", history.now, text, value, threshold, _certainty(seen))


def overshoot(history: History, *, share: float = 0.2, window: int = 10) -> Alert | None:
    """The curvature along the step to come could raise the loss by more than `share` of it.

    By ½ λ₁‖Δ‖² at most, for the step Δ that the optimiser is about to take at the rate of now (`stride`) and a loss
    that is quadratic along it; λ₁ as in `stability`, and for Adam both in the metric of its preconditioner. That of a
    healthy step is small beside the loss: what the slope gains is worth more than the curvature takes, even at the edge
    of stability. It needs no limit, so it sees momentum and Adam stumble where λ₁ is far below theirs, but it is no
    proof: Δ may lie across the top eigenvectors.

    share   docs/science.md says what it catches, and at what price in false alarms
    window  losses, the median of which counts: those of small batches scatter

    Silent where losses are not above 0: it is for those whose least value is 0.
    """
    now = history.observations[-1] if history.observations else None
    seen = _highest(history)
    if seen is None or seen.top is None or now is None or now.stride is None or now.rate is None:
        return None
    losses = sorted(x.loss for x in history.observations[-window:] if x.loss is not None and math.isfinite(x.loss))
    if not losses or losses[0] <= 0:
        return None
    length, middle = now.rate * now.stride, _middle(losses)
    value, threshold = seen.top[0] * length * length / 2, share * middle
    if not value > threshold:
        return None
    text = (
        f"the step to come, of length {length:.3g} at the rate {now.rate:g}, may raise the loss by ½ λ₁‖Δ‖² = "
        f"{value:.3g}, {value / middle:.3g} × the median {middle:.3g} of the last; {_words(seen, 'λ₁', *seen.top)}"
    )
    return Alert("overshoot", history.now, text, value, threshold, _certainty(seen))


def jump(
    history: History,
    *,
    of: Literal["λ₁", "loss", "grad_norm"] = "λ₁",
    threshold: float = 6.0,
    window: int = 20,
    least: int = 5,
    floor: float = 0.05,
) -> Alert | None:
    """A rise out of the ordinary: a robust z-score, (x − median)/(1.4826 · MAD) of the values before, over `threshold`.

    Scores are of logarithms where all values are positive, for what multiplies; of the values themselves elsewhere.

    threshold  normal noise passes 6 once in 10⁹ values; mini-batches have heavier tails, and a steady rise adds 1.3
    window     values before that count: short ones forget trends, long ones are less noisy
    least      fewer values make no judgement
    floor      the scale is at least this (as a share of the median: 0.05 is 5%), so that quiet times do not make
               alarms of nothing

    (MAD is the median absolute deviation: B. Iglewicz and D. Hoaglin, How to detect and handle outliers, 1993, who
    suggest 3.5 for single tests.)
    """
    if of == "λ₁":
        before, last = _split(history, "top")
        if last is None or last.top is None:
            return None
        past = [r.top[0] for r in before if r.certified and r.top is not None and r.matrix == last.matrix][-window:]
        value, certainty, words, where = last.top[0], _certainty(last), _words(last, of, *last.top), "certified looks"
    else:
        now = getattr(history.observations[-1], of) if history.observations else None
        if now is None or not math.isfinite(now):
            return None
        known = map(attrgetter(of), history.observations[-window - 1 : -1])
        past = [x for x in known if x is not None and math.isfinite(x)]
        value, certainty, words, where = now, "observed", f"{of} = {now:.4g}", "steps"
    if len(past) < least:
        return None
    past.sort()
    ratios = past[0] > 0 and value > 0
    middle = _middle(past)
    rise = math.log(value / middle) if ratios else value - middle
    scale = floor if ratios else floor * abs(middle)
    if rise > threshold * scale:
        away = sorted(abs(math.log(x / middle) if ratios else x - middle) for x in past)
        scale = max(_CONSISTENT * _middle(away), scale)
    if not rise > threshold * scale:
        return None
    score = rise / scale if scale > 0 else math.inf
    text = f"{words} is {score:.3g} robust deviations above the median {middle:.4g} of {len(past)} {where}"
    held = middle * math.exp(threshold * scale) if ratios else middle + threshold * scale
    return Alert(f"jump of {of}", history.now, text, value, held, certainty)


def negative_curvature(
    history: History, *, factor: float = 2.0, share: float = 0.1, window: int = 10, least: int = 3
) -> Alert | None:
    """The smallest eigenvalue is negative and growing in size: needs `which` "SA", "BE" or "LM".

    factor  its size is over this many times the median of the `window` certified looks before (`least` at least)
    share   and over this share of the largest eigenvalue, where that is known: below it, negative values are the usual
            edge of the bulk
    """
    before, last = _split(history, "bottom")
    if last is None or last.bottom is None:
        return None
    past = [max(-r.bottom[0], 0.0) for r in before if r.certified and r.bottom is not None and r.matrix == last.matrix]
    past = past[-window:]
    if len(past) < least:
        return None
    top = max(last.top[0], 0.0) if last.top is not None else 0.0
    middle = _middle(sorted(past))
    threshold = -max(factor * middle, share * top)
    value = last.bottom[0]
    if not value < threshold:
        return None
    words = _words(last, "the smallest eigenvalue", *last.bottom)
    text = f"{words}, the median of {len(past)} looks before {-middle:.4g}"
    return Alert("negative curvature", history.now, text, value, threshold, _certainty(last))


def non_finite(history: History) -> Alert | None:
    """NaN or infinity in the loss, the gradient norm, the parameters or a product with the matrix."""
    step = history.now
    for x in history.observations[-1:]:
        for name, value in (("loss", x.loss), ("gradient norm", x.grad_norm)):
            if value is not None and not math.isfinite(value):
                return Alert("non-finite", step, f"the {name} of step {x.step} is {value}", value, math.inf, "observed")
    for record in history.records[-1:]:
        if not record.finite:
            text = f"at step {record.step}: {record.status}"
            return Alert("non-finite", step, text, math.nan, math.inf, "observed")
    return None


def repeated_batch(history: History, *, times: int = 3) -> Alert | None:
    """The same batch, by its hash, `times` times in a row, after others: training on one batch alone is quiet."""
    hashes = [x.batch for x in history.observations if x.batch is not None]
    last = hashes[-times:]
    if len(last) < times or len(set(last)) > 1 or set(hashes) == set(last):
        return None
    text = f"the last {times} batches are the same"
    return Alert("repeated batch", history.now, text, float(times), float(times), "observed")


RULES: tuple[Rule, ...] = (
    stability,
    overshoot,
    # 3.3 times at least: after a change of the rate λ₁ settles elsewhere, and no harm is done
    partial(jump, floor=0.2),
    partial(jump, of="loss", window=50, least=20),
    partial(jump, of="grad_norm", window=50, least=20),
    negative_curvature,
    non_finite,
    repeated_batch,
)


def _highest(history: History) -> Record | None:
    """The record with the largest λ₁ since the last certified look, and with it."""
    seen: Record | None = None
    for record in reversed(history.records):
        if record.top is not None and (seen is None or seen.top is None or record.top > seen.top):
            seen = record
        if record.certified:
            break
    return seen


def _split(history: History, end: Literal["top", "bottom"]) -> tuple[list[Record], Record | None]:
    """The last record, if it is new and holds that end of the spectrum, and those before it that do."""
    known = [record for record in history.records if getattr(record, end) is not None]
    if not known or known[-1] is not history.records[-1] or known[-1].step != history.now:
        return [], None  # it was judged when it was new
    return known[:-1], known[-1]


def _middle(rising: list[float]) -> float:
    """The median."""
    half, odd = divmod(len(rising), 2)
    return rising[half] if odd else (rising[half - 1] + rising[half]) / 2


def _certainty(record: Record) -> Certainty:
    return "certified" if record.certified else "one-sided"


def _words(record: Record, name: str, value: float, bound: float) -> str:
    if record.certified:
        return f"{name} = {value:.4g} ± {bound:.1g} (look at step {record.step})"
    side = "≥" if name == "λ₁" else "≤"
    return f"{name} {side} {value:.4g} ({record.kind} at step {record.step})"
