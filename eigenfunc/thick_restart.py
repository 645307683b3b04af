"""Thick-restart Lanczos driven to certified eigenpairs: when to check, restart, probe, certify, and stop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenfunc import completeness, tree
from eigenfunc.certificate import Certified, Products, Riders, certify, where_due
from eigenfunc.checkpoint import Journal, Saved
from eigenfunc.jsonlog import tell
from eigenfunc.krylov import basis as vectors, lanczos as kernel
from eigenfunc.plan import Plan

_BEYOND = 0.3  # of the tolerance is what blocks aim at: vectors just within it make the proof take more passes
ROUNDS = 4  # certificates drawn up before the noise is blamed
_COUNTS = ("j", "width", "rows", "stop", "rounds", "restarts", "verification", "strictness", "anorm", "asym")
_PRODUCTS = ("scale", "noise", "matvecs", "passes")
_PROBE = {"vectors": "probe", "images": "riders"}  # tensors of a probe, by their names in a file


class Ritz(NamedTuple):
    theta: Tensor  # (j,) rising, in units of the scaled operator
    s: Tensor  # (j, j) coefficients
    coupling: Tensor  # (width, j): what A couples each Ritz vector to among the coming rows

    @property
    def estimates(self) -> Tensor:
        """(j,) residual norms by the recurrence: a reason to stop, never a certificate."""
        lengths: Tensor = torch.linalg.vector_norm(self.coupling, dim=0)
        return lengths


class Run:
    """One run of the solver: the kernel's state, and the counts that go with it.

    Rows [0, j) of the basis have been multiplied, `width` rows behind them are to come: a block, and one more for
    each missed eigenvector that a probe brought up.

    Between two products a run can be saved: `snapshot` gives out all there is, and after `restore` it goes on from
    there bit for bit. `journal`, if there is one, does so.
    """

    def __init__(
        self,
        plan: Plan,
        products: Products,
        generator: torch.Generator,
        bar: Any,
        basis_dtype: torch.dtype | None = None,
    ) -> None:
        self.basis_dtype = basis_dtype or products.dtype
        self.plan = plan
        self.products = products
        self.generator = generator
        self.bar = bar
        self.journal: Journal | None = None
        self.halfway: completeness.Halfway | None = None
        self.limits = completeness.UNKNOWN
        self.rounds = 0  # of certificates
        self.stop = 0  # products before which there is no looking for convergence
        self.restarts = 0
        self.verification = products.matvecs
        self.strictness = 1.0
        self.anorm = 0.0
        self.asym = 0.0

    def start(self, q: Tensor, image: Tensor, rows: int | None = None) -> None:
        """From an orthonormal block q (b, n) and its image, with room for so many rows or for those of the plan."""
        b = q.shape[0]
        self.rows = rows or self.plan.basis_size + b
        state = kernel.init(q, image, self.rows, self.basis_dtype, self.plan.place)
        self.state = kernel.absorb(state, image, 0, b, again=where_due)
        self.j = self.width = b

    def snapshot(self) -> Saved:
        """All that the run needs to go on from here, beside the operator and the plan; the basis is not copied."""
        tensors = {**self.state._asdict(), "basis": tree.rows(self.state.basis, 0, self.j + self.width)}
        tensors["generator"] = self.generator.get_state()
        facts: dict[str, Any] = {
            "run": {name: getattr(self, name) for name in _COUNTS},
            "products": {name: getattr(self.products, name) for name in _PRODUCTS},
            "limits": [self.limits.beyond[1], self.limits.beyond[-1], self.limits.proven],
        }
        return Saved(tensors, facts)

    def restore(self, saved: Saved) -> None:
        """Take in a snapshot, of the same operator and plan."""
        tensors, facts, device = saved.tensors, saved.facts, self.products.device
        for name in _COUNTS:
            setattr(self, name, facts["run"][name])
        for name in _PRODUCTS:
            setattr(self.products, name, facts["products"][name])
        above, below, proven = facts["limits"]
        self.limits = completeness.Limits({1: above, -1: below}, proven)
        self.generator.set_state(tensors["generator"])
        like = torch.empty(0, self.products.width, device=device)
        basis = vectors.allocate(like, self.rows, self.basis_dtype, self.plan.place)
        vectors.write(basis, 0, tensors["basis"])
        small = {name: tensors[name].to(device, copy=True) for name in kernel.State._fields if name != "basis"}
        self.state = kernel.State(basis=basis, **small)
        if "probe" in facts:
            kept: dict[str, Any] = {name: tensors[file] for name, file in _PROBE.items() if file in tensors}
            self.halfway = completeness.Halfway(**kept, **facts["probe"])

    def _probing(self, mark: Saved, halfway: Callable[[], completeness.Halfway]) -> None:
        """Within a probe the run is where it was before it, and somewhere along the probe's chain."""

        def state() -> Saved:
            rest = halfway()._asdict()
            kept = {file: rest.pop(name) for name, file in _PROBE.items()}
            return mark.along(Saved({file: x for file, x in kept.items() if x is not None}, {"probe": rest}))

        if self.journal is not None:
            self.journal.tick(state)

    @property
    def spent(self) -> int:
        return self.products.matvecs - self.verification

    @property
    def batch(self) -> int:
        return min(self.plan.block_size, self.width)

    @property
    def full(self) -> bool:
        return self.j + self.width + self.batch > self.rows

    def floor(self) -> float:
        return self.products.floor(self.anorm)

    def target(self, theta: Tensor) -> Tensor:
        return (self.plan.tol * theta.abs()).clamp_min(self.floor())

    def room(self, theta: Tensor) -> Tensor:
        """How far beyond a wanted value a further one does no harm; bounds are widened by what cannot be excluded."""
        return (self.plan.tol * theta.abs()).clamp_min(max(16 * self.floor(), completeness.TINY))

    def advance(self, riders: Riders | None = None) -> None:
        count = self.batch
        self.state = kernel.step(self.state, riders or self.products, self.j, self.width, count, again=where_due)
        self.j += count

    def look(self) -> Ritz:
        """Read the state once and solve the projected problem; replaces vectors lost to a breakdown."""
        j, width, state = self.j, self.width, self.state
        figures = torch.stack([state.anorm, state.asym, state.finite.double()])
        host = torch.cat([figures, state.alive[: j + width], state.t[: j + width, :j].flatten()]).cpu()
        anorm, self.asym, finite = host[:3].tolist()
        self.products.check_finite(bool(finite))
        self.anorm = max(self.anorm, anorm)
        alive, t = host[3 : 3 + j + width] > 0, host[3 + j + width :].reshape(j + width, j)
        if bool(alive.all()):
            theta, s = torch.linalg.eigh(t[:j])
            return Ritz(theta, s, t[j:] @ s)
        if not bool(alive[:j].all()):
            j = self.j = int(torch.argmin(alive.int()))
        for row in range(j + width - 1, j - 1, -1):
            if not bool(alive[row]):
                self._replace(row)
        return self.look()

    def _replace(self, row: int) -> None:
        """A random vector in place of a coming row that was given up, or none where the whole space is used up."""
        last = self.j + self.width - 1
        if last < self.plan.n:
            self.inject(row, self.products.random(self.generator))
            return
        self.state = kernel.swap(self.state, row, last)
        self.width -= 1

    def inject(self, row: int, vector: Tensor) -> None:
        self.state = kernel.inject(self.state, row, vector, stop=self.j + self.width)

    def restart(self, ritz: Ritz, count: int) -> None:
        index = self.plan.kept(ritz.theta, count)
        device = self.state.t.device
        self.state = kernel.restart(self.state, ritz.theta[index].to(device), ritz.s[:, index].to(device), self.width)
        self.j = count

    def insist(self, least: int) -> None:
        """Take at least `least` more products before the next look for convergence."""
        self.stop = self.products.matvecs + max(1, least)

    def converge(self) -> Ritz:
        """Go on until the pairs look settled or the budget is spent. Saving is for the end of a step: what is done
        with it next is decided by a look, which is the same when it is repeated."""
        plan = self.plan
        while True:
            full = self.full
            spacing = max(1, self.j // 32) if self.width == 1 else 1
            if full or self.j >= plan.n or self.width > 1 or (self.j > plan.k + 1 and self.j % spacing == 0):
                ritz = self.look()
                if self.j == plan.n:
                    return ritz
                if self.j > plan.k + 1 and self.products.matvecs >= self.stop and self._done(ritz):
                    return ritz
                if self.full:
                    count = plan.k + (self.rows - self.width - plan.k) // 2
                    self.restart(ritz, min(count, self.rows - self.width - self.batch))
                    self.restarts += 1
            self.advance()
            self.halfway = None
            if self.journal is not None:
                self.journal.tick(self.snapshot, early=full)

    def _grain(self) -> float:
        """What a basis in half precision gives at best, relative to ‖A‖; no use in going on below it."""
        return 0.0 if self.basis_dtype == self.products.dtype else torch.finfo(self.basis_dtype).eps / 16

    def _done(self, ritz: Ritz) -> bool:
        return self.settled(ritz) or self.spent >= self.plan.max_matvecs

    def settled(self, ritz: Ritz) -> bool:
        """Every wanted estimate meets its target, and no other Ritz interval reaches in among the wanted values."""
        index = self.plan.wanted(ritz.theta)
        theta = ritz.theta[index]
        least = max(self.products.aim(self.anorm), self._grain() * self.anorm)
        aimed = self.plan.tol * (_BEYOND if self.plan.block_size > 1 else 1.0)
        target = (aimed * theta.abs()).clamp_min(least)
        ratio = float((ritz.estimates[index] / target.clamp_min(1e-300)).max())
        self._tell(float(theta[0]) * self.products.scale, ratio)
        return ratio <= self.strictness and not self._intruded(ritz, index, target)

    def _tell(self, first: float, ratio: float) -> None:
        if self.bar is not None:
            self.bar.update(self.products.matvecs - self.bar.n)
            self.bar.set_postfix_str(f"λ₁ {first:.4g}, residual {ratio:.1g} × tolerance")
        spent = {"products": self.products.matvecs, "passes": self.products.passes}
        tell("look", **spent, value=first, residual_over_tolerance=ratio)

    def _intruded(self, ritz: Ritz, index: Tensor, target: Tensor) -> bool:
        plan = self.plan
        rest = torch.ones_like(ritz.theta, dtype=torch.bool).index_fill(0, index, False)
        for sign, order in plan.sides():
            inner = int(order[0])
            limit = plan.outward(ritz.theta[index], sign)[inner] + target[inner]
            if bool((plan.outward(ritz.theta, sign) + ritz.estimates > limit)[rest].any()):
                return True
        return False

    def probe(self, ritz: Ritz, mark: Saved | None = None, riders: Riders | None = None) -> completeness.Finding:
        """Look for eigenvalues that the start vectors did not reach. `mark`, by default the run as it is, is what is
        saved on the way; its first product takes `riders` along."""
        begun, mark = self.products.matvecs, mark or self.snapshot()
        halfway, self.halfway = self.halfway, None
        span = completeness.Span(
            vectors=tree.rows(self.state.basis, 0, self.j),
            coming=tree.rows(self.state.basis, self.j, self.j + self.width),
            theta=ritz.theta,
            s=ritz.s,
            coupling=ritz.coupling,
        )
        index = self.plan.wanted(ritz.theta)
        slack = torch.stack([ritz.estimates[index].clamp_min(self.floor()), self.room(ritz.theta[index])])
        finding = completeness.search(
            self.plan,
            self.products,
            span,
            ritz.theta[index],
            slack,
            self.anorm,
            self.generator,
            min(max(100, self.spent), 300),
            partial(self._probing, mark),
            halfway,
            riders,
        )
        self.verification += self.products.matvecs - begun
        return finding

    def known(self, ritz: Ritz) -> completeness.Limits:
        """Of the whole space, up to rounding: the next values outwards are those of the pairs that are not wanted."""
        rest = torch.ones_like(ritz.theta, dtype=torch.bool).index_fill(0, self.plan.wanted(ritz.theta), False)
        others = ritz.theta[rest]
        if len(others) == 0:
            return completeness.ALL
        return completeness.Limits({sign: float((sign * others).max()) + self.floor() for sign in (1, -1)}, True)

    def join(self, ritz: Ritz, vector: Tensor) -> None:
        """Make a vector with a share in what may be missing the first of the coming rows."""
        plan, grown = self.plan, self.width + 1
        room = self.rows - grown - plan.block_size
        if self.j + self.width >= plan.n or room <= plan.k:
            return
        if self.j > room:
            self.restart(ritz, room)
        self.width = grown
        self.inject(self.j + grown - 1, vector)
        self.state = kernel.swap(self.state, self.j, self.j + grown - 1)

    def riding(self, ritz: Ritz) -> Riders | None:
        """The vectors to be certified, for a product of the probe to take along: where blocks are multiplied, passes
        are what counts. Not from a disk, where memory counts more."""
        if self.plan.block_size == 1 or self.plan.basis_path is not None:
            return None
        return Riders(self.products, vectors.orthonormalise(self.vectors(ritz)))

    def vectors(self, ritz: Ritz) -> Tensor:
        """The wanted Ritz vectors (k, n)."""
        coefficients = ritz.s[:, self.plan.wanted(ritz.theta)].mT.to(self.state.t)
        x: Tensor = tree.combine(coefficients, tree.rows(self.state.basis, 0, self.j), self.products.dtype)
        return x

    def certified(self, x: Tensor) -> Certified:
        certified = certify(self.products, x)
        self.verification += len(x)
        return certified

    def adopt(self, certified: Certified) -> Ritz:
        """Take certified pairs, found in whatever way, and the directions of their residuals as the basis."""
        self.start(certified.vectors, certified.images, 2 * self.plan.k)
        return self.look()


def search(run: Run) -> tuple[Certified, completeness.Limits, int]:
    """Converge, probe, certify, and again where the probe or a fresh residual says so.

    Returns the certified pairs, beyond which values the probe found none missing, and the number of certificates.
    """
    plan = run.plan
    while True:
        ritz, riders = run.converge(), None
        if run.j == plan.n:
            run.limits = run.known(ritz)
        elif not run.limits.proven:
            before, riders = run.products.matvecs, run.riding(ritz)
            finding = run.probe(ritz, riders=riders)
            run.limits = finding.limits
            if finding.direction is not None and run.spent < plan.max_matvecs:
                run.join(ritz, finding.direction)
                run.insist((run.products.matvecs - before) // 2)
                continue
        certified = run.certified(run.vectors(ritz)) if riders is None else riders.certified()
        run.rounds += 1
        met = certified.residuals <= run.target(certified.values)
        if bool(met.all()) or run.j == plan.n or run.rounds == ROUNDS or run.spent >= plan.max_matvecs:
            return certified, run.limits, run.rounds
        run.strictness /= 4
