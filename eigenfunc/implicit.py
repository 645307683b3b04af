"""Eigenpairs of a Hessian as differentiable functions of the parameters and of the batch.

The pairs come from Lanczos on detached tensors; their derivatives come from the equation that defines them and not
from the iterations, so they cost a few products and no graph of the steps: see `eigenfunc.perturbation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenfunc import scope, tree
from eigenfunc.curvature.products import Loss
from eigenfunc.errors import InputError, TransformError
from eigenfunc.krylov import basis as vectors
from eigenfunc.krylov.lanczos import absorb, init, step
from eigenfunc.krylov.span import weighted
from eigenfunc.perturbation import Leaves, Problem, Stack, over, values_at, vectors_at
from eigenfunc.solution import EigenPairs
from eigenfunc.tree import Tree


def top_eigenpairs(
    loss: Loss, params: Tree, batch: Any, *, k: int, num_steps: int, v0: Tree, num_trips: int | None = None
) -> EigenPairs:
    """The k largest eigenvalues of the Hessian of `loss(params, batch)`, with vectors that can be differentiated.

    values     (k,) float64, falling
    vectors    (k, *leaf), orthonormal; of either sign
    residuals  (k,) float64, ‖H v − λ v‖ from fresh products, without derivatives: whether `num_steps` were enough

    Pure: no host read, no branch on values. Under vmap (over stacked models, over samples, over `v0`), and
    differentiable in every floating-point tensor of `params` and `batch`: once by grad, jvp, jacrev, twice by
    grad∘grad, jvp∘grad and grad∘jvp. The derivatives are those of the exact pairs, so they are as good as the pairs
    are. What the loss closes over is constant to `backward()`, and refused to torch.func: pass it in the batch.

    `num_steps` Lanczos steps start from `v0`, a vector shaped as `params`. A stack of b vectors makes it block
    Lanczos, which alone finds an eigenvalue of multiplicity up to b as often as it occurs. A pair that the Krylov
    space does not hold is NaN. `num_trips` steps of conjugate gradients (default: 2 `num_steps`) apply the resolvent,
    which only derivatives of vectors and second derivatives need.

    The third derivatives of the loss that this takes are torch's own, except where they are known to be wrong or
    missing (layer and batch norms, determinants, `solve`, …): elementary operations stand in there.

    Under `torch.compile(fullgraph=True)` without derivatives; `sharpness` has first ones there, and none of the pairs
    has a second.

    Within a cluster vectors are not functions of the matrix. Pairs closer than rounding can tell are left out of each
    other's derivative: that of a sum over the whole cluster (of values, or of v vᵀ) is right, that of a single vector
    is the part that leaves the cluster. So take k such that no cluster is cut: derivatives of its vectors are NaN.

    Raises `TreeError` where `v0` does not match, `InputError` for counts out of range, `TransformError` where the loss
    closes over a tensor that torch.func differentiates by, inside two nested jvp, where torch would drop a tangent
    (take grad∘jvp or jvp∘grad), and for what has no derivative under torch.compile, whose own error then names it.
    """
    _check(params, k, num_steps, v0)
    problem, theta = over(loss, params, batch, num_trips or 2 * num_steps)
    _check_derivatives(theta, 0)
    fixed = _detached(theta)
    found = _solve(problem, fixed, v0, k, num_steps)
    image = _constant(problem.products(fixed, found.vectors))
    residuals = tree.norms(tree.sub(image, weighted(found.values, found.vectors)))
    values = values_at(problem, found.values, found.vectors, theta)
    rows = vectors_at(problem, found.values, found.vectors, theta)
    nan = torch.full_like(residuals, torch.nan)
    return EigenPairs(
        torch.where(found.held, values, nan), problem.rebuild(rows), torch.where(found.held, residuals, nan)
    )


def sharpness(
    loss: Loss, params: Tree, batch: Any, *, num_steps: int, v0: Tree, num_trips: int | None = None
) -> Tensor:
    """The largest eigenvalue () float64 of the Hessian of `loss(params, batch)`: see `top_eigenpairs`.

    Its gradient differentiates the loss once more, in the time of two to four products, in memory that does not
    depend on `num_steps`. For a multiple eigenvalue it is ⟨v, dH v⟩ with the v that was found, one of many
    subgradients.

    Under `torch.compile(fullgraph=True)` too, with first derivatives, by the batch and by what the loss closes over
    as well; second ones raise `TransformError`, or come out as NaN where they are asked for by `backward()`.
    """
    _check(params, 1, num_steps, v0)
    problem, theta = over(loss, params, batch, num_trips or 2 * num_steps)
    _check_derivatives(theta, 1)
    found = _solve(problem, [x.detach() for x in theta], v0, 1, num_steps)
    values = values_at(problem, found.values, found.vectors, theta)
    return torch.where(found.held[0], values[0], torch.nan)


def _check(params: Tree, k: int, num_steps: int, v0: Tree) -> None:
    tree.check_vector_space(params, "params")
    tree.check_like(v0, params, "v0", stacked=_stacked(v0, params))
    width = tree.leaves(v0)[0].shape[0] if _stacked(v0, params) else 1
    if num_steps < 1 or not 1 <= k <= min(tree.size(params), num_steps * width):
        raise InputError(
            f"k={k} pairs from num_steps={num_steps} steps of width {width} for {tree.size(params)} parameters: k lies "
            "between 1 and the smaller of steps times width and the number of parameters"
        )


def _check_derivatives(theta: Leaves, order: int) -> None:
    """Refuse what torch drops in silence: the outer of two jvp, and under the compiler derivatives beyond `order`."""
    if scope.jvp_levels() > 1:
        raise TransformError(
            "eigenpairs inside two nested torch.func.jvp (or jacfwd): torch drops the outer tangent there without a "
            "word; take grad(jvp(...)) or jvp(grad(...)) for second derivatives"
        )
    if not torch.compiler.is_compiling():
        return
    tracked = order == 0 and torch.is_grad_enabled() and any(x.requires_grad for x in theta)
    if tracked or scope.derivative_levels() > order:
        raise TransformError(
            "under torch.compile sharpness can be differentiated once, and eigenpairs cannot: detach what requires "
            "grad, or leave the derivative out of what is compiled"
        )


def _stacked(v0: Tree, params: Tree) -> bool:
    ours, theirs = tree.leaves(v0), tree.leaves(params)
    return len(ours) > 0 and isinstance(ours[0], Tensor) and ours[0].ndim == theirs[0].ndim + 1


class _Found(NamedTuple):
    values: Tensor  # (k,)
    vectors: Stack  # (k, *leaf)
    held: Tensor  # (k,) bool: False where the Krylov space ran out


def _solve(problem: Problem, theta: Leaves, v0: Tree, k: int, num_steps: int) -> _Found:
    """The k largest Ritz pairs of block Lanczos. The first product shows whether the loss closes over what is being
    differentiated; the steps after it take place below the transforms, where operations cost less."""
    start: Stack = [leaf.detach() for leaf in tree.leaves(v0)]
    if start[0].ndim == theta[0].ndim:
        start = tree.lifted(start)
    lengths = tree.norms(start)
    q, _, first = vectors.independent(start, 10 * tree.coarsest_eps(start) * lengths)
    image = _constant(problem.products(theta, q))
    m = len(q)

    def steps(inputs: Leaves) -> tuple[Tensor, ...]:
        first, q, image, theta = (
            inputs[0],
            list(inputs[1 : 1 + m]),
            list(inputs[1 + m : 1 + 2 * m]),
            inputs[1 + 2 * m :],
        )
        values, rows, held = _iterate(problem, theta, q, image, first, k, num_steps)
        return values, held, *rows

    inputs = first, *q, *image, *theta
    apply: Any = _Settled.apply
    values, held, *rows = steps(inputs) if torch.compiler.is_compiling() else apply(steps, *inputs)
    return _Found(values, list(rows), held)  # which the compiler of torch 2.11 has as a tuple


def _iterate(problem: Problem, theta: Leaves, q: Stack, image: Stack, first: Tensor, k: int, num_steps: int) -> _Found:
    """From the first block q, its image, and which of its rows count. The rows after a breakdown come last, below the
    spectrum."""
    b = first.shape[0]
    size = b * num_steps
    state = absorb(init(q, image, size + b), image, 0, b)
    state = state._replace(alive=torch.cat([first, state.alive[b:]]))
    for j in range(b, size, b):
        state = step(state, lambda rows: _detached(problem.products(theta, rows)), j, b, b)
    alive = state.alive[:size] > 0
    t = (state.t[:size, :size] + state.t[:size, :size].mT) / 2
    below = -4 * torch.linalg.matrix_norm(t) - 1
    values, s = torch.linalg.eigh(torch.where(alive[:, None] & alive[None, :], t, torch.diag_embed(below.expand(size))))
    values, s = values.flip(0)[:k], s.flip(1)[:, :k]
    rows: Stack = tree.combine(s.mT, tree.rows(state.basis, 0, size))
    return _Found(values, rows, values > below / 2)


def _detached(leaves: Leaves) -> Stack:
    return [leaf.detach() for leaf in leaves]


class _Settled(torch.autograd.Function):
    """Steps on constants, which no derivative follows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(steps: Callable[[Leaves], tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        return steps(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)


class _Constant(torch.autograd.Function):
    """The identity, which refuses a tangent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*image: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf.clone() for leaf in image)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        return

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, ...]:
        return slopes

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        raise TransformError(_CLOSED)


_CLOSED = (
    "the loss closes over a tensor that is being differentiated by, and the derivative of an eigenpair would miss it: "
    "hand it to the loss in its batch, or detach it if it is meant as a constant"
)


def _constant(image: Stack) -> Stack:
    """The image of detached tensors, detached; `TransformError` if torch.func follows it all the same."""
    if torch.compiler.is_compiling():
        return _detached(image)
    functorch: Any = torch._C._functorch
    for leaf in image:
        inner = leaf
        while functorch.is_functorch_wrapped_tensor(inner):
            if functorch.is_gradtrackingtensor(inner) and inner.requires_grad:
                raise TransformError(_CLOSED)
            inner = functorch.get_unwrapped(inner)
    apply: Any = _Constant.apply
    return _detached(apply(*image))
