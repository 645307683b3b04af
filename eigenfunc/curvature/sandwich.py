"""Matrices Jᵀ M J, with J the Jacobian of a model's outputs by its parameters and M a symmetric map on outputs.

Gauss–Newton and Fisher matrices are of this form, and differ in M. A product takes one tangent of the outputs (J v),
one M, and one pull-back (Jᵀ w); J is never formed, and only M ever sees the targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from eigenfunc import scope, tree
from eigenfunc.curvature import differences
from eigenfunc.curvature.differences import Map
from eigenfunc.curvature.mends import LeanLinear, Seen, Traceable, mended, show_all_calls
from eigenfunc.curvature.products import Product, Way, Ways, forward_ad, looped
from eigenfunc.curvature.setup import Matrix, operator
from eigenfunc.data import fresh
from eigenfunc.errors import ObjectiveError
from eigenfunc.objective import AS_PAIRS, Composition, pair
from eigenfunc.operator import LinearOperator
from eigenfunc.tree import Tree

OutputMap = Callable[[Any, Any], Callable[[Tree], Tree]]  # (outputs, targets) -> (u -> M u), u shaped as the outputs


class Halves(NamedTuple):
    """A model and what follows it, on one batch; outputs are the list of the floating-point leaves of the model's."""

    predict: Map  # leaves of the parameters -> outputs
    curvature: Callable[[Sequence[Tensor]], Map]  # outputs -> (u -> M u)
    whole: Callable[[Sequence[Tensor]], tuple[Tree, Any]]  # outputs -> the model's outputs, and the targets


def halves(objective: Any, output_map: OutputMap, batch: Any, params: Tree, seed: int | None = None) -> Halves:
    """`Halves` on a batch (inputs, targets); with a seed what is drawn at random in each of them repeats."""
    refs, rebuild = tree.flatten(params)
    inputs, targets = pair(batch, AS_PAIRS)
    last: list[Callable[[Sequence[Any]], Tree]] = []

    def start() -> None:
        if seed is not None:
            scope.reseed(seed, refs[0].device)

    def predict(leaves: Sequence[Tensor]) -> list[Tensor]:
        start()
        outputs, rebuilt = floating(objective.predict(rebuild(list(leaves)), fresh(inputs)))
        last[:] = [rebuilt]
        return outputs

    def curvature(outputs: Sequence[Tensor]) -> Map:
        start()
        rebuilt = last[0]
        product = output_map(*whole(outputs))
        return lambda u: floating(product(rebuilt(u)))[0]

    def whole(outputs: Sequence[Tensor]) -> tuple[Tree, Any]:
        return last[0](outputs), fresh(targets)

    return Halves(predict, curvature, whole)


def floating(outputs: Tree) -> tuple[list[Tensor], Callable[[Sequence[Any]], Tree]]:
    """The floating-point leaves of a model's outputs, and the function that puts such leaves back among the others.

    Raises `ObjectiveError` where there is none, or something that is neither a tensor nor a container of tensors.
    """
    flat, rebuild = tree.flatten(outputs)
    for leaf in flat:
        if not isinstance(leaf, Tensor) or leaf.is_complex():
            kind = f"tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ObjectiveError(
                f"the model returns a {kind}: outputs must be real tensors, or tuples, lists and dicts of them. Let "
                "predict pick the tensors that the criterion needs (view_as_real for complex ones), by a module say "
                "whose forward returns model(inputs).logits"
            )
    places = [i for i, leaf in enumerate(flat) if leaf.is_floating_point()]
    if not places:
        raise ObjectiveError("the model returns no floating-point tensor: there is nothing to differentiate")
    if len(places) == len(flat):
        return flat, lambda leaves: rebuild(list(leaves))

    def whole(leaves: Sequence[Any]) -> Tree:
        given = dict(zip(places, leaves, strict=True))
        return rebuild([given.get(i, leaf) for i, leaf in enumerate(flat)])

    return [flat[i] for i in places], whole


def graph(f: Halves, point: Sequence[Tensor]) -> Product:
    """Keep the graphs of the outputs and of Jᵀ w; a product runs backward through both, for J v is the derivative of
    ⟨Jᵀ w, v⟩ by w. Nothing of the model is run again. Only outside of transforms."""
    leaves = [leaf.detach().requires_grad_() for leaf in point]
    outputs = f.predict(leaves)
    live = [i for i, z in enumerate(outputs) if z.requires_grad]
    if not live:
        raise ObjectiveError(_INDEPENDENT)
    duals = [z.new_zeros(()).expand(z.shape).requires_grad_() for z in outputs]
    moving = [duals[i] for i in live]
    ends: Any = [get_gradient_edge(outputs[i]) for i in live]
    size, device = sum(z.nbytes for z in outputs), outputs[0].device  # M keeps outputs and perhaps as much again
    apply = f.curvature([z.detach() for z in outputs])
    del outputs  # which M may not need
    pulled = torch.autograd.grad(ends, leaves, moving, create_graph=True, allow_unused=True)
    linear = [j for j, slope in enumerate(pulled) if slope is not None and slope.requires_grad]
    slopes = [get_gradient_edge(pulled[j]) for j in linear]
    del pulled

    def product(v: Sequence[Tensor], batched: bool) -> list[Tensor]:
        pull: Any = partial(torch.autograd.grad, retain_graph=True, allow_unused=True, is_grads_batched=batched)
        lead = v[0].shape[:1] if batched else ()
        tangents: list[Any] = list(pull(slopes, moving, [v[j] for j in linear])) if linear else [None] * len(live)
        found = dict(zip(live, tangents, strict=True))
        u = _apart([_or_zeros(found.pop(i, None), dual, lead) for i, dual in enumerate(duals)], v)
        del tangents
        with scope.untouched(device), mended():  # M may run the criterion
            w = _one_by_one(apply, u) if batched else apply(u)
        del u
        out = pull(ends, leaves, [w[i] for i in live])
        return [_or_zeros(block, x, lead) for block, x in zip(out, leaves, strict=True)]

    return Product(lambda v: product(v, False), lambda vs: product(vs, True), beside=2 * size)


def _one_by_one(apply: Map, u: list[Tensor]) -> list[Tensor]:
    """M applied to each of a stack in its place: under vmap it would take several times the memory of the stack."""
    for i in range(u[0].shape[0]):
        for x, image in zip(u, apply([x[i] for x in u]), strict=True):
            x[i] = image
    return u


def _or_zeros(block: Tensor | None, like: Tensor, lead: Sequence[int]) -> Tensor:
    return like.new_zeros((*lead, *like.shape)) if block is None else block.detach()


def _apart(u: list[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """The tangents, in memory that is neither v's nor one another's, so that M may write into it."""
    if torch.compiler.is_compiling() or scope.inside_transform():
        return u
    taken = {x.untyped_storage().data_ptr() for x in v}
    out = []
    for x in u:
        own = x.clone() if x.untyped_storage().data_ptr() in taken or 0 in x.stride() else x
        taken.add(own.untyped_storage().data_ptr())
        out.append(own)
    return out


_INDEPENDENT = (
    "the outputs do not depend on any of the parameters: check that they are computed from the `params` that predict "
    "is given, without .detach(), .item() or NumPy on the way"
)


def dual(f: Halves, point: Sequence[Tensor]) -> Product:
    """Dual numbers through plain autograd, for J v and the graph of the outputs in one forward pass."""

    def pushed(v: Sequence[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in point]
        with forward_ad.dual_level(), LeanLinear():
            outputs = f.predict([forward_ad.make_dual(x, t) for x, t in zip(leaves, v, strict=True)])
            found = [forward_ad.unpack_dual(z).tangent for z in outputs]
            u = [torch.zeros_like(z) if t is None else t.detach() for z, t in zip(outputs, found, strict=True)]
        live = [i for i, z in enumerate(outputs) if z.requires_grad]
        if not live:
            raise ObjectiveError(_INDEPENDENT)
        del found
        ends: Any = [get_gradient_edge(outputs[i]) for i in live]
        w = f.curvature([z.detach() for z in outputs])(_apart(u, v))
        del u, outputs
        out = torch.autograd.grad(ends, leaves, [w[i] for i in live], allow_unused=True)
        return [_or_zeros(block, x, ()) for block, x in zip(out, leaves, strict=True)]

    return Product(pushed, looped(pushed))


def jvp(f: Halves, point: Sequence[Tensor]) -> Product:
    """`torch.func.jvp` through the model, M, then `torch.func.vjp`: two forward passes, and it composes with every
    transform."""

    def pushed(v: Sequence[Tensor]) -> list[Tensor]:
        with LeanLinear():
            ends: list[Any] = list(torch.func.jvp(f.predict, (list(point),), (list(v),)))
        w = f.curvature(ends[0])(_apart(ends[1], v))
        ends.clear()
        pull: Any = torch.func.vjp(f.predict, list(point))[1]
        return list(pull(w)[0])

    return Product(pushed, lambda vs: list(torch.func.vmap(pushed, randomness="same")(list(vs))))


def vjp(f: Halves, point: Sequence[Tensor]) -> Product:
    """`graph` in functional form."""
    made: Any = torch.func.vjp(f.predict, list(point))
    outputs, pull = made
    push: Any = torch.func.vjp(lambda w: pull(w)[0], [torch.zeros_like(z) for z in outputs])[1]
    apply = f.curvature(outputs)

    def product(v: Sequence[Tensor]) -> list[Tensor]:
        return list(pull(apply(_apart(push(list(v))[0], v)))[0])

    return Product(product, lambda vs: list(torch.func.vmap(product, randomness="same")(list(vs))))


def _by_differences(f: Halves, point: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """J v by differences of the outputs; what follows is linear and so carries the error on."""

    def outputs(leaves: Sequence[Tensor]) -> list[Tensor]:
        return [z.detach() for z in f.predict(leaves)]

    leaves = [x.detach().requires_grad_() for x in point]
    u, off = differences.estimate(outputs, point, v, differences.best_step(outputs, point, [v]))
    ends = f.predict(leaves)
    apply = f.curvature([z.detach() for z in ends])
    live = [i for i, z in enumerate(ends) if z.requires_grad]

    def pulled(w: list[Tensor]) -> list[Tensor]:
        slopes = torch.autograd.grad(
            [ends[i] for i in live], leaves, [w[i] for i in live], retain_graph=True, allow_unused=True
        )
        return [_or_zeros(slope, x, ()) for slope, x in zip(slopes, leaves, strict=True)]

    return pulled(apply(u)), differences.sizes(pulled(apply(off)))


WAYS: dict[str, Way[Halves]] = {"graph": graph, "dual": dual, "jvp": jvp, "vjp": vjp}


def sandwich(
    name: str,
    objective: Any,
    params: Tree,
    data: Any,
    output_map: OutputMap,
    *,
    product: str = "auto",
    cache: int | Literal["auto"] = "auto",
    chunk: int | None = None,
    compile: bool = False,
    check: bool = True,
    confirm: Callable[[Tree, Any, Seen], None] | None = None,
) -> LinearOperator:
    """The operator Jᵀ M J over the data, called `name`, with M given by `output_map`; see `ggn` for the rest.

    `output_map(outputs, targets)` returns the function u ↦ M u for one batch, on trees shaped as the model's outputs,
    linear and symmetric; outside of transforms it may overwrite u. It may draw random numbers, from a random state that
    is the same whenever it is called for a batch. It must vmap over u and, for derivatives of the product, be
    differentiable itself. `confirm(outputs, targets, seen)` proves it on the first batch, under the mends.
    """
    check_parts(objective, name)

    def confirmed(f: Halves, point: Sequence[Tensor], seen: Seen) -> None:
        if confirm is not None:
            confirm(*f.whole([z.detach() for z in f.predict(point)]), seen)

    remedy = "check=False takes one way without proof"
    matrix = Matrix(
        Composition(objective),
        partial(halves, objective, output_map),
        Ways(name, WAYS, _by_differences, "central differences of the outputs", remedy),
        partial(seeded_product, objective, output_map),
        "its pure product",
        "vjp",
        confirm=confirmed,
    )
    return operator(matrix, params, data, product, cache, chunk, compile, check)


def check_parts(objective: Any, name: str) -> None:
    """Raise `ObjectiveError` unless the model and its criterion can be had apart."""
    if not all(callable(getattr(objective, part, None)) for part in ("predict", "criterion")):
        raise ObjectiveError(
            f"the {name} matrix needs the model apart from its loss: pass functional_loss(model, criterion)[0], or any "
            "object with predict(params, inputs) and criterion(outputs, targets), rather than a "
            f"{type(objective).__name__} without them"
        )


def pure_product(name: str, objective: Any, params: Tree, batch: Any, v: Tree, output_map: OutputMap) -> Tree:
    """Jᵀ M J v on one batch, composable with every transform as far as the output map is."""
    check_parts(objective, name)
    tree.check_vector_space(params, "params")
    tree.check_like(v, params, "v")
    if torch.compiler.is_compiling():
        return _traced_product(objective, output_map, params, batch, v)
    constant = not torch.is_grad_enabled() and not scope.inside_transform()
    image = seeded_product(objective, output_map, params, batch, v, None)
    return tree.tree_map(torch.detach, image) if constant else image


def seeded_product(objective: Any, output_map: OutputMap, params: Tree, batch: Any, v: Tree, seed: int | None) -> Tree:
    """`pure_product` without its checks, with the random numbers of `seed`."""
    with scope.untouched(tree.device(params)), mended():
        params, batch, v = scope.usable(params), scope.usable(batch), scope.usable(v)
        leaves, rebuild = tree.flatten(params)
        return rebuild(jvp(halves(objective, output_map, batch, params, seed), leaves).single(tree.leaves(v)))


def _traced_product(objective: Any, output_map: OutputMap, params: Tree, batch: Any, v: Tree) -> Tree:
    """For torch.compile, without graph breaks; backward only, as in `products.traced_hvp`."""
    show_all_calls()
    with sdpa_kernel(SDPBackend.MATH), Traceable():
        leaves, rebuild = tree.flatten(params)
        return rebuild(vjp(halves(objective, output_map, batch, params), leaves).single(tree.leaves(v)))
