"""The ways to form a Hessian-vector product of one batch.

A way takes a function of a list of tensors and the point, does its set-up, and returns the product on such lists.
Each has its own failures: fused kernels without forward AD, custom functions that differentiate once, hooks that
torch.func does not know. So none is trusted alone: `proof.prove` holds ways of different kinds against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from eigenfunc import scope, tree
from eigenfunc.curvature.differences import Map, best_step, estimate, sizes
from eigenfunc.curvature.held import Held
from eigenfunc.curvature.mends import Traceable, mended, show_all_calls
from eigenfunc.data import fresh
from eigenfunc.errors import ObjectiveError
from eigenfunc.tree import Tree

Loss = Callable[[Tree, Any], Tensor]
Function = Callable[[Sequence[Tensor]], Tensor]
F = TypeVar("F")

forward_ad: Any = _forward_ad


class Product(NamedTuple):
    single: Map  # one vector, as a list of tensors shaped as the point
    block: Map  # a stack of vectors, with a leading axis on every tensor
    held: int | None = None  # bytes kept for it, None if only autograd knows
    beside: int = 0  # bytes kept beside what autograd knows
    within: Callable[[Sequence[int]], Product] | None = None  # the block on some leaves, if that is cheaper


Way = Callable[[F, Sequence[Tensor]], Product]


class Ways(NamedTuple, Generic[F]):
    """The ways to form a product with one matrix, from a function f of a list of tensors, and a witness to them.

    Those called as in `FORWARD` push tangents forward, the others pull back only. The witness gives (the product with
    a vector, the error of each block as a 0-dim tensor) by central differences.
    """

    matrix: str
    each: Mapping[str, Way[F]]
    witness: Callable[[F, Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]
    witness_name: str
    remedy: str  # what else to do where no two agree


_CAUTION = 4.0  # times an estimate that is off by as much where rounding is all there is


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
    with Held():
        value = f(leaves)
    gradient = slopes(value, leaves, create_graph=True)

    def pulled(chosen: Sequence[int], v: Sequence[Tensor], batched: bool) -> list[Tensor]:
        pairs = [(gradient[i], x) for i, x in zip(chosen, v, strict=True) if gradient[i] is not None]
        live = [(slope, x) for slope, x in pairs if slope.requires_grad]
        if not live:
            return [torch.zeros_like(x) for x in v]
        out = torch.autograd.grad(
            [slope for slope, _ in live],
            [leaves[i] for i in chosen],
            [x for _, x in live],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        return [torch.zeros_like(x) if block is None else _own(block, x) for x, block in zip(v, out, strict=True)]

    def within(chosen: Sequence[int]) -> Product:
        return Product(lambda v: pulled(chosen, v, False), lambda vs: pulled(chosen, vs, True))

    return within(range(len(leaves)))._replace(within=within)


def _narrowed(
    way: Callable[[Function, Sequence[Tensor]], Product], f: Function, point: Sequence[Tensor], chosen: Sequence[int]
) -> Product:
    """The product by `way` of f as a function of some of its leaves alone, the others constant."""

    def g(some: Sequence[Tensor]) -> Tensor:
        filled = list(point)
        for i, x in zip(chosen, some, strict=True):
            filled[i] = x
        return f(filled)

    return way(g, [point[i] for i in chosen])


def embedded(product: Product, point: Sequence[Tensor], chosen: Sequence[int]) -> Product:
    """The principal block on some leaves by whole products, of vectors that are zero elsewhere."""

    def through(apply: Map, lead: int) -> Map:
        def mapped(v: Sequence[Tensor]) -> list[Tensor]:
            filled = [x.new_zeros(v[0].shape[:lead] + x.shape) for x in point]
            for i, x in zip(chosen, v, strict=True):
                filled[i] = x
            image = apply(filled)
            return [image[i] for i in chosen]

        return mapped

    return Product(through(product.single, 0), through(product.block, 1))


def _own(image: Tensor, x: Tensor) -> Tensor:
    """The image without its history, and never x itself, which a backward pass may hand through."""
    return image.clone() if image.data_ptr() == x.data_ptr() else image.detach()


def slopes(value: Tensor, leaves: Sequence[Tensor], *, create_graph: bool = False) -> list[Any]:
    """The gradient, None for what the loss does not use; `ObjectiveError` if it uses nothing."""
    if not value.requires_grad:
        raise ObjectiveError(_INDEPENDENT)
    gradient = torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True)
    if all(slope is None for slope in gradient):
        raise ObjectiveError(_INDEPENDENT)
    return list(gradient)


_INDEPENDENT = (
    "the loss does not depend on any of the parameters: check that it is computed from the `params` it is given, "
    "without .detach(), .item() or NumPy on the way"
)


def jvp(f: Function, point: Sequence[Tensor]) -> Product:
    """`torch.func.jvp` of `grad`, forward over reverse: least memory, and it composes with every transform."""
    slope = torch.func.grad(f)

    def pushed(v: Sequence[Tensor]) -> list[Tensor]:
        return list(torch.func.jvp(slope, (list(point),), (list(v),))[1])

    block = torch.func.vmap(pushed, randomness="same")
    return Product(pushed, lambda vs: list(block(list(vs))), within=partial(_narrowed, jvp, f, point))


def dual(f: Function, point: Sequence[Tensor]) -> Product:
    """Forward over reverse by dual numbers through plain autograd, for what torch.func does not take."""

    def pushed(v: Sequence[Tensor]) -> list[Tensor]:
        with forward_ad.dual_level():
            leaves = [forward_ad.make_dual(x.detach().requires_grad_(), t) for x, t in zip(point, v, strict=True)]
            gradient = slopes(f(leaves), leaves)
            tangents = [None if slope is None else forward_ad.unpack_dual(slope).tangent for slope in gradient]
            return [torch.zeros_like(x) if t is None else t for x, t in zip(v, tangents, strict=True)]

    return Product(pushed, looped(pushed), within=partial(_narrowed, dual, f, point))


def vjp(f: Function, point: Sequence[Tensor]) -> Product:
    """`torch.func.vjp` of `grad`: the kept graph in functional form."""
    pull: Any = torch.func.vjp(torch.func.grad(f), list(point))[1]

    def pulled(v: Sequence[Tensor]) -> list[Tensor]:
        return list(pull(list(v))[0])

    return Product(lambda v: _settled(pulled(v)), lambda vs: _settled(list(torch.func.vmap(pulled)(list(vs)))))


def _settled(images: list[Tensor]) -> list[Tensor]:
    """The images without a history, which torch 2.14 leaves on them behind a batch norm, unless one is wanted."""
    if torch.compiler.is_compiling() or scope.inside_transform():
        return images
    return [image.detach() for image in images]


class Differences:
    """How gradients are differenced: the step, chosen on the first batch, and the largest error so far.

    `error` is that of a product with a unit vector. It depends on the vector, and is largest where the loss bends
    most, so it is measured with every product.
    """

    def __init__(self) -> None:
        self.step: float | None = None
        self.error = 0.0

    def __call__(self, f: Function, point: Sequence[Tensor]) -> Product:
        """Central differences of the gradient, of fourth order, along the unit vector; see `estimate`."""
        if self.step is None:
            generator = torch.Generator().manual_seed(0)
            bent = _gradient(f, point)  # a direction in which the loss bends
            directions = [[tree.randn(x, generator) for x in point], bent]
            self.step = best_step(partial(_gradient, f), point, directions)
        step = self.step

        def product(v: Sequence[Tensor]) -> list[Tensor]:
            image, errors = estimate(partial(_gradient, f), point, v, step)
            length = float(tree.norm(list(v)))
            if length > 0:
                self.error = max(self.error, _CAUTION * float(tree.norm(errors)) / length)
            return image

        return Product(product, looped(product), within=partial(_narrowed, self, f, point))


def _by_differences(f: Function, point: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    slope = partial(_gradient, f)
    found, errors = estimate(slope, point, v, best_step(slope, point, [v]))
    return found, sizes(errors)


def _gradient(f: Function, point: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in point]
    gradient = slopes(f(leaves), leaves)
    return [torch.zeros_like(x) if s is None else s.detach() for x, s in zip(leaves, gradient, strict=True)]


def looped(single: Map) -> Map:
    """Products with a stack, one vector after the other."""

    def block(vs: Sequence[Tensor]) -> list[Tensor]:
        count = vs[0].shape[0]
        images = [single([v[i] for v in vs]) for i in range(count)]
        return [torch.stack(blocks) for blocks in zip(*images, strict=True)]

    return block


WAYS: dict[str, Way[Function]] = {"graph": graph, "dual": dual, "jvp": jvp, "vjp": vjp}
FORWARD = frozenset({"jvp", "dual"})  # the others are reverse over reverse
ON_REQUEST = "finite-difference"
HESSIAN = Ways(
    "Hessian",
    WAYS,
    _by_differences,
    "central differences of the gradient",
    f"product='{ON_REQUEST}' differentiates the gradient by differences, check=False takes one way without proof",
)


def of_leaves(loss: Loss, batch: Any, params: Tree, seed: int | None = None) -> Function:
    """The loss as a function of the list of leaves of its parameters; with a seed its random operations repeat."""
    refs, rebuild = tree.flatten(params)

    def f(leaves: Sequence[Tensor]) -> Tensor:
        if seed is not None:
            scope.reseed(seed, refs[0].device)
        return scalar(loss(rebuild(list(leaves)), fresh(batch)))

    return f


def hvp(loss: Loss, params: Tree, batch: Any, v: Tree) -> Tree:
    """Hessian of `loss(params, batch)` with respect to `params`, times `v`: `jvp` of `grad`.

    Pure, and composes with torch.func: under vmap over v, over params and v (stacked models), under grad and jvp.
    `v` is shaped as `params`, any pytree of real floating-point tensors. Raises `TreeError` where they do not
    match, `ObjectiveError` for a loss that is not a scalar. B. Pearlmutter, Neural Computation 6 (1994).
    """
    tree.check_vector_space(params, "params")
    tree.check_like(v, params, "v")
    if torch.compiler.is_compiling():
        return traced_hvp(loss, params, batch, v)
    constant = not torch.is_grad_enabled() and not scope.inside_transform()
    image = seeded_hvp(loss, params, batch, v, None)
    return tree.tree_map(torch.detach, image) if constant else image


def seeded_hvp(loss: Loss, params: Tree, batch: Any, v: Tree, seed: int | None) -> Tree:
    """`hvp` without its checks, with the random numbers of `seed`."""
    with scope.untouched(tree.device(params)), mended():
        params, batch, v = scope.usable(params), scope.usable(batch), scope.usable(v)
        leaves, rebuild = tree.flatten(params)
        return rebuild(jvp(of_leaves(loss, batch, params, seed), leaves).single(tree.leaves(v)))


def traced_hvp(loss: Loss, params: Tree, batch: Any, v: Tree) -> Tree:
    """`hvp` for torch.compile, without graph breaks: the pull-back of the gradient.

    Reverse over reverse, because the compiler keeps `torch.no_grad()` from gradients but not from tangents. Unlike in
    eager mode, a loss that draws random numbers moves the global random state.
    """
    show_all_calls()
    with sdpa_kernel(SDPBackend.MATH), Traceable():
        leaves, rebuild = tree.flatten(params)
        return rebuild(vjp(of_leaves(loss, batch, params), leaves).single(tree.leaves(v)))
