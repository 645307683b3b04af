"""Solvers of other libraries on a diagonal matrix, judged alike: products until every true residual is small enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.sparse import linalg
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.spectra import diagonal
from eigenfunc import eigsh
from eigenfunc.plan import plan_for

Array = np.ndarray[Any, Any]
_SEED = 0
_STEPS = 150  # of LOBPCG, which takes about 40 where it gets there


class Found(NamedTuple):
    values: Array  # (k,), the outermost first
    vectors: Array  # (n, k)
    products: int
    verification: int = 0  # products on top of those, that only verify


@dataclass(frozen=True)
class Case:
    """The k largest (LA) or smallest (SA) of these eigenvalues, to be found from one start vector."""

    spectrum: Tensor
    k: int
    which: Literal["LA", "SA"]

    @cached_property
    def matrix(self) -> Array:
        """The diagonal, in random order."""
        return np.asarray(diagonal(self.spectrum)(torch.ones_like(self.spectrum)))

    @cached_property
    def start(self) -> Array:
        return np.random.default_rng(_SEED).standard_normal(len(self.spectrum))

    @cached_property
    def wanted(self) -> Array:
        return torch.sort(self.spectrum, descending=self.which == "LA").values[: self.k].numpy()

    @property
    def basis_size(self) -> int:
        """What `eigsh` keeps by default, offered to the others too."""
        return plan_for(self.k, self.which, 0.1, len(self.spectrum)).basis_size

    def residuals(self, found: Found) -> Array:
        """‖A x − θ x‖ over |λ|, of unit x."""
        x = found.vectors / np.linalg.norm(found.vectors, axis=0)
        image = self.matrix[:, None] * x
        return np.asarray(np.linalg.norm(image - x * found.values, axis=0) / np.abs(self.wanted))

    def missed(self, found: Found, tol: float) -> bool:
        return bool((np.abs(found.values - self.wanted) > tol * np.abs(self.wanted)).any())


Solver = Callable[[Case, float], Found]


def judged(solver: Solver, case: Case, tol: float) -> Found | None:
    """What the solver finds at `tol`, or the first tenth, hundredth, … of it with all residuals ≤ tol·|λ|.

    None where an eigenvalue is missed, or where no such tolerance helps.
    """
    for power in range(5):
        found = solver(case, tol / 10**power)
        if (case.residuals(found) <= tol).all():
            return None if case.missed(found, tol) else found
    return None


def fewest(solvers: Iterable[Solver], case: Case, tol: float) -> Found | None:
    results = [found for solver in solvers if (found := judged(solver, case, tol)) is not None]
    return min(results, key=lambda found: found.products, default=None)


def our_solver(case: Case, tol: float, basis_size: int | None = None) -> Found:
    A = diagonal(case.spectrum)
    start = torch.from_numpy(case.start)
    solution = eigsh(
        A, case.k, which=case.which, tol=tol, v0=start, seed=_SEED, basis_size=basis_size, throw=False, max_matvecs=9999
    )
    spare = solution.stats.verification
    return Found(solution.values.numpy(), solution.vectors.numpy().T, solution.stats.matvecs - spare, spare)


class _Counted(linalg.LinearOperator):  # type: ignore[misc]
    def __init__(self, case: Case) -> None:
        super().__init__(case.matrix.dtype, (len(case.matrix), len(case.matrix)))
        self.case = case
        self.products = 0

    def _matmat(self, x: Array) -> Array:
        self.products += x.shape[1]
        return self.case.matrix[:, None] * x

    def _matvec(self, x: Array) -> Array:
        return self._matmat(x.reshape(-1, 1))


def _outermost_first(case: Case, values: Array, vectors: Array, products: int) -> Found:
    order = np.argsort(values)[:: -1 if case.which == "LA" else 1]
    return Found(values[order], vectors[:, order], products)


def arpack(case: Case) -> list[Solver]:
    """SciPy's `eigsh`, with a basis of 2k+10 and with as large a one as `eigsh` keeps."""

    def with_basis(ncv: int) -> Solver:
        def solve(case: Case, tol: float) -> Found:
            A = _Counted(case)
            values, vectors = linalg.eigsh(A, k=case.k, which=case.which, ncv=ncv, tol=tol, v0=case.start)
            return _outermost_first(case, values, vectors, A.products)

        return solve

    return [with_basis(ncv) for ncv in sorted({2 * case.k + 10, case.basis_size})]


def primme(case: Case) -> list[Solver]:
    """PRIMME's method of fewest products (GD+k), with bases as large as its own default, 2k+10 and that of `eigsh`;
    restarts as it comes, and keeping few or many vectors; with and without locking; none if it is not installed."""
    try:
        import primme as library
    except ImportError:
        return []

    def with_options(**options: Any) -> Solver:
        def solve(case: Case, tol: float) -> Found:
            A = _Counted(case)
            values, vectors = library.eigsh(
                A,
                case.k,
                which=case.which,
                v0=case.start[:, None],
                method="PRIMME_DEFAULT_MIN_MATVECS",
                convtest=lambda value, _, residual: residual <= tol * abs(value),
                **options,
            )
            return _outermost_first(case, values, vectors, A.products)

        return solve

    solvers = [with_options()]
    for ncv in sorted({2 * case.k + 10, case.basis_size}):
        for kept in ({}, {"minRestartSize": case.k + 5}, {"minRestartSize": (case.k + 3 * ncv) // 4}):
            solvers += [with_options(ncv=ncv, **kept), with_options(ncv=ncv, locking=1, **kept)]
    return solvers


class _ColumnCount(TorchFunctionMode):
    """Counts the columns that a sparse matrix is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.sparse.mm:
            self.products += args[1].shape[1]
        return func(*args, **(kwargs or {}))


def lobpcg(case: Case) -> list[Solver]:
    """`torch.lobpcg`, with no guard vectors and with some; it looks for the largest only."""

    def with_guards(guards: int) -> Solver:
        def solve(case: Case, tol: float) -> Found:
            n = len(case.matrix)
            places = torch.arange(n).expand(2, n)
            A = torch.sparse_coo_tensor(places, torch.from_numpy(case.matrix), check_invariants=True).coalesce()
            X = torch.from_numpy(np.random.default_rng(_SEED).standard_normal((n, case.k + guards)))
            X[:, 0] = torch.from_numpy(case.start)
            with _ColumnCount() as count:
                values, vectors = torch.lobpcg(A, case.k, X=X, tol=tol, niter=_STEPS)
            return _outermost_first(case, values.numpy(), vectors.numpy(), count.products)

        return solve

    return [with_guards(guards) for guards in (0, max(3, case.k // 5))] if case.which == "LA" else []


def unbounded(case: Case, limit: float) -> int:
    """Steps of fully reorthogonalised Lanczos with an unbounded basis until the k wanted residuals are at most `limit`:
    hardly beaten by any method without a preconditioner from this start vector."""
    basis = torch.from_numpy(case.start / np.linalg.norm(case.start))[None]
    matrix = torch.from_numpy(case.matrix)
    t = torch.zeros(0, 0, dtype=torch.float64)
    while True:
        image = matrix * basis[-1]
        column = basis @ image
        for _ in range(2):
            image = image - (basis @ image) @ basis
        t = torch.nn.functional.pad(t, (0, 1, 0, 1))
        t[-1] = t[:, -1] = column
        length = torch.linalg.vector_norm(image)
        _, s = torch.linalg.eigh(t)
        ends = s[-1, -case.k :] if case.which == "LA" else s[-1, : case.k]
        if len(t) > case.k and bool((length * ends.abs() <= limit).all()):
            return len(t)
        basis = torch.cat([basis, (image / length)[None]])


def products(found: Found | None) -> float:
    """How many it took; infinite for what is not right."""
    return math.inf if found is None else found.products
