"""Symmetric operators whose spectra are known exactly, of any size, each told by one line."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.operator import LinearOperator, aslinearoperator
from eigenfunc.testing.layouts import LAYOUTS, parameter_tree
from eigenfunc.testing.spectra import FAMILIES, spectrum
from eigenfunc.tree import Tree

Count = int | tuple[int, int]
WHICH = ("LM", "LA", "SA", "BE")
EXTREMES = {"float64": 200, "float32": 25}  # powers of ten at which squares leave the range of the dtype
TOLERANCES = {"float64": (1e-2, 1e-4, 1e-6, 1e-8, 1e-9), "float32": (1e-2, 1e-3, 1e-4)}
DENSE = 400  # up to this size a problem may be a dense matrix


class _Told:
    """A repr that leaves out defaults and can be evaluated."""

    def __repr__(self) -> str:
        told = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in told)})"


class Rotation:
    """An orthogonal matrix Q on rows (p, n) at a cost of O(n log n): a permutation, then perhaps sign flips and a
    Hartley transform, then up to three Householder reflections. Float64."""

    def __init__(self, n: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(n, generator=g)
        spins, count = int(torch.randint(2, (), generator=g)), int(torch.randint(4, (), generator=g))
        self.signs = torch.randint(2, (n,), generator=g).double() * 2 - 1 if spins else None
        drawn = torch.randn(count, n, generator=g, dtype=torch.float64)
        self.normals = drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """Q x, row by row."""
        x = x[:, self.order]
        if self.signs is not None:
            x = _hartley(x * self.signs)
        for normal in self.normals:
            x = x - 2 * torch.outer(x @ normal, normal)
        return x

    def backward(self, x: Tensor) -> Tensor:
        """Qᵀ x, row by row."""
        for normal in self.normals.flip(0):
            x = x - 2 * torch.outer(x @ normal, normal)
        if self.signs is not None:
            x = _hartley(x) * self.signs
        return x[:, torch.argsort(self.order)]


def _hartley(x: Tensor) -> Tensor:
    """The orthogonal, symmetric transform of R. N. Bracewell, J. Opt. Soc. Am. 73 (1983): its own inverse."""
    wave: Tensor = torch.fft.fft(x, norm="ortho")
    return wave.real - wave.imag


@dataclass(frozen=True, repr=False)
class Problem(_Told):
    """A = Q diag(scale·(λ + shift)) Qᵀ on a parameter tree, with λ of a family of `FAMILIES`.

    family  name in `FAMILIES`
    n       size, up to the family's largest
    seed    of the spectrum, the eigenvectors and the shapes of the leaves
    dtype   "float64" or "float32", of the vectors
    scale   of all eigenvalues, of either sign
    shift   added to the eigenvalues before scaling
    turn    another number, other eigenvectors
    layout  the container of the leaves: see `parameter_tree`
    dense   a matrix rounded to `dtype`, n at most 400. If not, products are formed in float64 from the factors of Q
            and rounded, so that the spectrum is that of the formula in float32 too
    """

    family: str
    n: int
    seed: int = 0
    dtype: str = "float64"
    scale: float = 1.0
    shift: float = 0.0
    turn: int = 0
    layout: str = "bare"
    dense: bool = False

    @cached_property
    def values(self) -> Tensor:
        """(n,) float64, the eigenvalues by the formula, not sorted."""
        return self.scale * (spectrum(self.family, self.n, self.seed) + self.shift)

    @cached_property
    def rotation(self) -> Rotation:
        return Rotation(self.n, self.seed + 7_919 * self.turn)

    @cached_property
    def unit(self) -> float:
        """‖A‖, or 1 for A = 0: the unit in which nothing leaves the range of float64."""
        return float(self.values.abs().max()) or 1.0

    @property
    def eps(self) -> float:
        return torch.finfo(self.torch_dtype).eps

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def like(self) -> Tree:
        return parameter_tree(self.n, self.layout, self.seed, self.torch_dtype)

    @cached_property
    def matrix(self) -> Tensor:
        """(n, n) in `dtype`."""
        eye = torch.eye(self.n, dtype=torch.float64)
        A = self.rotation.forward(self.rotation.backward(eye) * (self.values / self.unit))
        return ((A + A.mT) / 2 * self.unit).to(self.torch_dtype)

    @cached_property
    def truth(self) -> Tensor:
        """(n,) float64, rising: the eigenvalues of what `operator` multiplies with."""
        if self.dense:
            rising: Tensor = torch.linalg.eigvalsh(self.matrix.double() / self.unit)
            return rising * self.unit
        return self.values.sort().values

    def image(self, x: Tensor) -> Tensor:
        """A x / unit for rows x (p, n), in float64 throughout: independent of `operator`'s rounding."""
        x = x.double()
        if self.dense:
            return x @ (self.matrix.double() / self.unit)
        return self.rotation.forward(self.rotation.backward(x) * (self.values / self.unit))

    def operator(self) -> LinearOperator:
        """A as a `LinearOperator` on `like`."""
        like = self.like
        if self.dense:
            return aslinearoperator(self.matrix, like)

        def products(vs: Tree) -> Tree:
            flat = self.rotation.backward(tree.ravel(vs, like).double()) * self.values
            return tree.unravel(self.rotation.forward(flat), like)

        def product(v: Tree) -> Tree:
            return tree.row(products(tree.lifted(v)), 0)

        return LinearOperator(product, like, products, description=repr(self))

    def start(self, kind: str, k: Count, which: str) -> Tree | None:
        """A start vector on `like`: "eigenvector" (of a wanted value), "orthogonal" to all wanted, "dense" for one
        that is neither; None for "random", which leaves it to the solver."""
        if kind == "random":
            return None
        order = torch.argsort(self.values)
        picked = order[select(self.values[order], k, which)]
        weights = torch.randn(self.n, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        if kind == "eigenvector":
            weights = torch.zeros_like(weights).index_fill(0, picked[-1:], 1.0)
        elif kind == "orthogonal" and len(picked) < self.n:
            weights = weights.index_fill(0, picked, 0.0)
        return tree.row(tree.unravel(self.rotation.forward(weights[None]), self.like), 0)


def ends(k: Count, which: str) -> tuple[int, int]:
    """How many are wanted at the top and at the bottom; all at the top for LM."""
    if isinstance(k, tuple):
        return k
    return {"BE": ((k + 1) // 2, k // 2), "SA": (0, k)}.get(which, (k, 0))


def select(rising: Tensor, k: Count, which: str) -> Tensor:
    """Indices into rising eigenvalues of the wanted ones, in the order in which a solver reports them:
    LM by falling magnitude, LA and BE falling, SA rising."""
    top, bottom = ends(k, which)
    if which == "LM":
        return torch.argsort(rising.abs(), descending=True, stable=True)[:top]
    if which == "SA":
        return torch.arange(bottom)
    falling = torch.arange(len(rising) - 1, -1, -1)
    return torch.cat([falling[:top], falling[len(rising) - bottom :]])


def gap(rising: Tensor, k: Count, which: str) -> float:
    """Distance between the wanted eigenvalues and the nearest that is not, infinite where all are wanted."""
    top, bottom = ends(k, which)
    if which == "LM":
        rising, bottom = rising.abs().sort().values, 0
    if top + bottom >= len(rising):
        return float("inf")
    steps = rising.diff()
    sides = [steps[len(steps) - top]] if top else []
    sides += [steps[bottom - 1]] if bottom else []
    return min(float(side) for side in sides)


@dataclass(frozen=True, repr=False)
class Case(_Told):
    """A problem and what is asked of a solver; its repr reproduces it.

    k           how many pairs; for BE also (number at the top, number at the bottom)
    which, tol  as `eigsh` takes them
    seed        the solver's
    start       see `Problem.start`
    block_size  and basis_size: for solvers that take them; None leaves the choice to the solver
    """

    problem: Problem
    k: Count = 1
    which: str = "LM"
    tol: float = 1e-6
    seed: int = 0
    start: str = "random"
    block_size: int = 1
    basis_size: int | None = None

    @property
    def wanted(self) -> Tensor:
        """The true eigenvalues of the wanted pairs, as a solver should report them."""
        truth = self.problem.truth
        return truth[select(truth, self.k, self.which)]

    @property
    def separated(self) -> bool:
        """Whether what is wanted stands out: by more than rounding, and by more than `tol` of the last wanted."""
        problem = self.problem
        edge = min(float(value) for value in self.wanted.abs())
        return gap(problem.truth, self.k, self.which) > max(self.tol * edge, 64 * problem.eps * problem.unit)


def random_size(rng: random.Random, family: str) -> int:
    """Mostly up to 300, now and then 2,000, rarely 100,000; the family's own sizes often."""
    made = FAMILIES[family]
    if made.sizes and rng.random() < 0.5:
        return rng.choice(made.sizes)
    draw = rng.random()
    if draw < 0.002 and made.largest >= 100_000:
        return 100_000
    return min(int(10 ** rng.uniform(0, 3.3 if draw < 0.03 else 2.48)), made.largest)


def random_case(
    rng: random.Random, *, families: Sequence[str] = tuple(FAMILIES), dtypes: Sequence[str] = tuple(EXTREMES)
) -> Case:
    """A case of any family, dtype, size, scale, container and start vector."""
    family, dtype = rng.choice(families), rng.choice(dtypes)
    n = random_size(rng, family)
    powers: list[Any] = [0, 0, 0, rng.uniform(-6, 6), EXTREMES[dtype], -EXTREMES[dtype]]
    problem = Problem(
        family,
        n,
        seed=rng.randrange(2**20),
        dtype=dtype,
        scale=rng.choice([1, 1, -1]) * 10.0 ** rng.choice(powers),
        shift=rng.choice([0.0] * 4 + [rng.uniform(-2, 2)]),
        layout=rng.choice(LAYOUTS),
        dense=n <= DENSE and rng.random() < 0.5,
    )
    which = rng.choice(WHICH)
    count = min(rng.randrange(1, 9), n)
    top, block = rng.randrange(count + 1), rng.choice([1, 4])
    least = min(count + 3 + min(block, n), n)
    return Case(
        problem,
        (top, count - top) if which == "BE" and rng.random() < 0.3 else count,
        which,
        tol=rng.choice(TOLERANCES[dtype]),
        seed=rng.randrange(2**20),
        start=rng.choice(["random"] * 6 + ["dense", "eigenvector", "orthogonal"]),
        block_size=block,
        basis_size=rng.choice([None, None, min(least + rng.randrange(20), n)]),
    )
