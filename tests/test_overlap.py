"""Shares of gradients in eigenspaces, and angles between spans, against dense algebra and SciPy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.linalg import subspace_angles
from torch import Tensor, nn
from torch.nn import functional as F

from eigenfunc import Batches, demo, eigsh, functional_loss, hessian, tree
from eigenfunc.errors import DataError, InputError, ObjectiveError, TreeError
from eigenfunc.overlap import gradient, gradient_overlap, gradient_shares, principal_angles, subspace_overlap
from eigenfunc.solution import EigenPairs
from tests.helpers import cut, flat, labelled, mlp, normal, seeded, untouched

X, Y = labelled(10)


def net(dropout: float = 0.0) -> nn.Module:
    return mlp(nn.BatchNorm1d(4), nn.Dropout(dropout))


@pytest.mark.parametrize("sizes", [[10], [7, 3], [1, 4, 5]])
def test_the_gradient_is_that_of_the_whole_data_and_leaves_no_trace(sizes: list[int]) -> None:
    model = net().eval()
    loss, params = functional_loss(model, F.cross_entropy)
    F.cross_entropy(model(X), Y).backward()  # `.grad` holds something that must stay
    with untouched(model):
        found = gradient(loss, params, Batches(cut((X, Y), sizes)))
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert (found[name] - p.grad).abs().max() < 1e-14
    summed, _ = functional_loss(model, nn.CrossEntropyLoss(reduction="sum"))
    total = gradient(summed, params, Batches(cut((X, Y), sizes), reduction="sum"))
    assert (flat(total) - 10 * flat(found)).abs().max() < 1e-12
    assert not any(leaf.requires_grad for leaf in found.values())


def test_modes_of_the_model_and_the_caller_change_nothing() -> None:
    model = net(dropout=0.4)
    loss, params = functional_loss(model, F.cross_entropy)
    with untouched(model):
        first = gradient(loss, params, Batches(cut((X, Y), [5, 5])))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            second = gradient(loss, params, Batches(cut((X, Y), [5, 5])))
    assert torch.equal(flat(first), flat(second))
    half = tree.tree_map(lambda leaf: leaf.bfloat16(), params)
    slopes = gradient(lambda p, x: (p["0.bias"] ** 2).sum() * x, half, torch.ones(()))
    assert {leaf.dtype for leaf in slopes.values()} == {torch.float32}


def test_unused_parameters_have_slope_zero_and_bad_losses_are_refused() -> None:
    params = {"used": torch.ones(2), "unused": torch.ones(3)}
    found = gradient(lambda p, batch: (p["used"] ** 2).sum() * batch, params, torch.tensor(3.0))
    assert found["used"].tolist() == [6, 6]
    assert found["unused"].tolist() == [0, 0, 0]
    with pytest.raises(ObjectiveError, match="does not depend"):
        gradient(lambda p, batch: batch.sum(), params, X)
    with pytest.raises(DataError, match="the gradient by 'used' holds NaN"):
        gradient(lambda p, batch: (p["used"] - 1).abs().sqrt().sum(), params, X)
    with pytest.raises(DataError, match="the data is empty"):
        gradient(lambda p, batch: p["used"].sum(), params, Batches([]))


def orthonormal(k: int, n: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(n, k, seed=seed)).Q.mT


@given(k=st.integers(1, 6), seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_shares_are_those_of_the_dense_projection(k: int, seed: int) -> None:
    loss, params = functional_loss(net(), F.cross_entropy)
    rows = orthonormal(k, tree.size(params), seed)
    pairs = EigenPairs(torch.zeros(k), tree.unravel(rows, params), torch.zeros(k))
    g = tree.ravel(gradient(loss, params, (X, Y)), params)
    shares = gradient_shares(loss, params, (X, Y), pairs)
    for i in range(k):
        inside = rows[: i + 1].mT @ (rows[: i + 1] @ g)
        assert shares[i] == pytest.approx(float(inside @ inside / (g @ g)), rel=1e-12, abs=1e-15)
    assert torch.equal(gradient_overlap(loss, params, (X, Y), pairs), shares[-1])
    assert shares.dtype == torch.float64
    along = EigenPairs(torch.zeros(1), tree.lifted(tree.unravel(g / g.norm(), params)), torch.zeros(1))
    assert gradient_overlap(loss, params, (X, Y), along) == pytest.approx(1, abs=1e-12)


def test_vectors_that_are_no_basis_of_the_space_are_refused() -> None:
    loss, params = functional_loss(net(), F.cross_entropy)
    rows = orthonormal(2, tree.size(params), 0)
    good = tree.unravel(rows, params)
    for bad in (2 * rows, rows[[0, 0]], rows * float("nan")):
        with pytest.raises(InputError, match="not orthonormal"):
            gradient_overlap(loss, params, (X, Y), tree.unravel(bad, params))
        with pytest.raises(InputError, match="vectors of b are not orthonormal"):
            subspace_overlap(good, tree.unravel(bad, params))
    with pytest.raises(TreeError, match="structure"):
        gradient_overlap(loss, params, (X, Y), {"0.bias": torch.eye(4).double()})
    with pytest.raises(TreeError, match="a is no stack of vectors: the first axes of its leaves, \\[2, 3\\]"):
        principal_angles({"x": torch.eye(2), "y": torch.eye(3)}, good)
    with pytest.raises(TreeError, match="shape"):
        principal_angles(torch.eye(4), torch.eye(3))
    assert math.isnan(gradient_overlap(lambda p, b: (p**2).sum() * b, torch.zeros(3), torch.ones(()), torch.eye(3)))


@given(a=st.integers(1, 5), b=st.integers(1, 5), n=st.integers(5, 12), seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_overlaps_and_angles_are_those_of_scipy(a: int, b: int, n: int, seed: int) -> None:
    V, W = orthonormal(a, n, seed), orthonormal(b, n, seed + 1)
    like = {"x": torch.zeros(n - 4).double(), "y": torch.zeros(2, 2).double()}
    one, other = tree.unravel(V, like), tree.unravel(W, like)
    angles = torch.tensor(subspace_angles(V.mT.numpy(), W.mT.numpy())).flip(0)
    angles[: max(0, a + b - n)] = 0  # so many directions are common for certain, where SciPy comes out at 1e-8
    assert (principal_angles(one, other) - angles).abs().max() < 1e-13
    assert (principal_angles(other, one) - angles).abs().max() < 1e-13
    overlap = subspace_overlap(one, other)
    assert overlap == pytest.approx(float(torch.linalg.matrix_norm(V @ W.mT) ** 2 / min(a, b)), abs=1e-13)
    assert overlap == pytest.approx(float((torch.cos(angles) ** 2).mean()), abs=1e-13)


@pytest.mark.parametrize("angles", [[1e-12, 1e-9, 0.5], [1e-10, 1e-5, 1.5], [0.0, 1e-8, math.pi / 2], [1e-14] * 3])
def test_small_angles_keep_their_digits_beside_large_ones(angles: list[float]) -> None:
    n, k = 50_000, len(angles)
    basis = orthonormal(2 * k, n, 0)
    theta = torch.tensor(angles, dtype=torch.float64)
    turn, back = orthonormal(k, k, 1), orthonormal(k, k, 2)  # any basis of either span will do
    V = turn @ basis[:k]
    W = back @ (torch.cos(theta)[:, None] * basis[:k] + torch.sin(theta)[:, None] * basis[k:])
    like = {"x": torch.zeros(n - 7).double(), "y": torch.zeros(7).double()}
    found = principal_angles(tree.unravel(V, like), tree.unravel(W, like))
    assert (found - theta).abs().max() < 50 * torch.finfo(torch.float64).eps
    assert subspace_overlap(V, W) == pytest.approx(float((torch.cos(theta) ** 2).mean()), abs=1e-14)


def test_solutions_of_two_precisions_are_compared() -> None:
    loss, params = functional_loss(net(), F.cross_entropy)
    A = hessian(loss, params, (X, Y))
    exact = eigsh(A, 3, which="LA", tol=1e-10, seed=0)
    loss, params = functional_loss(net().float(), F.cross_entropy)
    rough = eigsh(hessian(loss, params, (X.float(), Y)), 3, which="LA", seed=1)
    assert subspace_overlap(exact, rough) == pytest.approx(1, abs=1e-5)
    assert 0 < principal_angles(rough, exact).max() < 1e-2
    inside = EigenPairs(exact.values[:1], tree.rows(exact.vectors, 1, 2), exact.residuals[:1])
    assert subspace_overlap(exact, inside) == pytest.approx(1, abs=1e-12)
    assert principal_angles(inside, exact).max() < 1e-12
    outside = eigsh(A, 2, which="SA", tol=1e-10, seed=0)
    assert subspace_overlap(exact, outside) < 1e-12
    assert principal_angles(exact, outside).min() == pytest.approx(math.pi / 2, abs=1e-6)


def test_the_gradient_of_a_classifier_moves_into_a_tiny_subspace() -> None:
    """G. Gur-Ari, D. Roberts, E. Dyer 2018, on the digits: the ten top eigenvectors, of 26,122, hold most of it."""
    images, labels = demo.digits()
    x = images.flatten(1)
    with seeded():
        sizes = [64, 128, 128, 10]
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        for layer in layers:
            nn.init.uniform_(layer.weight, -(layer.in_features**-0.5), layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    loss, params = functional_loss(model, F.cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    g = torch.Generator().manual_seed(0)
    shares = {}
    for step in range(1, 201):
        index = torch.randint(len(x), (64,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), labels[index]).backward()
        optimizer.step()
        if step in (20, 200):
            top = eigsh(hessian(loss, params, (x, labels), check=False), 10, which="LA", tol=1e-3, seed=0)
            shares[step] = float(gradient_overlap(loss, params, (x, labels), top))
    assert shares[20] < 0.1
    assert shares[200] > 0.85
    random = tree.randn(params, g)
    unit = tree.scale(1 / tree.norm(random), random)
    assert float((tree.exact_gram(top.vectors, tree.lifted(unit)) ** 2).sum()) < 0.002
