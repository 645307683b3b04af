"""The drop-in for hessian-eigenthings 0.x, called in the ways that scripts in the wild call it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eigenfunc import compute_hessian_eigenthings
from eigenfunc.errors import ConvergenceWarning, DataError, InputError
from tests.helpers import labelled, second_derivatives, seeded, untouched, wanted

CE = nn.CrossEntropyLoss()
X, Y = labelled(50)


def model(training: bool = True) -> nn.Module:
    """Its names do not sort into the order of its parameters."""
    with seeded(1):
        parts = {"z": nn.Linear(5, 6), "act": nn.Tanh(), "a": nn.Linear(6, 3)}
        net = nn.Sequential()
        for name, part in parts.items():
            net.add_module(name, part)
        return net.double().train(training)


def loader(size: int = 16, **options: Any) -> DataLoader[Any]:
    """Its last batch is smaller."""
    return DataLoader(TensorDataset(X, Y), batch_size=size, **options)


def truth(net: nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    """The dense Hessian in the order of `net.parameters()`."""
    return second_derivatives(CE(net(x), y), list(net.parameters()))


def largest(H: Tensor, k: int) -> np.ndarray:
    return wanted(torch.linalg.eigvalsh(H), k, "LM").sort(descending=True).values.numpy()


def assert_pairs(values: Any, vectors: Any, H: Tensor, k: int, tolerance: float) -> None:
    assert isinstance(values, np.ndarray)
    assert isinstance(vectors, np.ndarray)
    assert values.shape == (k,)
    assert vectors.shape == (k, H.shape[0])
    assert (np.diff(values) <= 0).all()
    assert np.abs(values - largest(H, k)).max() < tolerance
    assert np.linalg.norm(vectors @ H.numpy() - values[:, None] * vectors, axis=1).max() < tolerance
    assert np.abs(vectors @ vectors.T - np.eye(k)).max() < 1e-10


def test_power_iteration_called_positionally_and_indexed_from_the_end() -> None:
    net = model()
    with untouched(net):
        values, vectors = compute_hessian_eigenthings(
            net, loader(), CE, 3, True, "power_iter", True, power_iter_steps=500, power_iter_err_threshold=1e-6
        )
    assert_pairs(values, vectors, truth(net), 3, 1e-5)
    assert values[-1] == values[2]
    assert np.array_equal(vectors[-1], vectors[2])


@pytest.mark.parametrize("options", [{}, {"num_lanczos_vectors": 15}, {"num_lanczos_vectors": 2}, {"max_steps": 100}])
def test_lanczos_gives_the_largest_in_magnitude(options: dict[str, Any]) -> None:
    net = model()
    values, vectors = compute_hessian_eigenthings(net, loader(), CE, 4, mode="lanczos", use_gpu=True, **options)
    assert_pairs(values, vectors, truth(net), 4, 1e-5)


def test_lanczos_takes_an_end_and_a_tolerance() -> None:
    net = model()
    values, _ = compute_hessian_eigenthings(net, loader(), CE, 3, mode="lanczos", which="SA", tol=1e-8)
    expected = torch.linalg.eigvalsh(truth(net))[:3].flip(0).numpy()
    assert np.abs(values - expected).max() < 1e-8


def test_a_start_vector_is_in_the_order_of_the_parameters() -> None:
    net = model()
    H = truth(net)
    top = torch.linalg.eigh(H).eigenvectors[:, -1]
    for start in (top, top.numpy()):
        values, vectors = compute_hessian_eigenthings(net, loader(), CE, 1, mode="lanczos", init_vec=start)
        assert abs(abs(vectors[0] @ top.numpy()) - 1) < 1e-10
        assert abs(values[0] - largest(H, 1)[0]) < 1e-8
    with pytest.raises(InputError, match="init_vec has 3 entries"):
        compute_hessian_eigenthings(net, loader(), CE, 1, mode="lanczos", init_vec=np.ones(3))


@pytest.mark.parametrize("name", ["max_samples", "max_possible_gpu_samples"])
def test_large_batches_are_cut_and_weigh_as_before(name: str) -> None:
    seen: list[int] = []

    def criterion(out: Tensor, target: Tensor) -> Tensor:
        seen.append(len(target))
        return CE(out, target)

    net = model()
    values, _ = compute_hessian_eigenthings(net, loader(50), criterion, 2, mode="lanczos", **{name: 13})
    assert max(seen) == 13
    assert np.abs(values - largest(truth(net), 2)).max() < 1e-5


def test_part_of_the_data_means_the_first_batch_for_lanczos() -> None:
    net = model()
    values, _ = compute_hessian_eigenthings(net, loader(), CE, 2, full_dataset=False, mode="lanczos")
    assert np.abs(values - largest(truth(net, X[:16], Y[:16]), 2)).max() < 1e-5


def test_part_of_the_data_means_mini_batches_for_power_iteration() -> None:
    net = model()
    with pytest.warns(ConvergenceWarning):
        values, _ = compute_hessian_eigenthings(net, loader(shuffle=True), CE, 1, False, power_iter_steps=300)
    assert abs(values[0] / largest(truth(net), 1)[0] - 1) < 0.1


def test_it_says_so_when_it_has_not_converged() -> None:
    with pytest.warns(ConvergenceWarning, match="raise max_steps"):
        values, vectors = compute_hessian_eigenthings(model(), loader(), CE, 4, power_iter_steps=2)
    assert values.shape == (4,)
    assert np.isfinite(vectors).all()


def test_tensors_come_back_on_request() -> None:
    values, vectors = compute_hessian_eigenthings(
        model(), loader(), CE, 1, power_iter_steps=500, to_numpy=False, momentum=0.0
    )
    assert isinstance(values, Tensor)
    assert isinstance(vectors, Tensor)


def test_frozen_parameters_are_left_out() -> None:
    net = model()
    net.get_parameter("z.weight").requires_grad_(False)
    values, vectors = compute_hessian_eigenthings(net, loader(), CE, 1, mode="lanczos")
    assert vectors.shape == (1, 6 + 18 + 3)
    assert values[0] <= largest(truth(model()), 1)[0] + 1e-9


def test_summed_losses_add_up() -> None:
    net = model()
    values, _ = compute_hessian_eigenthings(net, loader(), nn.CrossEntropyLoss(reduction="sum"), 1, mode="lanczos")
    assert abs(values[0] / 50 - largest(truth(net), 1)[0]) < 1e-6


def test_batches_that_a_batch_norm_sees_are_not_cut() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with untouched(net):
        values, _ = compute_hessian_eigenthings(net, [(X, Y)], CE, 1, mode="lanczos", max_samples=13)
    assert abs(values[0] - largest(truth(net), 1)[0]) < 1e-5


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="mode"):
        compute_hessian_eigenthings(model(), loader(), CE, 1, mode="qr")
    with pytest.raises(TypeError, match="power_steps"):
        compute_hessian_eigenthings(model(), loader(), CE, 1, power_steps=3)
    with pytest.raises(InputError, match="k ="):
        compute_hessian_eigenthings(model(), loader(), CE, 1000, mode="lanczos")
    with pytest.raises(DataError, match="only once"):
        compute_hessian_eigenthings(model(), iter(loader()), CE, 1)
    for mode in ("lanczos", "power_iter"):
        with pytest.raises(DataError, match="empty"):
            compute_hessian_eigenthings(model(), [], CE, 1, mode=mode, full_dataset=mode != "lanczos")


def test_fp16_warns_that_it_does_nothing() -> None:
    with pytest.warns(UserWarning, match="fp16"):
        values, _ = compute_hessian_eigenthings(model(), loader(), CE, 1, fp16=True, mode="lanczos")
    assert abs(values[0] - largest(truth(model()), 1)[0]) < 1e-5
