"""Products, kernels and whole runs under `torch.compile(fullgraph=True)`: no graph break, and the eager result."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._dynamo.variables.torch import get_overridable_functions
from torch.nn import functional as F

import eigenfunc
from eigenfunc import functional_loss, hvp, tree
from eigenfunc.errors import TransformError
from eigenfunc.krylov import lanczos, lobpcg, power, run, subspace
from tests.helpers import Params, flat, mlp, normal, random_like, rotated, untouched

G = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, generator=G).double()
Y = torch.randn(6, 3, generator=G).double()
A = rotated(torch.linspace(-1, 3, 12), 1)
V = torch.randn(12, generator=G).double()
W = {"w": X[:3] / 2, "b": Y[0]}  # not in the order of the keys


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def traced(f: Callable[..., Any], *args: Any, backend: Any = "aot_eager") -> Any:
    listed = set(get_overridable_functions())
    try:
        return torch.compile(f, fullgraph=True, backend=backend)(*args)
    finally:
        assert not counters["graph_break"]
        assert get_overridable_functions() == listed


def assert_same(found: Any, truth: Any, tolerance: float = 1e-12) -> None:
    pairs = list(zip(tree.leaves(found), tree.leaves(truth), strict=True))
    assert pairs
    for x, y in pairs:
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        size = max(1.0, float(y.double().abs().max()))
        assert float((x.double() - y.double()).abs().max()) <= tolerance * size


def layer(params: Params, batch: Any) -> Tensor:
    return torch.tanh(batch[0] @ params["w"].mT + params["b"])


def smooth(params: Params, batch: Any) -> Tensor:
    return (layer(params, batch) ** 4).mean()


def unused(params: Params, batch: Any) -> Tensor:
    return (params["w"] ** 3).sum()[None]


def mse(params: Params, batch: Any) -> Tensor:
    return F.mse_loss(layer(params, batch), batch[1])


def distances(params: Params, batch: Any) -> Tensor:
    return torch.cdist(layer(params, batch), batch[1]).pow(3).sum()


def attention(params: Params, batch: Any) -> Tensor:
    q = layer(params, batch)[None]
    return F.scaled_dot_product_attention(q, q, q).pow(3).sum()


def constant_norm(params: Params, batch: Any) -> Tensor:
    h = layer(params, batch)
    with torch.no_grad():
        size = h.norm()
    return ((h / size) ** 4).sum()


def constant_data(params: Params, batch: Any) -> Tensor:
    h = layer(params, batch)
    return (h * h.data).square().sum()


def weight_norm(params: Params, batch: Any) -> Tensor:
    return torch.tanh(batch[0] @ torch._weight_norm(params["w"], params["b"][:, None], 0).mT).pow(3).sum()


def padded_embedding(params: Params, batch: Any) -> Tensor:
    return F.embedding(torch.tensor([0, 2, 1, 0]), params["w"], padding_idx=0, sparse=True).pow(3).sum()


LOSSES = [smooth, unused, mse, padded_embedding, distances, attention, constant_norm, constant_data, weight_norm]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_traced_product_is_the_eager_one(loss: Callable[..., Tensor]) -> None:
    v = random_like(W)
    found = traced(lambda p, b, v: hvp(loss, p, b, v), W, [X, Y], dict(sorted(v.items())))
    assert_same(found, hvp(loss, W, (X, Y), v))


def small(*between: nn.Module, last: int = 3) -> nn.Module:
    return mlp(*between, sizes=(4, 4, last))


class Keeps(nn.Module):
    """Features put by, and a plain tensor that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.size = nn.Linear(4, 4).double(), torch.ones(4).double()

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.linear(x).tanh()
        self.size = self.size * self.kept.mean()
        return self.kept * self.size


MODULES = {
    "plain": small(),
    "normalised": small(nn.BatchNorm1d(4)),
    "convolution": small(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2).double(), nn.Flatten()),
    "weight norm": small(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4).double())),
    "keeps": small(Keeps()),
    "transformer": small(
        nn.Unflatten(1, (1, 4)), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0).double(), nn.Flatten()
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_traced_product_of_a_module_is_the_eager_one(name: str) -> None:
    model = MODULES[name]
    loss, params = functional_loss(model, nn.MSELoss())
    v = random_like(params)
    with untouched(model):
        found = traced(lambda p, b, v: hvp(loss, p, b, v), params, (X, Y), v)
    assert_same(found, hvp(loss, params, (X, Y), v))


def test_a_batch_may_be_taken_apart_by_the_loss() -> None:
    def greedy(params: Params, batch: dict[str, Any]) -> Tensor:
        return (batch.pop("x") @ params["w"].mT).pow(3).mean() + (params["b"] ** 4).sum()

    batch = {"x": X}
    v = random_like(W)
    assert_same(traced(lambda v: hvp(greedy, W, batch, v), v), hvp(greedy, W, batch, v))
    assert list(batch) == ["x"]


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_a_graph_break_inside_a_product_is_named() -> None:
    @torch.compiler.disable
    def opaque(params: Params, batch: Any) -> Tensor:
        return smooth(params, batch)

    def broken(params: Params, batch: Any) -> Tensor:
        return opaque(params, batch) + (layer(params, batch) * layer(params, batch).data).sum()

    for loss in (opaque, broken):
        with pytest.raises(TransformError, match="graph"):
            torch.compile(lambda v, loss=loss: hvp(loss, W, (X, Y), v), backend="eager")(random_like(W))


def test_checks_and_transforms_go_through_the_compiler() -> None:
    def product(v: Params) -> Params:
        return hvp(smooth, W, (X, Y), v)

    v, u = random_like(W), random_like(W, 1)
    stack = tree.stack([v, u])
    assert_same(traced(torch.func.vmap(product), stack), torch.func.vmap(product)(stack))
    slope = torch.func.grad(lambda v: tree.dot(product(v), v))
    assert_same(traced(slope, v), slope(v))
    assert_same(traced(lambda v: torch.func.jvp(product, (v,), (u,))[1], v, backend="eager"), product(u))
    with pytest.raises(Exception, match="structure"):
        traced(product, {"w": v["w"]})
    with pytest.raises(Exception, match="shape"):
        traced(product, {**v, "b": v["b"][:2]})


class Pair(NamedTuple):
    left: Any
    right: Any


def trees(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keyed = st.dictionaries(st.sampled_from("dacb"), children, min_size=1, max_size=3)
    return st.one_of(
        keyed,
        keyed.map(OrderedDict),
        st.lists(children, min_size=1, max_size=2),
        st.tuples(children, children),
        st.builds(Pair, children, children),
    )


@settings(max_examples=12, deadline=None)
@given(st.recursive(st.builds(lambda: torch.zeros(1)), trees, max_leaves=5))
def test_trees_are_traversed_in_the_same_order(structure: Any) -> None:
    flat, rebuild = tree.flatten(structure)
    numbered = rebuild([torch.full((1,), float(i)) for i in range(len(flat))])

    def walk(x: Any) -> tuple[list[Tensor], Any]:
        return tree.leaves(x), tree.add(x, x)

    torch.compiler.reset()
    order, doubled = traced(walk, numbered, backend="eager")
    assert [int(leaf) for leaf in order] == list(range(len(flat)))
    assert [int(leaf) for leaf in tree.leaves(doubled)] == [2 * i for i in range(len(flat))]


def dense(block: Tensor) -> Tensor:
    return block @ A


def product(v: Params) -> Params:
    return hvp(smooth, W, (X, Y), v)


def products(block: Params) -> Params:
    return tree.lifted(product(tree.row(block, 0)))


STARTS = {"matrix": (V, lambda v: A @ v, dense), "hvp": (random_like(W), product, products)}


@pytest.mark.parametrize(("kind", "backend"), [("matrix", "eager"), ("matrix", "aot_eager"), ("hvp", "aot_eager")])
def test_single_steps_trace(kind: str, backend: str) -> None:
    v0, matvec, matmat = STARTS[kind]
    unit = tree.lifted(tree.scale(1 / tree.norm(v0), v0))

    def begun() -> lanczos.State:
        return lanczos.absorb(lanczos.init(unit, matmat(unit), 5), matmat(unit), 0)

    found = traced(lambda s: lanczos.step(s, matmat, 1), begun(), backend=backend)
    assert_same(tuple(found), tuple(lanczos.step(begun(), matmat, 1)))
    start = power.step(power.init(v0), matvec)
    found = traced(lambda s: power.step(s, matvec, 0.1), start, backend=backend)
    assert_same(tuple(found), tuple(power.step(start, matvec, 0.1)))


def span(block: Any) -> Tensor:
    """The projector onto the rows: blind to their signs and to turns among them."""
    rows = torch.cat([leaf.flatten(1) for leaf in tree.leaves(block)], dim=1)
    return rows.mT @ rows


@pytest.mark.parametrize(("kind", "backend"), [("matrix", "aot_eager"), ("hvp", "eager")])
def test_steps_of_blocks_trace(kind: str, backend: str) -> None:
    block = normal(3, 12)
    matmat: Callable[[Any], Any] = dense
    if kind == "hvp":
        block, matmat = tree.stack([random_like(W, i) for i in range(2)]), torch.func.vmap(product)
    for module in (subspace, lobpcg):
        start = module.init(block, matmat)
        found = traced(lambda s, step=module.step: step(s, matmat), start, backend=backend)
        truth = module.step(start, matmat)
        assert_same((found.values, found.residuals), (truth.values, truth.residuals), 1e-11)
        assert_same(span(found.vectors), span(truth.vectors), 1e-11)


@pytest.mark.parametrize(("kind", "backend"), [("matrix", "aot_eager"), ("hvp", "eager")])
def test_unrolled_runs_trace(kind: str, backend: str) -> None:
    v0, matvec, _ = STARTS[kind]
    for solver in (eigenfunc.lanczos, eigenfunc.power)[: 1 if kind == "hvp" else 2]:
        found = traced(lambda v, solver=solver: solver(matvec, v, 3), v0, backend=backend)
        assert_same(tuple(found), tuple(solver(matvec, v0, 3)))


@pytest.mark.parametrize("kind", STARTS)
def test_a_looped_step_is_compiled_once_and_gives_what_lanczos_gives(kind: str) -> None:
    v0, matvec, _ = STARTS[kind]
    counter = CompileCounter()
    for steps in (1, 7, 3):
        truth = tuple(eigenfunc.lanczos(matvec, v0, steps))
        assert_same(tuple(run(matvec, v0, steps, backend=counter)), truth)
        assert_same(tuple(run(matvec, v0, steps, compile=False)), truth)
    assert counter.frame_count == 1
    assert not counters["graph_break"]


def test_many_matrices_can_be_compiled_in_one_process() -> None:
    counter = CompileCounter()
    with torch._dynamo.config.patch(recompile_limit=1):
        run(lambda v: A @ v, V, 2, backend=counter)
        run(lambda v: A @ (2 * v), V, 2, backend=counter)
    assert counter.frame_count == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_looped_run_that_breaks_down_says_so(dtype: torch.dtype) -> None:
    values = torch.tensor([3.0, 1.0, 1.0, -2.0], dtype=dtype)
    found = run(lambda v: values * v, torch.ones(4, dtype=dtype), 6, backend="eager")
    truth = eigenfunc.lanczos(lambda v: values * v, torch.ones(4, dtype=dtype), 6)
    assert found.alive.tolist() == truth.alive.tolist() == [True] * 3 + [False] * 3
    assert not found.residual.any()
    assert_same(tuple(found), tuple(truth), 20 * torch.finfo(dtype).eps)


def test_a_looped_run_leaves_nothing_to_differentiate() -> None:
    weights = A.clone().requires_grad_()
    found = run(lambda v: weights @ v, V, 3, backend="eager")
    assert not any(leaf.requires_grad for leaf in found)
    assert_same(tuple(found), tuple(eigenfunc.lanczos(lambda v: A @ v, V, 3)))
    with pytest.raises(TransformError, match="lanczos"):
        torch.func.grad(lambda c: run(lambda v: c * (A @ v), V, 3, compile=False).alphas.sum())(V[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_for_real() -> None:
    loss, params = functional_loss(MODULES["plain"], nn.MSELoss())
    v = random_like(params)

    def curved(v: Params) -> Params:
        return hvp(loss, params, (X, Y), v)

    assert_same(traced(curved, v, backend="inductor"), curved(v))
    assert_same(tuple(run(curved, v, 12)), tuple(eigenfunc.lanczos(curved, v, 12)))
    assert len(flat(v)) > 12
    for solver in (eigenfunc.lanczos, eigenfunc.power):
        found = traced(lambda v, solver=solver: solver(curved, v, 3), v, backend="inductor")
        assert_same(tuple(found), tuple(solver(curved, v, 3)))
