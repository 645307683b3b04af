"""How a solver without a search of its own ends: fresh products, the completeness probe, the verdict."""

from __future__ import annotations

import torch
from torch import Tensor

from eigenfunc.certificate import Certified, certify
from eigenfunc.solution import Solution
from eigenfunc.thick_restart import Run
from eigenfunc.verdict import conclude

_PROBE_BUDGET = 100  # products that the completeness probe may take, or a quarter of those spent before


def certificate(run: Run, x: Tensor) -> Certified:
    """Rayleigh–Ritz pairs of k fresh products in the span of x (k, n), counted as verification."""
    solving = run.spent
    certified = certify(run.products, x)
    run.verification = run.products.matvecs - solving
    return certified


def finish(
    run: Run, certified: Certified, *, rounds: int = 1, seed: int, begun: float, remedy: str, throw: bool
) -> Solution:
    """Probe beyond the certified pairs for any that were missed, and conclude."""
    plan, anorm, asym = run.plan, run.anorm, run.asym
    ritz = run.adopt(certified)
    run.anorm = max(run.anorm, anorm)
    passed = torch.ones(plan.k, dtype=torch.bool)
    if plan.k < plan.n:
        run.plan = plan._replace(max_matvecs=run.spent + max(_PROBE_BUDGET, run.spent // 4))
        passed = run.probe(ritz)[1]
    run.plan, run.asym = plan, max(run.asym, asym)
    return conclude(run, certified, passed, rounds=rounds, seed=seed, begun=begun, remedy=remedy, throw=throw)
