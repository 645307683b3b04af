"""Hessian-vector products: against finite differences on many layers and losses, and under every transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

import eigenfunc
from eigenfunc import eigsh, functional_loss, hessian, hvp
from tests.helpers import (
    Params,
    assert_blocks_close,
    dense_hessian,
    difference,
    flat,
    normal,
    plain,
    random_like,
    seeded,
    untouched,
)

CE = nn.CrossEntropyLoss()
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


class Attention(nn.Module):
    """Fused attention, causal or not, in front of a classifier."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.out = nn.Linear(4, 3)
        self.causal = causal

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.project(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.core = kind(4, 5, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.core(x)[0][:, -1])


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.tanh(self.table(x)).mean(1))


def convolutions(training: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    ).train(training)


def with_nonlinearity(part: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), part, nn.Linear(6, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    **{
        type(part).__name__: (lambda part=part: with_nonlinearity(part), normal(6, 4))
        for part in (
            nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.ELU(), nn.Mish(), nn.LayerNorm(6),
            nn.GroupNorm(2, 6), nn.RMSNorm(6), nn.Softmax(-1), nn.LogSigmoid(), nn.PReLU(), nn.BatchNorm1d(6),
        )
    },
    "GELU, approximate": (lambda: with_nonlinearity(nn.GELU("tanh")), normal(6, 4)),
    "weight norm": (
        lambda: with_nonlinearity(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))), normal(6, 4)
    ),
    "spectral norm": (
        lambda: with_nonlinearity(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))).eval(), normal(6, 4)
    ),
    "convolutions, train": (lambda: convolutions(True), normal(6, 2, 7, 7)),
    "convolutions, eval": (lambda: convolutions(False), normal(6, 2, 7, 7)),
    "max pooling": (
        lambda: nn.Sequential(nn.Conv1d(4, 3, 2), nn.Tanh(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(9, 3)),
        normal(6, 4, 7),
    ),
    "attention": (lambda: Attention(causal=False), normal(6, 5, 4)),
    "causal attention": (lambda: Attention(causal=True), normal(6, 5, 4)),
    "transformer, train": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, 0, batch_first=True), nn.Flatten(), nn.Linear(20, 3)),
        normal(6, 5, 4),
    ),
    "transformer, eval": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, activation="gelu", batch_first=True), nn.Flatten(), nn.Linear(20, 3)
        ).eval(),
        normal(6, 5, 4),
    ),
    "embedding": (Words, torch.tensor([[0, 1, 2], [3, 3, 3], [4, 5, 6], [7, 8, 0], [1, 1, 2], [8, 2, 4]])),
    "GRU": (lambda: Recurrent(nn.GRU), normal(6, 5, 4)),
    "LSTM": (lambda: Recurrent(nn.LSTM), normal(6, 5, 4)),
}  # fmt: skip

SCORES = normal(6, 3)
LOSSES: dict[str, tuple[Any, Tensor]] = {
    "cross entropy": (CE, LABELS),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "soft labels": (CE, SCORES.softmax(-1)),
    "mse": (nn.MSELoss(), SCORES),
    "mse, summed": (nn.MSELoss(reduction="sum"), SCORES),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3).double() * 2), SCORES.sigmoid()),
    "huber": (nn.HuberLoss(delta=0.5), SCORES),
    "smooth l1": (nn.SmoothL1Loss(beta=0.5), SCORES),
    "kl": (lambda out, y: F.kl_div(out.log_softmax(-1), y, reduction="batchmean"), SCORES.softmax(-1)),
    "poisson": (nn.PoissonNLLLoss(), SCORES.exp()),
    "cosine": (lambda out, y: 1 - F.cosine_similarity(out, y).mean(), SCORES),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    factory, x = MODELS[name]
    with seeded(3):
        return factory().double(), x


def by_differences(model: nn.Module, value: Callable[[Any], Tensor], params: Params, v: Params) -> Tensor:
    """Fourth-order central differences of ordinary gradients: no second derivative is asked of autograd."""
    loss = plain(model, value)

    def slope(t: Tensor) -> Tensor:
        leaves = {name: (params[name] + t * v[name]).requires_grad_() for name in params}
        slopes = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True)
        return flat(dict(zip(leaves, slopes, strict=True)))

    return difference(slope, 3e-5)


@pytest.mark.parametrize("name", MODELS)
def test_products_agree_with_finite_differences_on_every_layer(name: str) -> None:
    model, x = made(name)
    loss, params = functional_loss(model, CE)
    v = random_like(params)
    truth = by_differences(model, lambda m: CE(m(x), LABELS), params, v)
    with untouched(model):
        found = hessian(loss, params, (x, LABELS))(v)
    assert_blocks_close(found, truth, 1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_products_agree_with_finite_differences_for_every_loss(name: str) -> None:
    model, x = made("Tanh")
    criterion, targets = LOSSES[name]
    loss, params = functional_loss(model, criterion)
    v = random_like(params)
    truth = by_differences(model, lambda m: criterion(m(x), targets), params, v)
    assert_blocks_close(hessian(loss, params, (x, targets))(v), truth, 1e-6)


@pytest.mark.parametrize("way", ["graph", "jvp", "vjp"])
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("name", ["Tanh", "convolutions, train", "attention", "embedding"])
def test_every_way_gives_the_dense_matrix(name: str, chunk: int, way: str) -> None:
    model, x = made(name)
    loss, params = functional_loss(model, CE)
    A = hessian(loss, params, (x, LABELS), product=way, chunk=chunk)
    truth = dense_hessian(plain(model, lambda m: CE(m(x), LABELS)), params)
    dense = A.to_dense(chunk=8)  # in the order of the tree's leaves, which are sorted by name
    assert (dense - truth).abs().max() < 1e-12 * truth.abs().max()
    assert f"'{way}'" in A.describe()


@pytest.mark.parametrize("name", ["Tanh", "LayerNorm", "convolutions, train", "attention", "embedding"])
def test_hvp_itself_agrees_and_goes_under_vmap_over_vectors(name: str) -> None:
    model, x = made(name)
    loss, params = functional_loss(model, CE)
    vs = [random_like(params, seed) for seed in range(3)]
    stacked = eigenfunc.tree.stack(vs)
    with untouched(model):
        images = vmap(lambda v: hvp(loss, params, (x, LABELS), v))(stacked)
    H = dense_hessian(plain(model, lambda m: CE(m(x), LABELS)), params)
    for i, v in enumerate(vs):
        assert_blocks_close({n: image[i] for n, image in images.items()}, H @ flat(v), 1e-11)


def test_the_operator_inside_a_transform_is_the_pure_product() -> None:
    model, x = made("Tanh")
    loss, params = functional_loss(model, CE)
    A = hessian(loss, params, (x, LABELS))
    vs = eigenfunc.tree.stack([random_like(params, seed) for seed in range(2)])
    mapped, block = vmap(A.matvec)(vs), A.matmat(vs)
    assert all((mapped[n] - block[n]).abs().max() < 1e-13 for n in params)
    made_inside = vmap(lambda v: hessian(loss, params, (x, LABELS))(v))(vs)
    assert all((made_inside[n] - block[n]).abs().max() < 1e-13 for n in params)


def test_any_pytree_of_parameters_will_do_whatever_the_order_of_its_keys() -> None:
    x = normal(5, 3)
    params: Any = {"z": [normal(3, 2)], "a": (normal(2), {"y": normal(2) + 1, "b": normal(1)})}

    def loss(p: Any, batch: Tensor) -> Tensor:
        hidden = torch.tanh(batch @ p["z"][0] + p["a"][0])
        return ((hidden * p["a"][1]["y"]).sum(1) - p["a"][1]["b"]).square().mean()

    A = hessian(loss, params, x)
    truth = torch.func.hessian(lambda flat: loss(eigenfunc.tree.unravel(flat, params), x))(
        eigenfunc.tree.ravel(params, params)
    )
    assert (A.to_dense() - truth).abs().max() < 1e-12
    solution = eigsh(A, 2, which="LA", seed=0)
    assert solution.vectors["a"][1]["b"].shape == (2, 1)


def test_parameters_the_loss_does_not_use_have_zero_blocks() -> None:
    params = {"used": normal(3), "linear": normal(2), "unused": normal(2)}

    def loss(p: Params, batch: Tensor) -> Tensor:
        return (p["used"] ** 4).sum() + p["linear"].sum()

    for product in ("auto", "graph", "jvp", "vjp"):
        image = hessian(loss, params, normal(1), product=product)({n: torch.ones_like(p) for n, p in params.items()})
        assert (image["used"] - 12 * params["used"] ** 2).abs().max() < 1e-12
        assert not image["linear"].any()
        assert not image["unused"].any()


def test_a_loss_of_shape_one_is_a_scalar() -> None:
    A = hessian(lambda p, batch: (p**2).sum().reshape(1), normal(3), normal(1))
    assert torch.equal(A(torch.ones(3).double()), 2 * torch.ones(3).double())


def test_a_linear_loss_has_the_zero_matrix() -> None:
    A = hessian(lambda p, batch: (p * batch).sum(), normal(3), normal(3))
    assert not A.to_dense().any()
    assert eigsh(A, 1, seed=0).values.tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_keeps_its_dtype_and_loses_no_more_than_it_must(dtype: torch.dtype) -> None:
    model, x = made("Tanh")
    loss, params = functional_loss(model, CE)
    v = random_like(params)
    truth = hessian(loss, params, (x, LABELS))(v)
    low, low_params = functional_loss(model.to(dtype), CE)
    found = hessian(low, low_params, (x.to(dtype), LABELS))({n: u.to(dtype) for n, u in v.items()})
    error = flat(found).double() - flat(truth)
    assert all(image.dtype == dtype for image in found.values())
    assert error.norm() < 20 * torch.finfo(dtype).eps * flat(truth).norm()


def test_grad_modes_around_a_call_change_nothing() -> None:
    model, x = made("convolutions, train")
    loss, params = functional_loss(model, CE)
    v = random_like(params)
    batch = (x, LABELS)
    outside = hessian(loss, params, batch)
    expected, pure = outside(v), hvp(loss, params, batch, v)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            u = {n: x * 1 for n, x in v.items()}
            assert all(torch.equal(expected[n], image) for n, image in outside(v).items())
            assert all(torch.equal(expected[n], image) for n, image in hessian(loss, params, batch)(u).items())
            assert all(torch.equal(pure[n], image) for n, image in hvp(loss, params, batch, u).items())
