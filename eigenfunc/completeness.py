"""Whether an eigenvalue was missed: a count of those beyond a point, with a stated chance of error.

Let V be all vectors multiplied so far, A V = V T + Q C with the coming vectors Q. By Haynsworth's inertia theorem
(Linear Algebra Appl. 1, 1968) A has as many eigenvalues above λ as T has, and as many more as

    B(λ) = P (A − Q S(λ) Qᵀ) P − λ,    P = 1 − V Vᵀ,    S(λ) = C (T − λ)⁻¹ Cᵀ

has positive ones. Whether B has any is settled by a Lanczos chain from a random vector u ⟂ V: along the chain the share
of an eigenvector in the vectors grows like the Lanczos polynomials outside the spectrum, and no share exceeds one, so
that its share in u must have been tiny, which is improbable for a random u. (J. van Dorsselaer, M. Hochstenbach and H.
van der Vorst, SIAM J. Matrix Anal. Appl. 22, 2000, bound the largest eigenvalue in this way.) Nothing is assumed of the
start vectors of the run, of gaps, or of how well anything has converged.

A run that multiplies blocks proves with c vectors at once, in fewer passes: they are one random vector for I ⊗ B, of
which each eigenvalue is c-fold. The share of a c-fold eigenspace is tiny only if c independent ones all are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc import storage, tree
from eigenfunc.certificate import Products, Riders
from eigenfunc.chance import escape, together
from eigenfunc.krylov import basis
from eigenfunc.plan import PROBE, Plan, Side

CHANCE = 1e-3  # of overlooking an eigenvalue, on each side
_WEAK = 1e-4  # coupling² of a Ritz vector over its distance and the size of the wanted values, to be next to nothing
_HELD = 2**22  # entries of the chain that are held in any case
TINY = 1e-290  # stands for the rounding of a matrix that is exactly zero
_STEPS = 8  # limits tried between the residual of the innermost wanted value and its tolerance
SHARES = (0.8, 0.1, 0.1)  # of CHANCE: what the first chain may settle, the first two together, and all three
CHAINS = len(SHARES)  # random vectors whose evidence is put together before giving up


class Limits(NamedTuple):
    """Values outwards, by sign of the side, beyond which no eigenvalue is missing."""

    beyond: dict[int, float]
    proven: bool  # whether each is within the tolerance of the innermost wanted value of its side


UNKNOWN = Limits({1: math.inf, -1: math.inf}, False)
ALL = Limits({1: -math.inf, -1: -math.inf}, True)


class Span(NamedTuple):
    """What has been multiplied, or part of it, and the coming rows Q (w, n), with T = diag(theta) in its eigenbasis."""

    vectors: Tensor  # (j, n), orthonormal
    coming: Tensor
    theta: Tensor  # (p,)
    s: Tensor  # (j, p): the Ritz vectors, in terms of `vectors`
    coupling: Tensor  # (w, p)

    def bridge(self, point: float) -> Tensor:
        """S(λ), (w, w)."""
        s: Tensor = (self.coupling / (self.theta - point)) @ self.coupling.mT
        return (s + s.mT) / 2

    def loose(self, points: list[float], scale: float) -> Span:
        """The part whose Ritz vectors are so weakly coupled that S(λ) is next to nothing at all of these points."""
        strength = (self.coupling * self.coupling).sum(0)
        away = torch.stack([(self.theta - point).abs() for point in points]).amin(0)
        kept = strength <= _WEAK * scale * away
        return self._replace(theta=self.theta[kept], s=self.s[:, kept], coupling=self.coupling[:, kept])


class Finding(NamedTuple):
    limits: Limits
    direction: Tensor | None  # (1, n): where what may be missing lies, as far as is known


class Halfway(NamedTuple):
    """A search cut short between two products: what the same call needs to go on from there."""

    chain: int  # its number
    spent: int  # products so far, of all chains
    passes: int
    before: list[list[float]]  # by side: the chances that the chains before leave
    alphas: list[float]
    betas: list[float]
    vectors: Tensor  # (held + 2, n): those held, the one before, the one to come
    images: Tensor | None = None  # of the riders, once they have been multiplied


Keep = Callable[[Callable[[], Halfway]], None]


class Points(NamedTuple):
    """Where nothing may lie beyond: `claims` are the limits that follow if nothing is beyond the `tests`."""

    tests: Tensor  # outwards; the first, strictest one settles S(λ)
    claims: Tensor


def search(
    plan: Plan,
    products: Products,
    span: Span,
    wanted: Tensor,
    slack: Tensor,
    anorm: float,
    generator: torch.Generator,
    most: int,
    keep: Keep = lambda halfway: None,
    halfway: Halfway | None = None,
    riders: Riders | None = None,
) -> Finding:
    """Count the eigenvalues beyond the innermost wanted ones, with some `most` products.

    wanted (k,) Ritz values; slack (2, k): how near to each a further eigenvalue does no harm, strictly (its residual)
    and at most (its tolerance). Before each product `keep` may ask for what it takes to go on from there, `halfway`.
    The first product takes `riders` along, which do not count as products of the search.
    """
    slack = slack.clamp_min(TINY)
    floor = products.floor(anorm)
    sides = plan.sides()
    points = [_points(plan, side, wanted, slack) for side in sides]
    settled = [side.sign * float(at.tests[0]) for side, at in zip(sides, points, strict=True)]
    if len(sides) == 2:  # one chain serves both, if S(λ) hardly differs
        span = span.loose(settled, float(wanted.abs().max()))
    bridges = [span.bridge(point) for point in settled]
    bridge = torch.stack(bridges).mean(0)
    evidence = [
        _Evidence(side.sign, at, _apart(bridge, own, side.sign), _apart(own, bridge, side.sign), floor)
        for side, at, own in zip(sides, points, bridges, strict=True)
    ]
    begun, direction = (products.matvecs, products.passes), None
    free = products.matvecs + (0 if riders is None else len(riders.vectors))
    if halfway is not None:
        products.matvecs += halfway.spent
        products.passes += halfway.passes
        if riders is not None and halfway.images is not None:
            riders.images = halfway.images.to(products.device, copy=True)
        for part, before in zip(evidence, halfway.before, strict=True):
            part.before, part.rounds = torch.tensor(before, dtype=torch.float64), halfway.chain
    chained = partial(Chain, products, span, bridge, anorm, generator, riders=riders)
    chain = chained(plan.tried)
    for index in range(CHAINS):
        if index:
            del chain  # before the next takes its memory
            chain = chained(plan.retried)
        if halfway is not None and index < halfway.chain:
            continue  # but its random vector is drawn again
        if halfway is not None and index == halfway.chain:
            chain.take(halfway)
        for _ in chain.steps(partial(_cut, keep, index, begun, evidence)):
            spent = products.matvecs - free
            if chain.length % (1 + chain.length // 16) and spent < most:  # a look costs the cube of the length
                continue
            for part in evidence:
                part.weigh(chain)
            open_ = [part for part in evidence if not part.closed(spent)]
            found = [part for part in evidence if part.missing]
            near = [chain.residual(part.sign) <= float(slack[1].min()) for part in found]
            if (found and (chain.length >= PROBE or all(near))) or not open_ or spent >= most:
                break
            if all(part.drowned(chain) for part in open_):
                break
        for part in evidence:
            part.weigh(chain)
        wanting = [part for part in evidence if part.missing or not part.proven]
        if any(part.missing for part in evidence) or not wanting or products.matvecs - free >= most:
            break
        for part in evidence:
            part.pass_on(chain)
    if wanting:
        direction = chain.ritz_vector(next((part for part in wanting if part.missing), wanting[0]).sign)
    beyond = {**UNKNOWN.beyond, **{part.sign: part.limit for part in evidence}}
    return Finding(Limits(beyond, not wanting), direction)


def _cut(keep: Keep, index: int, begun: tuple[int, int], evidence: list[_Evidence], chain: Chain) -> None:
    before, products = [part.before.tolist() for part in evidence], chain.products
    keep(lambda: chain.halfway(index, products.matvecs - begun[0], products.passes - begun[1], before))


def _apart(a: Tensor, b: Tensor, sign: int) -> float:
    """How far the eigenvalues may lie further out, to one side, where S(λ) is b and not a."""
    return max(float(torch.linalg.eigvalsh(sign * (a - b))[-1]), 0.0)


class _Evidence:
    """What chains say of one side so far: the chance, for each limit, that a value beyond it was overlooked.

    further, less   how far the eigenvalues of the side's own B(λ) may lie outside, and inside, those of the chain's
    """

    def __init__(self, sign: int, points: Points, further: float, less: float, floor: float) -> None:
        self.sign = sign
        self.claims = points.claims
        self.tests = points.tests - further
        self.less = float(points.tests[0]) + less + floor
        self.before = torch.ones_like(points.tests)
        self.rounds = 0
        self.chances = self.before
        self.missing = False

    def weigh(self, chain: Chain) -> None:
        product = self.before * chain.chances(self.tests, self.sign).clamp_max(1.0)
        self.chances = together(product, self.rounds + 1) / SHARES[self.rounds]
        self.missing = chain.outermost(self.sign) > self.less

    def pass_on(self, chain: Chain) -> None:
        """The product of the chances so far goes into the evidence of the next chain."""
        self.before = self.before * chain.chances(self.tests, self.sign).clamp_max(1.0)
        self.rounds += 1

    def drowned(self, chain: Chain) -> bool:
        """Whether the chain goes no further for the rounding of its products."""
        last = self.tests[_STEPS - 1 : _STEPS]
        noisy, pure = chain.chances(last, self.sign), chain.chances(last, self.sign, rounding=0.01)
        return chain.length > 2 and bool(torch.isfinite(noisy)) and bool(noisy > 10 * pure)

    def closed(self, spent: int) -> bool:
        """The strictest limit holds, or, after a few products, any within the tolerance."""
        return self.proven and (spent >= PROBE or bool(self.chances[0] <= CHANCE))

    @property
    def proven(self) -> bool:
        return bool((self.chances[:_STEPS] <= CHANCE).any())

    @property
    def limit(self) -> float:
        sure = self.claims[self.chances <= CHANCE]
        return float(sure.min()) if len(sure) else math.inf


def _points(plan: Plan, side: Side, wanted: Tensor, slack: Tensor) -> Points:
    """The innermost wanted value with its two slacks, then the others: a pair may stand where a later one falls."""
    values = plan.outward(wanted, side.sign)[side.order]
    strict, loose = slack[:, side.order]
    # S(λ) has poles at the Ritz values: keep away from those by half their slack
    options = values[0] + strict[0] + torch.linspace(0, 1, 9, dtype=values.dtype) * (loose[0] - strict[0]).clamp_min(0)
    away = ((options[:, None] - values) / strict).abs().amin(1)
    first = options[int(torch.argmax((away >= 0.5).int()))] if bool((away >= 0.5).any()) else options[away.argmax()]
    reach = (first - values[0]).clamp_min(strict[0])
    widths = torch.logspace(0, 1, _STEPS, dtype=values.dtype, base=float((loose[0] / reach).clamp_min(1.0)))
    near = values[0] + reach * widths
    far = (values + strict)[1:].clamp_min(float(first))
    return Points(torch.cat([near, far]), torch.cat([near, far + strict[1:]]))


class Chain:
    """Lanczos on I ⊗ B(λ) from `count` random vectors, taken as one. It needs three such blocks at a time; more are
    held, to be orthogonal to them and for a Ritz vector: the first few, or all where that costs nothing."""

    def __init__(
        self,
        products: Products,
        span: Span,
        bridge: Tensor,
        anorm: float,
        generator: torch.Generator,
        count: int = 1,
        riders: Riders | None = None,
    ) -> None:
        self.products = products
        self.riders = riders
        self.span = span
        self.bridge = bridge
        self.rounding = products.rounding(anorm)
        self.least = 10 * products.eps * anorm
        self.mix = (span.s @ span.s.mT).to(products.device)
        self.size = products.size - len(span.theta)
        self.count = count
        self.room = max(PROBE, _HELD // (count * products.size))
        row = torch.empty(1, count * products.width, dtype=products.dtype, device=products.device)
        self.rows = basis.allocate(row, self.room, place=storage.place_of(span.vectors, products.device))
        self.held = self.rows[:0]
        start = torch.cat([products.random(generator) for _ in range(count)])
        for _ in range(3):
            start = self._outside(start)
            start = start / tree.norms(start)[:, None].to(start.dtype)
        start = start / math.sqrt(count)
        self.previous, self.q = torch.zeros_like(start), start
        self.alphas: list[float] = []
        self.betas: list[float] = []

    @property
    def length(self) -> int:
        return len(self.alphas)

    def halfway(self, index: int, spent: int, passes: int, before: list[list[float]]) -> Halfway:
        pair = (part.reshape(1, -1).to(self.held.device) for part in (self.previous, self.q))
        vectors = torch.cat([self.held, *pair])
        images = None if self.riders is None else self.riders.images
        return Halfway(index, spent, passes, before, list(self.alphas), list(self.betas), vectors, images)

    def take(self, halfway: Halfway) -> None:
        """Go on from there, with the same start vector."""
        self.alphas, self.betas = list(halfway.alphas), list(halfway.betas)
        parts = torch.split(halfway.vectors, [len(halfway.vectors) - 2, 1, 1])
        self._hold(parts[0])
        pair = (part.to(self.q.device, copy=True) for part in parts[1:])  # aligned in memory as before, for BLAS
        self.previous, self.q = (part.reshape(self.count, -1) for part in pair)

    def _hold(self, vectors: Tensor) -> None:
        count = len(self.held)
        basis.write(self.rows, count, vectors)
        self.held = self.rows[: count + len(vectors)]

    def steps(self, between: Callable[[Chain], None] = lambda chain: None) -> Iterator[None]:
        """One product after the other, until the space is used up; `between` is called before each."""
        while self.betas[-1:] != [0.0]:
            between(self)
            q, beta = self.q, self.betas[-1] if self.betas else 0.0
            w = (self.riders or self.products)(q)
            w = basis.subtract(w, self.bridge.to(w.device) @ tree.gram(self.span.coming, q), self.span.coming)
            w = w - beta * self.previous
            alpha = float(tree.dot(q, w))
            w = self._outside(w - alpha * q)
            length, beta = math.hypot(alpha, beta), float(tree.norm(w))
            if beta < 0.1 * length:
                w = self._outside(w)
                beta = float(tree.norm(w))
            self.products.check_finite(math.isfinite(alpha + beta))
            if self.length < self.room:
                self._hold(q.reshape(1, -1))
            self.alphas.append(alpha)
            self.betas.append(beta if beta > self.least and self.length < self.count * self.size else 0.0)
            if self.betas[-1] > 0:
                self.previous, self.q = q, w / beta
            yield

    def _outside(self, w: Tensor) -> Tensor:
        """w less its parts in V and in the held vectors: last of all, or what is left of them would grow."""
        v = self.span.vectors
        w = basis.subtract(w, self.mix @ tree.gram(v, w), v)
        if len(self.held) and self.room > PROBE:
            flat = w.reshape(1, -1)
            w = basis.subtract(flat, tree.gram(self.held, flat), self.held).reshape(w.shape)
        return w

    def _projected(self, length: int) -> tuple[Tensor, Tensor]:
        off = torch.tensor(self.betas[: length - 1], dtype=torch.float64)
        t = torch.diag(torch.tensor(self.alphas[:length], dtype=torch.float64))
        values, vectors = torch.linalg.eigh(t + torch.diag(off, 1) + torch.diag(off, -1))
        return values, vectors

    def outermost(self, sign: int) -> float:
        """A Rayleigh quotient of B + λ: an eigenvalue lies beyond it."""
        return float((sign * self._projected(self.length)[0]).max())

    def residual(self, sign: int) -> float:
        values, vectors = self._projected(self.length)
        return abs(float(vectors[-1, int(torch.argmax(sign * values))])) * self.betas[-1]

    def ritz_vector(self, sign: int) -> Tensor:
        values, vectors = self._projected(len(self.held))
        weights = vectors[:, int(torch.argmax(sign * values))]
        block: Tensor = tree.combine(weights[None].to(self.q.device), self.held).reshape(self.count, -1)
        if self.count > 1:  # close to a multiple of one eigenvector in each row
            block = tree.combine(torch.linalg.eigh(tree.exact_gram(block, block))[1][:, -1:].mT, block)
        return block

    def chances(self, points: Tensor, sign: int, *, rounding: float = 1.0) -> Tensor:
        """(p,) bounds of the probability that an eigenvalue beyond each point escapes the chain so far.

        An eigenvector has shares c with K c = f, K = [T − λ, β e], |f| the rounding of the products, |c| bounded;
        the largest share in the start vector that this allows is δ, and `escape` the chance of less.
        """
        m = self.length
        if m == self.count * self.size:  # all of the space: the Ritz values are all that there is, up to rounding
            known = points > self.outermost(sign) + 2 * math.sqrt(m) * self.rounding
            return torch.where(known, 0.0, torch.inf).to(points.dtype)
        rounding = max(rounding * self.rounding * math.sqrt(m / self.products.size), 1e-300)
        k = torch.zeros(m, m + 1, dtype=torch.float64)
        k.diagonal().copy_(torch.tensor(self.alphas, dtype=torch.float64))
        k.diagonal(1).copy_(torch.tensor(self.betas, dtype=torch.float64))
        k.diagonal(-1).copy_(torch.tensor(self.betas[:-1], dtype=torch.float64))
        shift = torch.eye(m, m + 1, dtype=torch.float64)
        k = (sign * k - points[:, None, None] * shift) / rounding
        size = torch.diag(torch.cat([torch.full((m,), m**-0.5), torch.ones(1)]).double())
        # large rows first: Householder's QR then keeps the digits of the small ones
        r = torch.linalg.qr(torch.cat([k, size.expand(len(points), -1, -1)], dim=1)).R
        first = torch.eye(m + 1, 1, dtype=torch.float64).expand(len(points), -1, -1)
        share = 3**0.5 * torch.linalg.vector_norm(torch.linalg.solve_triangular(r.mT, first, upper=False), dim=(1, 2))
        chances = escape(share, self.count, self.size)
        return torch.where(points > self.outermost(sign), chances, torch.inf)
