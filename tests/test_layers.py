"""Blocks of layers: the principal blocks of the dense matrix, for less than a whole product, in shared sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from eigenfunc import Batches, LinearOperator, aslinearoperator, eigsh, functional_loss, hessian, tree
from eigenfunc.curvature import products
from eigenfunc.errors import InputError, ObjectiveError, TransformError, TreeError
from eigenfunc.layers import blocks, eigsh_blocks
from eigenfunc.selection import grouped
from tests.helpers import cut, dense_hessian, labelled, plain, rotated, seeded

Setting = tuple[Any, dict[str, Tensor], "Counted"]

X, Y = labelled(24)
CUT = cut((X, Y), [10, 10, 4])


class Counted:
    """The data in uneven batches, counting how often it is read from the start."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter(CUT)


class Scaled(nn.Module):
    """A network with a layer of one parameter, and one that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.unused = nn.Linear(2, 2)
        self.second = nn.Linear(6, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.last(torch.tanh(self.second(F.gelu(self.gain * self.first(x)))))


def model() -> nn.Module:
    with seeded(3):
        return Scaled().double()


def setting() -> Setting:
    loss, params = functional_loss(model(), nn.CrossEntropyLoss())
    return loss, params, Counted()


def dense_blocks(by: Callable[[str], str]) -> dict[str, Tensor]:
    _, params = functional_loss(model(), nn.CrossEntropyLoss())
    whole = dense_hessian(plain(model(), lambda m: F.cross_entropy(m(X), Y)), params)
    groups = [by(name) for name in owners(params)]
    index = {group: torch.tensor([i for i, g in enumerate(groups) if g == group]) for group in set(groups)}
    return {group: whole[rows][:, rows] for group, rows in index.items()}


def owners(params: dict[str, Tensor]) -> list[str]:
    """The name of the parameter that holds each entry of a flat vector."""
    return [name for name in sorted(params) for _ in range(params[name].numel())]


def module(name: str) -> str:
    return name.rpartition(".")[0]


LAYERS = ["", "first", "unused", "second", "last"]


@pytest.mark.parametrize("cache", ["auto", 0])
@pytest.mark.parametrize("product", ["graph", "jvp", "dual", "vjp"])
def test_blocks_are_the_principal_blocks_of_the_dense_matrix(product: str, cache: Any) -> None:
    loss, params, data = setting()
    found = blocks(loss, params, Batches(data), product=product, cache=cache)
    truth = dense_blocks(module)
    assert list(found) == LAYERS
    for name, block in found.items():
        assert (block.to_dense() - truth[name]).abs().max() < 1e-12, name
        v = tree.randn(block.like, torch.Generator().manual_seed(0))
        assert (tree.ravel(block(v), block.like) - truth[name] @ tree.ravel(v, block.like)).abs().max() < 1e-12


def test_blocks_by_differences_carry_their_error() -> None:
    loss, params, data = setting()
    found = blocks(loss, params, Batches(data), product="finite-difference")
    for name, truth in dense_blocks(module).items():
        block = found[name].to_dense()
        assert 0 < found[name].noise() < 1e-6
        assert torch.linalg.matrix_norm(block - truth, 2) <= len(truth) ** 0.5 * found[name].noise()


def test_one_vector_at_a_time_or_several_give_the_same_images() -> None:
    loss, params, data = setting()
    for chunk in (1, 3, 100):
        block = hessian(loss, params, Batches(data), chunk=chunk).restrict(["second", "first.bias"])
        dense = block.to_dense()
        vs = tree.stack([tree.randn(block.like, torch.Generator().manual_seed(i)) for i in range(4)])
        assert (tree.ravel(block.matmat(vs), block.like) - tree.ravel(vs, block.like) @ dense).abs().max() < 1e-12


def test_groups() -> None:
    A = hessian(*setting()[:2], CUT[0])
    assert list(A.blocks("parameter")) == list(A.like)
    assert list(A.blocks(lambda name: name[-1])) == ["n", "t", "s"]
    by_pattern = A.blocks(["*.bias", "last", "gain"])
    assert {name: sorted(block.like) for name, block in by_pattern.items()} == {
        "*.bias": ["first.bias", "last.bias", "second.bias", "unused.bias"],
        "last": ["last.bias", "last.weight"],
        "gain": ["gain"],
    }
    assert list(A.restrict("first").blocks("parameter")) == ["first.weight", "first.bias"]
    with pytest.raises(InputError, match=r"by: 'third' selects none of 'gain', 'first.weight'"):
        A.blocks(["first", "third"])
    with pytest.raises(InputError, match=r"'module', 'parameter', a function or a list of patterns, got 'layer'"):
        A.blocks("layer")
    with pytest.raises(InputError, match="gives a NoneType for 'gain'"):
        A.blocks(lambda name: None)  # type: ignore[arg-type,return-value]


def test_layers_come_in_the_order_of_the_model_and_own_their_parametrisations() -> None:
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(11)))
    nn.utils.parametrizations.weight_norm(net[4])
    _, params = functional_loss(net, nn.MSELoss())
    groups = grouped(params, "module", "by")
    assert list(groups) == [str(i) for i in range(11)]
    assert len(groups["4"]) == 3
    nested = {"b": [torch.zeros(1), torch.zeros(2)], "a": {"y": torch.zeros(1), "x": torch.zeros(1)}}
    assert grouped(nested, "module", "by") == {"b": ["b.0", "b.1"], "a": ["a.y", "a.x"]}
    twice = aslinearoperator(torch.eye(2), like={"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)})
    with pytest.raises(TreeError, match=r"two leaves are called 'a\.b'"):
        twice.restrict("a")


def flops(A: LinearOperator) -> int:
    v = tree.randn(A.like, torch.Generator().manual_seed(0))
    A(v)
    with FlopCounterMode(display=False) as counter:
        A(v)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("product", ["graph", "jvp", "dual"])
def test_the_blocks_of_late_layers_cost_little(product: str) -> None:
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30), nn.Linear(30, 5))
    loss, params = functional_loss(net.double(), nn.MSELoss())
    A = hessian(loss, params, (torch.ones(64, 20).double(), torch.ones(64, 5).double()), product=product)
    shares = [flops(block) / flops(A) for block in A.blocks().values()]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] < 0.75
    assert shares[-1] < 0.2
    if product == "graph":
        assert sum(shares) < 1  # all layers' blocks together cost less than one whole product
        assert shares[-1] < 0.05


@pytest.mark.parametrize("wrong", ["raises", "lies"])
def test_a_block_product_that_does_not_agree_is_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    narrowed = products._narrowed

    def broken(way: Any, f: Any, point: Any, chosen: Any) -> Any:
        if wrong == "raises":
            raise RuntimeError("not this way")
        product = narrowed(way, f, point, chosen)
        return product._replace(single=lambda v: [1.01 * x for x in product.single(v)])

    monkeypatch.setattr(products, "_narrowed", broken)
    loss, params, data = setting()
    found = blocks(loss, params, Batches(data), product="jvp")
    assert "whole products" not in found["last"].describe()
    for name, truth in dense_blocks(module).items():
        assert (found[name].to_dense() - truth).abs().max() < 1e-12, name
    count = {"raises": 5, "lies": 4}[wrong]  # zero is zero, for the unused layer
    assert f"{count} blocks by whole products" in found["last"].describe()


def test_kept_and_remade_graphs_are_both_held_against_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    narrowed, (loss, params, _) = products._narrowed, setting()
    size = hessian(loss, params, CUT[0], product="graph", check=False)
    budget = int(float(size.describe().split("kept (")[1].split()[0]) * 1024 * 1.5)
    whole = hessian(loss, params, Batches(CUT), check=False).to_dense()

    def lying(way: Any, f: Any, point: Any, chosen: Any) -> Any:
        product = narrowed(way, f, point, chosen)
        return product._replace(single=lambda v: [1.01 * x for x in product.single(v)])

    monkeypatch.setattr(products, "_narrowed", lying)
    monkeypatch.setattr("eigenfunc.curvature.setup._fastest", lambda *_: ("jvp", 0.0))
    A = hessian(loss, params, Batches(CUT), cache=budget)
    assert "the first 1, and no others, kept" in A.describe()
    index = torch.tensor([i for i, name in enumerate(owners(params)) if name.startswith("last")])
    assert (A.restrict("last").to_dense() - whole[index][:, index]).abs().max() < 1e-12


@given(seed=st.integers(0, 1000), c=st.floats(-3, 3), sigma=st.floats(-3, 3))
@settings(max_examples=10, deadline=None)
def test_the_algebra_keeps_cheap_blocks(seed: int, c: float, sigma: float) -> None:
    loss, params, _ = setting()
    H = hessian(loss, params, CUT[seed % 3], product="graph", check=False)
    g = torch.Generator().manual_seed(seed)
    d = tree.tree_map(lambda leaf: torch.rand(leaf.shape, generator=g, dtype=leaf.dtype) + 0.1, params)
    A = (c * H + H.precondition(d)).shift(sigma) - 2 * H
    assert A.principal is not None
    inner = A.restrict(lambda name: name != "gain").restrict(["last", "first.weight", "unused.bias"])
    assert inner.principal is not None
    dense = A.to_dense()
    index = torch.tensor([i for i, name in enumerate(owners(params)) if name in inner.like])
    assert (inner.to_dense() - dense[index][:, index]).abs().max() < 1e-12
    assert H.deflate(eigsh(H, 1, seed=0)).principal is None


def test_blocks_of_a_plain_matrix_and_of_a_function() -> None:
    like = {"a": torch.zeros(3).double(), "b": torch.zeros(2, 2).double()}
    M = rotated(torch.arange(7.0), 0)
    A = aslinearoperator(M, like=like)
    B = LinearOperator(A.matvec, like)
    for operator in (A, B):
        found = operator.blocks("parameter")
        assert (found["a"].to_dense() - M[:3, :3]).abs().max() < 1e-14
        assert (found["b"].to_dense() - M[3:, 3:]).abs().max() < 1e-14
        values = {name: s.values for name, s in eigsh_blocks(operator, 9, which="SA", by="parameter", seed=0).items()}
        assert (values["a"] - torch.linalg.eigvalsh(M[:3, :3])).abs().max() < 1e-13
        assert (values["b"] - torch.linalg.eigvalsh(M[3:, 3:])).abs().max() < 1e-13


def test_blocks_within_a_transform_and_after_a_change_of_the_parameters() -> None:
    loss, params, data = setting()
    params = {name: leaf.clone() for name, leaf in params.items()}
    block = hessian(loss, params, Batches(data)).restrict("last")
    vs = tree.stack([tree.randn(block.like, torch.Generator().manual_seed(i)) for i in range(3)])
    mapped = tree.ravel(torch.func.vmap(block.matvec)(vs), block.like)
    assert (mapped - tree.ravel(block.matmat(vs), block.like)).abs().max() < 1e-12
    with pytest.raises(TransformError, match="call it outside"):
        torch.func.vmap(lambda x: x + eigsh_blocks(torch.eye(3))[""].values[0])(torch.zeros(2))
    params["first.bias"].add_(1)
    with pytest.raises(ObjectiveError, match=r"'first\.bias' was changed in place"):
        block(tree.row(vs, 0))
