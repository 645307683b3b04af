"""Subspace iteration and LOBPCG against dense truth, what they cost, and where they must say no."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.func import vmap

from benchmarks.spectra import diagonal, hess
from eigenfunc import NotConverged, Solution, Status, aslinearoperator, lobpcg, subspace_iteration
from eigenfunc.errors import InputError, NonFiniteError, TransformError, TreeError
from tests.helpers import Counted, assert_certified, never, on_tree, rotated, symmetric

Solver = Callable[..., Solution]
SOLVERS: dict[str, tuple[Solver, dict[str, Any]]] = {
    "LM": (subspace_iteration, {}),
    "LA": (lobpcg, {"which": "LA"}),
    "SA": (lobpcg, {"which": "SA"}),
}


def solve(which: str, A: Any, k: int, **options: Any) -> Solution:
    solver, fixed = SOLVERS[which]
    return solver(A, k, **fixed, **options)


@st.composite
def spectra(draw: st.DrawFn) -> Tensor:
    n = draw(st.integers(1, 40))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    i = torch.arange(1, n + 1).double()
    kind = draw(st.sampled_from(["powers", "outliers", "multiple", "pairs", "low rank", "one value", "zero"]))
    return {
        "powers": 0.8**i * torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0),
        "outliers": torch.cat([1 / i[:8], 0.01 * torch.rand(n, generator=g).double()])[:n],
        "multiple": torch.cat([torch.ones(min(4, n)).double(), 0.7 * torch.rand(n, generator=g).double()])[:n],
        "pairs": torch.stack([0.7**i, -(0.7**i)], 1).flatten()[:n],
        "low rank": torch.where(i <= 3, 1 / i, 0.0),
        "one value": torch.full((n,), -2.0).double(),
        "zero": torch.zeros(n).double(),
    }[kind]


@given(values=spectra(), which=st.sampled_from(sorted(SOLVERS)), data=st.data(), seed=st.integers(0, 10_000))
@settings(max_examples=120, deadline=None)
def test_what_is_called_converged_lies_within_its_bounds_of_the_dense_truth(
    values: Tensor, which: str, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(1, min(6, len(values))))
    dtype, tol = data.draw(st.sampled_from([(torch.float64, 1e-6), (torch.float32, 1e-4)]))
    A = rotated(values, seed, dtype)
    assert_certified(solve(which, A, k, tol=tol, seed=seed), A, k, which)


@pytest.mark.parametrize("which", SOLVERS)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_all_eigenpairs_of_small_matrices_can_be_asked_for(which: str, n: int) -> None:
    A = symmetric(n, 3)
    for k in range(1, n + 1):
        assert_certified(solve(which, A, k, tol=1e-8, seed=0), A, k, which)


@pytest.mark.parametrize("which", SOLVERS)
@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float64, 200), (torch.float64, -200), (torch.float32, 25)])
def test_extreme_scales_give_the_same_relative_answer(which: str, dtype: torch.dtype, exponent: int) -> None:
    truth = torch.cat([1 / torch.arange(1, 6).double(), torch.linspace(0.05, 0.1, 20).double()])
    truth = -truth if which == "SA" else truth
    c = 10.0**exponent
    A = rotated(truth, 0, dtype) * c
    solution = solve(which, A, 4, tol=1e-5, seed=0)
    assert ((solution.values / c - truth[:4]).abs() <= solution.bounds / c).all()
    if which != "LM":
        preconditioned = solve(which, A, 4, tol=1e-5, seed=0, preconditioner=lambda v: v / c)
        assert ((preconditioned.values / c - truth[:4]).abs() <= preconditioned.bounds / c).all()


@pytest.mark.parametrize("which", SOLVERS)
def test_trees_of_mixed_dtypes_keep_their_structure(which: str) -> None:
    like = {"w": torch.zeros(3, 4), "b": torch.zeros(5).double(), "c": torch.zeros(()).double()}
    A = rotated(0.6 ** torch.arange(18).double(), 0) - 0.1 * torch.eye(18)
    solution = solve(which, on_tree(A, like), 2, tol=1e-4, seed=0)
    assert solution.vectors["w"].shape == (2, 3, 4)
    assert solution.vectors["c"].dtype == torch.float64
    truth = torch.linalg.eigvalsh(A)
    assert (solution.values - (truth[:2] if which == "SA" else truth.flip(0)[:2])).abs().max() < 1e-5


def ill_conditioned(n: int = 1000) -> tuple[Tensor, Any]:
    """Values from 1 to 1e6, and a preconditioner that knows them to 30%."""
    values = torch.linspace(1, 1e3, n).double() ** 2
    rough = values * (1 + 0.3 * torch.rand(n, generator=torch.Generator().manual_seed(0)).double())
    return values, lambda v: v / rough


def test_a_preconditioner_saves_nearly_all_products_where_the_matrix_is_ill_conditioned() -> None:
    values, precondition = ill_conditioned()
    product = Counted(lambda v: values * v)
    A = aslinearoperator(product, values)
    quick = lobpcg(A, 4, which="SA", preconditioner=precondition, seed=0)
    assert quick.stats.matvecs == product.calls
    assert ((quick.values - values[:4]).abs() <= quick.bounds).all()
    assert quick.stats.matvecs < 100
    plain = lobpcg(A, 4, which="SA", max_steps=200, seed=0, throw=False)
    assert not plain.converged.any()
    assert plain.stats.matvecs > 10 * quick.stats.matvecs


@pytest.mark.parametrize("solver", ["subspace", "lobpcg", "preconditioned"])
@pytest.mark.parametrize("block_size", [2, None])
def test_eigenvectors_as_start_block_do_not_pass_for_the_wanted_ones(solver: str, block_size: int | None) -> None:
    values = torch.cat([torch.tensor([1.0, 2.0, 3.0]), torch.linspace(5, 20, 197)]).double()
    A = aslinearoperator(lambda v: values * v, values)
    options: dict[str, Any] = {"v0": torch.eye(200).double()[1:3], "block_size": block_size, "tol": 1e-6, "seed": 0}
    if solver == "subspace":
        shifted = subspace_iteration(A.shift(-20), 2, **options)
        assert ((shifted.values + 20 - values[:2]).abs() <= shifted.bounds).all()
        return
    precondition = (lambda v: v / (values + 0.5)) if solver == "preconditioned" else None
    solution = lobpcg(A, 2, which="SA", preconditioner=precondition, **options)
    assert ((solution.values - values[:2]).abs() <= solution.bounds).all()
    short = lobpcg(A, 2, which="SA", preconditioner=precondition, **options, max_steps=1, throw=False)
    assert (short.values - torch.tensor([2.0, 3.0])).abs().max() < 1e-12
    assert short.status is Status.INCOMPLETE
    assert not short.converged.any()


@given(seed=st.integers(0, 1000), copies=st.integers(1, 5), k=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_a_preconditioned_probe_neither_overlooks_copies_nor_cries_wolf(seed: int, copies: int, k: int) -> None:
    values = torch.cat([torch.ones(copies), torch.linspace(2, 200, 60 - copies)]).double()
    A, rough = rotated(values, seed), torch.linalg.inv(rotated(values * 1.2 + 0.3, seed))
    assert_certified(lobpcg(A, k, which="SA", preconditioner=lambda v: rough @ v, seed=seed), A, k, "SA")


def test_old_eigenvectors_as_start_block_save_products() -> None:
    A = diagonal(hess(2_000))
    for solver, k in ((subspace_iteration, 5), (lobpcg, 5)):
        cold = solver(A, k, seed=0)
        warm = solver(A, k, v0=cold.vectors, seed=1)
        assert warm.stats.matvecs < 0.7 * cold.stats.matvecs
        assert ((warm.values - cold.values).abs() <= warm.bounds + cold.bounds).all()


def test_no_more_products_than_other_implementations_need() -> None:
    spectrum = hess(10_000)
    for k, limit in ((1, 18), (10, 108), (20, 225)):  # SciPy's LOBPCG with guard vectors, at a laxer tolerance
        solution = lobpcg(diagonal(spectrum), k, seed=0)
        assert ((solution.values - spectrum[:k]).abs() <= solution.bounds).all()
        assert solution.stats.matvecs - solution.stats.verification <= limit


@pytest.mark.parametrize("which", SOLVERS)
def test_products_that_turn_nan_are_named(which: str) -> None:
    values = torch.arange(1, 41).double()
    product = Counted(lambda v: values * v * (float("nan") if product.calls > 25 else 1.0))
    with pytest.raises(NonFiniteError, match="NaN"):
        solve(which, aslinearoperator(product, torch.zeros(40).double()), 3, tol=1e-10, seed=0)
    assert product.calls < 40


@pytest.mark.parametrize("which", SOLVERS)
@pytest.mark.parametrize("k", [1, 3])
def test_a_matrix_that_is_not_symmetric_is_called_so(which: str, k: int) -> None:
    A = rotated(torch.linspace(-1, 1, 30).double() ** 3, 0)
    A = A + 1e-4 * torch.triu(torch.ones(30, 30).double(), 1)
    solution = solve(which, aslinearoperator(lambda v: A @ v, A[0]), k, max_steps=300, seed=0, throw=False)
    assert solution.status is Status.NOT_SYMMETRIC
    assert not solution.converged.any()


@pytest.mark.parametrize("which", SOLVERS)
def test_products_that_differ_each_time_are_called_so(which: str) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.cat([torch.tensor([4.0, 3.0, 2.0]), torch.rand(47, generator=g) / 2]).double()

    def product(v: Tensor) -> Tensor:
        return values * v + 1e-3 * torch.randn(50, generator=g, dtype=torch.float64) * torch.linalg.vector_norm(v)

    solution = solve(which, aslinearoperator(product, values), 2, tol=1e-6, max_steps=30, seed=0, throw=False)
    assert solution.status in (Status.NONDETERMINISTIC, Status.NOT_SYMMETRIC)
    assert not solution.converged.any()


@pytest.mark.parametrize("which", SOLVERS)
def test_too_few_steps_raise_with_what_was_found_and_the_remedy(which: str) -> None:
    A = rotated(torch.linspace(-1, 1, 50).double(), 0)
    with pytest.raises(NotConverged, match="raise max_steps") as caught:
        solve(which, A, 2, max_steps=2, tol=1e-8, seed=0)
    assert not caught.value.solution.converged.any()
    assert caught.value.solution.values.shape == (2,)


@pytest.mark.parametrize("which", SOLVERS)
def test_a_seed_reproduces_the_run_and_leaves_start_vectors_and_global_state_alone(which: str) -> None:
    A, v0 = rotated(0.7 ** torch.arange(20).double(), 0), symmetric(20, 5)[:2].clone()
    kept, state = v0.clone(), torch.get_rng_state()
    first, second = (solve(which, A, 2, v0=v0, seed=3, throw=False) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(v0, kept)
    assert torch.equal(state, torch.get_rng_state())
    assert solve(which, A, 2, v0=v0[0], seed=3, throw=False).values.shape == (2,)


BAD: dict[str, dict[str, Any]] = {
    "k zero": {"k": 0},
    "k above n": {"k": 9},
    "tol zero": {"tol": 0.0},
    "steps zero": {"max_steps": 0},
    "block below k": {"k": 3, "block_size": 2},
    "block not whole": {"block_size": 3.5},
    "v0 zero": {"v0": torch.zeros(8).double()},
    "v0 with a zero row": {"v0": torch.eye(2, 8).double() * torch.tensor([[1.0], [0.0]])},
    "v0 nan": {"v0": torch.full((1, 8), float("nan")).double()},
    "v0 of another length": {"v0": torch.ones(2, 7).double()},
    "v0 of another dtype": {"v0": torch.ones(2, 8)},
    "v0 of another structure": {"v0": {"w": torch.ones(8).double()}},
    "v0 no tensor": {"v0": 1.0},
    "seed negative": {"seed": -2},
}


@pytest.mark.parametrize("which", SOLVERS)
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_the_first_product(which: str, name: str) -> None:
    with pytest.raises(InputError):
        solve(which, aslinearoperator(never, torch.zeros(8).double()), **{"k": 2, **BAD[name]})


def test_lobpcg_refuses_other_ends_and_what_cannot_precondition() -> None:
    A = torch.eye(8).double()
    with pytest.raises(InputError, match="LM"):
        lobpcg(A, 1, which="LM")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="positive definite"):
        lobpcg(A, 1, preconditioner=lambda v: -v)
    with pytest.raises(InputError, match="positive definite"):
        lobpcg(A, 1, preconditioner=lambda v: v * float("nan"))
    with pytest.raises(TreeError, match="preconditioner"):
        lobpcg(A, 1, preconditioner=lambda v: v[:4])


@pytest.mark.parametrize("which", SOLVERS)
def test_the_drivers_refuse_to_run_inside_a_transform(which: str) -> None:
    with pytest.raises(TransformError):
        vmap(lambda s: solve(which, aslinearoperator(lambda v: s * v, torch.ones(3)), 1).values)(torch.ones(2))
