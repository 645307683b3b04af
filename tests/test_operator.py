"""Operators as members of an algebra: linear, symmetric, and equal to their dense matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from eigenfunc import LinearOperator, aslinearoperator, eigsh, functional_loss, hessian, tree
from eigenfunc.errors import InputError, TreeError
from tests.helpers import labelled, mlp, normal, symmetric

CE = nn.CrossEntropyLoss()


@st.composite
def trees(draw: st.DrawFn) -> Any:
    """A nested tree of float64 zeros with at most sixty entries."""
    shape = st.lists(st.integers(1, 3), max_size=3).map(lambda dims: torch.zeros(dims, dtype=torch.float64))
    keys = st.text(alphabet="abcxyz", min_size=1, max_size=3)
    nested = st.recursive(
        shape,
        lambda inner: st.one_of(
            st.dictionaries(keys, inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3),
            st.tuples(inner, inner),
        ),
        max_leaves=5,
    )
    return draw(nested)


def on(like: Any, matrix: Tensor) -> LinearOperator:
    return aslinearoperator(matrix, like=like)


def vector(like: Any, seed: int) -> Any:
    return tree.randn(like, torch.Generator().manual_seed(seed))


def close(a: Any, b: Any, like: Any, tolerance: float = 1e-11) -> bool:
    gap = tree.ravel(a, like) - tree.ravel(b, like)
    return bool(gap.abs().max() <= tolerance * (1 + tree.ravel(b, like).abs().max()))


@given(like=trees(), seed=st.integers(0, 10_000), a=st.floats(-5, 5), b=st.floats(-5, 5))
@settings(deadline=None, max_examples=60)
def test_products_are_linear_and_symmetric_on_any_tree(like: Any, seed: int, a: float, b: float) -> None:
    A = on(like, symmetric(tree.size(like), seed))
    u, v = vector(like, seed), vector(like, seed + 1)
    mixed = A(tree.add(tree.scale(a, u), tree.scale(b, v)))
    assert close(mixed, tree.add(tree.scale(a, A(u)), tree.scale(b, A(v))), like)
    assert abs(tree.dot(u, A(v)) - tree.dot(v, A(u))) < 1e-11 * (1 + tree.norm(u) * tree.norm(v))
    assert torch.equal(tree.ravel(A @ v, like), tree.ravel(A(v), like))


@given(hidden=st.integers(1, 5), seed=st.integers(0, 10_000), a=st.floats(-3, 3))
@settings(deadline=None, max_examples=15)
def test_hessians_are_linear_and_symmetric(hidden: int, seed: int, a: float) -> None:
    A = hessian(*functional_loss(mlp(sizes=(3, hidden, 2), seed=seed), CE), labelled(6, 3, 2))
    u, v = vector(A.like, seed), vector(A.like, seed + 1)
    assert close(A(tree.add(tree.scale(a, u), v)), tree.add(tree.scale(a, A(u)), A(v)), A.like)
    assert abs(tree.dot(u, A(v)) - tree.dot(v, A(u))) < 1e-12 * (1 + tree.norm(A(v)) * tree.norm(u))


@given(like=trees(), seed=st.integers(0, 10_000), c=st.floats(-4, 4))
@settings(deadline=None, max_examples=40)
def test_sums_scalings_shifts_and_deflations_equal_the_dense_ones(like: Any, seed: int, c: float) -> None:
    n = tree.size(like)
    a, b = symmetric(n, seed), symmetric(n, seed + 1)
    A, B = on(like, a), on(like, b)
    pairs = eigsh(A, min(2, n), which="LA", seed=0, tol=1e-10).pairs
    x = tree.ravel(pairs.vectors, like)
    cases = {
        "sum": (A + B, a + b),
        "difference": (A - B, a - b),
        "scaled": (c * A, c * a),
        "from the right": (A * c, c * a),
        "negative": (-A, -a),
        "shift": (A.shift(c), a + c * torch.eye(n).double()),
        "deflated": (A.deflate(pairs), a - (x.mT * pairs.values) @ x),
    }
    vs = tree.stack([vector(like, seed + i) for i in range(3)])
    for name, (operator, truth) in cases.items():
        assert (operator.to_dense() - truth).abs().max() < 1e-11, name
        block = tree.ravel(operator.matmat(vs), like)
        single = torch.stack([tree.ravel(operator(tree.row(vs, i)), like) for i in range(3)])
        assert (block - single).abs().max() < 1e-11, name


def test_a_restriction_is_the_principal_block() -> None:
    x = normal(8, 3)
    A = hessian(*functional_loss(mlp(sizes=(3, 4, 2)), nn.MSELoss()), (x, x[:, :2]))
    dense = A.to_dense()
    labels = [name for name, leaf in zip(tree.names(A.like), tree.leaves(A.like), strict=True) for _ in leaf.flatten()]
    for select in ("0", "*.bias", ["0.weight", "2.bias"], lambda name: "weight" in name):
        block = A.restrict(select)
        index = [i for i, label in enumerate(labels) if label in block.like]
        assert (block.to_dense() - dense[index][:, index]).abs().max() < 1e-12
        top = eigsh(block, 1, which="LA", seed=0, tol=1e-8)
        assert abs(top.values[0] - torch.linalg.eigvalsh(dense[index][:, index])[-1]) <= top.bounds[0]
    with pytest.raises(InputError, match="selects none"):
        A.restrict("3")


def test_deflated_pairs_leave_the_next_ones_on_top() -> None:
    a = symmetric(40, 3)
    first = eigsh(a, 3, which="LA", seed=0, tol=1e-10)
    rest = eigsh(aslinearoperator(a).deflate(first.pairs), 2, which="LA", seed=0, tol=1e-8)
    truth = torch.linalg.eigvalsh(a).flip(0)[3:5]
    assert ((rest.values - truth).abs() < 1e-7).all()


def test_mixed_dtypes_keep_theirs() -> None:
    like = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float32)}
    a = symmetric(5, 0)
    A = on(like, a)
    v = vector(like, 0)
    image = (0.5 * A.shift(2.0))(v)
    assert {name: leaf.dtype for name, leaf in image.items()} == {"a": torch.float64, "b": torch.float32}
    truth = 0.5 * (a @ tree.ravel(v, like) + 2 * tree.ravel(v, like))
    assert (tree.ravel(image, like) - truth).abs().max() < 1e-6


FOREIGN = symmetric(30, 5)
SOURCES: dict[str, Any] = {
    "tensor": FOREIGN,
    "array": FOREIGN.numpy(),
    "SciPy operator": scipy.sparse.linalg.aslinearoperator(FOREIGN.numpy()),
    "sparse matrix": scipy.sparse.csr_matrix(FOREIGN.numpy()),
    "sparse array": scipy.sparse.csr_array(FOREIGN.numpy()),
    "operator": aslinearoperator(FOREIGN),
}


@pytest.mark.parametrize("name", SOURCES)
def test_everything_that_stands_for_a_matrix_is_taken(name: str) -> None:
    A = aslinearoperator(SOURCES[name])
    assert (A.to_dense() - FOREIGN).abs().max() < 1e-14
    values = scipy.sparse.linalg.eigsh(FOREIGN.numpy(), 3, which="LA", return_eigenvectors=False)[::-1]
    solution = eigsh(SOURCES[name], 3, which="LA", seed=0, tol=1e-8)
    assert (np.abs(solution.values.numpy() - values) <= solution.bounds.numpy() + 1e-12).all()


def test_a_callable_comes_with_its_space() -> None:
    A = aslinearoperator(lambda v: {"w": 2 * v["w"]}, like={"w": torch.zeros(3)})
    assert torch.equal(A.to_dense(), 2 * torch.eye(3))
    with pytest.raises(InputError, match="needs `like`"):
        aslinearoperator(lambda v: v)


NOT_MATRICES: dict[str, tuple[Any, str]] = {
    "not square": (torch.ones(2, 3), "square"),
    "empty": (torch.ones(0, 0), "square and not empty"),
    "not symmetric": (torch.ones(3, 3).triu(), "not symmetric"),
    "nan": (torch.full((2, 2), float("nan")), "NaN"),
    "integers": (torch.eye(2, dtype=torch.long), "dtype"),
    "complex": (torch.eye(2, dtype=torch.complex64), "dtype"),
    "sparse integers": (scipy.sparse.eye_array(3, dtype=int), "dtype"),
    "sparse, not square": (scipy.sparse.csr_array(np.ones((2, 3))), "square"),
    "a number": (3.0, "cannot read a matrix"),
    "text": ("A", "cannot read a matrix"),
}


@pytest.mark.parametrize("name", NOT_MATRICES)
def test_what_is_no_symmetric_matrix_is_refused(name: str) -> None:
    source, message = NOT_MATRICES[name]
    with pytest.raises(InputError, match=message):
        aslinearoperator(source)


def test_operators_on_different_spaces_do_not_add() -> None:
    with pytest.raises(TreeError, match="summand"):
        aslinearoperator(torch.eye(3)) + aslinearoperator(torch.eye(4))
    with pytest.raises(TypeError):
        aslinearoperator(torch.eye(3)) + 1


def test_a_dense_matrix_too_large_is_refused() -> None:
    A = aslinearoperator(lambda v: v, like=torch.zeros(1).expand(10**6))
    with pytest.raises(InputError, match="over the limit"):
        A.to_dense()


def test_an_operator_tells_what_it_is() -> None:
    A = aslinearoperator(torch.eye(3))
    assert A.describe() == "dense matrix, n = 3"
    assert "dense matrix" in (2.0 * A).describe()
    assert "n = 3" in repr(A)
    assert A.shape == (3, 3)
