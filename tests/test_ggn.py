"""Gauss–Newton products against Jᵀ H J formed densely from plain derivatives, on networks, losses and cuts of data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn import functional as F

from eigenfunc import Batches, eigsh, functional_loss, hessian, tree
from eigenfunc.curvature.ggn import ggn, ggnvp
from eigenfunc.curvature.sandwich import WAYS
from tests.helpers import Params, assert_blocks_close, dense_ggn, dense_hessian, flat, plain, random_like, untouched
from tests.test_products import MODELS, made

CE = nn.CrossEntropyLoss()
COUNT, WIDTH, CLASSES = 9, 4, 3


def normal(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = normal(COUNT, WIDTH)
SCORES = normal(COUNT, CLASSES, seed=8)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0])
PARTLY = torch.where(torch.arange(COUNT) % 4 == 1, -100, LABELS)
SHARES = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def fourth(out: Tensor, y: Tensor) -> Tensor:
    """Convex, and no likelihood that is known."""
    return (out.logsumexp(1) + (out - y).pow(4).sum(1)).mean()


class Case(NamedTuple):
    criterion: Callable[[Any, Any], Tensor]
    targets: Tensor
    weight: Callable[[Any], Any] | None = None  # of a batch, where it is not its number of samples
    depth: int = 0  # positions beyond (N, C), where outputs have such an axis


LOSSES: dict[str, Case] = {
    "cross entropy": Case(CE, LABELS),
    "class weights": Case(nn.CrossEntropyLoss(SHARES), LABELS, lambda batch: SHARES[batch[1]].sum()),
    "ignored": Case(CE, PARTLY, lambda batch: (batch[1] != -100).sum()),
    "smoothed": Case(nn.CrossEntropyLoss(label_smoothing=0.2), LABELS),
    "soft targets": Case(CE, SCORES.softmax(1)),
    "positions": Case(CE, LABELS[:, None].repeat(1, 2).roll(1, 1), None, 2),
    "mse": Case(nn.MSELoss(), SCORES),
    "bce": Case(nn.BCEWithLogitsLoss(pos_weight=SHARES), SCORES.sigmoid()),
    "poisson": Case(nn.PoissonNLLLoss(), SCORES.exp()),
    "gaussian": Case(partial(F.gaussian_nll_loss, var=1.5), SCORES),
    "function": Case(lambda out, y: F.cross_entropy(out, y), LABELS),
    "custom": Case(fourth, SCORES),
    "smooth l1": Case(nn.SmoothL1Loss(beta=0.5), SCORES),
}


def net(between: nn.Module | None = None, depth: int = 0, hidden: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = [nn.Unflatten(1, (CLASSES, depth))] if depth else []
        last = nn.Linear(hidden, CLASSES * max(depth, 1))
        return nn.Sequential(nn.Linear(WIDTH, hidden), between or nn.Tanh(), last, *shape).double()


def of_model(model: nn.Module, criterion: Callable[[Any, Any], Tensor], params: Params, x: Any, y: Any) -> Tensor:
    return dense_ggn(lambda p: functional_call(model, p, (x,)), criterion, params, y)


def assert_same(found: Tensor, truth: Tensor, tolerance: float = 1e-10) -> None:
    assert (found - truth).abs().max() <= tolerance * truth.abs().max()


@given(
    name=st.sampled_from(list(LOSSES)),
    activation=st.sampled_from([nn.Tanh(), nn.GELU(), nn.ReLU(), nn.LayerNorm(4)]),
    cuts=st.sets(st.integers(1, COUNT - 1), max_size=3),
    way=st.sampled_from(["auto", *WAYS]),
    cache=st.sampled_from(["auto", 0]),
)
@settings(max_examples=40, deadline=None)
def test_the_matrix_is_the_dense_one_for_every_loss_way_and_cut(
    name: str, activation: nn.Module, cuts: set[int], way: str, cache: Any
) -> None:
    case = LOSSES[name]
    model = net(activation, case.depth).double()
    objective, params = functional_loss(model, case.criterion)
    ends = [0, *sorted(cuts), COUNT]
    pieces = [(X[a:b], case.targets[a:b]) for a, b in pairwise(ends)]
    data = Batches(pieces, weight=case.weight)
    with untouched(model):
        dense = ggn(objective, params, data, product=way, cache=cache).to_dense()
    truth = of_model(model, case.criterion, params, X, case.targets)
    assert_same(dense, truth)
    rising = torch.linalg.eigvalsh((dense + dense.mT) / 2)
    assert rising[0] >= -1e-13 * rising[-1]  # all of these losses are convex


@pytest.mark.parametrize("name", MODELS)
def test_the_matrix_is_the_dense_one_on_every_layer(name: str) -> None:
    model, x = made(name)
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    objective, params = functional_loss(model, CE)
    v = random_like(params)
    with untouched(model):
        found = ggn(objective, params, (x, labels))(v)
    truth = dense_ggn(lambda p: plain(model, lambda m: m(x))(p), CE, params, labels)
    assert_blocks_close(found, truth @ flat(v), 1e-10)


class Tied(nn.Module):
    """A language model whose embedding is its last layer too, with a parameter that goes nowhere."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.inner = nn.TransformerEncoderLayer(4, 2, 8, dropout, batch_first=True)
        self.out = nn.Linear(4, 6)
        self.out.weight = self.table.weight
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(self.table(x))).mT  # type: ignore[no-any-return]


WORDS = torch.tensor([[0, 1, 2], [3, 3, 5], [4, 5, 0]])


def tied(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Tied(dropout).double()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", ["auto", 0])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_tied_and_idle_parameters_attention_and_dropout_by_every_way(way: str, cache: Any, dropout: float) -> None:
    model = tied(dropout)
    objective, params = functional_loss(model, CE)
    data = Batches([(WORDS[:2], WORDS[:2].flip(1)), (WORDS[2:], WORDS[2:])])
    vs = tree.stack([random_like(params, seed) for seed in range(3)])
    with untouched(model):
        images = ggn(objective, params, data, product=way, cache=cache, chunk=2).matmat(vs)
    truth = torch.zeros(tree.size(params), tree.size(params), dtype=torch.float64)
    for index, (x, y) in enumerate(data):

        def outputs(p: Params, index: int = index, x: Tensor = x) -> Any:
            with torch.random.fork_rng(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                torch.default_generator.manual_seed(torch.initial_seed() + index)
                return functional_call(model, p, (x,))

        truth += len(x) / 3 * dense_ggn(outputs, CE, params, y)
    for i in range(3):
        assert_blocks_close(tree.row(images, i), truth @ flat(tree.row(vs, i)), 1e-10)
    assert not images["idle"].any()
    assert "out.weight" not in images


def test_it_is_the_hessian_of_a_linear_model_and_where_the_loss_is_fitted() -> None:
    linear = nn.Linear(WIDTH, CLASSES).double()
    for case in (LOSSES["cross entropy"], LOSSES["bce"], LOSSES["custom"]):
        objective, params = functional_loss(linear, case.criterion)
        H = hessian(objective, params, (X, case.targets)).to_dense()
        assert_same(ggn(objective, params, (X, case.targets)).to_dense(), H)
    model = net()
    objective, params = functional_loss(model, nn.MSELoss())
    fitted = (X, model(X).detach())
    assert_same(ggn(objective, params, fitted).to_dense(), hessian(objective, params, fitted).to_dense())


def test_hessian_minus_gauss_newton_is_the_curvature_of_the_model() -> None:
    """Σ ∂L/∂z ∇²z, with the slopes of the loss held constant."""
    model = net()
    objective, params = functional_loss(model, CE)
    data = Batches([(X[:5], LABELS[:5]), (X[5:], LABELS[5:])])
    rest = hessian(objective, params, data) - ggn(objective, params, data)
    z = model(X).detach().requires_grad_()
    slopes = torch.autograd.grad(CE(z, LABELS), z)[0]
    truth = dense_hessian(plain(model, lambda m: (slopes * m(X)).sum()), params)
    assert_same(rest.to_dense(), truth)
    assert torch.linalg.eigvalsh(truth)[0] < -0.01
    solution = eigsh(rest, 2, which="SA", seed=0)
    assert ((solution.values - torch.linalg.eigvalsh(truth)[:2]).abs() <= solution.bounds).all()


class Several:
    """Any object with predict and criterion: outputs in a dict, one of them a count that the criterion divides by."""

    def predict(self, params: Any, inputs: dict[str, Tensor]) -> Any:
        hidden = torch.tanh(inputs.pop("x") @ params["a"][0])
        spread = F.softplus(hidden @ params["a"][1]) + 0.1
        return {"mean": hidden.sum(1), "rest": (spread, torch.tensor(4)), "constant": torch.ones(2).double()}

    def criterion(self, outputs: Any, targets: Any) -> Tensor:
        spread, count = outputs["rest"]
        off = (outputs["mean"] - targets.pop("y")) ** 2 / spread
        return (off + spread.log()).sum() / count + (outputs["constant"] ** 2).sum()


@pytest.mark.parametrize("way", ["auto", *WAYS])
def test_outputs_and_parameters_of_any_structure(way: str) -> None:
    params = {"a": (normal(WIDTH, 2), normal(2, seed=3))}
    batch = ({"x": X}, {"y": SCORES[:, 0]})
    A = ggn(Several(), params, Batches([batch], weight=lambda batch: 1.0), product=way)
    truth = dense_ggn(
        lambda p: Several().predict({"a": (p["0"], p["1"])}, {"x": X}),
        Several().criterion,
        {"0": params["a"][0], "1": params["a"][1]},
        _Refilled(y=SCORES[:, 0]),
    )
    assert_same(A.to_dense(), truth)
    v = {"a": (normal(WIDTH, 2, seed=4), normal(2, seed=5))}
    assert_same(tree.ravel(ggnvp(Several(), params, batch, v), v), truth @ tree.ravel(v, v))
    assert list(batch[0]) == ["x"]


class _Refilled(dict[str, Tensor]):
    def pop(self, key: str, *rest: Any) -> Any:
        return self[key]


def test_a_product_over_kept_graphs_runs_neither_model_nor_criterion() -> None:
    calls: list[str] = []

    class Counted:
        def __init__(self, criterion: Any) -> None:
            self.objective = functional_loss(net(), CE)[0]
            self.inner = criterion

        def predict(self, params: Params, inputs: Tensor) -> Any:
            calls.append("predict")
            return self.objective.predict(params, inputs)

        @property
        def criterion(self) -> Any:
            return self.inner

    params = functional_loss(net(), CE)[1]
    data = Batches([(X[:4], LABELS[:4]), (X[4:], LABELS[4:])])
    for cache, count in (("auto", 0), (0, 2)):
        A = ggn(Counted(CE), params, data, cache=cache, product="graph")  # type: ignore[arg-type]
        calls.clear()
        A(random_like(params))
        assert len(calls) == count
    assert "graphs of all batches kept (" in ggn(Counted(CE), params, data).describe()


def test_the_description_tells_matrix_way_and_witness() -> None:
    objective, params = functional_loss(net(), CE)
    words = ggn(objective, params, (X, LABELS)).describe()
    for part in ("Gauss–Newton, way 'graph'", "confirmed by 'dual'", "ms a product", "ms a gradient"):
        assert part in words
    assert "way 'jvp', confirmed by 'graph'" in ggn(objective, params, (X, LABELS), product="jvp").describe()
    assert "not checked" in ggn(objective, params, (X, LABELS), check=False).describe()


def test_the_pure_product_goes_under_vmap_over_vectors_and_models() -> None:
    models = [net() for _ in range(3)]
    for i, model in enumerate(models):
        with torch.no_grad():
            model[0].weight.mul_(1 + i)  # type: ignore[index, union-attr]
    stacked = {name: p.detach() for name, p in stack_module_state(models)[0].items()}
    objective, params = functional_loss(models[0], CE)
    vs = tree.stack([random_like(params, seed) for seed in range(3)])
    truths = [of_model(m, CE, dict(m.named_parameters()), X, LABELS) for m in models]
    over_vectors = vmap(lambda v: ggnvp(objective, params, (X, LABELS), v))(vs)
    over_models = vmap(lambda p, v: ggnvp(objective, p, (X, LABELS), v))(stacked, vs)
    for i in range(3):
        v = flat(tree.row(vs, i))
        assert_blocks_close(tree.row(over_vectors, i), truths[0] @ v, 1e-11)
        assert_blocks_close(tree.row(over_models, i), truths[i] @ v, 1e-11)


@pytest.mark.parametrize("name", ["cross entropy", "custom", "poisson"])
def test_derivatives_of_the_pure_product_are_those_of_differences(name: str) -> None:
    case = LOSSES[name]
    objective, params = functional_loss(net(nn.GELU()), case.criterion)
    u, direction = random_like(params, 1), random_like(params, 2)

    def curvature(p: Params, x: Tensor) -> Tensor:
        return tree.dot(ggnvp(objective, p, (x, case.targets), u), u)

    h = 1e-4

    def moved(t: float) -> Tensor:
        return curvature({n: params[n] + t * direction[n] for n in params}, X)

    slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    by_grad = sum((g * direction[n]).sum() for n, g in grad(curvature)(params, X).items())
    by_jvp = jvp(lambda p: curvature(p, X), (params,), (direction,))[1]
    rows = jacrev(curvature, argnums=1)(params, X)
    along = (curvature(params, X + h * X) - curvature(params, X - h * X)) / (2 * h)
    assert abs(by_grad - slope) < 1e-8 * abs(slope)
    assert abs(by_jvp - by_grad) < 1e-11 * abs(slope)
    assert abs((rows * X).sum() - along) < 1e-6 * abs(along)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    curvature(leaves, X).backward()
    assert abs(sum((p.grad * direction[n]).sum() for n, p in leaves.items()) - by_grad) < 1e-11 * abs(slope)  # type: ignore[operator, misc]


@pytest.mark.parametrize("name", ["cross entropy", "custom"])
def test_the_pure_product_compiles_without_a_graph_break(name: str) -> None:
    case, model = LOSSES[name], net(nn.BatchNorm1d(4))
    objective, params = functional_loss(model, case.criterion)
    v = random_like(params)
    torch.compiler.reset()
    traced = torch.compile(lambda p, b, v: ggnvp(objective, p, b, v), fullgraph=True, backend="aot_eager")
    with untouched(model):
        found = traced(params, (X, case.targets), v)
    torch.compiler.reset()
    assert_blocks_close(found, flat(ggnvp(objective, params, (X, case.targets), v)), 1e-11)


def test_the_operator_inside_a_transform_is_the_pure_product() -> None:
    objective, params = functional_loss(net(nn.Dropout(0.3)), CE)
    A = ggn(objective, params, Batches([(X[:4], LABELS[:4]), (X[4:], LABELS[4:])]))
    vs = tree.stack([random_like(params, seed) for seed in range(2)])
    mapped, block = vmap(A.matvec, randomness="same")(vs), A.matmat(vs)
    assert all((mapped[n] - block[n]).abs().max() < 1e-13 for n in params)
    data = Batches([(X, LABELS)])
    inside = vmap(lambda v: ggn(objective, params, data)(v), randomness="same")(vs)
    outside = ggn(objective, params, data).matmat(vs)
    assert all((inside[n] - outside[n]).abs().max() < 1e-13 for n in params)


def test_compiled_products_are_the_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    for between in (nn.Dropout(0.5), nn.BatchNorm1d(4)):
        objective, params = functional_loss(net(between), CE)
        data = Batches([(X[:4], LABELS[:4]), (X[4:], LABELS[4:])])
        v = random_like(params)
        A = ggn(objective, params, data, compile=True)
        assert "compiled" in A.describe()
        assert_blocks_close(A(v), flat(ggn(objective, params, data)(v)), 1e-11)


def test_micro_batches_and_mini_batches_leave_the_matrix_as_it_is() -> None:
    objective, params = functional_loss(net(), CE)
    v = random_like(params)
    truth = of_model(net(), CE, params, X, LABELS) @ flat(v)
    assert_blocks_close(ggn(objective, params, Batches([(X, LABELS)], microbatch=2))(v), truth, 1e-11)
    A = ggn(objective, params, Batches([(X[:4], LABELS[:4]), (X[4:], LABELS[4:])]))
    assert A.minibatches is not None
    stream = A.minibatches()
    mean = tree.scale(0.5, tree.add(next(stream)(v), next(stream)(v)))
    assert_blocks_close(mean, truth, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["cross entropy", "mse", "custom"])
def test_lower_precision_keeps_its_dtype_and_loses_no_more_than_it_must(name: str, dtype: torch.dtype) -> None:
    case, model = LOSSES[name], net()
    params = functional_loss(model, case.criterion)[1]
    v = random_like(params)
    truth = of_model(model, case.criterion, params, X, case.targets) @ flat(v)
    low, low_params = functional_loss(net().to(dtype), case.criterion)
    targets = case.targets.to(dtype) if case.targets.is_floating_point() else case.targets
    found = ggn(low, low_params, (X.to(dtype), targets))({n: u.to(dtype) for n, u in v.items()})
    assert all(image.dtype == dtype for image in found.values())
    assert (flat(found).double() - truth).norm() < 20 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("name", ["cross entropy", "mse"])
def test_curvlinops_has_the_same_matrix_in_float32(name: str) -> None:
    peer = pytest.importorskip("curvlinops")
    case, model = LOSSES[name], net().float()
    y = case.targets.float() if case.targets.is_floating_point() else case.targets
    data = [(X[:4].float(), y[:4]), (X[4:].float(), y[4:])]
    objective, params = functional_loss(model, case.criterion)
    v = random_like(params)
    theirs = peer.GGNLinearOperator(model, case.criterion, list(model.parameters()), data, check_deterministic=False)
    with torch.no_grad():
        image = theirs @ [v[name] for name, _ in model.named_parameters()]
    expected = flat(dict(zip(params, image, strict=True)))
    assert_blocks_close(ggn(objective, params, Batches(data))(v), expected, 1e-5)
