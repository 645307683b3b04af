"""What an operator chose by timing or memory, told to another process: the same products bit for bit, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eigenfunc import Batches, LinearOperator, aslinearoperator, eigsh, functional_loss, hessian, tree
from eigenfunc.checkpoint import Checkpoint
from eigenfunc.curvature import setup, sweep
from eigenfunc.curvature.ggn import ggn
from eigenfunc.errors import CheckpointError, CheckpointWarning, Stopped
from tests.helpers import cut, mlp, random_like

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 6, generator=G), torch.randint(0, 3, (64,), generator=G)
NONE, SOME, ALL = 0, 8_000, 2**24  # bytes for kept graphs


def made(way: str, cache: int, matrix: Any = hessian, **asked: Any) -> LinearOperator:
    """As if one way had been the fastest."""
    loss, params = functional_loss(mlp(sizes=(6, 9, 3)).float(), nn.CrossEntropyLoss())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "_fastest", lambda made, refs, prepares: ("graph" if made.complete else way, 1.0))
        data = Batches(cut((X, Y), 12))
        operator: LinearOperator = matrix(loss, params, data, cache=cache, **asked)
    return operator


def told(A: LinearOperator) -> Any:
    """As it comes out of a file."""
    return json.loads(json.dumps(A.choices.tell()))


def same(A: LinearOperator, B: LinearOperator) -> bool:
    vs = tree.stack([random_like(A.like, i) for i in range(9)])
    pairs = [(A.matmat(vs), B.matmat(vs)), (A(tree.row(vs, 0)), B(tree.row(vs, 0)))]
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(tree.leaves(x), tree.leaves(y), strict=True))


@pytest.mark.parametrize("matrix", [hessian, ggn])
@pytest.mark.parametrize("cache", [NONE, SOME, ALL])
def test_products_are_formed_as_they_were(matrix: Any, cache: int) -> None:
    A = made("dual", cache, matrix, chunk=3)
    graphs = A.choices.tell()["graphs"]
    assert graphs == {NONE: 0, ALL: 6}.get(cache, graphs)
    assert cache != SOME or matrix is not hessian or 0 < graphs < 6
    differed = 0
    for way, other in [("graph", NONE), ("graph", SOME), ("graph", ALL), ("dual", NONE), ("dual", SOME)]:
        B = made(way, other, matrix)
        B.choices.take({**told(B), "chunk": 3})
        differed += not same(A, B)
        B.choices.take(told(A))
        assert same(A, B)
        assert told(B) == {**told(A), "graphs": told(B)["graphs"]}
        assert f"way '{told(A)['way']}'" in B.describe()
        assert "vectors 3 at once" in B.describe()
    assert differed > 0


def test_the_error_of_differences_is_remembered() -> None:
    way = "finite-difference"
    A, B = made(way, NONE, product=way), made(way, NONE, product=way)
    for i in range(20):
        A(random_like(A.like, i))
    B(random_like(A.like, 0))
    assert 0 < B.noise() < A.noise()
    B.choices.take(told(A))
    assert B.noise() == A.noise()
    assert told(B) == told(A)


def test_ways_that_are_not_to_be_had_are_refused() -> None:
    A, only = made("dual", NONE), made("jvp", NONE, product="jvp")
    with pytest.raises(CheckpointError, match="formed by dual, what can be formed now by jvp"):
        only.choices.take(told(A))
    with pytest.raises(CheckpointError, match="formed by graph, jvp, what can be formed now by jvp"):
        only.choices.take({**told(only), "graphs": 2})
    with pytest.raises(CheckpointError, match="dual compiled, what can be formed now by"):
        A.choices.take({**told(A), "compiled": True})


def test_the_algebra_passes_choices_on() -> None:
    def built(way: str, cache: int) -> LinearOperator:
        A, B = made(way, cache, chunk=3), made("graph", cache, chunk=3)
        pair = eigsh(aslinearoperator(lambda v: v, A.like), 1, seed=0).pairs
        return ((2 * A).shift(0.5).deflate(pair) - B).restrict(["0.weight", "2.bias"])

    A, B = built("dual", SOME), built("graph", NONE)
    assert [part["way"] for part in told(A)] == ["dual", "graph"]
    assert told(B) != told(A)
    B.choices.take(told(A))
    assert same(A, B)
    dense = aslinearoperator(torch.eye(3))
    assert told(dense + dense) == [None, None]
    (dense + dense).choices.take([None, None])


def test_a_run_goes_on_with_the_choices_that_it_began_with(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"k": 8, "which": "LA", "basis_size": 30, "tol": 1e-5, "seed": 0}
    first = made("dual", SOME, chunk=3)
    truth = eigsh(first, **asked)
    left = 12

    def stop() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    path = tmp_path / "run"
    with pytest.raises(Stopped, match=str(path)):
        eigsh(first, **asked, checkpoint=Checkpoint(path, stop=stop))
    solution = eigsh(made("graph", NONE), **asked, checkpoint=path)
    assert torch.equal(solution.values, truth.values)
    assert torch.equal(solution.residuals, truth.residuals)
    assert all(
        torch.equal(a, b) for a, b in zip(tree.leaves(solution.vectors), tree.leaves(truth.vectors), strict=True)
    )
    other = made("graph", NONE)
    deaf = LinearOperator(other.matvec, other.like)  # is told nothing, and goes its own way
    with pytest.warns(CheckpointWarning):
        eigsh(deaf, **asked, checkpoint=path)


def test_blocks_have_to_be_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A close choice would be another one in each run, and with it the last digits of the result."""
    for share, chunk in [(0.9, 1), (0.7, 8)]:
        A = made("graph", ALL)
        single = iter([5.0, 1.0, 3.0])
        monkeypatch.setattr(sweep, "seconds", lambda f, device, s=single, b=8 * share: next(s, b))
        A.matmat(tree.stack([random_like(A.like, i) for i in range(9)]))
        assert f"vectors {chunk} at once" in A.describe()
