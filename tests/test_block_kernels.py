"""The kernels of the block solvers: their defining identities, vmap against the loop, trees against flat vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.func import vmap

from eigenfunc import tree
from eigenfunc.krylov import lobpcg as lobpcg_kernel, span, subspace as subspace_kernel
from tests.helpers import nested, normal, on_tree, rotated, symmetric


def block(b: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(b, n, seed=seed, dtype=dtype)


def residuals(A: Tensor, pairs: Any) -> Tensor:
    return torch.linalg.vector_norm(pairs.vectors @ A - pairs.values[:, None] * pairs.vectors, dim=1)


@given(n=st.integers(1, 20), seed=st.integers(0, 10_000), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_subspace_state_holds_ritz_pairs_and_an_orthonormal_block(n: int, seed: int, data: st.DataObject) -> None:
    b, rank = data.draw(st.integers(1, n)), data.draw(st.integers(0, n))
    values = block(1, n, seed + 1)[0] * (torch.arange(n) < rank)
    A = rotated(values, seed)
    state = subspace_kernel.init(block(b, n, seed), lambda x: x @ A)
    for _ in range(3):
        before = state.block
        state = subspace_kernel.step(state, lambda x: x @ A)
        X, eye = state.vectors, torch.eye(b)
        assert (state.block @ state.block.mT - eye).abs().max() < 1e-12
        assert (X @ A @ X.mT - torch.diag(state.values)).abs().max() < 1e-12
        assert (residuals(A, state) - state.residuals).abs().max() < 1e-12
        assert (before - before @ X.mT @ X).abs().max() < 1e-12
        image = X @ A
        lost = image - image @ state.block.mT @ state.block
        assert lost.abs().max() < 1e-6 * torch.linalg.matrix_norm(A, 2).clamp_min(1e-300)


@given(n=st.integers(1, 20), seed=st.integers(0, 10_000), data=st.data(), preconditioned=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_lobpcg_state_holds_ritz_pairs_directions_and_their_images(
    n: int, seed: int, data: st.DataObject, preconditioned: bool
) -> None:
    b = data.draw(st.integers(1, n))
    A = symmetric(n, seed)
    weights = 0.1 + block(1, n, seed + 1)[0].abs()
    precondition = (lambda x: x * weights) if preconditioned else None
    state = lobpcg_kernel.init(block(b, n, seed), lambda x: x @ A)
    for _ in range(6):
        before = state.values
        state = lobpcg_kernel.step(state, lambda x: x @ A, precondition)
        X, P = state.vectors, state.directions
        assert (X @ X.mT - torch.eye(b)).abs().max() < 1e-12
        assert (X @ P.mT).abs().max() < 1e-12
        alive = torch.linalg.vector_norm(P, dim=1) > 0
        assert (P @ P.mT - torch.diag(alive.double())).abs().max() < 1e-12
        assert (X @ A - state.images).abs().max() < 1e-12
        assert (P @ A - state.shifts).abs().max() < 1e-11
        assert (state.values >= before - 1e-12).all()
        assert (residuals(A, state) - state.residuals).abs().max() < 1e-12


def run_subspace(matmat: Any, start: Any, steps: int = 5) -> Any:
    state = subspace_kernel.init(start, matmat)
    for _ in range(steps):
        state = subspace_kernel.step(state, matmat)
    return subspace_kernel.extract(state, 3)


def run_lobpcg(matmat: Any, start: Any, steps: int = 5) -> Any:
    state = lobpcg_kernel.init(start, matmat)
    for _ in range(steps):
        state = lobpcg_kernel.step(state, matmat, lambda x: tree.scale(0.5, x))
    return lobpcg_kernel.extract(state, 3)


@pytest.mark.parametrize("run", [run_subspace, run_lobpcg])
def test_vmap_over_matrices_and_starts_equals_the_loop(run: Any) -> None:
    def of(A: Tensor, start: Tensor) -> Any:
        return run(lambda x: x @ A, start)

    matrices = torch.stack([symmetric(12, s) for s in range(4)])
    starts = torch.stack([block(3, 12, s) for s in range(4)])
    matrices[3] = 0
    batched = vmap(of)(matrices, starts)
    for i in range(4):
        single = of(matrices[i], starts[i])
        assert (batched.values[i] - single.values).abs().max() < 1e-12
        assert (batched.residuals[i] - single.residuals).abs().max() < 1e-12
        assert (batched.vectors[i].mT @ batched.vectors[i] - single.vectors.mT @ single.vectors).abs().max() < 1e-12
    shared = vmap(of, in_dims=(None, 0))(matrices[0], starts)
    assert (shared.values[1] - of(matrices[0], starts[1]).values).abs().max() < 1e-12


@pytest.mark.parametrize("run", [run_subspace, run_lobpcg])
def test_a_tree_gives_what_its_flat_vectors_give(run: Any) -> None:
    A, start, like = symmetric(12, 0), block(3, 12, 1), nested(12)
    flat = run(lambda x: x @ A, start, 3)
    shaped = run(on_tree(A, like).matvec, tree.unravel(start, like), 3)
    assert (flat.values - shaped.values).abs().max() < 1e-12
    assert (flat.residuals - shaped.residuals).abs().max() < 1e-12
    assert (tree.ravel(shaped.vectors, like).abs() - flat.vectors.abs()).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dependent_rows_come_out_as_leading_zeros(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    rows = block(3, 500, 0, dtype)
    mixed = torch.cat([rows, rows[:1] * 3, rows[1:2] + rows[2:], torch.zeros(1, 500, dtype=dtype)])
    found = span.orthonormal(mixed)
    assert not found[:3].any()
    assert (found[3:].double() @ found[3:].double().mT - torch.eye(3)).abs().max() < 10 * eps
    assert (rows - rows @ found.mT @ found).abs().max() < 100 * eps
    fresh = span.outside(torch.cat([rows[:2], block(1, 500, 5, dtype)]), found)
    assert not fresh[:2].any()
    assert (fresh[2:] @ found[3:].mT).abs().max() < 10 * eps


def test_a_residual_that_meets_its_target_costs_no_product() -> None:
    A = torch.diag(torch.tensor([5.0, 4.0, 1.0, 0.5, 0.2]).double())
    start = torch.eye(3, 5).double()
    start[1, 3] = 0.1
    state = lobpcg_kernel.init(start, lambda x: x @ A)
    seen = []

    def matmat(x: Tensor) -> Tensor:
        seen.append(int((torch.linalg.vector_norm(x, dim=1) > 0).sum()))
        return x @ A

    lobpcg_kernel.step(state, matmat, None, torch.full((3,), 1e-9).double())
    assert seen == [1]


@pytest.mark.parametrize("kernel", [subspace_kernel, lobpcg_kernel])
def test_a_step_is_traced_as_one_graph(kernel: Any) -> None:
    A = symmetric(10, 0)

    def step(state: Any) -> Any:
        return kernel.step(state, lambda x: x @ A)

    state = kernel.init(block(3, 10, 1), lambda x: x @ A)
    traced = torch.compile(step, fullgraph=True, backend="eager")(state)
    assert (traced.values - step(state).values).abs().max() < 1e-12
