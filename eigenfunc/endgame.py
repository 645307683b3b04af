"""How a solver without a search of its own ends: fresh products, the completeness probe, the verdict."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eigenfunc.certificate import Certified, certify
from eigenfunc.solution import Solution
from eigenfunc.thick_restart import Run
from eigenfunc.verdict import conclude

Probe = Callable[[Certified], Tensor]

_PROBE_BUDGET = 100  # or a quarter of what was spent before


def certificate(run: Run, x: Tensor) -> Certified:
    """Rayleigh–Ritz pairs of k fresh products in the span of x (k, n), counted as verification."""
    solving = run.spent
    certified = certify(run.products, x)
    run.verification = run.products.matvecs - solving
    return certified


def budget(run: Run) -> int:
    """Products that a completeness probe may take."""
    return max(_PROBE_BUDGET, run.spent // 4)


def finish(
    run: Run,
    certified: Certified,
    *,
    probe: Probe | None = None,
    rounds: int = 1,
    seed: int,
    begun: float,
    remedy: str,
    throw: bool,
) -> Solution:
    """Look beyond the certified pairs for any that were missed, by `run.probe` or by a probe of the solver's own, which
    says of each pair, as reported, whether it stood; and conclude."""
    plan, solving = run.plan, run.spent
    passed = torch.ones(plan.k, dtype=torch.bool)
    if probe is not None and plan.k < plan.n:
        passed = probe(certified)
        run.verification = run.products.matvecs - solving
    elif plan.k < plan.n:
        anorm, asym = run.anorm, run.asym
        ritz = run.adopt(certified)
        run.anorm = max(run.anorm, anorm)
        run.plan = plan._replace(max_matvecs=solving + budget(run))
        passed = run.probe(ritz)[1]
        run.plan, run.asym = plan, max(run.asym, asym)
    return conclude(run, certified, passed, rounds=rounds, seed=seed, begun=begun, remedy=remedy, throw=throw)
