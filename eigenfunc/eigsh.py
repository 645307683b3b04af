"""Extreme eigenpairs with a certificate: the host-side driver of thick-restart Lanczos."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eigenfunc import tree
from eigenfunc.certificate import Certified, Products, certify, non_finite
from eigenfunc.errors import InputError, NonFiniteError, NotConverged
from eigenfunc.krylov import basis
from eigenfunc.krylov import lanczos as kernel
from eigenfunc.operator import aslinearoperator
from eigenfunc.solution import Solution, Stats, Status, cluster_bounds
from eigenfunc.tree import Tree

Which = Literal["LM", "LA", "SA", "BE"]

_PROBE = 8  # products spent on looking for eigenvalues that were missed


class Plan(NamedTuple):
    """What is wanted, checked, and the sizes chosen for it."""

    which: str
    top: int
    bottom: int
    tol: float
    n: int
    basis_size: int
    max_matvecs: int

    @property
    def k(self) -> int:
        return self.top + self.bottom

    def wanted(self, theta: Tensor) -> Tensor:
        """Indices into the rising values `theta` of the wanted ones, in the order in which they are reported."""
        return self._ends(theta, self.top, self.bottom)

    def kept(self, theta: Tensor, count: int) -> Tensor:
        """Indices of the `count` pairs to keep at a restart: the wanted and the next in line."""
        extra = count - self.k
        up = extra if self.bottom == 0 else 0 if self.top == 0 else extra - extra // 2
        return self._ends(theta, self.top + up, self.bottom + extra - up)

    def _ends(self, theta: Tensor, top: int, bottom: int) -> Tensor:
        if self.which == "LM":
            return torch.argsort(theta.abs(), descending=True, stable=True)[:top]
        falling = torch.arange(len(theta) - 1, -1, -1)
        if self.which == "SA":
            return torch.arange(bottom)
        return torch.cat([falling[:top], falling[len(theta) - bottom :]])


    def intruded(self, ritz: Ritz, index: Tensor, floor: float) -> bool:
        """Whether an eigenvalue behind an unwanted Ritz value may lie beyond the last wanted one."""
        rest = torch.ones_like(ritz.theta, dtype=torch.bool).index_fill(0, index, False)
        if not bool(rest.any()):
            return False
        theta, reach = ritz.theta[rest], ritz.estimates[rest]
        slack = ritz.estimates[index].clamp_min(floor)
        values = ritz.theta[index]
        if self.which == "LM":
            return bool((theta.abs() + reach).max() > values[-1].abs() + slack[-1])
        above = self.top > 0 and bool((theta + reach).max() > values[self.top - 1] + slack[self.top - 1])
        edge = -1 if self.which == "SA" else self.top
        below = self.bottom > 0 and bool((theta - reach).min() < values[edge] - slack[edge])
        return above or below


class Ritz(NamedTuple):
    theta: Tensor  # (j,) rising, in units of the scaled operator
    s: Tensor  # (j, j) coefficients
    estimates: Tensor  # (j,) residual norms by the recurrence: a reason to stop, never a certificate


class _Run:
    """One run of the solver: the kernel's state and the counts that go with it."""

    def __init__(self, plan: Plan, products: Products, generator: torch.Generator, bar: Any) -> None:
        self.plan = plan
        self.products = products
        self.generator = generator
        self.bar = bar
        self.restarts = 0
        self.verification = products.matvecs
        self.anorm = 0.0
        self.asym = 0.0
        self.cut = False  # the probe dropped a residual: symmetry no longer predicts the couplings

    def start(self, q: Tensor) -> None:
        image = self.products(q)
        self.state = kernel.absorb(kernel.init(q, image, self.plan.basis_size), image, 0, again=self.again)
        self.j = 1

    def again(self, large: Tensor) -> bool:
        """A second Gram–Schmidt pass where it is due; always on accelerators, where asking would stall them."""
        return large.device.type != "cpu" or bool(large)

    @property
    def spent(self) -> int:
        return self.products.matvecs - self.verification

    def advance(self) -> None:
        self.state = kernel.step(self.state, self.products, self.j, again=self.again)
        self.j += 1

    def look(self) -> Ritz:
        """Read the state once and solve the projected problem; replaces a vector lost to a breakdown."""
        j, state = self.j, self.state
        figures = torch.stack([state.anorm, state.asym, state.finite.double()])
        host = torch.cat([figures, state.alive[: j + 1], state.t[: j + 1, :j].flatten()]).cpu()
        anorm, asym, finite = host[:3].tolist()
        if not finite:
            raise NonFiniteError(non_finite(self.products.matvecs))
        self.anorm = max(self.anorm, anorm)
        if not self.cut:
            self.asym = asym
        alive, t = host[3 : 4 + j], host[4 + j :].reshape(j + 1, j)
        if not bool(alive.all()):
            j = self.j = int(torch.argmin(alive))
            t = t[: j + 1, :j]
            if j < self.plan.n:
                self.inject(known=True)
        theta, s = torch.linalg.eigh(t[:j])
        return Ritz(theta, s, (t[j] @ s).abs())

    def inject(self, *, known: bool) -> None:
        fresh = self.products.random(self.generator)
        self.state = kernel.inject(self.state, self.j, fresh, stop=self.j + 1, known=known)

    def floor(self) -> float:
        return self.products.floor(self.anorm)

    def target(self, theta: Tensor) -> Tensor:
        return (self.plan.tol * theta.abs()).clamp_min(self.floor())

    def restart(self, ritz: Ritz, count: int) -> None:
        index = self.plan.kept(ritz.theta, count)
        device = self.state.t.device
        self.state = kernel.restart(self.state, ritz.theta[index].to(device), ritz.s[:, index].to(device))
        self.j = count
        self.restarts += 1

    def converge(self, least: int = 0) -> Ritz:
        """Take at least `least` more products, and on until the pairs look settled or the budget is spent."""
        plan, stop = self.plan, self.products.matvecs + least
        while True:
            if self.j == plan.basis_size or (self.j > plan.k + 1 and self.j % max(1, self.j // 20) == 0):
                ritz = self.look()
                if self.j == plan.n:
                    return ritz
                if self.j > plan.k + 1 and self.products.matvecs >= stop:
                    if self.settled(ritz) or self.spent >= plan.max_matvecs:
                        return ritz
                if self.j == plan.basis_size:
                    self.restart(ritz, plan.k + (plan.basis_size - plan.k) // 2)
            self.advance()

    def settled(self, ritz: Ritz) -> bool:
        """Every wanted estimate meets its target, and no other Ritz interval reaches in among the wanted values."""
        index = self.plan.wanted(ritz.theta)
        theta, estimates = ritz.theta[index], ritz.estimates[index]
        ratio = float((estimates / self.target(theta).clamp_min(1e-300)).max())
        self.show(float(theta[0]), ratio)
        return ratio <= 1 and not self.plan.intruded(ritz, index, self.floor())

    def show(self, first: float, ratio: float) -> None:
        if self.bar is not None:
            self.bar.update(self.products.matvecs - self.bar.n)
            self.bar.set_postfix_str(f"λ₁ {first * self.products.scale:.4g}, residual {ratio:.1g} × tolerance")

    def probe(self, ritz: Ritz) -> tuple[Ritz, Tensor]:
        """Look for eigenvalues that the start vector did not reach.

        A random vector orthogonal to the basis replaces the coming one, and the iteration goes on for eight steps,
        or until the new Ritz values are settled. Returns the new pairs and which of the wanted values moved by more
        than their residual: those from the first such on are not to be trusted yet.
        """
        index = self.plan.wanted(ritz.theta)
        allowed = ritz.estimates[index].clamp_min(self.floor())
        before, begun = ritz.theta[index], self.products.matvecs
        self.restart(ritz, min(self.j, max(self.plan.k, self.plan.basis_size - _PROBE)))
        self.restarts -= 1
        self.cut = True
        self.inject(known=False)
        ritz = self.converge(_PROBE)
        self.verification += self.products.matvecs - begun
        index = self.plan.wanted(ritz.theta)
        return ritz, (ritz.theta[index] - before).abs() > allowed

    def certify(self, ritz: Ritz) -> Certified:
        coefficients = ritz.s[:, self.plan.wanted(ritz.theta)].mT
        x = tree.combine(coefficients.to(self.state.t), tree.rows(self.state.basis, 0, self.j))
        begun = self.products.matvecs
        certified = certify(self.products, x)
        self.verification += self.products.matvecs - begun
        return certified

    def resume(self, ritz: Ritz, certified: Certified) -> None:
        """Go on from the kept pairs along the worst true residual, which the probe had cut off."""
        if self.j == self.plan.basis_size:
            self.restart(ritz, self.plan.k + (self.plan.basis_size - self.plan.k) // 2)
        worst = int(torch.argmax(certified.residuals / self.target(certified.values).clamp_min(1e-300)))
        x = certified.vectors[worst : worst + 1]
        residual = self.products(x) - certified.values[worst].to(x) * x
        self.verification += 1
        self.state = kernel.inject(self.state, self.j, residual, stop=self.j + 1, known=False)


def eigsh(
    A: Any,
    k: int | tuple[int, int] = 6,
    *,
    which: Which = "LM",
    tol: float = 1e-4,
    v0: Tree | None = None,
    seed: int | None = None,
    basis_size: int | None = None,
    max_matvecs: int | None = None,
    progress: bool = False,
    throw: bool = True,
) -> Solution:
    """The k extreme eigenpairs of a symmetric operator, by thick-restart Lanczos, with proof.

    A           `LinearOperator`, or what `aslinearoperator` takes
    k           how many; for BE also (number at the top, number at the bottom)
    which       LM largest in magnitude, LA largest, SA smallest, BE both ends (the odd one at the top)
    tol         relative to each eigenvalue: converged means ‖A v − λ v‖ ≤ max(tol·|λ|, noise)
    v0          start vector, shaped as `A.like`; default: random
    seed        of all random numbers; default: a fresh one, told in `stats.seed`
    basis_size  vectors kept; default 2k+10, at least k+20, for LM and LA; 4k+20, from 60 to 120, for SA and BE, where
                the edge of the spectrum is dense; n where that is at most twice as many
    max_matvecs products that may be spent on solving; those that verify (k fresh ones, the probe, the noise: about
                k + 10) come on top. Default max(1000, 50 k)
    throw       raise `NotConverged`, which carries the solution, unless every pair converged

    Memory: basis_size + 1 vectors, and 2k more at the end. Before a pair is called converged a random vector is
    sent through eight more steps, which must not bring up an eigenvalue that was missed (a further copy of a
    multiple one, or one that `v0` is orthogonal to). That proof is probabilistic: an eigenvalue that is barely
    beyond the k-th can escape it. Residuals come from fresh products.

    Raises `InputError` for arguments out of range, `TreeError` for a `v0` of another structure, `NonFiniteError`
    for a product with NaN, `TransformError` inside a torch.func transform, and `NotConverged`.

    K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix Anal.
    Appl. 22 (2000).
    """
    begun = time.perf_counter()
    A = aslinearoperator(A)
    products = Products(A)
    plan = _plan(k, which, tol, products.size, basis_size, max_matvecs)
    generator, seed = seeded(seed)
    q = start_vector(v0, products, generator)
    with torch.no_grad(), tqdm(disable=not progress, desc=f"eigsh {which}", unit=" products", leave=False) as bar:
        products.calibrate(generator)
        run = _Run(plan, products, generator, bar if progress else None)
        run.start(q)
        certified, passed, rounds = _search(run)
    order = _order(plan, certified.values)
    values, residuals = certified.values[order], certified.residuals[order]
    noise = run.floor()
    met = residuals <= run.target(values)
    symmetric = max(run.asym, certified.asymmetry) <= max(100 * products.eps, 20 * products.noise) * run.anorm
    converged = met & passed & torch.tensor(symmetric)
    status, message = _verdict(run, values, residuals, met, passed, symmetric, rounds)
    stats = Stats(
        matvecs=products.matvecs,
        verification=run.verification,
        passes=products.passes,
        restarts=run.restarts,
        seconds=time.perf_counter() - begun,
        basis_size=plan.basis_size,
        basis_bytes=(plan.basis_size + 1) * products.size * products.dtype.itemsize,
        orthogonality=certified.orthogonality,
        asymmetry=max(run.asym, certified.asymmetry) / run.anorm if run.anorm > 0 else 0.0,
        norm=run.anorm * products.scale,
        seed=seed,
    )
    solution = Solution(
        values=values * products.scale,
        vectors=tree.unravel(certified.vectors[order.to(products.device)], A.like, narrow=False),
        residuals=residuals * products.scale,
        bounds=cluster_bounds(values, residuals, noise) * products.scale,
        converged=converged,
        noise=noise * products.scale,
        which=which,
        tol=tol,
        status=status,
        message=message,
        stats=stats,
    )
    if throw and not solution.success:
        raise NotConverged(f"{status}: {message}", solution)
    return solution


def _search(run: _Run) -> tuple[Certified, Tensor, int]:
    """Converge, probe, certify, and again where the probe or a fresh residual says so.

    Returns the certified pairs, which of them the probe passed, and the number of certificates drawn up.
    """
    plan = run.plan
    passed = torch.ones(plan.k, dtype=torch.bool)
    probed = False
    rounds = 0
    while True:
        ritz = run.converge()
        if run.j < plan.n and not probed:
            ritz, moved = run.probe(ritz)
            passed = moved.cumsum(0) == 0
            probed = bool(passed.all())
            if run.j == plan.n:
                passed = torch.ones_like(passed)
            elif not probed and run.spent < plan.max_matvecs:
                continue
        certified = run.certify(ritz)
        rounds += 1
        met = certified.residuals <= run.target(certified.values)
        if bool(met.all()) or run.j == plan.n or rounds == 4 or run.spent >= plan.max_matvecs:
            return certified, passed, rounds
        run.resume(ritz, certified)
        run.advance()


def _order(plan: Plan, values: Tensor) -> Tensor:
    """The reported order of k values that come rising."""
    if plan.which == "LM":
        return torch.argsort(values.abs(), descending=True, stable=True)
    return torch.arange(plan.k) if plan.which == "SA" else torch.arange(plan.k - 1, -1, -1)


def _verdict(
    run: _Run, values: Tensor, residuals: Tensor, met: Tensor, passed: Tensor, symmetric: bool, rounds: int
) -> tuple[Status, str]:
    products, plan = run.products, run.plan
    if not symmetric:
        return Status.NOT_SYMMETRIC, (
            f"⟨u, A v⟩ and ⟨v, A u⟩ differ by {run.asym / run.anorm:.1e} of ‖A‖, where rounding explains "
            f"{max(100 * products.eps, 20 * products.noise):.1e}; the eigenpairs of a symmetric matrix are not those "
            "of this one. Use (A + Aᵀ)/2, or find what makes the products inconsistent"
        )
    if bool((met & passed).all()):
        return Status.CONVERGED, f"all {plan.k} pairs certified at tol {plan.tol:g}"
    worst = float((residuals / values.abs().clamp_min(1e-300)).max())
    missing = int((~(met & passed)).sum())
    if products.noise > products.roundoff:
        return Status.NONDETERMINISTIC, (
            f"the same product formed twice differs by {products.noise:.1e}, relative, which rounding does not "
            f"explain; {missing} of {plan.k} pairs stay above tol {plan.tol:g}. Freeze the data and the masks, or ask "
            f"for a tol above {10 * products.noise:.0e}"
        )
    if not bool(passed.all()):
        return Status.INCOMPLETE, (
            f"the completeness probe changed the wanted set at max_matvecs={plan.max_matvecs}; raise it, or "
            f"basis_size (now {plan.basis_size})"
        )
    if run.spent < plan.max_matvecs:
        return Status.STAGNATED, (
            f"{missing} of {plan.k} pairs stay above tol {plan.tol:g} in {rounds} certificates, the worst relative "
            f"residual being {worst:.1e}; products in {products.dtype} with noise {products.noise:.1e} give no "
            "more. Use float64, or a larger tol"
        )
    return Status.NOT_CONVERGED, (
        f"{missing} of {plan.k} pairs are above tol {plan.tol:g} after max_matvecs={plan.max_matvecs} products, the "
        f"worst relative residual being {worst:.1e}; raise max_matvecs or basis_size (now {plan.basis_size})"
    )


def _plan(
    k: int | Sequence[int], which: str, tol: float, n: int, basis_size: int | None, max_matvecs: int | None
) -> Plan:
    if which not in ("LM", "LA", "SA", "BE"):
        raise InputError(f"which must be 'LM', 'LA', 'SA' or 'BE', got {which!r}")
    if isinstance(k, (tuple, list)) and which == "BE" and len(k) == 2:
        top, bottom = (whole(part, "k", 0) for part in k)
    else:
        count = whole(k, "k", 1)
        top, bottom = {"BE": ((count + 1) // 2, count // 2), "SA": (0, count)}.get(which, (count, 0))
    wanted = top + bottom
    if not 1 <= wanted <= n:
        raise InputError(f"k = {k} eigenpairs of a matrix of size {n}: k must lie between 1 and n")
    if not (isinstance(tol, (int, float)) and 0 < tol < 1):
        raise InputError(f"tol must lie between 0 and 1 (it is relative to each eigenvalue), got {tol!r}")
    if basis_size is None:
        basis_size = max(2 * wanted + 10, 16) if which in ("LM", "LA") else min(max(4 * wanted + 20, 60), 120)
        basis_size = max(basis_size, wanted + 20)
        if n <= 2 * basis_size:
            basis_size = n
    least = min(wanted + 3, n)
    size = min(whole(basis_size, "basis_size", 1), n)
    if size < least:
        raise InputError(f"basis_size must be at least {least} for k = {wanted} and n = {n}, got {basis_size}")
    budget = max(1000, 50 * wanted) if max_matvecs is None else whole(max_matvecs, "max_matvecs", 1)
    return Plan(which, top, bottom, tol, n, size, budget)


def whole(value: Any, what: str, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise InputError(f"{what} must be an integer of at least {least}, got {value!r}")
    return int(value.__index__())


def seeded(seed: int | None) -> tuple[torch.Generator, int]:
    """A CPU generator of its own, and the seed it starts from."""
    generator = torch.Generator()
    if seed is None:
        seed = generator.seed() % 2**31
    return generator.manual_seed(whole(seed, "seed", 0)), seed


def start_vector(v0: Tree | None, products: Products, generator: torch.Generator) -> Tensor:
    if v0 is None:
        return products.random(generator)
    tree.check_like(v0, products.A.like, "v0")
    flat = tree.ravel(tree.tree_map(lambda leaf: leaf.detach(), v0), products.A.like)[None]
    largest = float(flat.abs().max())
    if largest == 0 or not math.isfinite(largest):
        raise InputError("v0 is zero" if largest == 0 else "v0 holds NaN or infinity")
    q, _, _ = basis.orthonormalise(flat / largest, torch.zeros((), dtype=torch.float64, device=flat.device))
    return q
