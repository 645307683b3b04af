"""The product engine: what it keeps, chooses, cuts and compiles never changes the matrix, and is said."""

from __future__ import annotations

import gc
import re
import resource
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import eigenfunc
from eigenfunc import Batches, eigsh, functional_loss, hessian
from eigenfunc.curvature import products, sweep
from eigenfunc.curvature.products import Product
from eigenfunc.errors import DataError
from tests.helpers import (
    Params,
    assert_blocks_close,
    cut,
    dense_hessian,
    flat,
    labelled,
    mlp,
    plain,
    random_like,
    untouched,
)

CE = nn.CrossEntropyLoss()
X, Y = labelled(12)


class Counted:
    """A loss that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.loss, self.params = functional_loss(mlp(), CE)

    def __call__(self, params: Params, batch: Any) -> Tensor:
        self.calls += 1
        return self.loss(params, batch)


def truth(v: Params) -> Tensor:
    return dense_hessian(plain(mlp(), lambda m: CE(m(X), Y)), functional_loss(mlp(), CE)[1]) @ flat(v)


@pytest.mark.parametrize(("cache", "calls"), [("auto", 0), (0, 3)])
def test_a_product_over_kept_graphs_runs_no_forward_pass(cache: Any, calls: int) -> None:
    loss = Counted()
    A = hessian(loss, loss.params, Batches(cut((X, Y), [5, 4, 3])), cache=cache)
    v, before = random_like(loss.params), loss.calls
    found = A(v)
    assert loss.calls - before == calls
    assert_blocks_close(found, truth(v), 1e-12)


@given(budget=st.integers(0, 40_000))
@settings(max_examples=25, deadline=None)
def test_any_budget_gives_the_same_matrix_and_is_kept_to(budget: int) -> None:
    loss = Counted()
    A = hessian(loss, loss.params, Batches(cut((X, Y), [5, 4, 3])), cache=budget)
    v, before = random_like(loss.params), loss.calls
    assert_blocks_close(A(v), truth(v), 1e-12)
    told = re.search(r"graphs of (all|the first (\d))", A.describe())
    kept = 0 if told is None else 3 if told[1] == "all" else int(told[2])
    assert loss.calls - before == 3 - kept
    if budget == 0:
        assert kept == 0


def test_some_graphs_are_kept_only_if_the_batches_keep_their_order() -> None:
    loss = Counted()
    whole = hessian(loss, loss.params, Batches(cut((X, Y), [4, 4, 4])))
    one = whole.kept_bytes() // 2  # of three graphs: for one and not for two
    ordered = hessian(loss, loss.params, DataLoader(TensorDataset(X, Y), batch_size=4), cache=one)
    shuffled = hessian(loss, loss.params, DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True), cache=one)
    assert "graphs of all batches kept" in whole.describe()
    assert "graphs of the first 1, and no others, kept" in ordered.describe()
    assert "graphs recomputed for each product" in shuffled.describe()
    v = random_like(loss.params)
    for A in (ordered, shuffled):
        assert_blocks_close(A(v), truth(v), 1e-12)


class Witnessed(torch.autograd.Function):
    """The square; remembers its contexts, which live as long as the graph."""

    contexts: list[Any] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        Witnessed.contexts.append(weakref.ref(ctx))
        return x * x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return 2 * ctx.saved_tensors[0] * slope


def test_graphs_are_freed_with_the_operator() -> None:
    def loss(p: Tensor, batch: Tensor) -> Tensor:
        return (Witnessed.apply(p.sin()) ** 3 * batch).sum()  # type: ignore[no-untyped-call]

    Witnessed.contexts.clear()
    A = hessian(loss, X[0], X[1])
    A(X[2])
    assert any(ref() is not None for ref in Witnessed.contexts)
    del A
    gc.collect()
    assert not any(ref() is not None for ref in Witnessed.contexts)


@pytest.mark.parametrize("options", [{}, {"cache": 0}, {"product": "jvp"}, {"product": "dual"}])
def test_a_thousand_products_grow_memory_by_nothing(options: dict[str, Any]) -> None:
    loss, params = functional_loss(mlp(), CE)
    A = hessian(loss, params, Batches(cut((X, Y), [6, 6])), **options)
    v = random_like(params)

    def run(count: int) -> int:
        for _ in range(count):
            A(v)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = run(100)
    assert run(1000) - before <= 256  # KiB: less than one of 1,000 products would leave if each left a tensor


def test_out_of_memory_halves_the_chunk_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def tight(f: Any, point: Any) -> Product:
        whole = products.graph(f, point)

        def block(vs: Any) -> list[Tensor]:
            sizes.append(len(vs[0]))
            if len(vs[0]) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole.block(vs)

        return Product(whole.single, block)

    loss, params = functional_loss(mlp(), CE)
    vs = eigenfunc.tree.stack([random_like(params, seed) for seed in range(13)])
    expected = hessian(loss, params, (X, Y)).matmat(vs)
    monkeypatch.setitem(products.WAYS, "graph", tight)
    A = hessian(loss, params, Batches(cut((X, Y), [7, 5])), product="graph", chunk=13)
    for _ in range(2):
        found = A.matmat(vs)
        assert all((found[name] - expected[name]).abs().max() < 1e-14 for name in params)
    assert sizes[:3] == [13, 6, 3]
    assert set(sizes[3:]) == {3}


def test_what_raises_at_any_chunk_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(f: Any, point: Any) -> Product:
        def fail(vs: Any) -> list[Tensor]:
            raise RuntimeError("not enough memory, whatever the chunk")

        return Product(fail, fail)

    loss, params = functional_loss(mlp(), CE)
    monkeypatch.setitem(products.WAYS, "graph", broken)
    A = hessian(loss, params, (X, Y), product="graph", check=False, chunk=4)
    with pytest.raises(RuntimeError, match="whatever the chunk"):
        A.matmat(eigenfunc.tree.stack([random_like(params, seed) for seed in range(4)]))


def test_the_chunk_is_measured_once_and_told() -> None:
    loss, params = functional_loss(mlp(), CE)
    A = hessian(loss, params, (X, Y))
    assert "at once" not in A.describe()
    vs = eigenfunc.tree.stack([random_like(params, seed) for seed in range(40)])
    found = A.matmat(vs)
    assert any(f"vectors {size} at once" in A.describe() for size in (1, 8, 32))
    for i in (0, 39):
        one = A(eigenfunc.tree.row(vs, i))
        assert all((found[name][i] - one[name]).abs().max() < 1e-13 for name in params)


def test_blocks_that_vmap_gets_wrong_are_multiplied_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(f: Any, point: Any) -> Product:
        right = products.graph(f, point)
        return Product(right.single, lambda vs: [torch.zeros_like(v) for v in vs])

    loss, params = functional_loss(mlp(), CE)
    vs = eigenfunc.tree.stack([random_like(params, seed) for seed in range(9)])
    expected = hessian(loss, params, (X, Y)).matmat(vs)
    monkeypatch.setitem(products.WAYS, "graph", wrong)
    found = hessian(loss, params, (X, Y)).matmat(vs)
    assert all((found[name] - expected[name]).abs().max() < 1e-13 for name in params)


@given(size=st.integers(1, 13), sizes=st.sampled_from([[12], [8, 4], [5, 4, 3]]))
@settings(max_examples=25, deadline=None)
def test_micro_batches_leave_the_matrix_as_it_is(size: int, sizes: list[int]) -> None:
    loss = Counted()
    seen: list[int] = []

    def watched(params: Params, batch: Any) -> Tensor:
        seen.append(len(batch[0]))
        return loss(params, batch)

    A = hessian(watched, loss.params, Batches(cut((X, Y), sizes), microbatch=size))
    v = random_like(loss.params)
    assert_blocks_close(A(v), truth(v), 1e-12)
    assert max(seen) <= max(size, 2)


def test_micro_batches_of_tokens_are_weighed_by_their_weight() -> None:
    labels = torch.where(torch.arange(12) % 3 == 0, -100, Y)
    loss, params = functional_loss(mlp(), CE)
    v = random_like(params)
    whole = hessian(loss, params, (X, labels))(v)
    free, _ = functional_loss(mlp(), loss_fn=lambda model, batch: CE(model(batch[0]), batch[1]))
    cut_up = Batches([(X, labels)], weight=lambda batch: (batch[1] != -100).sum(), microbatch=5)
    for form, data in ((free, cut_up), (loss, replace(cut_up, weight=None))):
        assert_blocks_close(hessian(form, params, data)(v), flat(whole), 1e-12)
    with pytest.raises(DataError, match="weight"):
        hessian(free, params, Batches([(X, labels)], microbatch=5))


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return CE(out @ out.mT, torch.arange(len(out)))


def test_micro_batches_are_refused_where_samples_mix() -> None:
    data = Batches(cut((X, Y), [12]), microbatch=4)
    model = mlp(nn.BatchNorm1d(4))
    with untouched(model), pytest.raises(DataError, match="mixes samples"):
        hessian(*functional_loss(model, CE), data)
    hessian(*functional_loss(mlp(nn.BatchNorm1d(4)).eval(), CE), data)
    hessian(*functional_loss(mlp(nn.Dropout(0.5)), CE), data)
    with pytest.raises(DataError, match="mixes samples"):
        hessian(*functional_loss(mlp(), loss_fn=contrastive), data)


def test_micro_batches_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="at least 1"):
        Batches(cut((X, Y), [12]), microbatch=0)
    loss, params = functional_loss(mlp(), loss_fn=lambda model, batch: CE(model(batch[0]), batch[1]) + batch[2].sum())
    with pytest.raises(DataError, match="cannot cut"):
        hessian(loss, params, Batches([(X, Y, torch.ones(3))], weight=lambda batch: len(batch[0]), microbatch=4))


def test_the_description_tells_way_witness_graphs_and_times() -> None:
    words = hessian(*functional_loss(mlp(), CE), (X, Y)).describe()
    for part in (
        "way 'graph'",
        "confirmed by 'dual'",
        "graphs of all batches kept (",
        "ms a product",
        "ms a gradient",
    ):
        assert part in words
    unchecked = hessian(*functional_loss(mlp(), CE), (X, Y), check=False).describe()
    assert "not checked" in unchecked


def test_unchecked_means_no_pass_over_the_data_at_set_up() -> None:
    loss = Counted()
    hessian(loss, loss.params, Batches(cut((X, Y), [6, 6])), check=False, cache=0)
    assert loss.calls == 0


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_losses_under_autocast_are_as_right_as_their_precision(lower: torch.dtype) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=lower):
            return CE(model(batch[0]), batch[1])

    model = mlp().float()
    loss, params = functional_loss(model, loss_fn=loss_fn)
    v = random_like(params)
    with untouched(model):
        found = hessian(loss, params, (X.float(), Y))(v)
    expected = truth({name: x.double() for name, x in v.items()})
    assert (flat(found).double() - expected).norm() < 16 * torch.finfo(lower).eps * expected.norm()
    assert all(x.dtype == torch.float32 for x in found.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_mixed_trees_keep_their_dtypes(dtype: torch.dtype) -> None:
    model = mlp().float()
    model[0].to(dtype)  # type: ignore[index]

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return CE(model[2](model[1](model[0](batch[0].to(dtype)).float())), batch[1])

    loss, params = functional_loss(model, loss_fn=loss_fn)
    v = random_like(params)
    found = hessian(loss, params, (X.float(), Y))(v)
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in params.items()}
    expected = truth({name: x.double() for name, x in v.items()})
    assert (flat(found).double() - expected).norm() < 16 * torch.finfo(dtype).eps * expected.norm()


def lennard_jones(positions: Tensor, batch: Any) -> Tensor:
    i, j = torch.triu_indices(len(positions), len(positions), 1)
    inverse = 1 / (positions[i] - positions[j]).square().sum(1) ** 3
    return 4 * (inverse**2 - inverse).sum()


def test_normal_modes_of_a_cluster_of_atoms_have_six_zeros() -> None:
    """Any pytree will do, positions of atoms too: 13 atoms in an icosahedron, relaxed by Newton's method."""
    golden = (1 + 5**0.5) / 2
    corners = [(0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    shell = torch.tensor([corner[s:] + corner[:s] for corner in corners for s in range(3)]).double()
    positions = torch.cat([torch.zeros(1, 3).double(), 1.08 * shell / shell[0].norm()])
    for _ in range(20):
        H = dense_hessian(lambda p: lennard_jones(p["x"], None), {"x": positions})
        slope = torch.func.grad(lennard_jones)(positions, None).flatten()
        positions = positions - (torch.linalg.pinv(H, rtol=1e-8) @ slope).reshape(13, 3)
    assert abs(lennard_jones(positions, None) + 44.326801) < 1e-6  # the known ground state of 13 atoms
    A = hessian(lennard_jones, positions, torch.zeros(1))
    solution = eigsh(A, 7, which="SA", tol=1e-8, seed=0)
    assert solution.values[:6].abs().max() < 1e-8
    expected = torch.linalg.eigvalsh(dense_hessian(lambda p: lennard_jones(p["x"], None), {"x": positions}))
    assert abs(solution.values[6] - expected[6]) <= solution.bounds[6]
    assert expected[6] > 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("factor", [1.0, -3.0])
def test_what_finite_differences_are_off_by_enters_the_bounds(dtype: torch.dtype, factor: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight.mul_(3)  # type: ignore[index]
    H = dense_hessian(plain(model, lambda m: CE(m(X), Y)), functional_loss(model, CE)[1])
    rising = torch.linalg.eigvalsh(factor * H)
    loss, params = functional_loss(model.to(dtype), CE)
    A = factor * hessian(
        loss, params, Batches([(x.to(dtype), y) for x, y in cut((X, Y), [7, 5])]), product="finite-difference"
    )
    solution = eigsh(A, 3, which="LA", tol=1e-2, seed=0)
    assert ((solution.values - rising.flip(0)[:3]).abs() <= solution.bounds).all()
    assert A.noise() > (1e-12 if dtype == torch.float64 else 1e-7)
    assert solution.noise >= A.noise()


def test_inputs_and_activations_serve_as_parameters_too() -> None:
    model = mlp()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def of_inputs(inputs: Tensor, targets: Tensor) -> Tensor:
        return CE(torch.func.functional_call(model, weights, (inputs,)), targets)

    A = hessian(of_inputs, X, Y)
    H = dense_hessian(lambda p: of_inputs(p["x"], Y), {"x": X})
    assert (A.to_dense() - H).abs().max() < 1e-14
    assert eigsh(A, 2, which="LA", seed=0).success


def test_free_memory_is_a_plausible_number_and_bounds_the_cache() -> None:
    free = sweep.available(torch.device("cpu"))
    assert 2**20 < free < 2**50
    assert 0 < sweep.budget_for("auto", torch.device("cpu")) <= free
    assert sweep.budget_for(123, torch.device("cpu")) == 123
