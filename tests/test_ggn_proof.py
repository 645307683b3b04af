"""Gauss–Newton products: what bears witness to them, what is refused, what is overwritten, and how much memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from eigenfunc import Batches, functional_loss
from eigenfunc.curvature import ggn as module, losses
from eigenfunc.curvature.ggn import ggn, ggnvp
from eigenfunc.curvature.proof import prove
from eigenfunc.curvature.sandwich import WAYS
from eigenfunc.errors import DataError, InputError, ObjectiveError, ProductError, TreeError
from tests.helpers import Params, assert_blocks_close, dense_ggn, flat, random_like, untouched
from tests.test_ggn import CE, CLASSES, COUNT, LABELS, SCORES, WIDTH, X, assert_same, net, normal, of_model


def test_what_a_product_may_overwrite_is_never_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that are the parameters themselves, whose tangent is the vector itself, in pieces of a few logits."""
    monkeypatch.setattr(losses, "CHUNK", 4)

    class Itself:
        criterion = CE

        def predict(self, params: Params, inputs: Tensor) -> Tensor:
            return params["z"].view(COUNT, CLASSES)

    params, v = {"z": SCORES.clone().flatten()}, {"z": normal(COUNT * CLASSES)}
    truth = dense_ggn(lambda p: p["z"].view(COUNT, CLASSES), CE, params, LABELS) @ v["z"]
    kept = v["z"].clone()
    for way in ["auto", *WAYS]:
        for check in (True, False):
            A = ggn(Itself(), params, (X, LABELS), product=way, check=check)
            for _ in range(2):
                assert_same(A(v)["z"], truth)
                assert torch.equal(v["z"], kept)
    assert_same(ggnvp(Itself(), params, (X, LABELS), v)["z"], truth)
    assert torch.equal(v["z"], kept)
    assert torch.equal(params["z"], SCORES.flatten())


class Sine(torch.autograd.Function):
    """Without a forward formula."""

    factor = 1.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return Sine.factor * slope * ctx.saved_tensors[0].cos()


class Bent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Sine.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def test_central_differences_bear_witness_where_one_kind_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(Bent())
    objective, params = functional_loss(model, CE)
    A = ggn(objective, params, (X, LABELS))
    assert "confirmed by central differences of the outputs" in A.describe()
    assert_same(A.to_dense(), of_model(model, CE, params, X, LABELS))
    monkeypatch.setattr(Sine, "factor", 1.2)
    with pytest.raises(ProductError, match="no two ways of forming the Gauss–Newton-vector product"):
        ggn(objective, params, (X, LABELS))


class Once(torch.autograd.Function):
    """With a forward formula, and a backward one that has no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        return slope * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        return tangent * ctx.saved_tensors[0].cos()


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def test_first_derivatives_suffice() -> None:
    model = net(Flat())
    objective, params = functional_loss(model, CE)
    A = ggn(objective, params, (X, LABELS))
    assert "way 'dual', confirmed by central differences of the outputs" in A.describe()
    assert_same(A.to_dense(), of_model(model, CE, params, X, LABELS))


class _Half(torch.autograd.Function):
    """x, with a forward formula that says x/2."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return slope.clone()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        return tangent / 2


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(_Half.apply(x))  # type: ignore[no-any-return, no-untyped-call]


def test_a_wrong_forward_formula_is_found_out() -> None:
    model = net(Halved())
    objective, params = functional_loss(model, CE)
    A = ggn(objective, params, (X, LABELS))
    assert "'graph'" in A.describe()
    assert_same(A.to_dense(), of_model(model, CE, params, X, LABELS))
    with pytest.raises(ProductError, match="differs by"):
        ggn(objective, params, (X, LABELS), product="jvp")


def test_a_wrong_output_map_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, params = functional_loss(net(), CE)

    def wrong(*args: Any, **options: Any) -> Callable[[Tensor], Tensor]:
        product = losses.output_hessian(*args, **options)
        return lambda u: 1.01 * product(u)

    monkeypatch.setattr(module, "output_hessian", wrong)
    with pytest.raises(ProductError, match="criterion's Hessian-vector product"):
        ggn(objective, params, (X, LABELS))
    large = nn.Linear(WIDTH, 3000).double()  # of which the first rows alone are looked at
    monkeypatch.setattr(module, "_PIECE", 1000)
    with pytest.raises(ProductError, match="criterion's Hessian-vector product"):
        ggn(*functional_loss(large, CE), (X, LABELS))


def test_what_cannot_be_a_gauss_newton_matrix_is_refused() -> None:
    model = net()
    objective, params = functional_loss(model, CE)
    whole = functional_loss(model, loss_fn=lambda m, batch: CE(m(batch[0]), batch[1]))[0]
    for bad in (whole, lambda params, batch: params["0.bias"].sum(), model):
        for call in (ggn, lambda *args: ggnvp(*args, random_like(params))):
            with pytest.raises(ObjectiveError, match=r"functional_loss\(model, criterion\)"):
                call(bad, params, (X, LABELS))
    with pytest.raises(ObjectiveError, match="pair"):
        ggn(objective, params, Batches([{"x": X}]))
    with pytest.raises(InputError, match="'graph', 'dual', 'jvp', 'vjp'"):
        ggn(objective, params, (X, LABELS), product="finite-difference")
    with pytest.raises(DataError, match="read only once"):
        ggn(objective, params, iter([(X, LABELS)]))
    with pytest.raises(TreeError, match="structure"):
        ggnvp(objective, params, (X, LABELS), {"other": X})
    with pytest.raises(ObjectiveError, match="NaN"):
        ggn(objective, {**params, "0.bias": params["0.bias"] * torch.nan}, (X, LABELS))
    with pytest.raises(DataError, match="batch 1 is nan"):
        ggn(objective, params, Batches([(X, LABELS), (X * torch.nan, LABELS)]))


def penalised(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda out, y: CE(out, y) + sum((p**2).sum() for p in model.parameters())


def noisy(out: Tensor, y: Tensor) -> Tensor:
    return CE(out + torch.randn(out.shape, dtype=out.dtype), y)


def test_criteria_that_are_no_function_of_outputs_and_targets_are_refused() -> None:
    model = net()
    with pytest.raises(ObjectiveError, match="A penalty in the criterion is no function of the outputs"):
        ggn(*functional_loss(model, penalised(model)), (X, LABELS))
    with untouched(model), pytest.raises(ObjectiveError, match="criterion draws random numbers"):
        ggn(*functional_loss(model, noisy), (X, LABELS))
    with pytest.raises(ObjectiveError, match="not \\(\\)"):
        ggn(*functional_loss(model, nn.CrossEntropyLoss(reduction="none")), (X, LABELS))


class Returning(nn.Module):
    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.what = nn.Linear(WIDTH, CLASSES).double(), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.inner(x))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda z: {"z": z, "size": 3}, "returns a int"),
        (lambda z: z + 1j, "returns a tensor of torch.complex"),
        (lambda z: z.argmax(1), "no floating-point tensor"),
        (lambda z: z.detach(), "do not depend on any of the parameters"),
    ],
)
def test_outputs_that_cannot_be_differentiated_are_refused(what: Callable[[Tensor], Any], words: str) -> None:
    def criterion(out: Any, y: Tensor) -> Tensor:
        out = out["z"] if isinstance(out, dict) else out
        return out.abs().double().pow(2).mean() if out.is_floating_point() or out.is_complex() else out.double().mean()

    objective, params = functional_loss(Returning(what), criterion)
    with pytest.raises(ObjectiveError, match=words):
        ggn(objective, params, (X, LABELS), check=False, product="graph")(random_like(params))


def test_an_operator_whose_parameters_moved_says_so() -> None:
    model = net()
    objective, params = functional_loss(model, CE)
    A = ggn(objective, params, (X, LABELS))
    with torch.no_grad():
        model[0].weight.add_(1)  # type: ignore[index, union-attr, operator]
    with pytest.raises(ObjectiveError, match=r"'0\.weight' was changed in place"):
        A(random_like(params))


def test_grad_modes_and_autocast_around_a_call_change_nothing() -> None:
    objective, params = functional_loss(net().float(), CE)
    v, batch = random_like(params), (X.float(), LABELS)
    A = ggn(objective, params, batch)
    expected, pure = A(v), ggnvp(objective, params, batch, v)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            assert all(torch.equal(expected[n], image) for n, image in A(v).items())
            assert all(torch.equal(expected[n], image) for n, image in ggn(objective, params, batch)(v).items())
            assert all(torch.equal(pure[n], image) for n, image in ggnvp(objective, params, batch, v).items())


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, key, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@contextmanager
def live() -> Iterator[Live]:
    with Live() as mode:
        yield mode


class Sloped(nn.Module):
    """Two linear layers, and beside their outputs the slope of those by the inputs."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(WIDTH, 4, bias=bias), nn.Linear(4, CLASSES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = self.second(torch.tanh(self.first(self.first.weight.sum() * x)))
        (slope,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
        return torch.cat([out, slope], -1)


@pytest.mark.parametrize("bias", [True, False])
def test_tangents_of_linear_layers_are_right_where_the_model_differentiates_itself(bias: bool) -> None:
    model = Sloped(bias).double()
    x, y = normal(2, COUNT, WIDTH), normal(2, COUNT, CLASSES + WIDTH, seed=5)
    objective, params = functional_loss(model, nn.MSELoss())
    v, step = random_like(params), 1e-3

    def slope(t: float) -> Tensor:
        return functional_call(model, {n: params[n] + t * v[n] for n in params}, (x,)).detach()

    u = (8 * (slope(step) - slope(-step)) - (slope(2 * step) - slope(-2 * step))) / (12 * step)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    out = functional_call(model, leaves, (x,))
    truth = torch.autograd.grad(out, [leaves[n] for n in sorted(leaves)], 2 / out.numel() * u)
    found = ggn(objective, params, (x, y), product="dual", check=False)(v)
    assert_blocks_close(found, torch.cat([block.flatten() for block in truth]), 1e-8)
    assert "mends met: mse_loss;" in ggn(objective, params, (x, y)).describe()


@pytest.mark.parametrize("criterion", [CE, nn.MSELoss()])
def test_a_large_vocabulary_takes_no_more_than_half_a_training_step_beside_it(
    criterion: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", 4000)
    monkeypatch.setattr(module, "_PIECE", 1000)
    model = nn.Sequential(nn.Embedding(50, 4), nn.Tanh(), nn.Linear(4, 1000)).double()
    x, y = torch.arange(400) % 50, torch.arange(400)
    y = y if criterion is CE else ((y[:, None] + torch.arange(1000)) % 2).double()
    with live() as step:
        torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
    objective, params = functional_loss(model, criterion)
    v = random_like(params)
    truth = flat(ggnvp(objective, params, (x, y), v))
    for way in ("graph", "dual", "jvp", "ggnvp", "proof")[:: 1 if criterion is CE else 4]:
        with live() as product:
            if way == "ggnvp":
                found = ggnvp(objective, params, (x, y), v)
            elif way == "proof":
                found = ggn(objective, params, (x, y))(v)
            else:
                found = ggn(objective, params, (x, y), product=way, check=False)(v)
        allowed = 0.8 if way == "dual" else 1.5
        assert product.peak <= allowed * step.peak, (way, product.peak / step.peak)
        assert_blocks_close(found, truth, 1e-10)


@pytest.mark.parametrize(
    ("criterion", "rows"),
    [
        (nn.MSELoss(), 2),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(CLASSES).double()), 2),
        (partial(F.mse_loss, weight=SCORES.exp()), COUNT),  # which would not fit the first rows
        (lambda out, y: F.mse_loss(out, y), COUNT),  # of which nothing is known
    ],
)
def test_the_first_rows_bear_witness_for_a_known_likelihood_alone(
    criterion: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def spied(f: Any, ways: Any, point: list[Tensor], *rest: Any) -> Any:
        taken.append(len(point[0]))
        return prove(f, ways, point, *rest)

    monkeypatch.setattr(module, "_PIECE", 1)
    monkeypatch.setattr(module, "prove", spied)
    objective, params = functional_loss(net(), criterion)
    v, targets = random_like(params), SCORES.sigmoid()
    assert_blocks_close(
        ggn(objective, params, (X, targets))(v), of_model(net(), criterion, params, X, targets) @ flat(v), 1e-10
    )
    assert taken == [rows]
