"""Derivatives of eigenpairs, against central differences and against eigh of Hessians in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from eigenfunc import EigenPairs, hvp, sharpness, top_eigenpairs, tree
from eigenfunc.errors import InputError, TransformError, TreeError
from tests.helpers import ZERO, Counted, difference, normal, orthogonal, slope

PARAMS = {"w": normal(3, 4, seed=1), "b": normal(3, seed=2), "a": normal(2, 3, seed=3)}
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])
BATCH = {"x": normal(6, 4, seed=4), "scale": torch.tensor(1.3).double()}
START = {name: normal(*leaf.shape, seed=5 + i) for i, (name, leaf) in enumerate(PARAMS.items())}
WAY = {name: normal(*leaf.shape, seed=15 + i) for i, (name, leaf) in enumerate(PARAMS.items())}
BATCH_WAY = {"x": normal(6, 4, seed=20), "scale": torch.tensor(0.7).double()}
SIZE = 21


def loss(params: Any, batch: Any) -> Tensor:
    hidden = torch.tanh(batch["scale"] * batch["x"] @ params["w"].mT + params["b"])
    return F.cross_entropy(hidden @ params["a"].mT, batch["y"])


def pairs(params: Any, batch: Any, k: int = 3) -> EigenPairs:
    return top_eigenpairs(loss, params, {**batch, "y": LABELS}, k=k, num_steps=SIZE, v0=START)


def largest(params: Any, batch: Any) -> Tensor:
    return sharpness(loss, params, {**batch, "y": LABELS}, num_steps=SIZE, v0=START)


def value(params: Any, batch: Any) -> Tensor:
    return (pairs(params, batch).values * torch.tensor([1.0, -2.0, 0.5])).sum()


def vector(params: Any, batch: Any) -> Tensor:
    """A function of the vectors that their signs do not enter."""
    rows = tree.ravel(pairs(params, batch, 2).vectors, PARAMS)
    probe, other = normal(SIZE, seed=30), normal(SIZE, seed=31)
    return ((rows @ probe) * (rows @ other) * torch.tensor([1.0, 2.0])).sum()


def along(f: Callable[[Any, Any], Tensor]) -> Callable[[Tensor], Tensor]:
    """f on a line through parameters and batch."""

    def line(t: Tensor) -> Tensor:
        return f(tree.add(PARAMS, tree.scale(t, WAY)), tree.add(BATCH, tree.scale(t, BATCH_WAY)))

    return line


def distance(x: Any, y: Any) -> float:
    return float(tree.norm(tree.sub(x, y)).detach())


def close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    return bool((x - y).abs().max() <= tolerance * y.abs().max())


@pytest.mark.parametrize("f", [largest, value, vector])
def test_second_derivatives_agree_with_differences(f: Any) -> None:
    line = along(f)
    truth = difference(grad(line))
    assert close(grad(grad(line))(ZERO), truth, 1e-6)
    assert close(slope(grad(line))(ZERO), truth, 1e-6)
    assert close(grad(slope(line))(ZERO), truth, 1e-6)


def test_backward_gives_what_grad_gives_twice() -> None:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}

    def slopes(of: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(of, [*leaves.values()], create_graph=True)
        return dict(zip(leaves, found, strict=True))

    first = slopes(largest(leaves, BATCH))
    second = slopes(tree.dot(first, WAY))
    assert distance(first, grad(largest)(PARAMS, BATCH)) < 1e-13
    truth = jvp(lambda p: grad(largest)(p, BATCH), (PARAMS,), (WAY,))[1]
    assert distance(second, truth) < 1e-10
    assert all(leaf.grad is None for leaf in leaves.values())


def test_jacobians_forwards_and_backwards_agree() -> None:
    def f(p: Any) -> Any:
        found = pairs(p, BATCH)
        return found.values, found.vectors

    assert distance(jacrev(f)(PARAMS), jacfwd(f)(PARAMS)) < 1e-11


def quartic(p: Tensor, batch: Any) -> Tensor:
    A, c = batch
    return p @ A @ p / 2 + (c * p**4).sum()


def dense(p: Tensor, batch: Any) -> Tensor:
    A, c = batch
    return A + torch.diag(12 * c * p**2)


@given(n=st.integers(2, 7), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=6, deadline=None)
def test_derivatives_are_those_of_the_dense_eigendecomposition(n: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    Q, p, c = orthogonal(n, seed), normal(n, seed=seed + 1), 0.01 * normal(n, seed=seed + 2)
    A = Q @ torch.diag(torch.linspace(-1, 2, n).double()) @ Q.mT
    weights, probe = normal(k, seed=seed + 3), normal(n, seed=seed + 4)

    def ours(p: Tensor, c: Tensor) -> Tensor:
        found = top_eigenpairs(quartic, p, (A, c), k=k, num_steps=n, v0=normal(n, seed=seed + 5), num_trips=3 * n)
        return (found.values * weights).sum() + ((found.vectors @ probe) ** 2 * weights).sum()

    def theirs(p: Tensor, c: Tensor) -> Tensor:
        values, rows = torch.linalg.eigh(dense(p, (A, c)))
        top, chosen = values.flip(0)[:k], rows.flip(1)[:, :k].mT
        return (top * weights).sum() + ((chosen @ probe) ** 2 * weights).sum()

    for i in (0, 1):
        assert torch.allclose(grad(ours, i)(p, c), grad(theirs, i)(p, c), rtol=1e-7, atol=1e-8)

    def turned(f: Any) -> Tensor:
        return jvp(lambda p: grad(f, 1)(p, c), (p,), (probe,))[1]

    assert torch.allclose(turned(ours), turned(theirs), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_sharpness_evaluates_the_loss_once_and_keeps_no_graph_of_the_steps() -> None:
    def nodes(steps: int) -> int:
        counted = Counted(loss)
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
        found = sharpness(counted, leaves, {**BATCH, "y": LABELS}, num_steps=steps, v0=START)
        assert counted.calls == steps
        count = len(list(graph(found.grad_fn)))
        torch.autograd.grad(found, [*leaves.values()])
        assert counted.calls == steps + 1
        return count

    assert nodes(4) == nodes(16) < 20


def test_the_gradient_of_sharpness_multiplies_no_more_than_three_products() -> None:
    """By the counts of matrix multiplications and convolutions; the batch has a slope if asked for."""

    def convolved(p: Any, batch: Tensor) -> Tensor:
        hidden = torch.tanh(F.conv2d(torch.tanh(F.conv2d(batch, p["w"])), p["u"]))
        return F.cross_entropy(hidden.flatten(1) @ p["a"], torch.arange(6) % 3)

    params = {"w": normal(4, 4, 3, 3, seed=1), "u": normal(4, 4, 3, 3, seed=2), "a": normal(64, 3, seed=3)}
    x, v = normal(6, 4, 8, 8, seed=4), {name: normal(*leaf.shape, seed=5) for name, leaf in params.items()}

    def value(p: Any, x: Tensor) -> Tensor:
        return sharpness(convolved, p, x, num_steps=4, v0=v)

    def flops(task: Callable[..., Any], *more: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            task(params, x, *more)
        return counter.get_total_flops()

    product, plain = flops(partial(hvp, convolved), v), flops(value)
    assert plain < flops(grad(value)) < flops(grad(value, (0, 1))) < plain + 3 * product


def graph(node: Any, seen: set[Any] | None = None) -> Iterator[Any]:
    seen = set() if seen is None else seen
    if node is not None and node not in seen:
        seen.add(node)
        yield node
        for following, _ in node.next_functions:
            yield from graph(following, seen)


def test_sharpness_of_each_sample_and_its_derivatives() -> None:
    def single(p: Any, x: Tensor, y: Tensor) -> Tensor:
        batch = {"x": x[None], "y": y[None], "scale": BATCH["scale"]}
        return sharpness(loss, p, batch, num_steps=8, v0=START)

    every = (None, 0, 0)
    values = vmap(single, every)(PARAMS, BATCH["x"], LABELS)
    slopes = vmap(grad(single), every)(PARAMS, BATCH["x"], LABELS)
    turned = vmap(lambda p, x, y: jvp(grad(lambda q: single(q, x, y)), (p,), (WAY,))[1], every)(
        PARAMS, BATCH["x"], LABELS
    )
    summed = grad(lambda p: vmap(single, every)(p, BATCH["x"], LABELS).sum())(PARAMS)
    assert distance(summed, tree.tree_map(lambda leaf: leaf.sum(0), slopes)) < 1e-12
    for i, (x, y) in enumerate(zip(BATCH["x"], LABELS, strict=True)):
        assert abs(single(PARAMS, x, y) - values[i]) < 1e-12
        assert distance(grad(single)(PARAMS, x, y), tree.row(slopes, i)) < 1e-12
        one = jvp(lambda p, x=x, y=y: grad(single)(p, x, y), (PARAMS,), (WAY,))[1]
        assert distance(one, tree.row(turned, i)) < 1e-9


class Layer(NamedTuple):
    w: Tensor
    b: Tensor


@dataclass
class Net:
    inner: Any
    outer: Any


optree.register_pytree_node(
    Net,
    lambda net: ((net.inner, net.outer), None, ("inner", "outer")),  # type: ignore[arg-type,return-value]
    lambda _, children: Net(*children),  # type: ignore[arg-type]
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)
torch.utils._pytree.register_dataclass(Net)

W, BIAS, OUT = PARAMS["w"], PARAMS["b"], PARAMS["a"]
CONTAINERS: dict[str, tuple[Any, Callable[[Any], tuple[Tensor, Tensor, Tensor]]]] = {
    "nested dict": ({"z": {"w": W, "b": BIAS}, "a": OUT}, lambda p: (p["z"]["w"], p["z"]["b"], p["a"])),
    "list": ([W, [BIAS, OUT]], lambda p: (p[0], p[1][0], p[1][1])),
    "namedtuple": (Layer(W, (BIAS, OUT)), lambda p: (p.w, *p.b)),  # type: ignore[arg-type]
    "dataclass": (Net(Layer(W, BIAS), OUT), lambda p: (*p.inner, p.outer)),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_parameters_in_any_container(kind: str) -> None:
    params, read = CONTAINERS[kind]
    w, b, a = read(params)

    def of(p: Any, batch: Any) -> Tensor:
        w, b, a = read(p)
        return loss({"w": w, "b": b, "a": a}, batch)

    start = tree.unravel(normal(SIZE, seed=3), params)

    def run(p: Any, batch: Any) -> EigenPairs:
        return top_eigenpairs(of, p, {**batch, "y": LABELS}, k=2, num_steps=SIZE, v0=start)

    truth = pairs({"w": w, "b": b, "a": a}, BATCH)
    found = run(params, BATCH)
    assert torch.allclose(found.values, truth.values[:2], atol=1e-12)
    assert type(found.vectors) is type(params)
    expected, got = grad(lambda p: pairs(p, BATCH).values[1])(PARAMS), grad(lambda p: run(p, BATCH).values[1])(params)
    for ours, name in zip(read(got), ("w", "b", "a"), strict=True):
        assert torch.allclose(ours, expected[name], atol=1e-10)
    way = tree.unravel(normal(SIZE, seed=4), params)
    forward = jvp(lambda p: run(p, BATCH).values[1], (params,), (way,))[1]
    assert close(forward, tree.dot(got, way), 1e-9)
    assert vmap(lambda p: run(p, BATCH).values)(tree.stack([params, way])).shape == (2, 2)


def test_single_precision_gives_double_precision_to_its_own_accuracy() -> None:
    def single(x: Any) -> Any:
        return tree.tree_map(lambda leaf: leaf.float(), x)

    def f(p: Any) -> Tensor:
        return sharpness(loss, p, {**single(BATCH), "y": LABELS}, num_steps=14, v0=single(START))

    first, second = grad(f)(single(PARAMS)), jvp(grad(f), (single(PARAMS),), (single(WAY),))[1]
    truth = jvp(lambda p: grad(largest)(p, BATCH), (PARAMS,), (WAY,))
    assert all(leaf.dtype == torch.float32 for leaf in tree.leaves((first, second)))
    assert distance(tree.tree_map(torch.Tensor.double, first), truth[0]) < 1e-5 * tree.norm(truth[0])
    assert distance(tree.tree_map(torch.Tensor.double, second), truth[1]) < 1e-4 * tree.norm(truth[1])


def test_nothing_of_the_callers_changes() -> None:
    before, state = tree.tree_map(torch.clone, (PARAMS, BATCH, START)), torch.get_rng_state()
    found = pairs(PARAMS, BATCH)
    grad(vector)(PARAMS, BATCH)
    assert distance(before, (PARAMS, BATCH, START)) == 0
    assert torch.equal(state, torch.get_rng_state())
    assert (tree.gram(found.vectors, found.vectors) - torch.eye(3)).abs().max() < 1e-13
    assert found.residuals.max() < 1e-13


def test_nested_forward_mode_is_refused() -> None:
    with pytest.raises(TransformError, match="nested"):
        slope(slope(along(largest)))(ZERO)
    with pytest.raises(TransformError, match="nested"):
        jacfwd(jacfwd(along(value)))(ZERO)


def test_a_tensor_closed_over_is_refused_and_not_given_a_zero_derivative() -> None:
    def scaled(c: Tensor) -> Tensor:
        return sharpness(lambda p, b: c * loss(p, b), PARAMS, {**BATCH, "y": LABELS}, num_steps=5, v0=START)

    one = torch.ones(()).double()
    assert torch.isfinite(scaled(one))
    for derivative in (grad(scaled), slope(scaled), lambda c: vmap(grad(scaled))(c[None])):
        with pytest.raises(TransformError, match="closes over"):
            derivative(one)


def test_bad_arguments_are_refused() -> None:
    batch = {**BATCH, "y": LABELS}
    for k, steps in ((0, 5), (6, 5), (1, 0), (SIZE + 1, 2 * SIZE)):
        with pytest.raises(InputError, match="num_steps"):
            top_eigenpairs(loss, PARAMS, batch, k=k, num_steps=steps, v0=START)
    with pytest.raises(TreeError, match="v0"):
        sharpness(loss, PARAMS, batch, num_steps=3, v0={**START, "w": START["b"]})
