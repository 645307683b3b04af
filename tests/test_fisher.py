"""Fisher matrices of models: against gradients of single terms, under transforms, and against curvlinops."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eigenfunc import Batches, eigsh, functional_loss, tree
from eigenfunc.curvature.fisher import fisher, fishervp
from eigenfunc.curvature.ggn import ggn
from eigenfunc.curvature.losses import KINDS
from eigenfunc.errors import DataError, InputError, ObjectiveError
from tests.helpers import flat, random_like, untouched

G = torch.Generator().manual_seed(11)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G, dtype=torch.float64)


class Tokens(nn.Module):
    """Logits (N, classes, length) of sequences (N, length, 3)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = network(classes)

    def forward(self, x: Tensor) -> Any:
        return self.net(x).movedim(-1, 1)


def network(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


X, Y = normal(9, 3), torch.randint(3, (9,), generator=G)
SEQUENCES, WORDS = normal(5, 4, 3), torch.randint(3, (5, 4), generator=G)
WORDS[0], WORDS[2, 1] = -100, -100
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 3.0]).double()
SCORES = normal(9, 2)


def gradients(model: nn.Module, inputs: Tensor, terms: Any) -> Tensor:
    """One row for each term: the gradient of its negative log-likelihood by the parameters, sorted by name."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    rows = jacrev(lambda p: terms(functional_call(model, p, (inputs,))).reshape(-1))(params)
    return torch.cat([rows[name].flatten(1) for name in sorted(rows)], dim=1)


def per_sample(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Any) -> Tensor:
    """The same from one sample at a time, by vmap in chunks."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def value(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = loss(functional_call(model, p, (x[None],)), y[None])
        return out

    rows = vmap(grad(value), in_dims=(None, 0, 0), chunk_size=4)(params, inputs, targets)
    return torch.cat([rows[name].flatten(1) for name in sorted(rows)], dim=1)


def dense(model: nn.Module, criterion: Any, data: Any, *args: Any, **options: Any) -> Tensor:
    loss, params = functional_loss(model, criterion)
    return fisher(loss, params, data, *args, **options).to_dense()


def test_empirical_is_the_mean_of_outer_products_of_sample_gradients() -> None:
    g = per_sample(network(3), X, Y, F.cross_entropy)
    found = dense(network(3), nn.CrossEntropyLoss(), (X, Y), "empirical")
    assert torch.allclose(found, g.mT @ g / 9, rtol=1e-10, atol=1e-14)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    assert torch.allclose(dense(network(3), nn.CrossEntropyLoss(), loader, "empirical"), found, rtol=1e-10, atol=1e-14)
    summed = dense(network(3), nn.CrossEntropyLoss(reduction="sum"), Batches(loader, reduction="sum"), "empirical")
    assert torch.allclose(summed, 9 * found, rtol=1e-10, atol=1e-14)
    pieces = Batches([(X, Y)], microbatch=2)
    assert torch.allclose(dense(network(3), nn.CrossEntropyLoss(), pieces, "empirical"), found, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_empirical_of_tokens_with_weights_and_gaps(smoothing: float) -> None:
    criterion = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=smoothing)
    counted = WORDS != -100
    own = torch.where(counted, CLASS_WEIGHTS[WORDS.clamp(min=0)], 0.0)
    scale = (1 - smoothing) * own + smoothing * CLASS_WEIGHTS.mean() * counted  # what each term weighs
    g = gradients(
        Tokens(3),
        SEQUENCES,
        lambda z: F.cross_entropy(z, WORDS, weight=CLASS_WEIGHTS, label_smoothing=smoothing, reduction="none"),
    )
    w = scale.reshape(-1)
    truth = (g / w.clamp(min=1e-9)[:, None]).mT @ (w[:, None] / own.sum() * (g / w.clamp(min=1e-9)[:, None]))
    found = dense(Tokens(3), criterion, (SEQUENCES, WORDS), "empirical")
    assert torch.allclose(found, truth, rtol=1e-10, atol=1e-14)

    def weight(batch: Any) -> Tensor:
        return torch.where(batch[1] != -100, CLASS_WEIGHTS[batch[1].clamp(min=0)], 0.0).sum()

    cut = Batches([(SEQUENCES[:1], WORDS[:1]), (SEQUENCES[1:3], WORDS[1:3]), (SEQUENCES[3:], WORDS[3:])], weight)
    assert torch.allclose(dense(Tokens(3), criterion, cut, "empirical"), truth, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("mean", "total"),
    [
        (nn.MSELoss(), nn.MSELoss(reduction="sum")),
        (nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss(reduction="sum")),
        (nn.PoissonNLLLoss(full=True), nn.PoissonNLLLoss(full=True, reduction="sum")),
        (partial(nn.GaussianNLLLoss(), var=0.3), lambda z, y: ((z - y) ** 2 / 0.6).sum()),
    ],
)
def test_empirical_of_other_losses_takes_the_outputs_of_a_sample_together(mean: Any, total: Any) -> None:
    targets = SCORES.sigmoid()
    g = per_sample(network(2), X, targets, total)
    assert torch.allclose(
        dense(network(2), mean, (X, targets), "empirical"), g.mT @ g / 18, rtol=1e-10, atol=1e-14
    )  # as the loss, which divides by 9 samples times 2 outputs


def test_empirical_with_batch_norm_goes_through_the_statistics_of_the_batch() -> None:
    model = nn.Sequential(network(4), nn.BatchNorm1d(4).double(), nn.Linear(4, 3).double())
    frozen = nn.Sequential(model[0], nn.BatchNorm1d(4, track_running_stats=False).double(), model[2])
    g = gradients(frozen, X, lambda z: F.cross_entropy(z, Y, reduction="none"))
    with untouched(model):
        found = dense(model, nn.CrossEntropyLoss(), (X, Y), "empirical")
    assert torch.allclose(found, g.mT @ g / 9, rtol=1e-10, atol=1e-13)


def test_one_operator_is_one_matrix() -> None:
    twice = [(X, Y), (X, Y)]
    model = network(3)
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
    with untouched(model):
        A = fisher(loss, params, Batches(twice), "monte-carlo", seed=3, cache=0)
        first = A.to_dense()
    torch.manual_seed(99)  # which it does not depend on
    again = fisher(loss, params, Batches(twice), "monte-carlo", seed=3, cache=0)
    assert torch.allclose(again.to_dense(), first, rtol=1e-10, atol=1e-13)
    kept = fisher(loss, params, Batches(twice), "monte-carlo", seed=3)
    assert torch.allclose(kept.to_dense(), first, rtol=1e-10, atol=1e-13)
    v = random_like(params)
    singles = [flat(A(v)) for _ in range(3)]
    assert all(torch.equal(singles[0], single) for single in singles)
    assert torch.allclose(first @ flat(v), singles[0], rtol=1e-10, atol=1e-13)
    assert torch.allclose(first, first.mT, rtol=1e-10, atol=1e-13)
    assert torch.linalg.eigvalsh(first)[0] > -1e-13
    half = fisher(loss, params, (X, Y), "monte-carlo", seed=3).to_dense()
    assert not torch.allclose(half, first, rtol=0.01)  # the second batch draws its own
    other = fisher(loss, params, Batches(twice), "monte-carlo", seed=4)
    assert not torch.allclose(other.to_dense(), first, rtol=0.01)
    assert "seed 4" in other.describe()
    assert eigsh(A, 2).values[0] == pytest.approx(torch.linalg.eigvalsh(first)[-1].item(), rel=1e-6)


def test_monte_carlo_over_the_model_converges() -> None:
    criterion = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    loss, params = functional_loss(Tokens(3), criterion)
    v, batch = random_like(params), (SEQUENCES, WORDS)
    exact = tree.dot(v, fisher(loss, params, batch)(v))
    found = torch.stack(
        [tree.dot(v, fishervp(loss, params, batch, v, "monte-carlo", num_samples=20, seed=s)) for s in range(40)]
    )
    assert (found.mean() - exact).abs() <= 4 * found.std() / 40**0.5
    assert found.std() / 40**0.5 < 0.05 * exact


@pytest.mark.parametrize("kind", KINDS)
def test_pure_products_compose(kind: Any) -> None:
    model = network(3)
    loss, params = functional_loss(model, nn.CrossEntropyLoss(label_smoothing=0.1))
    product = partial(fishervp, loss, kind=kind, num_samples=2, seed=None if kind != "monte-carlo" else 1)
    operator = fisher(loss, params, (X, Y), kind, num_samples=2, seed=1)
    v, w = random_like(params, 1), random_like(params, 2)
    truth = product(params, (X, Y), v)
    assert torch.allclose(flat(operator(v)), flat(truth), rtol=1e-10, atol=1e-13)
    stacked = tree.stack([v, w])
    both = vmap(lambda v: product(params, (X, Y), v))(stacked)
    assert torch.allclose(flat(tree.row(both, 0)), flat(truth), rtol=1e-10, atol=1e-13)
    assert torch.allclose(flat(tree.row(vmap(operator.matvec)(stacked), 0)), flat(truth), rtol=1e-10, atol=1e-13)
    models, _ = stack_module_state([model, network(3).apply(lambda m: m)])  # type: ignore[arg-type]
    each = vmap(lambda p: product(p, (X, Y), v))({name: x.detach() for name, x in models.items()})
    assert torch.allclose(flat(tree.row(each, 1)), flat(truth), rtol=1e-10, atol=1e-13)

    def along(p: dict[str, Tensor]) -> Tensor:
        return tree.dot(v, product(p, (X, Y), v))

    slope = tree.dot(grad(along)(params), w)
    moved = jvp(along, (params,), (w,))[1]
    assert torch.allclose(slope, moved, rtol=1e-8)
    if kind != "monte-carlo":  # whose draws jump
        ahead, behind = (along(tree.add(params, tree.scale(h, w))) for h in (1e-5, -1e-5))
        assert torch.allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6)


def test_what_has_no_fisher_matrix_is_refused() -> None:
    loss, params = functional_loss(network(3), loss_fn=lambda model, batch: model(batch).sum())
    with pytest.raises(ObjectiveError, match="apart from its loss"):
        fisher(loss, params, X)
    loss, params = functional_loss(network(3), nn.CrossEntropyLoss())
    with pytest.raises(InputError, match="kind"):
        fisher(loss, params, (X, Y), "type-2")  # type: ignore[arg-type]
    for count in (0, 1.5, True):
        with pytest.raises(InputError, match="num_samples"):
            fisher(loss, params, (X, Y), "monte-carlo", num_samples=count)  # type: ignore[arg-type]
    for seed in (-1, 0.5):
        with pytest.raises(InputError, match="seed"):
            fisher(loss, params, (X, Y), "monte-carlo", seed=seed)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="compile"):
        fisher(loss, params, (X, Y), "monte-carlo", compile=True)
    shuffled = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    with pytest.raises(DataError, match="same order"):
        fisher(loss, params, shuffled, "monte-carlo")
    with pytest.raises(InputError, match="seed"):
        fishervp(loss, params, (X, Y), random_like(params), "monte-carlo")


def test_shuffled_batches_do_for_the_other_kinds() -> None:
    shuffled = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    for kind in ("exact", "empirical"):
        truth = dense(network(3), nn.CrossEntropyLoss(), (X, Y), kind)
        assert torch.allclose(dense(network(3), nn.CrossEntropyLoss(), shuffled, kind), truth, rtol=1e-10, atol=1e-14)


PEER = [
    (nn.CrossEntropyLoss(), Y),
    (nn.CrossEntropyLoss(reduction="sum"), Y),
    (nn.MSELoss(), normal(9, 3)),
    (nn.BCEWithLogitsLoss(), (normal(9, 3) > 0).double()),
]


@pytest.mark.parametrize(("criterion", "targets"), PEER)
def test_agrees_with_curvlinops(criterion: Any, targets: Tensor) -> None:
    peer = pytest.importorskip("curvlinops")
    model = network(3).float()
    loss, params = functional_loss(model, criterion)
    data = [(X[:4].float(), _narrow(targets[:4])), (X[4:].float(), _narrow(targets[4:]))]
    batches = Batches(data, reduction=criterion.reduction)
    v = random_like(params)
    order = [name for name, _ in model.named_parameters()]
    shared = (model, criterion, list(model.parameters()), data)
    across = torch.cat([v[name].reshape(-1) for name in order])

    def theirs(operator: Any) -> Tensor:
        out: Tensor = operator @ across
        return out.detach()

    def ours(kind: Any, **options: Any) -> Tensor:
        image = fisher(loss, params, batches, kind, **options)(v)
        return torch.cat([image[name].reshape(-1) for name in order])

    for kind, operator in (("exact", peer.GGNLinearOperator), ("empirical", peer.EFLinearOperator)):
        expected = theirs(operator(*shared))
        assert (ours(kind) - expected).norm() <= 1e-5 * expected.norm(), kind
    sampled = theirs(peer.FisherMCLinearOperator(*shared, mc_samples=2000, seed=1))
    assert (ours("monte-carlo", num_samples=2000, seed=1) - sampled).norm() <= 0.1 * sampled.norm()


def _narrow(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def test_exact_is_the_gauss_newton_matrix() -> None:
    criterion = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1)
    loss, params = functional_loss(Tokens(3), criterion)
    truth = ggn(loss, params, (SEQUENCES, WORDS)).to_dense()
    assert torch.allclose(fisher(loss, params, (SEQUENCES, WORDS)).to_dense(), truth, rtol=1e-12, atol=1e-15)
