"""Third and fourth derivatives, against differences of second ones, where torch's own are wrong or missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad

from eigenfunc import functional_loss, hvp, sharpness, tree
from eigenfunc.curvature.mends import mended
from eigenfunc.curvature.thrice import Thrice
from eigenfunc.perturbation import over
from tests.helpers import ZERO, difference, normal, random_like, slope


def mixed(y: Tensor) -> Tensor:
    return (y * torch.linspace(0.5, 1.5, y.numel()).double().reshape(y.shape)).sin().sum()


def rows(x: Tensor) -> Tensor:
    return x.reshape(6, 4)


def definite(x: Tensor) -> Tensor:
    return rows(x).mT @ rows(x) + torch.eye(4)


OTHER = normal(6, 4, seed=9)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda x: mixed(F.layer_norm(rows(x), (4,), x[:4], x[4:8])),
    "layer norm over two axes": lambda x: mixed(F.layer_norm(x.reshape(2, 3, 4), (3, 4))),
    "batch norm": lambda x: mixed(F.batch_norm(rows(x), None, None, x[:4], x[4:8], training=True)),
    "batch norm of pictures": lambda x: mixed(F.batch_norm(x.reshape(2, 3, 2, 2), None, None, x[:3], training=True)),
    "batch norm at rest": lambda x: mixed(F.batch_norm(rows(x), OTHER[0], OTHER[1] ** 2, x[:4], x[4:8])),
    "instance norm": lambda x: mixed(F.instance_norm(x.reshape(2, 3, 4), weight=x[:3], bias=x[3:6])),
    "glu": lambda x: mixed(F.glu(rows(x))),
    "normalize": lambda x: mixed(F.normalize(rows(x))),
    "cosine similarity": lambda x: mixed(F.cosine_similarity(rows(x), OTHER)),
    "vector norm": lambda x: mixed(torch.linalg.vector_norm(rows(x), dim=1)),
    "norm": lambda x: x.norm() * mixed(x),
    "std": lambda x: mixed(rows(x).std(1)) + mixed(torch.std(rows(x), dim=0, keepdim=True)),
    "std by other names": lambda x: (
        x.std(False) + mixed(rows(x).std(1, False, True)) + mixed(torch.std(rows(x), 0, unbiased=True))
    ),
    "solve": lambda x: mixed(torch.linalg.solve(definite(x), OTHER.mT)) + mixed(torch.linalg.solve(definite(x), x[:4])),
    "logdet": lambda x: torch.logdet(definite(x)),
    "slogdet": lambda x: torch.linalg.slogdet(-rows(x)[:3, :3]).logabsdet,
    "det": lambda x: torch.linalg.det(rows(x)[:4] / 2),
    "softmax": lambda x: mixed(F.softmax(rows(x), 1)),
    "group norm": lambda x: mixed(F.group_norm(x.reshape(2, 4, 3), 2)),
    "gelu": lambda x: mixed(F.gelu(x)),
    "convolution": lambda x: mixed(F.conv1d(x.reshape(2, 2, 6), x[:12].reshape(3, 2, 2))),
}


def close(x: Tensor, y: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((x - y).abs() <= tolerance * (y.abs() + 1e-2))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_third_and_fourth_derivatives(name: str) -> None:
    f, x = FUNCTIONS[name], 0.7 * normal(24, seed=1)
    v, a, way = normal(24, seed=2), normal(24, seed=3), normal(24, seed=4)

    def second(t: Tensor) -> Tensor:
        with Thrice():
            product: Tensor = hvp(lambda p, _: f(p), x + t * way, None, v)
        return product @ a

    with Thrice():
        elementary = f(x)
    assert close(elementary, f(x), 1e-10)
    assert close(second(ZERO), hvp(lambda p, _: f(p), x, None, v) @ a, 1e-9)
    with mended():
        third = difference(second)
        assert close(grad(second)(ZERO), third)
        assert close(slope(second)(ZERO), third)
        fourth = difference(grad(second))
        assert close(grad(grad(second))(ZERO), fourth)
        assert close(slope(grad(second))(ZERO), fourth)


MORE: dict[str, Callable[[Tensor], Tensor]] = {
    "pairwise distance": lambda x: mixed(F.pairwise_distance(rows(x)[:3], rows(x)[3:])),
    "triplets": lambda x: F.triplet_margin_loss(rows(x)[:2], rows(x)[2:4], rows(x)[4:]),
    "standard deviation and mean": lambda x: mixed(torch.std_mean(rows(x), 1)[0]),
    "renorm": lambda x: mixed(torch.renorm(rows(x), 2, 0, 0.5)),
    "eigenvalues": lambda x: mixed(torch.linalg.eigvalsh(definite(x))),
    "attention": lambda x: mixed(F.scaled_dot_product_attention(*(rows(x).reshape(1, 1, 6, 4),) * 3, is_causal=True)),
    "products of many": lambda x: mixed(rows(x).prod(1)) + mixed(rows(x).cumprod(1)),
    "powers": lambda x: mixed(x.abs() ** x.flip(0)),
    "entropy": lambda x: F.cross_entropy(
        rows(x), torch.arange(6) % 4, torch.arange(1.0, 5).double(), label_smoothing=0.1
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS | MORE)
def test_what_the_gradient_of_an_eigenvalue_pulls_back(name: str) -> None:
    """Against differences of the quadratic form from plain double backward."""
    f, x, rest = (FUNCTIONS | MORE)[name], 0.7 * normal(24, seed=1), torch.zeros(24).double()
    v, a, way = normal(24, seed=2), normal(24, seed=3), normal(24, seed=4)

    def form(t: Tensor) -> Tensor:
        with mended():
            return torch.autograd.functional.vhp(f, x + t * way, v)[1] @ a

    problem, theta = over(lambda p, _: f(p), x, None, trips=1)
    slope_of_x = problem.slopes(theta, [torch.stack([a, a + v])], [torch.stack([v, rest])], [True])[0]
    assert slope_of_x is not None
    assert close(slope_of_x @ way, difference(form))


def test_norms_of_zero_have_slope_zero_and_other_orders_are_left_to_torch() -> None:
    with Thrice():
        assert torch.equal(grad(lambda x: x.norm())(torch.zeros(3)), torch.zeros(3))
        for order in (1, 3, float("inf")):
            mine = torch.linalg.vector_norm(OTHER, order, 1)
            assert torch.equal(mine, torch.linalg.vector_norm(OTHER, ord=order, dim=1))
        assert close(torch.norm(OTHER, 1), OTHER.abs().sum(), 1e-12)
        assert torch.logdet(-torch.eye(3)).isnan()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
        self.out = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.layer(self.embedding(x))).flatten(0, 1)


MODELS: dict[str, tuple[Callable[[], nn.Module], nn.Module, Any]] = {
    "transformer": (Encoder, nn.CrossEntropyLoss(), (torch.arange(15).reshape(3, 5) % 7, torch.arange(15) % 5)),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3)),
        nn.CrossEntropyLoss(),
        (normal(5, 1, 6, 6), torch.arange(5) % 3),
    ),
    "squared error": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)),
        nn.MSELoss(),
        (OTHER, OTHER[:, :2]),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_sharpness_of_common_models_has_its_derivatives(name: str) -> None:
    build, criterion, batch = MODELS[name]
    with torch.random.fork_rng():
        model = build()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.data = normal(*p.shape, seed=i) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 2) + (p.ndim == 1)
        model.double()
    loss, params = functional_loss(model, criterion)
    start, way = random_like(params, 1), random_like(params, 2)

    def f(t: Tensor) -> Tensor:
        return sharpness(loss, tree.add(params, tree.scale(t, way)), batch, num_steps=30, v0=start)

    assert close(grad(f)(ZERO), difference(f), 1e-6)
    assert close(slope(grad(f))(ZERO), difference(grad(f)), 1e-5)
