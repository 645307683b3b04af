"""What eigenfunc.testing draws: spectra, trees, operators and losses against independent truths."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import eigenfunc.testing
from eigenfunc import LinearOperator, hessian, tree
from eigenfunc.testing import (
    FAMILIES,
    LAYOUTS,
    LOSSES,
    Case,
    Layer,
    Problem,
    SmallLoss,
    check_operator,
    parameter_tree,
    random_case,
    small_loss,
    spectrum,
    strategies,
)
from eigenfunc.testing.problems import Rotation, gap, select
from tests.helpers import second_derivatives


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_every_size_and_the_same_values_for_the_same_seed(family: str) -> None:
    for n in (1, 2, 3, 10, 42, 201):
        values = spectrum(family, n, seed=n)
        assert values.shape == (n,)
        assert values.dtype == torch.float64
        assert values.isfinite().all()
        assert torch.equal(values, spectrum(family, n, seed=n))
        assert values.abs().max() <= max(n, 12)


def test_closed_forms_of_spectra() -> None:
    assert spectrum("Clement", 6).tolist() == [5, 3, 1, -1, -3, -5]
    assert spectrum("rank one", 7).tolist() == [7, 0, 0, 0, 0, 0, 0]
    assert spectrum("identity", 3).tolist() == [1, 1, 1]
    assert spectrum("zero", 3).tolist() == [0, 0, 0]
    geometric = spectrum("geometric", 9)
    assert (geometric / 10.0 ** -(2.0 * torch.arange(9)).double() - 1).abs().max() < 1e-5
    top = spectrum("Wilkinson", 21).sort(descending=True).values
    assert abs(top[0] - 10.746194182903393) < 1e-13  # Wilkinson 1965, page 309
    assert 0 <= top[0] - top[1] < 1e-13
    hilbert = np.linalg.eigvalsh(scipy.linalg.hilbert(8))
    assert np.abs(spectrum("Hilbert", 8).sort().values.numpy() - hilbert).max() < 1e-15
    pairs = spectrum("pairs", 9).sort().values
    assert torch.equal(pairs, -pairs.flip(0))


@pytest.mark.parametrize("glue", ["1e-8", "1e-14"])
def test_glued_wilkinson_has_clusters_as_tight_as_the_glue(glue: str) -> None:
    top = spectrum(f"glued Wilkinson {glue}", 210).sort(descending=True).values
    assert top[0] - top[19] < 10 * float(glue) + 1e-13
    assert top[19] - top[20] > 0.1
    blocks = [np.diag(np.abs(np.arange(21) - 10.0)) + np.eye(21, k=1) + np.eye(21, k=-1)] * 2
    A = scipy.linalg.block_diag(*blocks)
    A[20, 21] = A[21, 20] = float(glue)
    found = spectrum(f"glued Wilkinson {glue}", 42).sort().values.numpy()
    assert np.abs(found - np.linalg.eigvalsh(A)).max() < 1e-13


def test_clusters_and_copies_are_at_the_top() -> None:
    counts = set()
    for seed in range(60):
        for spacing in ("1e-4", "1e-6", "1e-12"):
            values = spectrum(f"cluster {spacing}", 60, seed)
            cluster = values[values > 0.95].sort(descending=True).values
            assert 2 <= len(cluster) <= 8
            assert (cluster - (1 - float(spacing) * torch.arange(len(cluster)).double())).abs().max() < 1e-15
        counts.add(int((spectrum("multiple", 60, seed) == 1).sum()))
    assert counts == set(range(1, 10))


@given(values=strategies.spectra(max_n=40))
@settings(max_examples=60, deadline=None)
def test_spectra_are_values_of_moderate_size(values: Tensor) -> None:
    assert values.dtype == torch.float64
    assert 1 <= len(values) <= 40
    assert values.abs().max() <= 40


@given(like=strategies.parameter_trees())
@settings(max_examples=200, deadline=None)
def test_trees_can_hold_vectors(like: Any) -> None:
    tree.check_vector_space(like, "like")
    assert 1 <= tree.size(like) <= 60
    v = tree.randn(like, torch.Generator().manual_seed(0))
    back = tree.unravel(tree.ravel(v, like), like)
    tree.check_like(back, like, "the vector")
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(back), tree.leaves(v), strict=True))


def test_trees_are_of_every_make() -> None:
    made = [parameter_tree(30, layout, seed) for layout in LAYOUTS for seed in range(40)]
    assert {type(like) for like in made} == {Tensor, dict, list, tuple, Layer}
    shapes = {leaf.shape for like in made for leaf in tree.leaves(like)}
    assert {(), (0,), (30,)} <= {tuple(shape) for shape in shapes}
    assert {len(shape) for shape in shapes} == {0, 1, 2}
    assert {tree.size(like) for like in made} == {30}


@given(n=st.integers(1, 40), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_rotations_are_orthogonal(n: int, seed: int) -> None:
    Q = Rotation(n, seed)
    eye = torch.eye(n, dtype=torch.float64)
    rows = Q.forward(eye)
    assert (rows @ rows.mT - eye).abs().max() < 1e-13
    assert (Q.backward(eye) - rows.mT).abs().max() < 1e-13


@given(problem=strategies.problems(max_n=40))
@settings(max_examples=150, deadline=None)
def test_operators_have_the_spectrum_they_are_said_to_have(problem: Problem) -> None:
    A = problem.operator()
    assert A.size == problem.n
    dense = A.to_dense().double() / problem.unit
    eps = 16 * torch.finfo(tree.work_dtype(A.like)).eps
    found = torch.linalg.eigvalsh((dense + dense.mT) / 2)
    formula = problem.values.sort().values / problem.unit
    assert (found - formula).abs().max() < eps * problem.n**0.5
    assert (found - problem.truth / problem.unit).abs().max() < eps * problem.n**0.5
    assert (problem.image(torch.eye(problem.n)) - dense).abs().max() < eps


@given(problem=strategies.problems(max_n=60))
@settings(max_examples=60, deadline=None)
def test_operators_keep_the_contract_of_operators(problem: Problem) -> None:
    A = problem.operator()
    check_operator(A)
    assert A.like is not None


@given(A=strategies.operators(max_n=20, dtypes=["float32"]))
@settings(max_examples=20, deadline=None)
def test_operators_are_of_the_dtype_asked_for(A: LinearOperator) -> None:
    assert tree.work_dtype(A.like) == torch.float32
    assert A.to_dense().isfinite().all()


def test_a_large_operator_costs_little_and_has_the_eigenvectors_it_says() -> None:
    problem = Problem("outliers", 100_000, seed=3, layout="nested")
    begun = time.perf_counter()
    A = problem.operator()
    v = problem.start("eigenvector", 1, "LA")
    residual = tree.sub(A(v), tree.scale(problem.truth[-1], v))
    assert float(tree.norm(residual)) < 1e-13
    assert time.perf_counter() - begun < 5
    w = problem.start("orthogonal", 2, "LA")
    assert abs(float(tree.dot(v, w))) < 1e-13 * float(tree.norm(w))


@given(case=strategies.cases())
@settings(max_examples=50, deadline=None)
def test_a_case_is_reproduced_by_its_repr(case: Case) -> None:
    again = eval(repr(case), {"Case": Case, "Problem": Problem})
    assert again == case
    assert torch.equal(again.wanted, case.wanted)


def test_random_cases_are_of_every_make() -> None:
    made = [random_case(random.Random(seed)) for seed in range(3_000)]
    assert {case.problem.family for case in made} == set(FAMILIES)
    assert {case.problem.layout for case in made} == set(LAYOUTS)
    assert {case.start for case in made} == {"random", "dense", "eigenvector", "orthogonal"}
    assert max(case.problem.n for case in made) == 100_000
    assert min(case.problem.n for case in made) == 1
    assert any(isinstance(case.k, tuple) for case in made)
    assert any(case.k == case.problem.n for case in made)
    assert {case.problem.dense for case in made} == {True, False}
    scales = [abs(case.problem.scale) for case in made]
    assert min(scales) == pytest.approx(1e-200)
    assert max(scales) == pytest.approx(1e200)


@given(
    values=st.lists(st.integers(-5, 5), min_size=1, max_size=7),
    which=st.sampled_from(["LM", "LA", "SA", "BE"]),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_the_wanted_values_and_their_gap_are_those_of_brute_force(
    values: list[int], which: str, data: st.DataObject
) -> None:
    k: Any = data.draw(st.integers(1, len(values)))
    if which == "BE" and data.draw(st.booleans()):
        top = data.draw(st.integers(0, k))
        k = (top, k - top)
    rising = torch.tensor(sorted(values)).double()
    falling = sorted(values, reverse=True)
    top, bottom = k if isinstance(k, tuple) else ((k + 1) // 2, k // 2)
    expected = {
        "LM": sorted(map(abs, values), reverse=True)[:k] if which == "LM" else [],
        "LA": falling[:k] if which == "LA" else [],
        "SA": sorted(values)[:k] if which == "SA" else [],
        "BE": falling[:top] + falling[len(falling) - bottom :],
    }[which]
    found = rising[select(rising, k, which)].tolist()
    assert [abs(x) for x in found] == expected if which == "LM" else found == expected
    rest = [rising[i].item() for i in set(range(len(values))) - set(select(rising, k, which).tolist())]
    apart = [abs(abs(a) - abs(b)) if which == "LM" else abs(a - b) for a in found for b in rest]
    assert gap(rising, k, which) == min(apart, default=float("inf"))


@pytest.mark.parametrize("kind", LOSSES)
def test_hessians_in_closed_form_are_second_derivatives(kind: str) -> None:
    for seed in range(8):
        made = small_loss(kind, seed)
        leaves, rebuild = tree.flatten(tree.tree_map(lambda leaf: leaf.clone().requires_grad_(), made.params))
        truth = second_derivatives(made.loss(rebuild(leaves), made.batch), leaves)
        assert (made.hessian - truth).abs().max() <= 1e-12 * truth.abs().max()


@given(made=strategies.small_losses())
@settings(max_examples=30, deadline=None)
def test_eigenfunc_hessians_of_small_losses_are_the_closed_ones(made: SmallLoss) -> None:
    A = hessian(made.loss, made.params, made.batch)
    assert (A.to_dense() - made.hessian).abs().max() <= 1e-11 * made.hessian.abs().max()
    check_operator(A)


def test_all_public_names_of_testing_have_a_docstring() -> None:
    for name in eigenfunc.testing.__all__:
        item = getattr(eigenfunc.testing, name)
        assert callable(item) is False or (item.__doc__ or "").strip(), name
