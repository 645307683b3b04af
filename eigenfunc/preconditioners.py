"""What optimisers keep: the diagonal by which an adaptive one divides its steps, and how long its next step is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, NAdam, Optimizer, RAdam, RMSprop

from eigenfunc import tree
from eigenfunc.errors import InputError
from eigenfunc.tree import Tree

State = Mapping[str, Any]
Group = Mapping[str, Any]
Key = tuple[int, tuple[int, ...], tuple[int, ...]]

_NEITHER: tuple[None, Group] = (None, {})


def adam_preconditioner(optimizer: Optimizer, params: Tree) -> Tree:
    """d = √v̂ + ε after the optimiser's last step, shaped as `params`, for `A.precondition(d)`.

    optimizer  torch's Adam, AdamW or NAdam (v̂ corrected for its bias; with amsgrad its maximum), RAdam (divided by
               its rectification; 1 in its first steps, which do not adapt), RMSprop (centred too), Adagrad (the
               square root of its sum). The learning rate is not part of d
    params     the parameters to look at, from `functional_loss` say: they are found in the optimiser by the memory
               they share with its own or, where it was made from named parameters, by their names

    Full-batch Adam with momentum β₁ hovers where the largest eigenvalue of D⁻¹H is (2 + 2β₁) / ((1 − β₁) η), 38/η for
    β₁ = 0.9 (J. Cohen et al., Adaptive gradient methods at the edge of stability, 2022). Entries are at least float32;
    they are 0, which no preconditioner takes, where v̂ and ε are.

    Raises `InputError` for another optimiser, parameters that it does not hold, and before its first step.
    """
    diagonal = next((f for kind, f in _DIAGONALS.items() if isinstance(optimizer, kind)), None)
    if diagonal is None:
        known = ", ".join(kind.__name__ for kind in _DIAGONALS)
        raise InputError(
            f"adam_preconditioner reads the state of {known} and their subclasses, not of {type(optimizer).__name__}; "
            "make d, a tree of positive tensors shaped as the parameters, yourself"
        )
    tree.check_vector_space(params, "params")
    held = _held(optimizer)
    flat, rebuild = tree.flatten(params)
    found = []
    for name, leaf in zip(tree.names(params), flat, strict=True):
        p, settings = held.get(_key(leaf)) or held.get(name) or _NEITHER
        if p is None or p.shape != leaf.shape:
            raise InputError(
                f"parameter '{name}' is not one of the optimiser's: it shares its memory with none of them. Pass the "
                "params of functional_loss(model) for the model that is trained, not for a copy; for a copy take d "
                "from dict(model.named_parameters()), by the same names, and cast it"
            )
        state = optimizer.state.get(p, {})
        if not state or float(state["step"]) == 0:
            raise InputError(
                f"the optimiser has no second moment of parameter '{name}' yet: take a step first, and leave out "
                "(select= of functional_loss) what gets no gradient"
            )
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        found.append(diagonal(state, settings).to(dtype=dtype, device=leaf.device))
    return rebuild(found)


def stride(optimizer: Optimizer, params: Tree) -> float | None:
    """Length of the optimiser's next step on `params`, per unit of its largest rate; None where that is not known.

    With the gradients that the parameters hold now; without them, of the last step once more, which only SGD with
    momentum and Adam remember. Known for SGD with all its options, Adam, AdamW and RAdam (v̂ of the last step), RMSprop
    without momentum and Adagrad without decay of its rate. The length of a step Δ is √(Δᵀ D Δ), D the diagonal of
    `adam_preconditioner`, or 1 for SGD: by Rayleigh's quotient ½ λ₁ times its square, λ₁ of the matrix that D
    preconditions, is the most by which the curvature along Δ can raise a quadratic loss.

    None for another optimiser or parameters that it does not hold, and before a gradient, or Adam's first step.
    """
    rate = max(float(group["lr"]) for group in optimizer.param_groups)
    rule = next((f for kind, f in _STEPS.items() if isinstance(optimizer, kind)), None)
    if rule is None or not 0 < rate < math.inf:
        return None
    held, parts = _held(optimizer), []
    for name, leaf in zip(tree.names(params), tree.leaves(params), strict=True):
        p, group = held.get(_key(leaf)) or held.get(name) or _NEITHER
        if p is None:
            return None
        state, sign = optimizer.state.get(p, {}), -1.0 if group.get("maximize") else 1.0
        g = None if p.grad is None else sign * p.grad.detach().to(torch.promote_types(p.dtype, torch.float32))
        if g is None and not state:
            continue  # it gets no gradient, and no step
        if g is not None and not group.get("decoupled_weight_decay"):
            g = g + float(group["weight_decay"]) * p.detach()
        step = rule(p.detach(), g, state, group)
        if step is None:
            return None
        parts.append(step * (float(group["lr"]) / rate))
    length = float(tree.norm(parts)) if parts else math.nan
    return length if math.isfinite(length) else None


def _sgd_step(_: Tensor, g: Tensor | None, state: State, group: Group) -> Tensor | None:
    beta, last = float(group["momentum"]), cast("Tensor | None", state.get("momentum_buffer"))
    if g is None or beta == 0:
        return last if g is None else g
    velocity: Tensor = g if last is None else beta * last + (1 - float(group["dampening"])) * g
    return g + beta * velocity if group["nesterov"] else velocity


def _adam_step(p: Tensor, g: Tensor | None, state: State, group: Group) -> Tensor | None:
    if not state:
        return None
    kind = _adam if "amsgrad" in group else _radam
    beta, count, d = float(group["betas"][0]), float(state["step"]) + (g is not None), kind(state, group)
    mean = state["exp_avg"] if g is None else beta * state["exp_avg"] + (1 - beta) * g
    step: Tensor = mean / (1 - beta**count) / d
    if group.get("decoupled_weight_decay"):
        step = step + float(group["weight_decay"]) * p
    return step * d.sqrt()


def _plain_step(_: Tensor, g: Tensor | None, state: State, group: Group) -> Tensor | None:
    """Of a gradient over the diagonal, without a memory of gradients."""
    if g is None or not state or float(state["step"]) == 0 or group.get("momentum") or group.get("lr_decay"):
        return None
    return g / (_rmsprop if "square_avg" in state else _adagrad)(state, group).sqrt()


def _held(optimizer: Optimizer) -> dict[Key | str, tuple[Tensor, Group]]:
    """Its parameters with their groups, by memory and, where it has them, by name."""
    held: dict[Key | str, tuple[Tensor, Group]] = {}
    for group in optimizer.param_groups:
        for p, name in zip(group["params"], group.get("param_names") or [None] * len(group["params"]), strict=True):
            held[_key(p)] = p, group
            if name is not None:
                held[name] = p, group
    return held


def _key(p: Tensor) -> Key:
    return p.data_ptr(), tuple(p.shape), p.stride()


def _adam(state: State, group: Group) -> Tensor:
    v: Tensor = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return torch.sqrt(v.double() / _correction(state, group)) + float(group["eps"])


def _correction(state: State, group: Group) -> float:
    return 1 - math.pow(group["betas"][1], state["step"])


def _radam(state: State, group: Group) -> Tensor:
    """L. Liu et al., On the variance of the adaptive learning rate and beyond, ICLR 2020."""
    v: Tensor = state["exp_avg_sq"].double()
    t, beta = float(state["step"]), float(group["betas"][1])
    correction = _correction(state, group)
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * t * beta**t / correction
    if length <= 5:
        return torch.ones_like(v)
    shares = [(n - 4) * (n - 2) / n for n in (length, longest)]
    return (torch.sqrt(v) + float(group["eps"])) / math.sqrt(correction * shares[0] / shares[1])


def _rmsprop(state: State, group: Group) -> Tensor:
    v: Tensor = state["square_avg"].double()
    if group["centered"]:
        v = (v - state["grad_avg"].double() ** 2).clamp_min(0)
    return torch.sqrt(v) + float(group["eps"])


def _adagrad(state: State, group: Group) -> Tensor:
    total: Tensor = state["sum"].double()
    return torch.sqrt(total) + float(group["eps"])


_DIAGONALS: dict[type[Optimizer], Callable[[State, Group], Tensor]] = {
    Adam: _adam,  # and AdamW
    NAdam: _adam,
    RAdam: _radam,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
}
_STEPS: dict[type[Optimizer], Callable[[Tensor, Tensor | None, State, Group], Tensor | None]] = {
    SGD: _sgd_step,
    Adam: _adam_step,  # and AdamW
    RAdam: _adam_step,
    RMSprop: _plain_step,
    Adagrad: _plain_step,
}
