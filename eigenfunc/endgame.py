"""How a solver without a search of its own ends: fresh products, and a probe for what it may have missed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from eigenfunc import completeness
from eigenfunc.certificate import Certified
from eigenfunc.checkpoint import Saved
from eigenfunc.thick_restart import Run


class Proof(NamedTuple):
    """Certified pairs, and what a probe says of them."""

    certified: Certified
    limits: completeness.Limits
    direction: Tensor | None  # (1, n): where what is missing lies, as far as is known
    complete: bool  # all residuals meet the tolerance, and nothing beyond the wanted values is missing


Probe = Callable[[Certified], completeness.Finding]


def prove(run: Run, x: Tensor, probe: Probe | None = None) -> Proof:
    """Rayleigh–Ritz in the span of x (k, n) by k fresh products, and where that meets the tolerance a probe beyond it:
    `run.probe`, or one of the solver's own. All products count as verification."""
    solving = run.spent
    certified = run.certified(x)
    del x  # as much memory as the pairs
    run.anorm = max(run.anorm, float((certified.values.abs() + certified.residuals).max()))
    met = certified.residuals <= run.target(certified.values)
    finding = completeness.Finding(completeness.ALL if len(met) == run.plan.n else completeness.UNKNOWN, None)
    if len(met) < run.plan.n and bool(met.any()):
        finding = (probe or _probe(run))(certified)
    run.verification = run.products.matvecs - solving
    return Proof(certified, finding.limits, finding.direction, bool(met.all()) and finding.limits.proven)


def _probe(run: Run, mark: Saved | None = None) -> Probe:
    def probe(certified: Certified) -> completeness.Finding:
        asym = run.asym
        ritz = run.adopt(certified)
        finding = completeness.Finding(completeness.ALL, None) if run.j == run.plan.n else run.probe(ritz, mark)
        run.asym = max(run.asym, asym)
        return finding

    return probe


def search_coarse(run: Run) -> tuple[Run, Proof]:
    """Converge a run whose basis is in half precision, and prove what it gives in the precision of the products.

    Such a basis is orthonormal to its own precision only, so that nothing is concluded from it: the Ritz vectors are
    formed in full, made orthonormal, multiplied afresh, and the probe starts from those. Returns a run for the verdict.
    """
    products = run.products
    while True:
        ritz = run.converge()
        begun, mark = products.matvecs, run.snapshot()
        prover = Run(run.plan, products, run.generator, None)
        prover.journal, prover.halfway, run.halfway = run.journal, run.halfway, None
        proof = prove(prover, run.vectors(ritz), _probe(prover, mark))
        run.verification += products.matvecs - begun
        if proof.complete or proof.direction is None or run.spent >= run.plan.max_matvecs:
            prover.verification, prover.restarts = run.verification, run.restarts
            prover.basis_dtype = run.basis_dtype
            return prover, proof
        run.join(ritz, proof.direction)
        run.insist((products.matvecs - begun) // 2)
