"""A symmetric matrix as a function v ↦ A v on pytrees, and its algebra."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eigenfunc import bridge, scope, selection, tree
from eigenfunc.choices import NO_CHOICES, Choices, both
from eigenfunc.errors import InputError, TreeError
from eigenfunc.tree import Tree

MatVec = Callable[[Tree], Tree]
Part = tuple[tuple[int, ...], list[Tensor]]  # which leaves, and a stack of vectors (p, *leaf) on them
Principal = Callable[[Sequence[Part]], list[list[Tensor]]]

_DENSE_LIMIT = 4 * 1024**3  # bytes of a dense matrix that may be formed


@dataclass(frozen=True, eq=False)
class LinearOperator:
    """A symmetric linear operator on pytrees shaped like `like`.

    matvec      maps one vector to one vector; called as A(v) or A @ v it is checked first (TreeError)
    like        structure, shapes, dtypes and device of its vectors; the entries are never read
    block       maps a stack (p, *leaf) to a stack, where that is cheaper than one at a time
    minibatches an endless stream of unbiased stand-ins for `matvec`, one mini-batch each, where there are any
    description what `describe()` says, or a function that finds it out
    noise       the largest error so far of a product with a unit vector, beyond rounding: of finite differences, say
    block_ratio measures the time of eight products in a block over that of eight single ones, where they may differ
    principal   products of several principal blocks, each on some leaves (by their positions in `tree.leaves(like)`)
                and with a stack of its own, in one sweep over the data, where that is cheaper than with zeros elsewhere
    kept_bytes  what is kept between products, in bytes
    choices     lets another process form the same products bit for bit; kept by all the algebra below
    """

    matvec: MatVec
    like: Tree
    block: MatVec | None = None
    minibatches: Callable[[], Iterator[MatVec]] | None = None
    description: str | Callable[[], str] = "linear operator"
    noise: Callable[[], float] = float
    block_ratio: Callable[[], float] | None = None
    principal: Principal | None = None
    choices: Choices = NO_CHOICES
    kept_bytes: Callable[[], int] = int

    @property
    def size(self) -> int:
        """n, the number of entries of a vector."""
        return tree.size(self.like)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size, self.size)

    def describe(self) -> str:
        return f"{self._words()}, n = {self.size}"

    def _words(self) -> str:
        return self.description if isinstance(self.description, str) else self.description()

    def __repr__(self) -> str:
        return f"<LinearOperator: {self.describe()}>"

    def __call__(self, v: Tree) -> Tree:
        tree.check_like(v, self.like, "v")
        return self.matvec(v)

    def __matmul__(self, v: Tree) -> Tree:
        return self(v)

    def matmat(self, vs: Tree) -> Tree:
        """Products with a stack (p, *leaf) of vectors: one sweep over the data, if there is data."""
        tree.check_like(vs, self.like, "vs", stacked=True)
        return self._matmat(vs)

    def _matmat(self, vs: Tree) -> Tree:
        if self.block is not None:
            return self.block(vs)
        count = tree.leaves(vs)[0].shape[0]
        return tree.stack([self.matvec(tree.row(vs, i)) for i in range(count)])

    def blockwise(self, parts: Sequence[Part]) -> list[list[Tensor]]:
        """The images under `principal`, or else by zeros elsewhere, of all vectors in one stack."""
        if self.principal is not None:
            return self.principal(parts)
        refs, rebuild = tree.flatten(self.like)
        edges = [0, *itertools.accumulate(len(vs[0]) for _, vs in parts)]
        whole = [ref.new_zeros((edges[-1], *ref.shape)) for ref in refs]
        for (chosen, vs), (start, stop) in zip(parts, itertools.pairwise(edges), strict=True):
            for i, x in zip(chosen, vs, strict=True):
                whole[i][start:stop] = x
        images = tree.leaves(self._matmat(rebuild(whole)))
        spans = zip(parts, itertools.pairwise(edges), strict=True)
        return [[images[i][start:stop] for i in chosen] for (chosen, _), (start, stop) in spans]

    def _with(
        self,
        change: Callable[[MatVec], MatVec],
        description: str,
        *,
        stacked: MatVec | None,
        factor: float = 1.0,
        principal: Principal | None = None,
    ) -> LinearOperator:
        streams = self.minibatches
        return LinearOperator(
            change(self.matvec),
            self.like,
            stacked,
            None if streams is None else lambda: (change(product) for product in streams()),
            description,
            lambda: factor * self.noise(),
            self.block_ratio,
            None if self.principal is None else principal,
            self.choices,
            self.kept_bytes,
        )

    def __add__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        tree.check_like(other.like, self.like, "the second summand")
        return LinearOperator(
            lambda v: tree.add(self.matvec(v), other.matvec(v)),
            self.like,
            lambda vs: tree.add(self._matmat(vs), other._matmat(vs)),
            description=f"({self._words()}) + ({other._words()})",
            noise=lambda: self.noise() + other.noise(),
            principal=None
            if self.principal is None or other.principal is None
            else lambda parts: tree.add(self.blockwise(parts), other.blockwise(parts)),
            choices=both(self.choices, other.choices),
            kept_bytes=lambda: self.kept_bytes() + other.kept_bytes(),
        )

    def __mul__(self, c: float) -> LinearOperator:
        if not isinstance(c, (int, float, Tensor)):
            return NotImplemented
        return self._with(
            lambda matvec: lambda v: tree.scale(c, matvec(v)),
            f"{c:g} · ({self._words()})",
            stacked=lambda vs: tree.scale(c, self._matmat(vs)),
            factor=abs(float(c)),
            principal=lambda parts: tree.scale(c, self.blockwise(parts)),
        )

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return -1.0 * self

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return self + -other

    def shift(self, sigma: float) -> LinearOperator:
        """A + σ I: every eigenvalue moves up by σ."""
        return self._with(
            lambda matvec: lambda v: tree.add(matvec(v), tree.scale(sigma, v)),
            f"({self._words()}) + {sigma:g} I",
            stacked=lambda vs: tree.add(self._matmat(vs), tree.scale(sigma, vs)),
            principal=lambda parts: tree.add(self.blockwise(parts), tree.scale(sigma, [vs for _, vs in parts])),
        )

    def precondition(self, d: Tree) -> LinearOperator:
        """D^-½ A D^-½ for the positive diagonal d, shaped as `like`, in its dtypes or others.

        Its eigenvalues are those of D⁻¹A, and of the pencil A x = λ D x: with d from `adam_preconditioner`, those that
        decide on the stability of Adam (J. Cohen et al., Adaptive gradient methods at the edge of stability, 2022). An
        eigenvector y of it stands for x = D^-½ y. `d` is read once, here.

        Raises `TreeError` where d does not match `like`, `InputError` where an entry is not positive and finite.
        """
        tree.check_like(d, self.like, "d", dtypes=False)
        for name, leaf in zip(tree.names(self.like), tree.leaves(d), strict=True):
            bad = leaf[~(torch.isfinite(leaf) & (leaf > 0))]
            if len(bad):
                where = f"d: leaf '{name}'" if name else "d"
                raise InputError(
                    f"{where} holds {float(bad[0]):g} ({len(bad)} of its {leaf.numel()} entries are not positive and "
                    "finite), which is no preconditioner: add a small constant, or restrict A and d to other leaves"
                )
        wide = tree.tree_map(lambda leaf: leaf.detach().to(torch.promote_types(leaf.dtype, torch.float32)), d)
        least = min(float(leaf.min()) for leaf in tree.leaves(wide) if leaf.numel())
        s = tree.tree_map(torch.rsqrt, wide)
        scales = tree.leaves(s)

        def scaled(x: Tree, by: Tree = s) -> Tree:
            return tree.tree_map(lambda leaf, c: (leaf * c).to(leaf.dtype), x, by)

        def principal(parts: Sequence[Part]) -> list[list[Tensor]]:
            within = [[scales[i] for i in chosen] for chosen, _ in parts]
            inner = [(chosen, scaled(vs, c)) for (chosen, vs), c in zip(parts, within, strict=True)]
            return [scaled(image, c) for image, c in zip(self.blockwise(inner), within, strict=True)]

        return self._with(
            lambda matvec: lambda v: scaled(matvec(scaled(v))),
            f"D^-½ ({self._words()}) D^-½",
            stacked=lambda vs: scaled(self._matmat(scaled(vs))),
            factor=1 / least,
            principal=principal,
        )

    def deflate(self, pairs: Any) -> LinearOperator:
        """A − Σ λ_i v_i v_iᵀ for `pairs` with `values` (k,) and orthonormal `vectors` (k, *leaf): a Solution, say."""
        values, vectors = pairs.values, pairs.vectors
        tree.check_like(vectors, self.like, "pairs.vectors", stacked=True, dtypes=False)

        def remove(products: Tree, vs: Tree) -> Tree:
            weights = tree.gram(vs, vectors)
            found = tree.combine(weights * values.to(weights), vectors)
            return tree.tree_map(lambda leaf, part: (leaf - part).to(leaf.dtype), products, found)

        def single(matvec: MatVec) -> MatVec:
            def product(v: Tree) -> Tree:
                lifted = tree.lifted(v)
                return tree.row(remove(tree.lifted(matvec(v)), lifted), 0)

            return product

        return self._with(
            single,
            f"({self._words()}) without {len(values)} pairs",
            stacked=lambda vs: remove(self._matmat(vs), vs),
        )

    def restrict(self, select: selection.Select) -> LinearOperator:
        """The principal block of A on some leaves; its vectors are dicts from leaf name to tensor.

        `select` is a predicate on names, a glob pattern, a name or a dotted prefix, or a list of those. A product of
        a curvature matrix so restricted costs less than a whole one: with kept graphs, the pull-back of the chosen
        leaves' gradient to these leaves. Raises `InputError` where nothing is selected, `TreeError` where two selected
        leaves have the same dotted name.
        """
        labels, refs, rebuild = tree.names(self.like), *tree.flatten(self.like)
        picked = set(selection.chosen(labels, select, "restrict"))
        if doubled := next((name for name in labels if name in picked and labels.count(name) > 1), None):
            raise TreeError(f"restrict: two leaves are called '{doubled}', so that it does not say which is meant")
        by_name = dict(zip(labels, refs, strict=True))
        like = {name: by_name[name] for name in tree.filled_names(self.like) if name in picked}
        names, back = tree.names(like), tree.flatten(like)[1]
        positions = tuple(labels.index(name) for name in names)

        def within(matvec: MatVec) -> MatVec:
            def product(v: Tree) -> Tree:
                pairs = zip(labels, refs, strict=True)
                whole = rebuild([v[name] if name in picked else torch.zeros_like(ref) for name, ref in pairs])
                image = tree.leaves(matvec(whole))
                return back([image[i] for i in positions])

            return product

        def stacked(vs: Tree) -> Tree:
            return back(self.blockwise([(positions, tree.leaves(vs))])[0])

        def single(v: Tree) -> Tree:
            if self.principal is None or scope.inside_transform():
                return within(self.matvec)(v)
            return tree.row(stacked(tree.lifted(v)), 0)

        def principal(parts: Sequence[Part]) -> list[list[Tensor]]:
            return self.blockwise([(tuple(positions[i] for i in chosen), vs) for chosen, vs in parts])

        streams = self.minibatches
        return LinearOperator(
            single,
            like,
            stacked,
            None if streams is None else lambda: (within(product) for product in streams()),
            lambda: f"block {', '.join(like)} of ({self._words()})",
            self.noise,
            principal=None if self.principal is None else principal,
            choices=self.choices,
            kept_bytes=self.kept_bytes,
        )

    def blocks(self, by: selection.By = "module") -> dict[str, LinearOperator]:
        """The principal blocks of A on groups of leaves, by group in the order of the leaves: see `restrict`.

        by   "module", one block a module (the dotted prefix of its parameters' names); "parameter"; a function from a
             name to that of its group; or a list of selections as `restrict` takes them, one block each, under the
             selection

        Raises `InputError` where `by` is none of these or a selection selects nothing.
        """
        groups = selection.grouped(self.like, by, "by")
        return {group: self.restrict(set(members).__contains__) for group, members in groups.items()}

    def to_dense(self, *, chunk: int = 128) -> Tensor:
        """The matrix (n, n), in the order of `tree.ravel`; raises `InputError` where it would take over 4 GiB."""
        n, dtype = self.size, tree.work_dtype(self.like)
        if n * n * dtype.itemsize > _DENSE_LIMIT:
            raise InputError(
                f"a dense matrix of size {n} takes {tree.gibibytes(n * n * dtype.itemsize)}, "
                f"over the limit of {tree.gibibytes(_DENSE_LIMIT)}; restrict the operator or use eigsh"
            )
        out = torch.empty(n, n, dtype=dtype, device=tree.device(self.like))
        for start in range(0, n, chunk):
            unit = out.new_zeros(min(chunk, n - start), n)
            unit.diagonal(start).fill_(1)
            out[start : start + chunk] = tree.ravel(self._matmat(tree.unravel(unit, self.like)), self.like)
        return out

    def to_scipy(self) -> Any:
        """This operator for SciPy: a `scipy.sparse.linalg.LinearOperator` (n, n) on NumPy vectors.

        Entries are in the order of `tree.ravel`, float64, or float32 where no leaf is wider; the products are formed
        where the operator lives, those of `matmat` in one sweep over the data. Complex vectors are multiplied by their
        real and imaginary parts. Raises `InputError` without SciPy.
        """

        def rows(flat: Tensor) -> Tensor:
            vs = tree.unravel(flat, self.like)
            image = tree.lifted(self.matvec(tree.row(vs, 0))) if len(flat) == 1 else self._matmat(vs)
            return tree.ravel(image, self.like)

        return bridge.scipy_operator(self.size, tree.work_dtype(self.like), tree.device(self.like), rows)


def aslinearoperator(A: Any, like: Tree | None = None) -> LinearOperator:
    """Make a `LinearOperator` of what stands for a symmetric matrix.

    A   a dense symmetric tensor (n, n); a callable v ↦ A v together with `like`, a pytree shaped as its vectors;
        or an object with a `shape` (n, n) and `matvec` or `@`, such as a SciPy LinearOperator or sparse matrix, a
        NumPy array, or an operator of another library. Those receive NumPy vectors, or tensors if they fail on them.

    Raises `InputError` for a matrix that is not square, symmetric and finite, or where `like` is missing;
    `TreeError` where `like` cannot hold vectors.
    """
    if isinstance(A, LinearOperator):
        return A
    if like is not None:
        tree.check_vector_space(like, "like")
    if isinstance(A, np.ndarray):
        A = torch.tensor(A)
    if isinstance(A, Tensor):
        return _dense(A, like)
    if hasattr(A, "shape") and (hasattr(A, "matvec") or hasattr(A, "__matmul__")):
        return _foreign(A)
    if callable(A):
        if like is None:
            raise InputError(
                "a callable needs `like`, a pytree shaped as its vectors: aslinearoperator(A, like=params)"
            )
        return LinearOperator(A, like, description="user's product")
    raise InputError(
        f"cannot read a matrix out of a {type(A).__name__}: pass a tensor, a callable with `like`, "
        "or an object with `shape` and `matvec`"
    )


def _dense(A: Tensor, like: Tree | None) -> LinearOperator:
    if A.ndim != 2 or A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise InputError(f"a matrix must be square and not empty, this one has shape {tuple(A.shape)}")
    if not A.is_floating_point():
        raise InputError(f"a matrix of dtype {A.dtype}: cast it to a real floating-point dtype")
    A = A.detach()
    if not torch.isfinite(A).all():
        raise InputError("the matrix holds NaN or infinity")
    largest, skew = A.abs().max(), (A - A.mT).abs().max()
    if skew > 100 * torch.finfo(A.dtype).eps * largest:
        raise InputError(
            f"the matrix is not symmetric: max |A - Aᵀ| = {skew:.3g}, max |A| = {largest:.3g}; use (A + Aᵀ)/2 if meant"
        )
    space = A[0] if like is None else like
    if tree.size(space) != A.shape[0]:
        raise InputError(f"`like` has {tree.size(space)} entries, the matrix {A.shape[0]} rows")

    def product(v: Tree) -> Tree:
        return tree.unravel(tree.ravel(v, space).to(A) @ A, space)

    return LinearOperator(product, space, product, description="dense matrix")


def _foreign(A: Any) -> LinearOperator:
    if len(A.shape) != 2 or A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise InputError(f"a matrix must be square and not empty, this one has shape {tuple(A.shape)}")
    given = getattr(A, "dtype", None)
    dtype = given if isinstance(given, torch.dtype) else torch.from_numpy(np.zeros(0, given or np.float64)).dtype
    if not dtype.is_floating_point:
        raise InputError(f"an operator of dtype {given}: eigenfunc takes real floating-point ones")
    like = torch.zeros(A.shape[0], dtype=dtype)
    apply = A.matvec if hasattr(A, "matvec") else A.__matmul__
    takes_tensors = isinstance(given, torch.dtype)

    def product(v: Tensor) -> Tensor:
        out = apply(v if takes_tensors else v.detach().cpu().numpy())
        return torch.as_tensor(np.asarray(out) if not isinstance(out, Tensor) else out).to(v).reshape(v.shape)

    return LinearOperator(product, like, description=f"{type(A).__module__.split('.')[0]} operator")
