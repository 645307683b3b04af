"""No cut of the data changes the matrix where the criterion is known; where it is not, a changed mean is told."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eigenfunc import Batches, eigsh_streaming, fisher, functional_loss, ggn, hessian, sampling_error
from eigenfunc.errors import DataWarning, ObjectiveError
from eigenfunc.landscape import landscape
from eigenfunc.overlap import gradient
from tests.helpers import dense_hessian, flat, labelled, mlp, normal, plain, seeded

X, Y = labelled(12)
SHARES = torch.tensor([1.0, 6.0, 0.3]).double()
IGNORED = torch.where(torch.arange(12) % 4 < 2, -100, Y)
SOFT = torch.softmax(normal(12, 3, seed=1), 1)
NUMBERS = normal(12, 3, seed=2)
CUTS = st.sets(st.integers(1, 11), min_size=1).map(lambda edges: [0, *sorted(edges), 12])

CRITERIA: dict[str, tuple[Any, Tensor]] = {
    "classes": (nn.CrossEntropyLoss(), Y),
    "class weights": (nn.CrossEntropyLoss(weight=SHARES), Y),
    "class weights, smoothed": (nn.CrossEntropyLoss(weight=SHARES, label_smoothing=0.2), Y),
    "ignored": (nn.CrossEntropyLoss(), IGNORED),
    "ignored and weighed": (partial(F.cross_entropy, weight=SHARES, ignore_index=1), Y),
    "soft": (nn.CrossEntropyLoss(weight=SHARES), SOFT),
    "summed": (nn.CrossEntropyLoss(weight=SHARES, reduction="sum"), Y),
    "summed by a function": (partial(F.mse_loss, reduction="sum"), NUMBERS),
    "squares": (nn.MSELoss(), NUMBERS),
    "positives": (nn.BCEWithLogitsLoss(pos_weight=SHARES, weight=SHARES.flip(0)), (NUMBERS > 0).double()),
    "counts": (F.poisson_nll_loss, NUMBERS.abs().round()),
    "huber": (nn.HuberLoss(), NUMBERS),
}


def pieces(targets: Tensor, edges: list[int]) -> list[tuple[Tensor, Tensor]]:
    return [(X[a:b], targets[a:b]) for a, b in itertools.pairwise(edges)]


def close(found: Tensor, truth: Tensor) -> bool:
    return bool((found - truth).abs().max() <= 1e-12 * truth.abs().max())


@pytest.mark.parametrize("name", CRITERIA)
@given(edges=CUTS)
@settings(max_examples=4, deadline=None)
def test_any_cut_gives_the_hessian_of_all_data_in_one_batch(name: str, edges: list[int]) -> None:
    criterion, targets = CRITERIA[name]
    model = mlp()
    loss, params = functional_loss(model, criterion)
    truth = dense_hessian(plain(model, lambda module: criterion(module(X), targets)), params)
    assert close(hessian(loss, params, Batches(pieces(targets, edges))).to_dense(), truth)


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "huber"])
@pytest.mark.parametrize("matrix", [ggn, partial(fisher, kind="empirical")])
def test_no_cut_changes_the_gauss_newton_and_the_fisher_matrix(name: str, matrix: Callable[..., Any]) -> None:
    criterion, targets = CRITERIA[name]
    loss, params = functional_loss(mlp(), criterion)
    truth = matrix(loss, params, (X, targets)).to_dense()
    assert close(matrix(loss, params, DataLoader(TensorDataset(X, targets), batch_size=5)).to_dense(), truth)
    assert close(matrix(loss, params, Batches([(X, targets)], microbatch=4)).to_dense(), truth)


class PerToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with seeded():
            self.map = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, 5) -> (N, 3, length)"""
        return self.map(x).movedim(-1, 1)


@pytest.mark.parametrize("weight", [None, SHARES])
def test_sequences_of_unequal_lengths_count_by_their_tokens(weight: Tensor | None) -> None:
    loss, params = functional_loss(PerToken(), nn.CrossEntropyLoss(weight=weight))
    batches = [(X[:8].reshape(4, 2, 5), IGNORED[:8].reshape(4, 2)), (X[8:].reshape(1, 4, 5), IGNORED[8:].reshape(1, 4))]
    whole = X.reshape(1, 12, 5), IGNORED.reshape(1, 12)
    assert close(hessian(loss, params, Batches(batches)).to_dense(), hessian(loss, params, whole).to_dense())


def test_a_batch_without_a_target_that_counts_is_left_out() -> None:
    loss, params = functional_loss(mlp(), nn.CrossEntropyLoss())
    batches = [(X[:8], Y[:8]), (X[8:], torch.full((4,), -100))]
    truth = hessian(loss, params, (X[:8], Y[:8])).to_dense()
    assert close(hessian(loss, params, Batches(batches)).to_dense(), truth)


def test_all_that_reads_data_weighs_alike() -> None:
    loss, params = functional_loss(mlp(), nn.CrossEntropyLoss(weight=SHARES))
    batches = Batches(pieces(Y, [0, 3, 5, 12]))
    assert close(flat(gradient(loss, params, batches)), flat(gradient(loss, params, (X, Y))))
    solution = eigsh_streaming(loss, params, batches, 2, seed=0, tol=1e-8, schedule=(1.0,))
    truth = torch.linalg.eigvalsh(hessian(loss, params, (X, Y)).to_dense())
    assert (solution.values.amax() - truth.amax()).abs() <= 1e-7 * truth.amax()
    grids = [landscape(loss, params, data, solution, 0, radius=1.0, points=3) for data in (batches, (X, Y))]
    assert close(grids[0].losses, grids[1].losses)
    weights = torch.stack([SHARES[y].sum() for _, y in batches.data])
    v = {name: x[0] for name, x in solution.vectors.items()}
    q = torch.stack([flat(v) @ flat(hessian(loss, params, batch)(v)) for batch in batches.data])
    spread = weights * (q - weights @ q / weights.sum()) / weights.sum()
    error = sampling_error(loss, params, batches, solution)[0]
    assert abs(error - spread.norm() * 1.5**0.5) <= 1e-9 * error


def test_a_weight_of_the_users_own_stands() -> None:
    loss, params = functional_loss(mlp(), nn.CrossEntropyLoss(weight=SHARES))
    batches = pieces(Y, [0, 4, 12])
    parts = [hessian(loss, params, batch).to_dense() for batch in batches]
    assert close(hessian(loss, params, Batches(batches, weight=lambda b: 1.0)).to_dense(), sum(parts) / 2)


@pytest.mark.parametrize("matrix", [hessian, ggn])
def test_a_loss_for_each_sample_is_refused(matrix: Callable[..., Any]) -> None:
    loss, params = functional_loss(mlp(), nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ObjectiveError, match="reduce it to one number"):
        matrix(loss, params, Batches(pieces(Y, [0, 4, 12])))


def weighed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], SHARES)


def summed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]) @ model(batch[0]).mT, torch.arange(len(batch[0])))


@pytest.mark.parametrize(("loss_fn", "remedy"), [(weighed, "weight="), (summed, "'sum'"), (contrastive, "weight=")])
def test_a_free_loss_whose_mean_another_cut_changes_says_so(loss_fn: Any, remedy: str) -> None:
    loss, params = functional_loss(mlp(), loss_fn=loss_fn)
    batches = pieces(Y, [0, 7, 12])
    with pytest.warns(DataWarning, match=f"another cut.*{remedy}"):
        hessian(loss, params, Batches(batches))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hessian(loss, params, Batches(batches, weight=lambda b: SHARES[b[1]].sum()))
        hessian(loss, params, Batches(batches[:1]))
        if loss_fn is summed:
            hessian(loss, params, Batches(batches, reduction="sum"))


def test_a_sum_of_means_says_so() -> None:
    loss, params = functional_loss(mlp(), nn.CrossEntropyLoss())
    with pytest.warns(DataWarning, match="another cut"):
        hessian(loss, params, Batches(pieces(Y, [0, 7, 12]), reduction="sum"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 30.0]))
@settings(max_examples=8, deadline=None)
def test_a_mean_over_samples_raises_no_alarm(dtype: torch.dtype, seed: int, scale: float) -> None:
    """Terms of both signs too, whose sum cancels."""
    loss, params = functional_loss(mlp(nn.Dropout(0.5)).to(dtype), loss_fn=lambda m, x: scale * m(x).sin().mean())
    batches = [normal(size, 5, seed=seed + size, dtype=dtype) for size in (9, 64)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        A = hessian(loss, params, Batches(batches))
    assert A.size == sum(p.numel() for p in params.values())


def test_batch_norm_in_train_mode_raises_no_alarm_of_weights() -> None:
    loss, params = functional_loss(
        mlp(nn.BatchNorm1d(4)), loss_fn=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        A = hessian(loss, params, Batches(pieces(Y, [0, 7, 12])))
    assert A.size == sum(p.numel() for p in params.values())
