"""From the products of one batch to an operator over all data: what is the same for every curvature matrix.

A `Matrix` says what is particular to one. `operator` tries the loss out on the data, proves the ways to form a
product against each other, picks the fastest, keeps what fits, and watches over the parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Literal, NamedTuple

import torch
from torch import Tensor

from eigenfunc import scope, tree
from eigenfunc.choices import Choices
from eigenfunc.curvature import products, rehearsal
from eigenfunc.curvature.compiled import Compiled
from eigenfunc.curvature.denominators import batches_of
from eigenfunc.curvature.mends import Seen, mended
from eigenfunc.curvature.products import F, Loss, Product, Way, Ways
from eigenfunc.curvature.proof import Proof, check_mends, disagreement, prove, tolerance_of
from eigenfunc.curvature.sweep import Prepare, Sweep, budget_for, seconds
from eigenfunc.data import Batches, Reader, average
from eigenfunc.errors import CheckpointError, CompileWarning, InputError, ObjectiveError
from eigenfunc.operator import LinearOperator, MatVec, Part
from eigenfunc.tree import Tree

_KEPT = "graph"  # the way whose work between products can be kept


class Matrix(NamedTuple, Generic[F]):
    """One curvature matrix of a loss.

    loss        (params, batch) -> (), which is tried out on the data before the first product
    bind        (batch, params, seed) -> f, what the ways take: functions of the list of leaves of the parameters
    ways        "graph", whose work is kept, among them
    pure        (params, batch, v, seed) -> product, for use inside of transforms; called as in `pure_name`
    traced      the way that is compiled, which runs the model once
    on_request  ways that are taken only if asked for, and then without proof
    noise       the largest error so far of a product with a unit vector, where more than rounding is known of
    confirm     (f, point, what the mends met): further proof, under the mends; raises `ProductError`
    """

    loss: Loss
    bind: Callable[[Any, Tree, int | None], F]
    ways: Ways[F]
    pure: Callable[[Tree, Any, Tree, int | None], Tree]
    pure_name: str
    traced: str
    on_request: Mapping[str, Way[F]] = {}
    noise: Callable[[], float] = float
    confirm: Callable[[F, Sequence[Tensor], Seen], None] | None = None


def operator(
    matrix: Matrix[F],
    params: Tree,
    data: Any,
    product: str,
    cache: int | Literal["auto"],
    chunk: int | None,
    compile: bool,
    check: bool,
) -> LinearOperator:
    """The matrix over all of the data; see `hessian` for the arguments and for what is raised."""
    ways = [*matrix.ways.each, *matrix.on_request]
    if product != "auto" and product not in ways:
        raise InputError(f"product must be 'auto' or one of {', '.join(map(repr, ways))}; got {product!r}")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise InputError(f"chunk must be an integer of at least 1, got {chunk!r}")
    if cache != "auto" and not (isinstance(cache, (int, float)) and cache >= 0):
        raise InputError(f"cache must be 'auto' or a number of bytes, got {cache!r}")
    tree.check_vector_space(params, "params")
    device = tree.device(params)
    batches = batches_of(matrix.loss, data)
    if scope.inside_transform():
        words = f"{matrix.ways.matrix} by {matrix.pure_name}, inside a transform"
        return LinearOperator(_pure(matrix, params, batches, torch.initial_seed()), params, description=words)
    with scope.untouched(device):
        point = scope.usable(tree.tree_map(lambda leaf: leaf.detach(), params))
    reader = Reader(batches.on(device), device)
    for name, leaf in zip(tree.names(point), tree.leaves(point), strict=True):
        if not tree.is_finite(leaf):
            raise ObjectiveError(f"parameter '{name}' holds NaN or infinity")
    return _SetUp(matrix, point, reader).operator(product, budget_for(cache, device), chunk, compile, check)


class _SetUp(NamedTuple, Generic[F]):
    """Where products are formed: the matrix, the point, and the data."""

    matrix: Matrix[F]
    point: Tree
    reader: Reader

    def prepare(self, way: str, index: int, batch: Any) -> Product:
        return self._formed(way, batch, self.reader.seed + index, tree.leaves(self.point))

    def operator(self, product: str, budget: int, chunk: int | None, compile: bool, check: bool) -> LinearOperator:
        matrix, point, reader = self
        in_order = rehearsal.rehearse(matrix.loss, point, reader) if check else reader.batches.sequential
        seen = Seen()
        with scope.untouched(reader.device):
            index, batch = reader.first()
        asked = product in matrix.on_request
        proof = self._proven(product, index, batch, seen) if check and not asked else None
        ways = (
            list(proof.ways) if proof is not None and product == "auto" else [_KEPT if product == "auto" else product]
        )
        if asked:
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
        sweep.way = _KEPT if _KEPT in ways else ways[0]
        if check:
            prepares = {way: partial(made or partial(self.prepare, way), index, batch) for way in ways}
            if made is not None:
                prepares = {sweep.way: prepares[sweep.way]}
            sweep.way, spent = _fastest(sweep, tree.leaves(point), prepares)
            sweep.remake = made or partial(self.prepare, sweep.way)
            figures = f"; on the first batch {1e3 * spent:.3g} ms a product" + figures

        def words() -> str:
            proven = "as asked" if asked else "not checked" if proof is None else proof.words(sweep.way)
            mends = f"; mends met: {', '.join(sorted(seen.names))}" if seen.names else ""
            error = f", off by at most {matrix.noise():.0e} for unit vectors so far" if asked else ""
            way = f"way '{sweep.way}'{' compiled' if made is not None else ''}"
            return f"{matrix.ways.matrix}, {way}, {proven}{mends}{error}; {sweep.describe()}{figures}{scope.process()}"

        return self._guarded(sweep, words, self._choices(sweep, ways, made is not None))

    def _choices(self, sweep: Sweep, ways: Sequence[str], compiled: bool) -> Choices:
        """Which way which batches go, and how many vectors at once. A kept graph and one made anew give the same bits,
        so that it does not matter how many fit this time."""

        def tell() -> dict[str, Any]:
            error = max(self.matrix.noise(), sweep.error)
            return {"way": sweep.way, "graphs": sweep.start, "compiled": compiled, "chunk": sweep.chunk, "error": error}

        def take(told: Any) -> None:
            way, graphs = told["way"], told["graphs"]
            needed = {way} if graphs == 0 or compiled else {way, _KEPT}
            if told["compiled"] != compiled or not needed <= set(ways):
                raise CheckpointError(
                    f"what was saved was formed by {', '.join(sorted(needed))}{' compiled' * told['compiled']}, what "
                    f"can be formed now by {', '.join(ways)}{' compiled' * compiled}. "
                    "Ask for the same `product` and `compile` in the same environment, or give another path"
                )
            sweep.chunk, sweep.error = told["chunk"], told["error"]
            if not compiled:
                sweep.way = way
                sweep.forget(graphs if way != _KEPT else sweep.start)
                sweep.remake = lambda index, batch: self.prepare(_KEPT if index < graphs else way, index, batch)

        return Choices(tell, take)

    def _guarded(self, sweep: Sweep, words: Callable[[], str], choices: Choices) -> LinearOperator:
        """The sweep as an operator that refuses once the parameters were written into."""
        matrix, point, reader = self
        pure = _pure(matrix, point, reader.batches, reader.seed)
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

        def noise() -> float:
            return max(matrix.noise(), sweep.error)

        return LinearOperator(
            matvec,
            point,
            matmat,
            sweep.minibatches,
            words,
            noise,
            sweep.block_ratio,
            principal,
            choices,
            lambda: sweep.kept_bytes,
        )

    def _formed(self, way: str, batch: Any, seed: int, leaves: Sequence[Tensor]) -> Product:
        f = self.matrix.bind(batch, self.point, seed)
        return {**self.matrix.ways.each, **self.matrix.on_request}[way](f, leaves)

    def _proven(self, product: str, index: int, batch: Any, seen: Seen) -> Proof:
        matrix, seed = self.matrix, self.reader.seed + index
        refs, names = tree.leaves(self.point), tree.names(self.point)
        f, loss = matrix.bind(batch, self.point, seed), self._loss(index, batch)
        with scope.untouched(self.reader.device):
            with mended(seen):
                if matrix.confirm is not None:
                    matrix.confirm(f, refs, seen)
                proof = prove(f, matrix.ways, refs, names, seen, None if product == "auto" else product)
            if seen.names:
                check_mends(loss, refs, names, seen, seed)
        return proof

    def _loss(self, index: int, batch: Any) -> products.Function:
        return products.of_leaves(self.matrix.loss, batch, self.point, self.reader.seed + index)

    def _gradient_seconds(self, index: int, batch: Any) -> float:
        f, leaves = self._loss(index, batch), [x.detach().requires_grad_() for x in tree.leaves(self.point)]
        with scope.untouched(self.reader.device), mended():
            return seconds(lambda: products.slopes(f(leaves), leaves), self.reader.device)

    def _compiled(self, way: str, index: int, batch: Any, seen: Seen) -> Prepare | None:
        """Compiled products, or None where that fails or disagrees with the eager product of the first batch."""
        maker = Compiled(partial(self._formed, self.matrix.traced), self.point)
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
        warnings.warn(f"the product is not compiled: {problem}", CompileWarning, stacklevel=5)
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


def _pure(matrix: Matrix[F], params: Tree, batches: Batches, seed: int) -> MatVec:
    def matvec(v: Tree) -> Tree:
        def parts() -> Iterator[tuple[float, Callable[[], Tree]]]:
            for index, batch in enumerate(batches):
                weight = batches.weigh(batch, index)
                yield weight, partial(matrix.pure, params, batch, v, seed + index)

        return average(parts(), batches.reduction)

    return matvec
