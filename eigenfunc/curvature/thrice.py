"""Functions whose third and fourth derivatives torch gets wrong, or refuses, in elementary operations.

torch 2.13 differentiates these twice as it should, and from there on is off by anything between 4% and 600% (layer,
batch and instance norm, determinants, `solve`), or stops (norms, `std`, `glu`). Derivatives of eigenpairs need the
third derivative of a loss, and the fourth for their own second.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Dim = int | Sequence[int] | None


class Thrice(TorchFunctionMode):
    """Functions that fail when differentiated thrice, by the formulas of this module."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {name: value for name, value in (kwargs or {}).items() if value is not None}
        formula = THRICE.get(func)
        if formula is None or len(args) > _PLACES[func] or not set(named) <= _NAMES[func]:
            return func(*args, **(kwargs or {}))
        return formula(*args, **named)


def _standard(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    centred: Tensor = x - x.mean(tuple(dims), keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(tuple(dims), keepdim=True) + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _channels(v: Tensor, ndim: int) -> Tensor:
    return v.reshape(1, -1, *[1] * (ndim - 2))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _affine(_standard(input, range(-len(normalized_shape), 0), eps), weight, bias)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        out = _standard(input, [0, *range(2, input.ndim)], eps)
    else:
        mean, var = _channels(running_mean, input.ndim), _channels(running_var, input.ndim)
        out = (input - mean) * torch.rsqrt(var + eps)
    return _affine(out, *(None if v is None else _channels(v, input.ndim) for v in (weight, bias)))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    out = _standard(input, range(2, input.ndim), eps)
    return _affine(out, *(None if v is None else _channels(v, input.ndim) for v in (weight, bias)))


def glu(input: Tensor, dim: int = -1) -> Tensor:
    a, b = input.chunk(2, dim)
    return a * torch.sigmoid(b)


def _root(squares: Tensor) -> Tensor:
    """The square root with slope zero at zero."""
    return torch.where(squares > 0, torch.sqrt(torch.where(squares > 0, squares, 1.0)), 0.0)


def vector_norm(x: Tensor, ord: float = 2, dim: Dim = None, keepdim: bool = False) -> Tensor:
    if ord != 2 or x.is_complex():
        out: Tensor = torch.linalg.vector_norm(x, ord, dim, keepdim)
        return out
    dims = tuple(range(x.ndim)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    return _root((x * x).sum(dims, keepdim=keepdim))


def norm(input: Tensor, p: float | str = "fro", dim: Dim = None, keepdim: bool = False) -> Tensor:
    if p not in (2, "fro"):
        out: Tensor = torch.norm(input, p, dim, keepdim)
        return out
    return vector_norm(input, 2, dim, keepdim)


def normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Tensor:
    return input / norm(input, p, dim, True).clamp_min(eps)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    return (normalize(x1, 2, dim, eps) * normalize(x2, 2, dim, eps)).sum(dim)


def std(
    input: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: float | None = None
) -> Tensor:
    if isinstance(dim, bool):  # std(input, unbiased)
        dim, unbiased = None, dim
    return _root(torch.var(input, dim, correction=unbiased if correction is None else correction, keepdim=keepdim))


def solve(A: Tensor, B: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.inv(A)
    return inverse @ B if B.ndim > 1 else (inverse @ B[:, None])[..., 0]


def slogdet(A: Tensor) -> Any:
    sign = torch.linalg.slogdet(A.detach())[0]
    size = torch.diagonal(torch.linalg.qr(A)[1], dim1=-2, dim2=-1).abs().log().sum(-1)
    return torch.return_types.linalg_slogdet((sign, size))  # type: ignore[attr-defined]


def logdet(input: Tensor) -> Tensor:
    sign, size = slogdet(input)
    return torch.where(sign > 0, size, torch.nan)


def det(A: Tensor) -> Tensor:
    sign, size = slogdet(A)
    out: Tensor = sign * torch.exp(size)
    return out


THRICE: dict[Any, Callable[..., Any]] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.glu: glu,
    F.normalize: normalize,
    F.cosine_similarity: cosine_similarity,
    torch.cosine_similarity: cosine_similarity,
    torch.linalg.vector_norm: vector_norm,
    torch.norm: norm,
    Tensor.norm: norm,
    torch.std: std,
    Tensor.std: std,
    torch.linalg.solve: solve,
    torch.logdet: logdet,
    Tensor.logdet: logdet,
    torch.linalg.slogdet: slogdet,
    torch.slogdet: slogdet,
    Tensor.slogdet: slogdet,
    torch.linalg.det: det,
    torch.det: det,
    Tensor.det: det,
}

_NAMES = {func: frozenset(inspect.signature(formula).parameters) for func, formula in THRICE.items()}
_PLACES = {func: formula.__code__.co_argcount for func, formula in THRICE.items()}
