"""What the solver says when it cannot certify, and what it refuses before the first product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import eigenfunc
from benchmarks.spectra import diagonal, hess
from eigenfunc import NotConverged, Status, eigsh
from eigenfunc.errors import InputError, NonFiniteError, TransformError, TreeError
from tests.helpers import Counted, never, normal, rotated


def test_too_small_a_budget_raises_and_the_error_carries_what_was_found() -> None:
    A = diagonal(hess(5_000))
    with pytest.raises(NotConverged, match="raise max_matvecs") as caught:
        eigsh(A, 10, which="LA", tol=1e-8, max_matvecs=25, seed=0)
    solution = caught.value.solution
    assert solution.status is Status.NOT_CONVERGED
    assert not solution.converged.all()
    solving = solution.stats.matvecs - solution.stats.verification
    assert solving <= 27
    wrong = (solution.values - hess(5_000)[:10]).abs() > solution.bounds
    assert not (wrong & solution.converged).any()


def test_a_matrix_that_is_not_symmetric_is_told_apart() -> None:
    skew = normal(80, 80)
    A = rotated(1 / torch.arange(1, 81).double(), 0) + 1e-5 * (skew - skew.mT)
    solution = eigsh(eigenfunc.aslinearoperator(lambda v: A @ v, A[0]), 3, which="LA", seed=0, throw=False)
    assert solution.status is Status.NOT_SYMMETRIC
    assert not solution.converged.any()
    upper = torch.ones(60, 60).triu().double()
    with pytest.raises(NotConverged, match="differ by"):
        eigsh(eigenfunc.aslinearoperator(lambda v: upper @ v, upper[0]), 3, which="LA", seed=0)


@pytest.mark.parametrize("noise", [1e-6, 1e-3])
def test_products_that_differ_each_time_are_told_apart(noise: float) -> None:
    g = torch.Generator().manual_seed(0)
    values = 1 / torch.arange(1, 301).double()

    def product(v: Tensor) -> Tensor:
        return values * v + noise * torch.linalg.vector_norm(v) * torch.randn(300, generator=g).double() / 300**0.5

    solution = eigsh(
        eigenfunc.aslinearoperator(product, values), 3, which="LA", tol=1e-9, seed=0, max_matvecs=200, throw=False
    )
    assert solution.status in (Status.NONDETERMINISTIC, Status.NOT_SYMMETRIC)
    assert not solution.converged.any()


def test_float32_stops_at_its_noise_and_says_how_much_that_is() -> None:
    A = rotated(1 / torch.arange(1, 101).double(), 0, torch.float32)
    solution = eigsh(A, 3, which="LA", tol=1e-12, seed=0)
    assert (solution.residuals <= solution.noise).all()
    assert 1e-8 < solution.noise < 1e-4


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_is_an_error_that_counts_it(step: int, bad: float) -> None:
    values = hess(1_000)
    product = Counted(lambda v: values * v * (bad if product.calls > step else 1.0))
    with pytest.raises(NonFiniteError, match=r"product \d+ with the matrix"):
        eigsh(eigenfunc.aslinearoperator(product, values), 3, which="LA", seed=0)


BAD: dict[str, dict[str, Any]] = {
    "k zero": {"k": 0},
    "k negative": {"k": -1},
    "k above n": {"k": 11},
    "k not whole": {"k": 2.5},
    "k boolean": {"k": True},
    "k a pair without BE": {"k": (1, 1), "which": "LA"},
    "tol zero": {"tol": 0.0},
    "tol negative": {"tol": -1e-3},
    "tol nan": {"tol": float("nan")},
    "which unknown": {"which": "SM"},
    "basis too small": {"basis_size": 3, "k": 3},
    "budget zero": {"max_matvecs": 0},
    "seed negative": {"seed": -1},
    "v0 zero": {"v0": torch.zeros(10).double()},
    "v0 nan": {"v0": torch.full((10,), float("nan")).double()},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_the_first_product(name: str) -> None:
    A = eigenfunc.aslinearoperator(never, torch.zeros(10).double())
    with pytest.raises(InputError):
        eigsh(A, **{"k": 2, **BAD[name]})


def test_a_start_vector_of_another_structure_is_refused() -> None:
    A = eigenfunc.aslinearoperator(torch.eye(4).double())
    with pytest.raises(TreeError, match="v0"):
        eigsh(A, 1, v0={"a": torch.ones(4).double()})
    with pytest.raises(TreeError, match="dtype"):
        eigsh(A, 1, v0=torch.ones(4))


def test_a_product_of_another_shape_is_refused() -> None:
    with pytest.raises(TreeError, match="product"):
        eigsh(eigenfunc.aslinearoperator(lambda v: v[:3], torch.zeros(4).double()), 1)


def test_inside_a_transform_the_pure_functions_are_named() -> None:
    with pytest.raises(TransformError, match=r"eigenfunc\.lanczos"):
        torch.func.vmap(lambda A: eigsh(eigenfunc.aslinearoperator(lambda v: A @ v, A[0]), 1).values)(
            torch.eye(3)[None]
        )


def test_the_report_prints_a_table_and_goes_through_json() -> None:
    import json

    solution = eigsh(torch.diag(torch.tensor([3.0, 2.0, 1.0])).double(), 2, seed=0)
    table = str(solution)
    assert "true residual" in table
    assert table.count("converged") >= 3
    report = json.loads(json.dumps(solution.report()))
    assert report["values"] == solution.values.tolist()
    assert report["status"] == "converged"


def test_nothing_global_changes() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    A = rotated(1 / torch.arange(1, 31).double(), 0)
    keep = A.clone()
    v0 = torch.ones(30).double()
    with torch.inference_mode():
        inside = eigsh(A, 2, seed=0, v0=v0)
    with torch.no_grad():
        eigsh(A, 2, seed=0)
    assert torch.equal(inside.values, eigsh(A, 2, seed=0, v0=v0).values)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert torch.equal(A, keep)
    assert torch.equal(v0, torch.ones(30).double())
    assert torch.is_grad_enabled()
