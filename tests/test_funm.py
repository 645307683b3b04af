"""f(A) v against dense functions of matrices, and the error that goes with it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from eigenfunc import tree
from eigenfunc.errors import InputError, NonFiniteError, NotConverged, TransformError, TreeError
from eigenfunc.funm import funm_multiply
from eigenfunc.operator import LinearOperator
from eigenfunc.testing.spectra import FAMILIES, spectrum
from tests.helpers import nested, on_tree, rotated, vector

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "inverse": lambda x: 1 / x,
    "root": torch.sqrt,
    "inverse root": torch.rsqrt,
    "log": torch.log,
    "square": lambda x: x * x,
    "constant": torch.ones_like,
}


def dense(A: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    values, u = torch.linalg.eigh(A.double())
    return (u * f(values)) @ u.mT


@pytest.mark.parametrize("name", FUNCTIONS)
@given(n=st.integers(1, 40), seed=st.integers(0, 10_000), digits=st.integers(2, 10))
@settings(max_examples=25, deadline=None)
def test_the_error_is_what_it_says(name: str, n: int, seed: int, digits: int) -> None:
    values = 0.01 + torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    A, v = rotated(values, seed), vector(n, seed + 1)
    found = funm_multiply(A, FUNCTIONS[name], v, tol=10.0**-digits)
    truth = dense(A, FUNCTIONS[name]) @ v
    assert found.converged
    assert (found.value - truth).norm() <= found.error + 1e-11 * truth.norm()
    assert found.error <= 1.001 * 10.0**-digits * (truth.norm() + found.error)
    assert found.matvecs <= n


def test_exponentials_roots_and_logarithms_are_scipys() -> None:
    A, v = rotated(torch.linspace(0.5, 3, 30).double(), 0), vector(30, 1)
    for f, theirs in ((torch.exp, scipy.linalg.expm), (torch.sqrt, scipy.linalg.sqrtm), (torch.log, scipy.linalg.logm)):
        truth = torch.tensor(theirs(A.numpy())) @ v
        assert (funm_multiply(A, f, v, tol=1e-9).value - truth).norm() < 1e-9 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_hard_spectra_keep_their_word(family: str, dtype: torch.dtype) -> None:
    values = spectrum(family, 60, 1)
    A = rotated(values / values.abs().max().clamp_min(1e-300), 1).to(dtype)
    v = vector(60, 2).to(dtype)
    truth = dense(A, torch.exp) @ v.double()
    found = funm_multiply(A, torch.exp, v, tol=1e-4)
    assert (found.value.double() - truth).norm() <= found.error
    inverse = funm_multiply(A, lambda x: 1 / (x * x + 1e-4), v, tol=1e-3, throw=False)
    truth = dense(A, lambda x: 1 / (x * x + 1e-4)) @ v.double()
    assert (inverse.value.double() - truth).norm() <= max(inverse.error, 1e-7 * float(truth.norm()))


def test_one_more_decade_is_not_reached_without_more_steps() -> None:
    A, v = rotated(torch.logspace(-5, 0, 100).double(), 0), vector(100, 1)
    with pytest.raises(NotConverged, match="num_steps") as caught:
        funm_multiply(A, lambda x: 1 / x, v, num_steps=12)
    found = caught.value.solution
    truth = torch.linalg.solve(A, v)
    assert found.matvecs == 12
    assert (found.value - truth).norm() > 1e-6 * truth.norm()
    assert not funm_multiply(A, lambda x: 1 / x, v, num_steps=12, throw=False).converged


def test_functions_that_are_undefined_on_the_spectrum_are_named() -> None:
    A, v = rotated(torch.linspace(-1, 2, 30).double(), 0), vector(30, 1)
    with pytest.raises(InputError, match=r"f is nan at the Ritz value -"):
        funm_multiply(A, torch.sqrt, v)
    with pytest.raises(InputError, match=r"f is -?inf at the Ritz value"):
        funm_multiply(torch.zeros(3, 3), torch.log, torch.ones(3))
    with pytest.raises(InputError, match="entry by entry"):
        funm_multiply(A, lambda x: x.sum(), v)


def test_the_root_of_a_semidefinite_matrix_takes_rounding_for_zero() -> None:
    values = torch.cat([torch.zeros(20), torch.linspace(1, 2, 5)]).double()
    A, v = rotated(values, 0), vector(25, 1)
    found = funm_multiply(A, torch.sqrt, v, tol=1e-5)
    assert (found.value - dense(A, lambda x: x.clamp_min(0).sqrt()) @ v).norm() <= found.error
    singular = funm_multiply(A, lambda x: 1 / x, v, throw=False)
    assert not singular.converged


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e200), (torch.float32, 1e25)])
def test_the_scales_of_matrix_and_vector_do_not_matter(dtype: torch.dtype, size: float) -> None:
    A, v = rotated(torch.linspace(1, 4, 20).double(), 0).to(dtype), vector(20, 1).to(dtype)
    truth = dense(A, torch.sqrt) @ v.double()
    for a, c in ((size, 1.0), (1 / size, 1.0), (1.0, size), (1.0, 1 / size)):
        found = funm_multiply(A * a, lambda x, a=a: (x / a).sqrt(), v * c, tol=1e-4)
        assert (found.value.double() / c - truth).norm() <= 1e-3 * truth.norm()


def test_trees_and_zero_vectors() -> None:
    A = rotated(torch.linspace(0.5, 3, 12).double(), 0)
    like = nested(12, torch.float32)
    v = tree.unravel(vector(12, 1).float(), like)
    found = funm_multiply(on_tree(A.float(), like), torch.exp, v, tol=1e-4)
    truth = dense(A, torch.exp) @ vector(12, 1)
    assert found.value["z"].shape == (2, 3)
    assert found.value["z"].dtype == torch.float32
    assert (tree.ravel(found.value, like) - truth).norm() < 1e-5 * truth.norm()
    nothing = funm_multiply(A, torch.exp, torch.zeros(12).double())
    assert nothing.converged
    assert nothing.matvecs == 0
    assert not nothing.value.any()


def test_refusals() -> None:
    A, v = torch.eye(4).double(), torch.ones(4).double()
    for arguments in ({"tol": 0.0}, {"num_steps": 0}):
        with pytest.raises(InputError):
            funm_multiply(A, torch.exp, v, **arguments)
    with pytest.raises(TreeError):
        funm_multiply(A, torch.exp, v[:2])
    with pytest.raises(NonFiniteError):
        funm_multiply(LinearOperator(lambda x: x * math.nan, v), torch.exp, v)
    with pytest.raises(TransformError):
        torch.func.vmap(lambda c: funm_multiply(lambda x: c * x, torch.exp, v).value)(torch.ones(2))
