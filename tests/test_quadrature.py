"""The Gauss rule of a spectral measure, against dense matrices: exactness, breakdown, transforms and derivatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from eigenfunc import tree
from eigenfunc.krylov.quadrature import Quadrature, quadrature
from eigenfunc.testing import spectrum
from tests.helpers import nested, on_tree, rotated, symmetric, vector


def rule(A: Tensor, v: Tensor, m: int) -> Quadrature:
    return quadrature(lambda x: A @ x, v, m)


def integral(A: Tensor, v: Tensor, m: int) -> Tensor:
    nodes, weights = rule(A, v, m)
    return (weights * torch.exp(nodes)).sum()


@given(n=st.integers(1, 30), m=st.integers(1, 12), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_polynomials_up_to_degree_2m_minus_1_are_integrated_exactly(n: int, m: int, seed: int) -> None:
    A, v = symmetric(n, seed), vector(n, seed + 1)
    A = A / torch.linalg.matrix_norm(A, 2)
    nodes, weights = rule(A, v, m)
    angles = torch.arccos(nodes.clamp(-1, 1))
    before, now = v, A @ v  # Chebyshev polynomials T_0, T_1, … of A by their recurrence, applied to v
    for degree in range(2 * m):
        assert abs((weights * torch.cos(degree * angles)).sum() - v @ before) < 1e-12 * n * m
        before, now = now, 2 * A @ now - before


def test_degree_2m_is_not_exact() -> None:
    A, v = symmetric(12, 0), vector(12, 1)
    nodes, weights = rule(A, v, 3)
    exact = v @ torch.linalg.matrix_power(A, 6) @ v
    assert abs((weights * nodes**6).sum() - exact) > 1e-3 * exact


@pytest.mark.parametrize("family", ["identity", "zero", "rank one", "low rank", "integers", "pairs"])
def test_after_a_breakdown_the_rule_is_the_measure_and_no_node_is_spurious(family: str) -> None:
    values = spectrum(family, 20, seed=3)
    A, v = rotated(values, 5), vector(20, 6)
    nodes, weights = rule(A, v, 25)
    exact, u = torch.linalg.eigh(A)
    assert torch.isfinite(nodes).all()
    assert (weights >= 0).all()
    assert abs(weights.sum() - v @ v) < 1e-13 * (v @ v)
    scale = 1 + values.abs().max()
    for point in (values.sort().values.diff() > 1e-9).nonzero().flatten():
        cut = values.sort().values[point : point + 2].mean()
        assert abs(weights[nodes <= cut].sum() - ((u.mT @ v) ** 2)[exact <= cut].sum()) < 1e-12 * 20
    carrying = nodes[weights > 1e-12]
    assert ((carrying[:, None] - values[None]).abs().amin(1) < 1e-12 * scale).all()
    assert len(carrying) == len(torch.unique(torch.round(values, decimals=8)))
    assert nodes.min() >= values.min() - 1e-12 * scale
    assert nodes.max() <= values.max() + 1e-12 * scale


def test_a_zero_vector_and_an_eigenvector() -> None:
    A = torch.diag(torch.arange(1, 6).double())
    assert rule(A, torch.zeros(5).double(), 3).weights.tolist() == [0, 0, 0]
    nodes, weights = rule(A, 2 * torch.eye(5).double()[3], 3)
    assert nodes.tolist() == [4, 4, 4]
    assert weights.tolist() == [4, 0, 0]


def test_a_tree_in_float32_gives_what_its_flat_vector_gives() -> None:
    like = nested(12, torch.float32)
    A, v = symmetric(12, 0), vector(12, 1).float()
    shaped = quadrature(on_tree(A.float(), like), tree.unravel(v, like), 6)
    exact = rule(A, v.double(), 6)
    assert shaped.nodes.dtype == torch.float64
    assert torch.allclose(shaped.nodes, exact.nodes, atol=1e-5, rtol=0)
    assert torch.allclose(shaped.weights, exact.weights, atol=1e-4, rtol=0)


CASES = {
    "generic": (symmetric(6, 0), vector(6, 1), 4),
    "more steps than entries": (symmetric(6, 0), vector(6, 1), 9),
    "identity": (torch.eye(6).double(), vector(6, 1), 4),
    "zero": (torch.zeros(6, 6).double(), vector(6, 1), 4),
    "rank one": (torch.outer(vector(6, 2), vector(6, 2)), vector(6, 1), 4),
    "two values": (torch.eye(6).double() + torch.outer(vector(6, 2), vector(6, 2)), vector(6, 1), 5),
    "start at an eigenvector": (torch.diag(torch.arange(6).double()), torch.eye(6).double()[2], 4),
}


@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_those_of_central_differences_also_at_a_breakdown(case: str) -> None:
    A, v, m = CASES[case]
    D, e, h = symmetric(6, 7), vector(6, 8), 1e-5
    slope_a = (integral(A + h * D, v, m) - integral(A - h * D, v, m)) / (2 * h)
    slope_v = (integral(A, v + h * e, m) - integral(A, v - h * e, m)) / (2 * h)
    by_a, by_v = grad(integral, argnums=(0, 1))(A, v, m)
    tolerance = 1e-7 * (1 + abs(slope_a) + abs(slope_v))
    assert abs((by_a * D).sum() - slope_a) < tolerance
    assert abs((by_v * e).sum() - slope_v) < tolerance
    assert abs(jvp(lambda x: integral(x, v, m), (A,), (D,))[1] - slope_a) < tolerance
    assert abs(jvp(lambda x: integral(A, x, m), (v,), (e,))[1] - slope_v) < tolerance


@pytest.mark.parametrize("family", ["multiple", "integers", "low rank", "outliers", "geometric"])
@pytest.mark.parametrize("seed", range(3))
def test_derivatives_where_eigenvalues_are_multiple_are_those_of_the_dense_matrix_function(
    family: str, seed: int
) -> None:
    values = spectrum(family, 21, seed)
    A, v, D = rotated(values / values.abs().max(), seed), vector(21, seed), symmetric(21, seed + 50)
    slope = jvp(lambda x: v @ torch.linalg.matrix_exp(x) @ v, (A,), (D,))[1]
    assert abs((grad(integral)(A, v, 24) * D).sum() - slope) < 1e-8 * (v @ v)


def test_with_all_steps_the_gradient_is_that_of_the_dense_matrix_function() -> None:
    A, v = symmetric(5, 0), vector(5, 1)
    dense = jacrev(lambda x: v @ torch.linalg.matrix_exp(x) @ v)(A)
    for found in (jacrev(integral)(A, v, 5), jacfwd(integral)(A, v, 5)):
        assert torch.allclose((found + found.mT) / 2, (dense + dense.mT) / 2, atol=1e-10, rtol=0)


def test_vmap_over_start_vectors_matrices_and_gradients_equals_the_loop() -> None:
    matrices = torch.stack([symmetric(6, 0), torch.eye(6).double(), torch.zeros(6, 6).double()])
    starts = torch.stack([vector(6, s) for s in range(3)])
    nodes, weights = vmap(lambda A, v: tuple(rule(A, v, 4)))(matrices, starts)
    slopes = vmap(grad(lambda A, v: integral(A, v, 4)))(matrices, starts)
    for i, (A, v) in enumerate(zip(matrices, starts, strict=True)):
        single = rule(A, v, 4)
        assert torch.allclose(nodes[i], single.nodes, atol=1e-13, rtol=0)
        assert torch.allclose(weights[i], single.weights, atol=1e-13, rtol=0)
        assert torch.allclose(slopes[i], grad(lambda A, v: integral(A, v, 4))(A, v), atol=1e-11, rtol=0)
