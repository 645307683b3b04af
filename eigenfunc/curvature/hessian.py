"""The Hessian of a loss over a data set, as a linear operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from eigenfunc import scope, tree
from eigenfunc.curvature import products, rehearsal
from eigenfunc.curvature.compiled import Compiled
from eigenfunc.curvature.mends import Seen, mended
from eigenfunc.curvature.products import ON_REQUEST, WAYS, Differences, Loss, Product
from eigenfunc.curvature.proof import Proof, check_mends, disagreement, prove, tolerance_of
from eigenfunc.curvature.sweep import Prepare, Sweep, budget_for, seconds
from eigenfunc.data import Batches, Reader, as_batches, average
from eigenfunc.errors import CompileWarning, InputError, ObjectiveError
from eigenfunc.operator import LinearOperator, MatVec, Part
from eigenfunc.tree import Tree

_KEPT = "graph"  # the way whose work between products can be kept


def hessian(
    loss: Loss,
    params: Tree,
    data: Any,
    *,
    product: str = "auto",
    cache: int | Literal["auto"] = "auto",
    chunk: int | None = None,
    compile: bool = False,
    check: bool = True,
) -> LinearOperator:
    """The Hessian of `loss(params, batch)` over `data` with respect to `params`, never formed.

    loss     (params, batch) -> (): an `Objective` from `functional_loss`, or any function
    params   pytree of real floating-point tensors on one device: the point, held by reference. Its values may not
             change while the operator is in use
    data     one batch, a DataLoader, or `Batches`: the mean (or sum) over all of it, whatever the cut
    product  "auto" takes the fastest of the ways that agree with one another on the first batch; "graph" (kept
             gradient graph), "jvp" (forward over reverse), "dual" (the same without torch.func) or "vjp" forces one.
             "finite-difference" differentiates the gradient by central differences, four gradients a product, with
             an error that is measured with each and becomes the noise of the operator
    cache    bytes of gradient graphs that may be kept between products, "auto" for half of the free memory, 0 for
             none. Graphs that do not fit are made anew for each product
    chunk    vectors multiplied at once in `matmat`; None measures what is fastest, and out of memory halves it
    compile  linearise the product by tracing and compile it, once for each shape of batch, which takes from some
             seconds to minutes; held against the eager product, and given up with a `CompileWarning` if it fails
    check    read the data twice at set-up, forward only, to see that it repeats and that the loss changes neither
             its parameters nor its batch, and prove the product; False takes all of that on trust

    Dropout draws the same mask for a batch in every product; BatchNorm in train mode uses each batch's statistics
    and changes no buffer. What is computed under `torch.no_grad()` is a constant. Inside a torch.func transform no
    check is made and every product is `hvp`.

    Raises `ObjectiveError` (not a scalar, no parameter in it, parameters that are NaN, written in place), `DataError`
    (no batch, cannot be weighed or cut, or a non-finite loss, naming the batch), `ProductError` (no two ways agree);
    warns with `DataWarning` where two passes over the data disagree.
    """
    ways = [*WAYS, ON_REQUEST]
    if product != "auto" and product not in ways:
        raise InputError(f"product must be 'auto' or one of {', '.join(map(repr, ways))}; got {product!r}")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise InputError(f"chunk must be an integer of at least 1, got {chunk!r}")
    if cache != "auto" and not (isinstance(cache, (int, float)) and cache >= 0):
        raise InputError(f"cache must be 'auto' or a number of bytes, got {cache!r}")
    tree.check_vector_space(params, "params")
    device = tree.device(params)
    batches = as_batches(data)
    if scope.inside_transform():
        return LinearOperator(
            _pure(loss, params, batches, torch.initial_seed()), params, description="Hessian by hvp, inside a transform"
        )
    with scope.untouched(device):
        point = scope.usable(tree.tree_map(lambda leaf: leaf.detach(), params))
    reader = Reader(batches.on(device), device)
    for name, leaf in zip(tree.names(point), tree.leaves(point), strict=True):
        if not bool(torch.isfinite(leaf).all()):
            raise ObjectiveError(f"parameter '{name}' holds NaN or infinity")
    set_up = _SetUp(loss, point, reader, Differences())
    return set_up.operator(product, budget_for(cache, device), chunk, compile, check)


class _SetUp(NamedTuple):
    """Where products are formed: the loss, the point, and the data."""

    loss: Loss
    point: Tree
    reader: Reader
    differences: Differences

    def prepare(self, way: str, index: int, batch: Any) -> Product:
        f, refs = self._of_leaves(index, batch), tree.leaves(self.point)
        return self.differences(f, refs) if way == ON_REQUEST else WAYS[way](f, refs)

    def operator(self, product: str, budget: int, chunk: int | None, compile: bool, check: bool) -> LinearOperator:
        loss, point, reader, differences = self
        in_order = rehearsal.rehearse(loss, point, reader) if check else reader.batches.sequential
        seen = Seen()
        with scope.untouched(reader.device):
            index, batch = reader.first()
        proof = self._proven(product, index, batch, seen) if check and product != ON_REQUEST else None
        ways = (
            list(proof.ways) if proof is not None and product == "auto" else [_KEPT if product == "auto" else product]
        )
        if product == ON_REQUEST:
            with scope.untouched(reader.device), mended():
                self.prepare(product, index, batch)
        figures = f", {1e3 * self._gradient_seconds(index, batch):.3g} ms a gradient" if check else ""
        sweep = Sweep(reader, point, partial(self.prepare, ways[0]), chunk)
        made = self._compiled(ways[0], index, batch, seen) if compile else None
        if made is not None:
            sweep.remake = made
            sweep.keep(made, budget, in_order=in_order)
        elif _KEPT in ways and budget > 0:
            sweep.keep(partial(self.prepare, _KEPT), budget, in_order=in_order)
        way = _KEPT if _KEPT in ways else ways[0]
        if check:
            prepares = {way: partial(made or partial(self.prepare, way), index, batch) for way in ways}
            way, spent = _fastest(sweep, tree.leaves(point), prepares if made is None else {way: prepares[way]})
            sweep.remake = made or partial(self.prepare, way)
            figures = f"; on the first batch {1e3 * spent:.3g} ms a product" + figures
        words = "as asked" if product == ON_REQUEST else "not checked" if proof is None else proof.words(way)
        words += f"; mends met: {', '.join(sorted(seen.names))}" if seen.names else ""
        prefix = f"Hessian, way '{way}'{' compiled' if made is not None else ''}, {words}"
        pure = _pure(loss, point, reader.batches, reader.seed)

        versions = [leaf._version for leaf in tree.leaves(point)]

        def current() -> None:
            for name, leaf, version in zip(tree.names(point), tree.leaves(point), versions, strict=True):
                if leaf._version != version:
                    raise ObjectiveError(
                        f"parameter '{name}' was changed in place after the operator was made (by an optimiser's step, "
                        "say); make a new operator, or pass copies of the parameters"
                    )

        def matvec(v: Tree) -> Tree:
            current()
            return pure(v) if scope.inside_transform() else sweep.matvec(v)

        def matmat(vs: Tree) -> Tree:
            current()
            return sweep.matmat(vs)

        def principal(parts: Sequence[Part]) -> list[list[Tensor]]:
            current()
            return sweep.principal(parts)

        def describe() -> str:
            error = f", off by at most {differences.error:.0e} for unit vectors so far" if product == ON_REQUEST else ""
            return f"{prefix}{error}; {sweep.describe()}{figures}"

        return LinearOperator(
            matvec, point, matmat, sweep.minibatches, describe, lambda: differences.error, sweep.block_ratio, principal
        )

    def _of_leaves(self, index: int, batch: Any) -> products.Function:
        return products.of_leaves(self.loss, batch, self.point, self.reader.seed + index)

    def _proven(self, product: str, index: int, batch: Any, seen: Seen) -> Proof:
        f, refs, names = self._of_leaves(index, batch), tree.leaves(self.point), tree.names(self.point)
        with scope.untouched(self.reader.device):
            with mended(seen):
                proof = prove(f, refs, names, seen, None if product == "auto" else product)
            if seen.names:
                check_mends(f, refs, names, seen, self.reader.seed + index)
        return proof

    def _gradient_seconds(self, index: int, batch: Any) -> float:
        f, leaves = self._of_leaves(index, batch), [x.detach().requires_grad_() for x in tree.leaves(self.point)]
        with scope.untouched(self.reader.device), mended():
            return seconds(lambda: products.slopes(f(leaves), leaves), self.reader.device)

    def _compiled(self, way: str, index: int, batch: Any, seen: Seen) -> Prepare | None:
        """Compiled products, or None where that fails or disagrees with the eager product of the first batch."""
        maker = Compiled(self.loss, self.point)
        refs, names = tree.leaves(self.point), tree.names(self.point)
        generator = torch.Generator().manual_seed(2)
        v = [tree.randn(x, generator) for x in refs]

        def made(index: int, batch: Any) -> Product:
            return maker(self.reader.seed + index, batch)

        try:
            with scope.untouched(self.reader.device), mended():
                found, eager = made(index, batch).single(v), self.prepare(way, index, batch).single(v)
            worst, label = disagreement(eager, found, names, seen.eps)
            problem = f"its block '{label}' is off by {worst:.1e}" if worst > tolerance_of(refs, seen.eps) else ""
        except Exception as error:  # tracers and compilers raise whatever they like
            problem = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if not problem:
            return made
        warnings.warn(f"the product is not compiled: {problem}", CompileWarning, stacklevel=4)
        return None


def _fastest(sweep: Sweep, refs: list[Tensor], prepares: Mapping[str, Callable[[], Product]]) -> tuple[str, float]:
    """The fastest way on the first batch, its set-up included unless all graphs are kept, and its seconds."""
    device = sweep.reader.device
    with scope.untouched(device), mended():
        v = [torch.ones_like(leaf) for leaf in refs]
        if sweep.complete:
            kept = next(iter(sweep.kept.values())).product
            return _KEPT if _KEPT in prepares else next(iter(prepares)), seconds(lambda: kept.single(v), device)
        times = {way: seconds(partial(_once, make, v), device) for way, make in prepares.items()}
    way = min(times, key=times.__getitem__)
    return way, times[way]


def _once(make: Callable[[], Product], v: list[Tensor]) -> list[Tensor]:
    return make().single(v)


def _pure(loss: Loss, params: Tree, batches: Batches, seed: int) -> MatVec:
    def matvec(v: Tree) -> Tree:
        def parts() -> Iterator[tuple[float, Callable[[], Tree]]]:
            for index, batch in enumerate(batches):
                weight = batches.weigh(batch, index)
                yield weight, partial(products.seeded_hvp, loss, params, batch, v, seed + index)

        return average(parts(), batches.reduction)

    return matvec
