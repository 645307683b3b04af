"""How a solver without a search of its own ends: fresh products, and a probe for what it may have missed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc import completeness
from eigenfunc.certificate import Certified
from eigenfunc.thick_restart import Run


class Proof(NamedTuple):
    """Certified pairs, what a probe says of them, and where to go on from if it is not enough."""

    certified: Certified
    limits: completeness.Limits
    vectors: Tensor  # (p, n): what the certificate and the probe leave as the best approximations, best first
    complete: bool  # all residuals meet the tolerance, and nothing beyond the wanted values is missing


Probe = Callable[[Certified], completeness.Finding]


def prove(run: Run, x: Tensor, probe: Probe | None = None) -> Proof:
    """Rayleigh–Ritz in the span of x (k, n) by k fresh products, and where that meets the tolerance a probe beyond it:
    `run.probe`, or one of the solver's own. All products count as verification."""
    solving = run.spent
    certified = run.certified(x)
    run.anorm = max(run.anorm, float((certified.values.abs() + certified.residuals).max()))
    met = certified.residuals <= run.target(certified.values)
    limits, vectors = completeness.ALL, certified.vectors
    if len(met) < run.plan.n and bool(met.any()):
        limits, direction = (probe or _probe(run))(certified)
        vectors = vectors if direction is None else torch.cat([direction, vectors])
    run.verification = run.products.matvecs - solving
    return Proof(certified, limits, vectors, bool(met.all()) and limits.proven)


def _probe(run: Run) -> Probe:
    def probe(certified: Certified) -> completeness.Finding:
        asym = run.asym
        ritz = run.adopt(certified)
        finding = completeness.Finding(completeness.ALL, None) if run.j == run.plan.n else run.probe(ritz)
        run.asym = max(run.asym, asym)
        return finding

    return probe
