"""The cube as custom functions, differentiable in more ways and fewer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Cube(torch.autograd.Function):
    """Differentiable twice in reverse, without a formula for forward mode, in the form torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * slope


class CubeModern(torch.autograd.Function):
    """The same with setup_context, which torch.func takes where no vmap is asked."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    backward = staticmethod(Cube.backward)


class CubeOnce(Cube):
    """Forgets to be differentiable twice, and says so."""

    backward = staticmethod(torch.autograd.function.once_differentiable(Cube.backward))


class CubeAdjoint(Cube):
    """As solvers of adjoint equations do: the backward pass computes without a graph, and nothing says so."""

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        with torch.no_grad():
            return Cube.backward(ctx, slope)
