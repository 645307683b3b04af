"""Products by a compiled graph: the part that depends on the vector is traced apart and compiled once a shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from eigenfunc import scope, tree
from eigenfunc.curvature import products
from eigenfunc.curvature.products import Product
from eigenfunc.data import mapped
from eigenfunc.tree import Tree


class Linear(NamedTuple):
    primal: Callable[..., Sequence[Any]]  # what the product needs of point and batch, run once a batch
    tangent: Callable[..., Sequence[Tensor]]  # the product from that and the vector, compiled


Make = Callable[[Any, int, Sequence[Tensor]], Product]  # batch, seed, leaves -> the product there


class Compiled:
    """A product, linearised: as `torch.func.linearize` does, but with the batch as an argument.

    A loss whose control flow depends on values of the batch fails to trace; sizes and anything that is not a tensor
    are baked in, and traced anew where they differ.
    """

    def __init__(self, make: Make, point: Tree) -> None:
        self._make_product = make
        self._refs = tree.leaves(point)
        self._made: dict[str, Linear] = {}

    def __call__(self, seed: int, batch: Any) -> Product:
        tensors: list[Tensor] = []
        mapped(lambda leaf: tensors.append(leaf) or leaf, batch)  # type: ignore[func-returns-value]
        key = repr(mapped(lambda leaf: (tuple(leaf.shape), leaf.dtype), batch))  # type: ignore[arg-type,return-value]
        if key not in self._made:
            self._made[key] = self._trace(seed, batch, tensors)
        primal, tangent = self._made[key]
        scope.reseed(seed, self._refs[0].device)
        held = list(primal(*self._refs, *tensors))

        def single(v: Sequence[Tensor]) -> list[Tensor]:
            return list(tangent(*held, *v))

        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held if isinstance(x, Tensor)}
        return Product(single, products.looped(single), sum(sizes.values()))

    def _trace(self, seed: int, batch: Any, tensors: list[Tensor]) -> Linear:
        count, refs = len(self._refs), self._refs

        def joint(*args: Tensor) -> list[Tensor]:
            given = iter(args[count:-count])
            whole = mapped(lambda leaf: next(given), batch)
            return self._make_product(whole, seed, args[:count]).single(args[-count:])

        traced = make_fx(torch.func.functionalize(joint))(*refs, *tensors, *map(torch.ones_like, refs))
        traced.graph.eliminate_dead_code()
        primal, tangent = split(traced, count)
        options: Any = {"fallback_random": True}
        return Linear(primal, torch.compile(tangent, dynamic=False, options=options))


def split(joint: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(primal, tangent): the nodes of `joint` that do not depend on its last `count` inputs, and those that do.

    `primal` takes the other inputs and returns the values that `tangent` takes before the last `count` inputs.
    """
    inputs = [node for node in joint.graph.nodes if node.op == "placeholder"]
    moving = set(inputs[-count:])
    for node in joint.graph.nodes:
        if any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    used: dict[fx.Node, None] = {}
    for node in joint.graph.nodes:
        if node in moving or node.op == "output":
            used.update(dict.fromkeys(source for source in node.all_input_nodes if source not in moving))

    still, running = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in joint.graph.nodes:
        if node not in moving and node.op != "output":
            copies[node] = still.node_copy(node, copies.__getitem__)
    still.output([copies[node] for node in used])
    places = {node: running.placeholder(f"held_{i}") for i, node in enumerate(used)}
    for node in joint.graph.nodes:
        if node in moving or node.op == "output":
            places[node] = running.node_copy(node, places.__getitem__)
    return fx.GraphModule(joint, still), fx.GraphModule(joint, running)
