"""The ways to form a Hessian-vector product of one batch, and the proof that one of them is right.

A way takes a function of a list of tensors and the point, does its set-up, and returns the product on such lists.
Each has its own failures: fused kernels without forward AD, custom functions that differentiate once, in-place
buffers. So no way is trusted alone: `prove` accepts one when a second, different one agrees with it block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenfunc import scope, tree
from eigenfunc.curvature.mends import mended
from eigenfunc.errors import EigenfuncError, ObjectiveError, ProductError
from eigenfunc.tree import Tree

Loss = Callable[[Tree, Any], Tensor]
Function = Callable[[Sequence[Tensor]], Tensor]
Product = Callable[[Sequence[Tensor]], list[Tensor]]


def scalar(value: Any) -> Tensor:
    """The loss as a 0-dim tensor; `ObjectiveError` for anything that is not one real number."""
    if not isinstance(value, Tensor):
        raise ObjectiveError(f"the loss returned a {type(value).__name__}, not a tensor with one entry")
    if value.numel() != 1:
        raise ObjectiveError(
            f"the loss has shape {tuple(value.shape)}, not (); reduce it to one number, with .mean() say"
        )
    if not value.is_floating_point():
        raise ObjectiveError(f"the loss has dtype {value.dtype}, which cannot be differentiated")
    return value.reshape(())


def graph(f: Function, point: Sequence[Tensor]) -> Product:
    """Keep the graph of the gradient; a product is one pull-back through it, because H is symmetric.

    Fastest once the graph is there, at the price of keeping it. Parameters that the loss does not use have zero
    blocks. Only outside of transforms.
    """
    leaves = [leaf.detach().requires_grad_() for leaf in point]
    value = f(leaves)
    if not value.requires_grad:
        raise ObjectiveError(_INDEPENDENT)
    slopes = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    if all(slope is None for slope in slopes):
        raise ObjectiveError(_INDEPENDENT)
    live = [i for i, slope in enumerate(slopes) if slope is not None and slope.requires_grad]

    def product(v: Sequence[Tensor], batched: bool = False) -> list[Tensor]:
        if not live:
            return [torch.zeros_like(x) for x in v]
        pulled = torch.autograd.grad(
            [slopes[i] for i in live],
            leaves,
            [v[i] for i in live],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        return [torch.zeros_like(x) if out is None else out.detach() for x, out in zip(v, pulled, strict=True)]

    return product


_INDEPENDENT = (
    "the loss does not depend on any of the parameters: check that it is computed from the `params` it is given, "
    "without .detach(), .item() or NumPy on the way"
)


def vjp(f: Function, point: Sequence[Tensor]) -> Product:
    """`torch.func.vjp` of `grad`: the kept graph in functional form."""
    pull: Any = torch.func.vjp(torch.func.grad(f), list(point))[1]
    return lambda v: list(pull(list(v))[0])


def jvp(f: Function, point: Sequence[Tensor]) -> Product:
    """`torch.func.jvp` of `grad`, forward over reverse: least memory, and it composes with every transform."""
    slope = torch.func.grad(f)
    return lambda v: list(torch.func.jvp(slope, (list(point),), (list(v),))[1])


WAYS: dict[str, Callable[[Function, Sequence[Tensor]], Product]] = {"graph": graph, "jvp": jvp, "vjp": vjp}


def of_leaves(loss: Loss, batch: Any, params: Tree, seed: int | None = None) -> Function:
    """The loss as a function of the list of leaves of its parameters; with a seed its random operations repeat."""
    refs, rebuild = tree.flatten(params)

    def f(leaves: Sequence[Tensor]) -> Tensor:
        if seed is not None:
            scope.reseed(seed, refs[0].device)
        return scalar(loss(rebuild(list(leaves)), batch))

    return f


def hvp(loss: Loss, params: Tree, batch: Any, v: Tree) -> Tree:
    """Hessian of `loss(params, batch)` with respect to `params`, times `v`: `jvp` of `grad`.

    Pure, and composes with torch.func: under vmap over v, over params and v (stacked models), under grad and jvp.
    `v` is shaped as `params`, any pytree of real floating-point tensors. Raises `TreeError` where they do not
    match, `ObjectiveError` for a loss that is not a scalar. B. Pearlmutter, Neural Computation 6 (1994).
    """
    tree.check_vector_space(params, "params")
    tree.check_like(v, params, "v")
    with scope.untouched(tree.device(params)), mended():
        params, batch, v = scope.usable(params), scope.usable(batch), scope.usable(v)
        leaves, rebuild = tree.flatten(params)
        return rebuild(jvp(of_leaves(loss, batch, params), leaves)(tree.leaves(v)))


class Proof(NamedTuple):
    way: str
    words: str  # which way, and what it was checked against


def prove(f: Function, point: Sequence[Tensor], labels: Sequence[str]) -> Proof:
    """The first way that a second one confirms, block by block, and that is symmetric on a random pair.

    Raises `ProductError` with the figures where no two ways agree.
    """
    generator = torch.Generator().manual_seed(0)
    u, v = ([tree.randn(x, generator) for x in point] for _ in range(2))
    products: dict[str, list[Tensor]] = {}
    trouble: dict[str, str] = {}
    for name, way in WAYS.items():
        try:
            product = way(f, point)
            image = product(v)
            skew, size = (0.0, 1.0) if products else _asymmetry(u, v, product(u), image)
        except EigenfuncError:
            raise
        except (RuntimeError, NotImplementedError, TypeError) as error:
            trouble[name] = str(error).strip().splitlines()[0][:200]
            continue
        if not all(torch.isfinite(block).all() for block in image):
            trouble[name] = "the product holds NaN or infinity"
            continue
        if skew > _tolerance(point) * size:
            trouble[name] = f"not symmetric: ⟨u, Hv⟩ and ⟨v, Hu⟩ differ by {skew:.2e} of {size:.2e}"
            continue
        for other, known in products.items():
            worst, label = _disagreement(known, image, labels)
            if worst <= _tolerance(point):
                without = "".join(f"; {failed} failed: {why}" for failed, why in trouble.items())
                return Proof(other, f"way '{other}', confirmed by '{name}' to {worst:.0e} in every block{without}")
            trouble[f"{other} against {name}"] = f"block '{label}' differs by {worst:.1e}"
        products[name] = image
    figures = "\n".join(f"  {name}: {why}" for name, why in trouble.items())
    raise ProductError(
        f"no two ways of forming the Hessian-vector product agree on this loss:\n{figures}\n"
        "Look for operations without second derivatives, custom autograd functions, or randomness in the forward "
        f"pass; product='{next(iter(products), 'graph')}' takes one way without proof"
    )


def _tolerance(point: Sequence[Tensor]) -> float:
    eps = tree.coarsest_eps(list(point))
    return 1e-8 if eps < 1e-12 else 1e-3 if eps < 1e-6 else 16 * eps


def _asymmetry(u: list[Tensor], v: list[Tensor], hu: list[Tensor], hv: list[Tensor]) -> tuple[float, float]:
    """|⟨u, Hv⟩ − ⟨v, Hu⟩| and the size its rounding is relative to."""
    skew = tree.dot(u, hv) - tree.dot(v, hu)
    size = tree.norm(u) * tree.norm(hv) + tree.norm(v) * tree.norm(hu)
    return float(skew.abs()), float(size)


def _disagreement(a: list[Tensor], b: list[Tensor], labels: Sequence[str]) -> tuple[float, str]:
    """Largest relative difference over the blocks; a block far below the whole is held against its rounding."""
    rounding = 1e-3 * float(tree.norm(a)) * tree.coarsest_eps(a) ** 0.25
    worst, where = 0.0, labels[0]
    for label, x, y in zip(labels, a, b, strict=True):
        size = max(float(tree.norm(x)), rounding)
        difference = float(tree.norm(tree.sub(x, y)))
        relative = difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))
        if relative > worst:
            worst, where = relative, label
    return worst, where
