"""Thick-restart Lanczos driven to certified eigenpairs: when to check, restart, probe, certify, and stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.certificate import Certified, Products, certify, non_finite, whole
from eigenfunc.errors import InputError, NonFiniteError
from eigenfunc.krylov import lanczos as kernel

PROBE = 8  # products spent at least on looking for eigenvalues that were missed
CAUTION = 3.0  # residuals that the probe's Ritz values must keep away by, being far from converged
ROUNDS = 4  # certificates drawn up before the noise is blamed


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

    def reported(self, values: Tensor) -> Tensor:
        """Indices of k rising values in the order in which they are reported."""
        if self.which == "LM":
            return torch.argsort(values.abs(), descending=True, stable=True)
        return torch.arange(self.k) if self.which == "SA" else torch.arange(self.k - 1, -1, -1)

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

    def intruded(self, ritz: Ritz, index: Tensor, floor: float, caution: float) -> Tensor:
        """(k,) bool: whether the interval of some unwanted Ritz value reaches beyond each wanted one.

        The two values next in line count `caution` times their residual: far from convergence a residual says
        little about the outermost eigenvalue behind them. Those that have converged themselves, further copies of a
        wanted one say, have the shorter interval of Kato and Temple, `close` says.
        """
        rest = torch.ones_like(ritz.theta, dtype=torch.bool).index_fill(0, index, False)
        if not bool(rest.any()):
            return torch.zeros(self.k, dtype=torch.bool)
        theta, reach = ritz.theta[rest], self.close(ritz, floor)[rest]
        values, slack = ritz.theta[index], ritz.estimates[index].clamp_min(floor)

        def outermost(rising: Tensor) -> Tensor:
            order = torch.argsort(rising)
            stretch = torch.ones_like(reach).index_fill(0, order[-2:], caution)
            return (rising + stretch * reach).max()

        if self.which == "LM":
            return outermost(theta.abs()) > values.abs() + slack
        above, below = outermost(theta) > values + slack, outermost(-theta) > slack - values
        return torch.where(torch.arange(self.k) < self.top, above, below)

    def close(self, ritz: Ritz, floor: float) -> Tensor:
        """(j,) how far an eigenvalue may be from each Ritz value: the residual r, or r² over the distance to the next
        Ritz value beyond a cluster, where r meets the tolerance. T. Kato, J. Phys. Soc. Japan 4 (1949)."""
        theta, r = ritz.theta, ritz.estimates
        apart = (theta[:, None] - theta[None, :]).abs()
        wide = 10 * torch.maximum(r[:, None], r[None, :]).clamp_min(floor)
        gap = torch.where(apart > wide, apart, torch.inf).amin(1)
        met = (r <= self.tol * theta.abs()) & torch.isfinite(gap)
        return torch.where(met, torch.minimum(r, r * r / gap), r)


class Ritz(NamedTuple):
    theta: Tensor  # (j,) rising, in units of the scaled operator
    s: Tensor  # (j, j) coefficients
    estimates: Tensor  # (j,) residual norms by the recurrence: a reason to stop, never a certificate


def plan_for(
    k: int | Sequence[int], which: str, tol: float, n: int, basis_size: int | None, max_matvecs: int | None
) -> Plan:
    """Check what is asked for and choose what is not; `InputError` says what is wrong."""
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
    least = min(wanted + 4, n)
    size = min(whole(basis_size, "basis_size", 1), n)
    if size < least:
        raise InputError(f"basis_size must be at least {least} for k = {wanted} and n = {n}, got {basis_size}")
    budget = max(1000, 50 * wanted) if max_matvecs is None else whole(max_matvecs, "max_matvecs", 1)
    return Plan(which, top, bottom, tol, n, size, budget)


class Run:
    """One run of the solver: the kernel's state, and the counts that go with it.

    Rows [0, j) of the basis have been multiplied, `width` rows behind them are to come: one, and one more a probe.
    """

    def __init__(self, plan: Plan, products: Products, generator: torch.Generator, bar: Any) -> None:
        self.plan = plan
        self.products = products
        self.generator = generator
        self.bar = bar
        self.rows = plan.basis_size + 1 if plan.basis_size < plan.n else 2 * plan.n + 2
        self.width = 1
        self.adopted = False
        self.restarts = 0
        self.verification = products.matvecs
        self.strictness = 1.0
        self.caution = 1.0
        self.anorm = 0.0
        self.asym = 0.0

    def start(self, q: Tensor) -> None:
        image = self.products(q)
        self.state = kernel.absorb(kernel.init(q, image, self.rows), image, 0, again=self._again)
        self.j = 1

    def adopt(self, certified: Certified) -> Ritz:
        """Take certified pairs, found in whatever way, as the basis; a probe has to go on from there.

        Their residuals do not join the basis, so the couplings to come are not those that symmetry predicts.
        """
        k, x = len(certified.values), certified.vectors
        state = kernel.init(x[:1], x[:1], self.rows)
        state.basis[:k] = x
        state.t[:k, :k] = torch.diag(certified.values)
        state.alive[:k] = 1
        self.anorm = float((certified.values.abs() + certified.residuals).max())
        self.state = state._replace(anorm=torch.full_like(state.anorm, self.anorm))
        self.j, self.width, self.adopted = k, 0, True
        return Ritz(certified.values, torch.eye(k, dtype=torch.float64), certified.residuals)

    def _again(self, large: Tensor) -> bool:
        """A second Gram–Schmidt pass where it is due; always on accelerators, where asking would stall them."""
        return large.device.type != "cpu" or bool(large)

    @property
    def spent(self) -> int:
        return self.products.matvecs - self.verification

    @property
    def full(self) -> bool:
        return self.j + self.width >= self.rows

    def floor(self) -> float:
        return self.products.floor(self.anorm)

    def target(self, theta: Tensor) -> Tensor:
        return (self.plan.tol * theta.abs()).clamp_min(self.floor())

    def advance(self) -> None:
        self.state = kernel.step(self.state, self.products, self.j, self.width, again=self._again)
        self.j += 1

    def look(self) -> Ritz:
        """Read the state once and solve the projected problem; replaces vectors lost to a breakdown."""
        j, width, state = self.j, self.width, self.state
        figures = torch.stack([state.anorm, state.asym, state.finite.double()])
        host = torch.cat([figures, state.alive[: j + width], state.t[: j + width, :j].flatten()]).cpu()
        anorm, asym, finite = host[:3].tolist()
        if not finite:
            raise NonFiniteError(non_finite(self.products.matvecs))
        self.anorm = max(self.anorm, anorm)
        self.asym = 0.0 if self.adopted else asym
        alive, t = host[3 : 3 + j + width] > 0, host[3 + j + width :].reshape(j + width, j)
        if not bool(alive[:j].all()):
            j = self.j = int(torch.argmin(alive.int()))
            t = t[: j + width, :j]
        theta, s = torch.linalg.eigh(t[:j])
        ritz = Ritz(theta, s, torch.linalg.vector_norm(t[j:] @ s, dim=0))
        self.width = min(width, self.plan.n - j)
        for row in range(j, j + self.width):
            if not bool(alive[row]):
                self.inject(row, known=self.width == width)
        return ritz

    def inject(self, row: int, *, known: bool) -> None:
        fresh = self.products.random(self.generator)
        self.state = kernel.inject(self.state, row, fresh, stop=self.j + self.width, known=known)

    def restart(self, ritz: Ritz, count: int) -> None:
        index = self.plan.kept(ritz.theta, count)
        device = self.state.t.device
        self.state = kernel.restart(self.state, ritz.theta[index].to(device), ritz.s[:, index].to(device), self.width)
        self.j = count

    def converge(self, least: int = 0) -> Ritz:
        """Take at least `least` more products, and on until the pairs look settled or the budget is spent."""
        plan, stop = self.plan, self.products.matvecs + least
        while True:
            spacing = max(1, self.j // 32) if self.width == 1 else 1
            if self.full or self.j >= plan.n or (self.j > plan.k + 1 and self.j % spacing == 0):
                ritz = self.look()
                if self.j == plan.n:
                    return ritz
                ripe = self.j > plan.k + 1 and self.products.matvecs >= stop
                if ripe and (self.settled(ritz) or self.spent >= plan.max_matvecs):
                    return ritz
                if self.full:
                    self.restart(ritz, plan.k + (self.rows - self.width - plan.k) // 2)
                    self.restarts += 1
            self.advance()
            if self.products.matvecs < stop:
                self.state = kernel.swap(self.state, self.j, self.j + self.width - 1)

    def settled(self, ritz: Ritz) -> bool:
        """Every wanted estimate meets its target, and no other Ritz interval reaches in among the wanted values."""
        index = self.plan.wanted(ritz.theta)
        theta, estimates = ritz.theta[index], ritz.estimates[index]
        ratio = float((estimates / self.target(theta).clamp_min(1e-300)).max())
        if self.bar is not None:
            self.bar.update(self.products.matvecs - self.bar.n)
            first = float(theta[0]) * self.products.scale
            self.bar.set_postfix_str(f"λ₁ {first:.4g}, residual {ratio:.1g} × tolerance")
        return ratio <= self.strictness and not bool(self.intruded(ritz, index).any())

    def intruded(self, ritz: Ritz, index: Tensor) -> Tensor:
        return self.plan.intruded(ritz, index, self.floor(), self.caution)

    def probe(self, ritz: Ritz) -> tuple[Ritz, Tensor]:
        """Look for eigenvalues that the start vector did not reach.

        A random vector orthogonal to the basis joins the coming rows; the first eight products go to its own Krylov
        space, any more, until the new Ritz values are settled, to all coming rows in turn. Returns the new pairs, and
        (k,) whether each wanted value stood: neither it nor one before it moved by more than its residual, or may
        have another beyond it.
        """
        plan = self.plan
        index = plan.wanted(ritz.theta)
        allowed = ritz.estimates[index].clamp_min(self.floor())
        before, begun = ritz.theta[index], self.products.matvecs
        self.widen(ritz)
        self.caution = CAUTION
        ritz = self.converge(PROBE)
        self.verification += self.products.matvecs - begun
        if self.j == plan.n:
            return ritz, torch.ones(plan.k, dtype=torch.bool)
        index = plan.wanted(ritz.theta)
        doubtful = ((ritz.theta[index] - before).abs() > allowed) | self.intruded(ritz, index)
        ends = [doubtful[: plan.top].cumsum(0), doubtful[plan.top :].flip(0).cumsum(0).flip(0)]
        if plan.which == "SA":
            ends = [doubtful.cumsum(0)]
        return ritz, torch.cat(ends) == 0

    def widen(self, ritz: Ritz) -> None:
        """Make room, and put a random vector first among the coming ones, for the least if they fill up."""
        k = self.plan.k
        grown = min(self.width + 1, self.rows - k - 2, self.plan.n - k)
        self.restart(ritz, min(self.j, max(k, self.rows - grown - PROBE), self.rows - grown - 1, self.plan.n - grown))
        row = self.j + grown - 1
        if grown == self.width:
            coupling = torch.linalg.vector_norm(self.state.t[self.j : self.j + self.width, :k], dim=1)
            row = self.j + int(torch.argmin(coupling))
        known = grown > self.width and not self.adopted
        self.width = grown
        self.inject(row, known=known)
        if known and grown > 1:
            # a vector that is random in all that has not been multiplied, the coming rows included
            weights = torch.randn(grown, generator=self.generator, dtype=torch.float64)
            weights[row - self.j] = (self.plan.n - self.j - grown + 1) ** 0.5
            weights = weights / torch.linalg.vector_norm(weights)
            self.state = kernel.mix(self.state, self.j, row, weights.to(self.state.t.device))
        self.state = kernel.swap(self.state, self.j, row)

    def certify(self, ritz: Ritz) -> Certified:
        coefficients = ritz.s[:, self.plan.wanted(ritz.theta)].mT
        x = tree.combine(coefficients.to(self.state.t), tree.rows(self.state.basis, 0, self.j))
        begun = self.products.matvecs
        certified = certify(self.products, x)
        self.verification += self.products.matvecs - begun
        return certified


def search(run: Run) -> tuple[Certified, Tensor, int]:
    """Converge, probe, certify, and again where the probe or a fresh residual says so.

    Returns the certified pairs, which of them the probe passed, and the number of certificates drawn up.
    """
    plan = run.plan
    passed = torch.ones(plan.k, dtype=torch.bool)
    probed = False
    rounds = 0
    while True:
        ritz = run.converge()
        if run.j == plan.n:
            passed = torch.ones_like(passed)
        elif not probed:
            ritz, passed = run.probe(ritz)
            probed = bool(passed.all())
            if not probed and run.spent < plan.max_matvecs:
                continue
        certified = run.certify(ritz)
        rounds += 1
        met = certified.residuals <= run.target(certified.values)
        if bool(met.all()) or run.j == plan.n or rounds == ROUNDS or run.spent >= plan.max_matvecs:
            return certified, passed, rounds
        run.strictness /= 4
