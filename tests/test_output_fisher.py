"""Fisher matrices in output space: enumerated expectations, and the statistics of draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from eigenfunc.curvature import likelihoods, losses
from eigenfunc.curvature.losses import output_fisher, output_hessian
from eigenfunc.errors import InputError, ObjectiveError

G = torch.Generator().manual_seed(11)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G, dtype=torch.float64)


Z = normal(4, 3)


def atoms(kind: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(targets, their probability for each of the four samples) with the mean and covariance of the likelihood."""
    one = torch.ones(4, dtype=torch.float64)
    if kind == "classes":
        for c in range(3):
            yield torch.full((4,), c), Z.softmax(1)[:, c]
    elif kind == "bits":
        for bits in itertools.product((0.0, 1.0), repeat=3):
            y = torch.tensor(bits).double().expand(4, 3)
            yield y, torch.where(y > 0, Z.sigmoid(), 1 - Z.sigmoid()).prod(1)
    elif kind in ("gaussian", "half"):
        variance = 0.5 if kind == "half" else 0.3
        for signs in itertools.product((-1.0, 1.0), repeat=3):
            yield Z + variance**0.5 * torch.tensor(signs).double(), one / 8
    else:
        rate = Z.exp()[:, :1] if kind == "counts" else Z.abs()[:, :1] + 0.25
        for k in range(60):
            y = torch.full((4, 1), float(k)).double()
            yield y, torch.distributions.Poisson(rate).log_prob(y).exp()[:, 0]


LIKELIHOODS: dict[str, tuple[Any, Tensor]] = {
    "classes": (nn.CrossEntropyLoss(), Z),
    "bits": (nn.BCEWithLogitsLoss(weight=normal(4, 3).abs()), Z),
    "half": (nn.MSELoss(), Z),
    "gaussian": (partial(nn.GaussianNLLLoss(reduction="sum"), var=0.3), Z),
    "counts": (nn.PoissonNLLLoss(), Z[:, :1]),
    "rates": (nn.PoissonNLLLoss(log_input=False, eps=0.25, reduction="sum"), Z[:, :1].abs()),
}


def as_matrix(apply: Any, like: Tensor) -> Tensor:
    eye = torch.eye(like.numel(), dtype=like.dtype)
    images: Tensor = vmap(apply)(eye.reshape(-1, *like.shape)).flatten(1)
    return images


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_exact_is_the_expectation_of_the_empirical_over_the_models_targets(kind: str) -> None:
    criterion, outputs = LIKELIHOODS[kind]
    truth = torch.zeros(outputs.numel(), outputs.numel(), dtype=torch.float64)
    for targets, chances in atoms(kind):
        share = chances[:, None].expand_as(outputs).reshape(-1)  # samples are apart in output space
        truth += share[:, None] * as_matrix(output_fisher(criterion, outputs, targets, "empirical"), outputs)
    targets = next(atoms(kind))[0]
    found = as_matrix(output_fisher(criterion, outputs, targets), outputs)
    assert torch.allclose(found, truth, rtol=1e-10, atol=1e-12)
    if kind != "rates":
        assert torch.equal(found, as_matrix(output_hessian(criterion, outputs, targets), outputs))


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_draws_have_the_exact_matrix_as_their_mean(kind: str) -> None:
    criterion, outputs = LIKELIHOODS[kind]
    targets = next(atoms(kind))[0]
    noise = np.random.default_rng(5)
    draws = torch.stack(
        [as_matrix(output_fisher(criterion, outputs, targets, "monte-carlo", noise=noise), outputs) for _ in range(800)]
    )
    exact = as_matrix(output_fisher(criterion, outputs, targets), outputs)
    error, deviation = (draws.mean(0) - exact).abs(), draws.std(0) / 800**0.5
    assert (error <= 4.5 * deviation + 1e-12).all()
    assert error.sum() > 0
    many = as_matrix(output_fisher(criterion, outputs, targets, "monte-carlo", num_samples=800, noise=noise), outputs)
    assert ((many - exact).abs() <= 4.5 * deviation + 1e-12).all()


def test_classes_are_drawn_by_their_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    z = normal(2, 6, 3)
    z[:, 2], z[:, 5] = -torch.inf, -torch.inf
    tokens = likelihoods.likelihood(nn.CrossEntropyLoss(), z, torch.zeros(2, 3, dtype=torch.long))
    assert isinstance(tokens, likelihoods.Tokens)
    drawn = losses._drawn(tokens, 20_000, np.random.default_rng(0))
    counts = torch.stack([(drawn == c).sum(1) for c in range(6)], dim=1)
    assert (counts[:, [2, 5]] == 0).all()
    expected = 20_000 * z.softmax(1)[:, [0, 1, 3, 4]]
    chi2 = ((counts[:, [0, 1, 3, 4]] - expected) ** 2 / expected).sum(1)
    assert (chi2 < 16.3).all()  # one in a thousand for 3 degrees of freedom

    class Lowest:
        def random(self, shape: Any) -> Any:
            return np.zeros(shape)

    z[:, 0] = -torch.inf  # which not even a level of zero may give
    assert (losses._drawn(tokens, 1, Lowest()) == 1).all()  # type: ignore[arg-type]
    z[:, 0] = 0.0
    drawn = losses._drawn(tokens, 20_000, np.random.default_rng(0))
    monkeypatch.setattr(losses, "CHUNK", 7)
    assert torch.equal(losses._drawn(tokens, 20_000, np.random.default_rng(0)), drawn)


def test_counts_are_the_quantiles_of_a_poisson_distribution() -> None:
    from scipy.stats import poisson

    level = torch.tensor([1e-9, 1e-3, 0.3, 0.5, 0.7, 0.999, 1 - 1e-9], dtype=torch.float64)
    for rate in (1e-6, 0.4, 7.0, 1234.5):
        found = likelihoods._counts(level, torch.full((7,), rate, dtype=torch.float64))
        assert found.tolist() == poisson.ppf(level.numpy(), rate).tolist()
    found = likelihoods._counts(torch.zeros(1).double(), torch.tensor([0.0, 7.0]).double())
    assert found.tolist() == [0.0, 0.0]


def test_entries_with_weights_of_their_own_enter_by_the_root() -> None:
    z, y, w = normal(4, 3), normal(4, 3), normal(4, 3).abs()
    u = normal(4, 3)
    g = w.sqrt() * 2 * (z - y)
    truth = g * (g * u).sum(1, keepdim=True) / w.sum()
    assert torch.allclose(output_fisher(partial(F.mse_loss, weight=w), z, y, "empirical")(u), truth, rtol=1e-12)
    samples = w[:, :1].expand(4, 3)
    loss = nn.BCEWithLogitsLoss(weight=samples, pos_weight=torch.full((3,), 5.0).double())
    hits = torch.tensor([1.0, 0, 1, 0]).double()[:, None].expand(4, 3)
    slope = z.sigmoid() - hits  # each sample counts w times, and five times that where it is positive
    truth = w[:, :1] * (1 + 4 * hits[:, :1]) * slope * (slope * u).sum(1, keepdim=True) / 12
    assert torch.allclose(output_fisher(loss, z, hits, "empirical")(u), truth, rtol=1e-12)


def test_what_has_no_fisher_matrix_is_refused() -> None:
    for criterion in (nn.L1Loss(), nn.HuberLoss(), lambda z, y: F.mse_loss(z, y), nn.MSELoss(reduction="none")):
        with pytest.raises(ObjectiveError, match="not known to be the negative log-likelihood"):
            output_fisher(criterion, Z, Z)
    with pytest.raises(InputError, match="noise"):
        output_fisher(nn.CrossEntropyLoss(), Z, torch.zeros(4, dtype=torch.long), "monte-carlo")
