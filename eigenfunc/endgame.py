"""How a solver without a search of its own ends: fresh products, and a probe for what it may have missed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc.certificate import Certified, certify
from eigenfunc.thick_restart import Run

_PROBE_BUDGET = 100  # or a quarter of what was spent before


class Proof(NamedTuple):
    """Certified pairs, what a probe says of them, and where to go on from if it is not enough."""

    certified: Certified
    passed: Tensor  # (k,) bool, as reported: neither the pair nor one before it may have another beyond it
    vectors: Tensor  # (p, n): what the certificate and the probe leave as the best approximations, best first
    complete: bool  # all residuals meet the tolerance, and all pairs passed


Probe = Callable[[Certified], tuple[Tensor, Tensor]]  # to `passed` and `vectors` of a proof


def budget(run: Run) -> int:
    """Products that a probe may take."""
    return max(_PROBE_BUDGET, run.spent // 4)


def prove(run: Run, x: Tensor, probe: Probe | None = None) -> Proof:
    """Rayleigh–Ritz in the span of x (k, n) by k fresh products, and where that meets the tolerance a probe beyond it:
    `run.probe`, or one of the solver's own. All products count as verification."""
    solving = run.spent
    certified = certify(run.products, x)
    run.anorm = max(run.anorm, float((certified.values.abs() + certified.residuals).max()))
    met = certified.residuals <= run.target(certified.values)
    passed, vectors = torch.ones_like(met), certified.vectors
    if len(met) < run.plan.n and bool(met.any()):
        passed, vectors = (probe or _probe(run))(certified)
    run.verification = run.products.matvecs - solving
    return Proof(certified, passed, vectors, bool(met.all() and passed.all()))


def _probe(run: Run) -> Probe:
    def probe(certified: Certified) -> tuple[Tensor, Tensor]:
        plan, anorm, asym = run.plan, run.anorm, run.asym
        ritz = run.adopt(certified)
        run.anorm = max(run.anorm, anorm)
        run.plan = plan._replace(max_matvecs=run.spent + budget(run))
        ritz, passed = run.probe(ritz)
        run.plan, run.asym = plan, max(run.asym, asym)
        return passed, certified.vectors if bool(passed.all()) else run.certify(ritz).vectors

    return probe
