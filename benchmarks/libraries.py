"""Eigenpairs of a Hessian by eigenfunc and three other libraries: each from a model and a batch, set-up included."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from scipy.sparse import linalg
from torch import Tensor

from benchmarks.models import Problem
from benchmarks.overhead import timed
from eigenfunc import eigsh, functional_loss, hessian

_SEED = 0
Settings = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a library returns; `vectors` gives (k, n) in the order of the module's parameters, off the clock."""

    values: Tensor
    vectors: Callable[[], Tensor]
    products: int
    figures: dict[str, Any] = field(default_factory=dict)


class Library(NamedTuple):
    solve: Callable[..., Answer]  # (problem, k, **settings)
    settings: Callable[[Projected, int, float], Iterator[Settings]]  # to try until one is right, the cheapest first


@dataclass(frozen=True)
class Projected:
    """The matrix as Lanczos sees it from the common start vector: T, and the coupling to what follows.

    From that vector every Krylov method does in these coordinates just what it does with the matrix, as long as it
    forms no more products: so the best settings of the other libraries are found here, at no cost.
    """

    t: Tensor  # (steps, steps) float64, tridiagonal up to rounding
    coupling: float

    def top(self, t: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest in magnitude of a leading block of T, and its eigenvectors' last entries."""
        values, s = torch.linalg.eigh(t)
        order = torch.argsort(values.abs(), descending=True)[:k]
        return values[order], s[-1, order]

    def values(self, k: int) -> Tensor:
        return self.top(self.t, k)[0]

    def settled(self, k: int, tol: float) -> bool:
        values, last = self.top(self.t, k)
        return bool((self.coupling * last.abs() <= tol * values.abs()).all())

    def steps(self, k: int, tol: float) -> int:
        """The least number of Lanczos steps after which the k pairs have residuals ≤ tol·|λ| and none is missed."""
        final = self.values(k)
        for m in range(k, len(self.t)):
            values, last = self.top(self.t[:m, :m], k)
            small = self.t[m, m - 1] * last.abs() <= tol * values.abs()
            if bool((small & ((values - final).abs() <= tol * final.abs())).all()):
                return m
        return len(self.t)

    def arpack(self, k: int, tol: float) -> tuple[int, float]:
        """The basis size and the tolerance with which ARPACK forms the fewest products for residuals ≤ tol·|λ|."""
        best = (len(self.t), 3 * k, tol)
        start = np.eye(len(self.t))[0]
        for ncv in (2 * k + 1, 3 * k, 4 * k, 6 * k):
            for own in (10 * tol, 3 * tol, tol, tol / 3):
                A, count = counted(self.t.numpy().__matmul__, len(self.t), np.float64)
                values, x = linalg.eigsh(A, k=k, which="LM", ncv=ncv, tol=own, v0=start)
                residual = np.hypot(np.linalg.norm(A @ x - x * values, axis=0), self.coupling * x[-1])
                products = len(count) - k
                if (residual <= tol * np.abs(values)).all():
                    best = min(best, (products, ncv, own))
        return best[1:]


def counted(product: Callable[[Any], Any], n: int, dtype: Any) -> tuple[linalg.LinearOperator, list[None]]:
    """A SciPy operator, and a list that grows by one a product."""
    count: list[None] = []

    def call(v: Any) -> Any:
        count.append(None)
        return product(v)

    return linalg.LinearOperator((n, n), matvec=call, dtype=dtype), count


def start_vector(p: Problem) -> Tensor:
    return torch.randn(p.size, generator=torch.Generator().manual_seed(_SEED))


def flat(blocks: Sequence[Tensor], k: int) -> Tensor:
    """A stack in blocks as a matrix (k, n)."""
    return torch.cat([x.detach().reshape(k, -1) for x in blocks], dim=1)


def _eigenfunc(p: Problem, k: int, tol: float) -> Answer:
    begun = time.perf_counter()
    A, seconds = timed(hessian(*functional_loss(p.model, p.criterion), p.batch))
    set_up = time.perf_counter() - begun
    named = dict(p.model.named_parameters())
    pieces = torch.split(start_vector(p), [x.numel() for x in named.values()])
    v0 = {name: piece.view_as(x) for (name, x), piece in zip(named.items(), pieces, strict=True)}
    begun = time.perf_counter()
    solution = eigsh(A, k, which="LM", tol=tol, v0=v0, seed=_SEED)
    whole = time.perf_counter() - begun
    figures = {
        "set_up": set_up,
        "outside": 1 - sum(seconds) / whole,
        "passes": solution.stats.passes,
        "verification": solution.stats.verification,
        "way": A.describe(),
    }
    vectors = solution.vectors
    return Answer(solution.values, lambda: flat([vectors[x] for x in named], k), solution.stats.matvecs, figures)


def _eigenthings(p: Problem, k: int, steps: int) -> Answer:
    library = importlib.import_module("hessian_eigenthings")
    A = library.HessianOperator(p.model, [p.batch], lambda model, batch: p.criterion(model(batch[0]), batch[1]))
    found = library.lanczos(A, k=k, max_iter=steps, reorthogonalize=True, which="LM", seed=_SEED)
    return Answer(found.eigenvalues, lambda: found.eigenvectors, found.iterations)


def _eigenthings_settings(projected: Projected, k: int, tol: float) -> Iterator[Settings]:
    steps = projected.steps(k, tol)
    for more in (0, 2, 5, 10):
        yield {"steps": steps + more}


def _curvlinops(p: Problem, k: int, ncv: int, tol: float) -> Answer:
    library = importlib.import_module("curvlinops")
    leaves = list(p.model.parameters())
    H = library.HessianLinearOperator(p.model, p.criterion, leaves, [p.batch], check_deterministic=False)
    A, count = counted(H.to_scipy(np.float32).matvec, p.size, np.float32)
    values, vectors = linalg.eigsh(A, k=k, which="LM", ncv=ncv, tol=tol, v0=start_vector(p).numpy())
    return Answer(torch.from_numpy(values), lambda: torch.from_numpy(vectors.T), len(count))


def _curvlinops_settings(projected: Projected, k: int, tol: float) -> Iterator[Settings]:
    ncv, own = projected.arpack(k, tol)
    for stricter in (1, 2, 5):
        yield {"ncv": ncv, "tol": own / stricter}


def _pyhessian(p: Problem, k: int, tol: float, steps: int, patience: float) -> Answer:
    library = importlib.import_module("pyhessian")
    module = importlib.import_module("pyhessian.hessian")
    product = module.hessian_vector_product
    count: list[None] = []
    stop = time.perf_counter() + patience

    def watched(*args: Any) -> Any:
        count.append(None)
        if time.perf_counter() > stop:
            raise TimeoutError(f"no end after {patience:.0f} s and {len(count)} products")
        return product(*args)

    torch.manual_seed(_SEED)
    with mock.patch.object(module, "hessian_vector_product", watched):
        held = library.hessian(p.model, p.criterion, data=p.batch, cuda=False)
        values, vectors = held.eigenvalues(maxIter=steps, tol=tol, top_n=k)
    rows = [torch.cat([x.detach().flatten() for x in blocks]) for blocks in vectors]
    return Answer(torch.tensor(values), lambda: torch.stack(rows), len(count))


def _pyhessian_settings(projected: Projected, k: int, tol: float) -> Iterator[Settings]:
    """Its own defaults first; its tolerance is on the change of the eigenvalue."""
    yield {"tol": 1e-3, "steps": 100}
    for own in (1e-5, 1e-7):
        yield {"tol": own, "steps": 10_000}


OURS = "eigenfunc"
LIBRARIES = {
    OURS: Library(_eigenfunc, lambda projected, k, tol: iter([{"tol": tol}])),
    "hessian-eigenthings, lanczos": Library(_eigenthings, _eigenthings_settings),
    "curvlinops + SciPy eigsh": Library(_curvlinops, _curvlinops_settings),
    "PyHessian": Library(_pyhessian, _pyhessian_settings),
}
