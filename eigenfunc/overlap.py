"""How much of a gradient lies in the span of eigenvectors, and how far two such spans are apart."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from eigenfunc import scope, tree
from eigenfunc.curvature import products
from eigenfunc.curvature.denominators import batches_of
from eigenfunc.curvature.mends import mended
from eigenfunc.curvature.products import Function, Loss
from eigenfunc.data import Reader, average
from eigenfunc.errors import DataError, InputError, TreeError
from eigenfunc.tree import Tree

_SLICE = 16_384  # entries of each vector that are held in float64 at a time
_ORTHONORMAL = 1e-3  # what inner products of basis vectors may be off by


def gradient(loss: Loss, params: Tree, data: Any) -> Tree:
    """The gradient of `loss(params, batch)` over `data`, in one pass; leaves of half precision in float32.

    loss, params, data  as for `hessian`: the weighted mean, or the sum, whatever the cut; zero for parameters that
                        the loss does not use

    No `.grad` is touched. Raises `ObjectiveError` where the loss cannot be differentiated, `DataError` where there is
    no batch or the gradient is not finite.
    """
    tree.check_vector_space(params, "params")
    device = tree.device(params)
    reader = Reader(batches_of(loss, data).on(device), device)
    refs, rebuild = tree.flatten(params)
    with scope.untouched(device), mended():
        leaves = [leaf.detach().requires_grad_() for leaf in map(scope.usable, refs)]
        parts = (
            (weight, partial(_slopes, products.of_leaves(loss, batch, params, reader.seed + index), leaves))
            for index, weight, batch in reader.one_pass()
        )
        found = average(parts, reader.batches.reduction)
    for name, leaf in zip(tree.names(params), found, strict=True):
        if not bool(torch.isfinite(leaf).all()):
            raise DataError(f"the gradient by '{name}' holds NaN or infinity: look for bad samples, or for an overflow")
    return rebuild(found)


def _slopes(f: Function, leaves: list[Tensor]) -> list[Tensor]:
    found = products.slopes(f(leaves), leaves)
    wide = [torch.promote_types(x.dtype, torch.float32) for x in leaves]
    return [
        torch.zeros_like(x, dtype=dtype, requires_grad=False) if slope is None else slope.detach().to(dtype)
        for x, slope, dtype in zip(leaves, found, wide, strict=True)
    ]


def gradient_shares(loss: Loss, params: Tree, data: Any, solution: Any) -> Tensor:
    """Share of the gradient in the span of the first 1, 2, …, k eigenvectors: ‖V Vᵀ g‖² / ‖g‖², (k,) float64, CPU.

    loss, params, data  as for `hessian`
    solution            a `Solution` or anything with orthonormal `vectors` (k, *leaf), shaped as `params`

    The shares rise; a random vector of size n has k/n in expectation. NaN where the gradient is zero. With the top
    eigenvectors of the Hessian of a classifier most of the gradient soon lies there (G. Gur-Ari, D. Roberts, E. Dyer,
    Gradient descent happens in a tiny subspace, 2018).

    Raises what `gradient` raises, `TreeError` where the vectors do not match `params`, `InputError` where they are not
    orthonormal.
    """
    vectors = _orthonormal(solution, "solution")
    tree.check_like(vectors, params, "solution.vectors", stacked=True)
    g = gradient(loss, params, data)
    inside = tree.exact_gram(vectors, tree.lifted(g))[:, 0] / tree.length(g)
    return torch.cumsum(inside**2, 0).cpu()


def gradient_overlap(loss: Loss, params: Tree, data: Any, solution: Any) -> Tensor:
    """Share () of the gradient in the span of all of `solution.vectors`: the last of `gradient_shares`."""
    return gradient_shares(loss, params, data, solution)[-1]


def subspace_overlap(a: Any, b: Any) -> Tensor:
    """‖V_aᵀ V_b‖²_F / k, () float64, CPU: 1 for the same span, or one inside the other, 0 for orthogonal ones.

    a, b  `Solution`s, or other things with orthonormal `vectors` (k, *leaf); or such stacks themselves. k is the
          smaller of the two numbers of vectors

    It is the mean of cos² of the principal angles. Two random spans have the larger number of vectors over n in
    expectation. Raises `TreeError` where the stacks do not match, `InputError` where they are not orthonormal.
    """
    large, small = _by_size(a, b)
    return ((tree.exact_gram(large, small) ** 2).sum() / _count(small)).cpu()


def principal_angles(a: Any, b: Any) -> Tensor:
    """The principal angles between two spans, rising, (k,) float64 in radians on the CPU; `a` and `b` as above.

    Angles below 45° come from their sines, the singular values of V_b − V_a V_aᵀ V_b, because a cosine near 1 holds
    no digit of an angle below 1e-8. (Å. Björck and G. Golub, Numerical methods for computing angles between linear
    subspaces, Math. Comp. 27, 1973.)
    """
    large, small = _by_size(a, b)
    inner = tree.exact_gram(large, small)
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    outside = tree.tree_map(lambda x, y: x.double() - _times(inner.mT, y), small, large)
    sines = torch.linalg.svdvals(_triangle(outside)).flip(0).clamp(max=1)
    return torch.where(cosines**2 > 0.5, torch.arcsin(sines), torch.arccos(cosines)).cpu()


def _times(c: Tensor, leaf: Tensor) -> Tensor:
    flat = c @ tree.matrix(leaf).double()
    return flat.reshape(flat.shape[:1] + leaf.shape[1:])


def _triangle(x: Tree) -> Tensor:
    """The factor R (k, k) or smaller of X = Q R for the columns of a stack x (k, *leaf), slice by slice, in float64."""
    r: Tensor | None = None
    for leaf in map(tree.matrix, tree.leaves(x)):
        for part in torch.split(leaf, _SLICE, dim=1):
            rows = part.double().mT
            r = torch.linalg.qr(rows if r is None else torch.cat([r, rows]), mode="r").R
    assert r is not None
    return r


def _by_size(a: Any, b: Any) -> tuple[Tree, Tree]:
    first, second = _orthonormal(a, "a"), _orthonormal(b, "b")
    tree.check_like(tree.rows(second, 0, 1), tree.rows(first, 0, 1), "b", dtypes=False)
    return (first, second) if _count(first) >= _count(second) else (second, first)


def _count(stack: Tree) -> int:
    count: int = tree.leaves(stack)[0].shape[0]
    return count


def _orthonormal(x: Any, what: str) -> Tree:
    """The stack of vectors of a solution, or x itself; `InputError` unless it is orthonormal."""
    vectors = getattr(x, "vectors", x)
    tree.check_vector_space(vectors, what)
    counts = {leaf.shape[0] if leaf.ndim else 0 for leaf in tree.leaves(vectors)}
    if len(counts) > 1 or counts == {0}:
        raise TreeError(f"{what} is no stack of vectors: the first axes of its leaves, {sorted(counts)}, count none")
    g = tree.exact_gram(vectors, vectors)
    off = float((g - torch.eye(len(g), dtype=g.dtype, device=g.device)).abs().max())
    if not off <= _ORTHONORMAL:
        raise InputError(f"the vectors of {what} are not orthonormal: their inner products are off by {off:.1e}")
    return vectors
