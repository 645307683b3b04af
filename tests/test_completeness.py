"""The proof that nothing was missed: the law of inertia, the stated chance of error, what a find leads to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from benchmarks.spectra import diagonal, hess
from eigenfunc import completeness, eigsh
from eigenfunc.certificate import Products
from eigenfunc.chance import escape
from eigenfunc.completeness import Chain, Span
from eigenfunc.krylov import lanczos as kernel
from eigenfunc.operator import aslinearoperator
from eigenfunc.plan import plan_for
from eigenfunc.testing import Case, Problem, faults
from tests.helpers import normal, rotated, vector


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spanned(A: Tensor, start: Tensor, steps: int) -> Span:
    """The first Lanczos vectors from `start` (1, n), in the form in which a run hands them on."""

    def matmat(block: Tensor) -> Tensor:
        return block @ A

    q = start / torch.linalg.vector_norm(start)
    state = kernel.absorb(kernel.init(q, matmat(q), steps + 1), matmat(q), 0)
    for j in range(1, steps):
        state = kernel.step(state, matmat, j)
    theta, s = torch.linalg.eigh(state.t[:steps, :steps])
    return Span(state.basis[:steps], state.basis[steps:], theta, s, state.t[steps:, :steps] @ s)


@given(n=st.integers(4, 25), seed=st.integers(0, 10_000), share=st.floats(0.05, 0.95), data=st.data())
@settings(max_examples=60, deadline=None)
def test_eigenvalues_beyond_a_point_are_those_of_both_parts(
    n: int, seed: int, share: float, data: st.DataObject
) -> None:
    values = vector(n, seed)
    A = rotated(values, seed)
    steps = data.draw(st.integers(1, n - 2))
    span = spanned(A, normal(1, n, seed=seed + 1), steps)
    point = float(torch.quantile(torch.cat([values, span.theta]), share))
    if (torch.cat([values, span.theta]) - point).abs().min() < 1e-6:
        return
    P = torch.eye(n).double() - span.vectors.mT @ span.vectors
    B = P @ (A - span.coming.mT @ span.bridge(point) @ span.coming) @ P
    outside = torch.linalg.svd(P).U[:, : n - steps]
    rest = torch.linalg.eigvalsh(outside.mT @ B @ outside)
    assert int((values > point).sum()) == int((span.theta > point).sum()) + int((rest > point).sum())


@pytest.mark.parametrize(("count", "steps"), [(1, 3), (1, 8), (1, 15), (2, 3), (2, 8), (4, 2), (4, 4), (4, 8)])
def test_the_chance_that_an_eigenvalue_escapes_is_at_most_the_one_stated(count: int, steps: int) -> None:
    n, draws = 200, 400
    values = torch.cat([torch.tensor([1.0]), torch.linspace(-0.5, 0.9, n - 1)]).double()
    empty = torch.zeros(1, n).double()
    span = Span(empty[:0], empty, empty[0, :0], empty[:0, :0], empty[:, :0])
    points = torch.tensor([0.999], dtype=torch.float64)
    claims = []
    for seed in range(draws):
        products = Products(aslinearoperator(lambda v: values * v, values))
        chain = Chain(products, span, torch.zeros(1, 1).double(), 1.0, generator(seed), count)
        for _ in chain.steps():
            if chain.length == steps:
                break
        claims.append(float(chain.chances(points, 1)[0]))
    for chance in (0.02, 0.1, 0.3):
        wrong = sum(claim <= chance for claim in claims)
        assert wrong <= draws * chance + 3 * (draws * chance) ** 0.5


@pytest.mark.parametrize("count", [1, 4])
def test_only_a_chain_through_all_of_its_space_leaves_nothing_to_chance(count: int) -> None:
    values = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    empty = torch.zeros(1, 3).double()
    span = Span(empty[:0], empty, empty[0, :0], empty[:0, :0], empty[:, :0])
    products = Products(aslinearoperator(lambda v: values * v, values))
    chain = Chain(products, span, torch.zeros(1, 1).double(), 1.0, generator(0), count)
    chain.alphas, chain.betas = [0.5, 0.5, 0.5], [0.1, 0.1, 0.1]  # as far as it goes for one vector, not for four
    chance = float(chain.chances(torch.tensor([0.95], dtype=torch.float64), 1)[0])
    assert chance == 0 if count == 1 else chance > 1e-8


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_shares_are_as_small_as_the_bound_says_no_more_often(count: int, size: int) -> None:
    draws = normal(20_000, count, size, seed=count)
    shares = torch.linalg.vector_norm((draws / draws.norm(dim=2, keepdim=True))[:, :, 0], dim=1) / count**0.5
    for share in torch.linspace(0.05, 1, 20).tolist():
        stated = escape(share, count, size)
        assert float((shares < share).double().mean()) <= stated + 3 * (stated / 20_000) ** 0.5


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("missing", [1, 3])
def test_copies_that_were_not_found_are_brought_up(missing: int, block_size: int) -> None:
    n = 300
    values = torch.cat(
        [torch.ones(1 + missing), torch.tensor([0.6]), torch.linspace(-0.3, 0.3, n - 2 - missing)]
    ).double()
    span = spanned(torch.diag(values), torch.ones(1, n).double(), 40)
    products = Products(aslinearoperator(lambda v: values * v, values))
    plan = plan_for(2, "LA", 1e-6, n, block_size=block_size)
    wanted = span.theta[plan.wanted(span.theta)]
    assert abs(wanted[1] - 0.6) < 1e-6
    for seed in range(20):
        slack = torch.full((2, 2), 1e-6, dtype=torch.float64)
        finding = completeness.search(plan, products, span, wanted, slack, 1.0, generator(seed), 100)
        assert not finding.limits.proven
        assert finding.direction is not None
        share = torch.linalg.vector_norm(finding.direction[0, : 1 + missing])
        assert share > 0.9 * torch.linalg.vector_norm(finding.direction)


def test_a_proof_takes_few_products_where_the_wanted_values_stand_apart() -> None:
    stats = eigsh(diagonal(hess(20_000)), 5, which="LA", seed=0).stats
    assert stats.verification <= 5 + 12


def test_what_cannot_be_excluded_widens_the_bounds_and_no_more_than_the_tolerance() -> None:
    close = torch.cat([1 - 1e-7 * torch.arange(12), torch.linspace(-0.5, 0.9, 900)]).double()
    solution = eigsh(diagonal(close), 3, which="LA", tol=1e-4, seed=0)
    assert ((solution.values - close[:3]).abs() <= solution.bounds).all()
    assert (solution.bounds <= 1.1e-4 * solution.values).all()


# Problems on which a probe that only looks at Ritz values and residuals called what it had complete.
ONCE_FALSE = (
    Case(
        Problem("outliers", n=139, seed=7, dtype="float32", dense=True), k=2, which="LA", tol=1e-4, start="orthogonal"
    ),
    Case(Problem("low rank", n=61, seed=3, dtype="float32"), k=1, tol=1e-4, start="orthogonal"),
    Case(Problem("Wilkinson", n=201, dtype="float32", dense=True), k=2, which="LA", tol=1e-2),
    Case(Problem("cluster 1e-4", n=97, seed=1), tol=1e-4, seed=97),
    Case(Problem("geometric", n=210, seed=210, shift=2.0), k=5, which="SA", tol=1e-4),
    Case(Problem("cluster 1e-12", n=42, dense=True), k=1, which="SA", tol=1e-9, start="dense"),
    Case(Problem("glued Wilkinson 1e-8", n=42), k=1, tol=1e-8),
)


@pytest.mark.parametrize("case", ONCE_FALSE, ids=lambda case: case.problem.family)
@pytest.mark.parametrize(("basis_size", "block_size"), [(None, 1), (24, 1), (None, 4)])
def test_problems_that_fooled_a_lesser_probe(case: Case, basis_size: int | None, block_size: int) -> None:
    problem = case.problem
    for seed in range(5):
        solution = eigsh(
            problem.operator(),
            case.k,
            which=case.which,  # type: ignore[arg-type]
            tol=case.tol,
            v0=problem.start(case.start, case.k, case.which),
            seed=seed,
            basis_size=basis_size,
            block_size=block_size,
            throw=False,
        )
        assert not faults(case, solution)
