"""Weighted data: any cut gives the same matrix, and data that does not repeat is found out."""

from __future__ import annotations

import itertools
import time
import warnings
from collections import UserDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

from eigenfunc import Batches, functional_loss, hessian
from eigenfunc.data import Reader
from eigenfunc.errors import DataError, DataWarning
from tests.helpers import cut, flat, labelled, mlp, random_like, untouched

X, Y = labelled(10)
CE = nn.CrossEntropyLoss()


def product(criterion: Any, data: Any) -> Tensor:
    loss, params = functional_loss(mlp(), criterion)
    return flat(hessian(loss, params, data)(random_like(params)))


@given(points=st.sets(st.integers(1, 9)))
@settings(max_examples=20, deadline=None)
def test_any_cut_of_the_data_gives_the_same_matrix(points: set[int]) -> None:
    edges = [0, *sorted(points), 10]
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    assert (product(CE, Batches(cut((X, Y), sizes))) - product(CE, (X, Y))).abs().max() < 1e-12


@pytest.mark.parametrize("sizes", [[8, 2], [5, 5]])
@pytest.mark.parametrize("cache", [0, 2**30])
def test_kept_and_recomputed_graphs_weigh_alike(sizes: list[int], cache: int) -> None:
    loss, params = functional_loss(mlp(), CE)
    v = random_like(params)
    split = hessian(loss, params, Batches(cut((X, Y), sizes)), cache=cache)
    assert ("recomputed" if cache == 0 else "kept") in split.describe()
    assert (flat(split(v)) - flat(hessian(loss, params, (X, Y))(v))).abs().max() < 1e-12


def test_a_loader_whose_last_batch_is_smaller_is_weighed_right() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    assert (product(CE, loader) - product(CE, (X, Y))).abs().max() < 1e-12


def test_losses_that_sum_add_up() -> None:
    criterion = nn.CrossEntropyLoss(reduction="sum")
    split = product(criterion, Batches(cut((X, Y), [8, 2]), reduction="sum"))
    assert (split - product(criterion, (X, Y))).abs().max() < 1e-11


def endless() -> Iterator[Any]:
    yield X, Y


@pytest.mark.parametrize("data", [endless, lambda: iter([(X, Y)]), lambda: zip([X], [Y], strict=True)])
def test_data_that_can_be_read_only_once_is_an_error(data: Any) -> None:
    with pytest.raises(DataError, match="only once"):
        product(CE, data())
    with pytest.raises(DataError, match="only once"):
        Batches(data())


@pytest.mark.parametrize("data", [Batches([]), DataLoader(TensorDataset(X[:0], Y[:0]))])
@pytest.mark.parametrize("check", [True, False])
def test_empty_data_is_an_error(data: Any, check: bool) -> None:
    loss, params = functional_loss(mlp(), CE)
    with pytest.raises(DataError, match="empty"):
        hessian(loss, params, data, check=check)(random_like(params))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none_are_refused(weight: float) -> None:
    with pytest.raises(DataError, match="weight of batch 0"):
        product(CE, Batches(cut((X, Y), [5, 5]), weight=lambda batch: weight))


def test_batches_of_unclear_size_ask_for_a_weight() -> None:
    loss, params = functional_loss(mlp(), loss_fn=lambda m, b: CE(m(b[0][:, 0]), b[1]))
    batches = [(X[:, None], Y), (X[:3, None].expand(3, 2, 5), Y[:3])]
    hessian(loss, params, Batches(batches))
    odd = [(X[:4, None], Y[:4], torch.zeros(7))]
    with pytest.raises(DataError, match="weight=lambda"):
        hessian(loss, params, Batches(odd))


@pytest.mark.parametrize("data", [X, {"x": X}, "text", 3])
def test_what_is_no_iterable_of_batches_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match="iterable of batches"):
        Batches(data)


def test_a_loss_that_is_not_finite_names_the_batch() -> None:
    spoilt = X.clone()
    spoilt[7, 0] = float("nan")
    batches = [(spoilt[:3], Y[:3]), (spoilt[3:6], Y[3:6]), (spoilt[6:], Y[6:])]
    with pytest.raises(DataError, match="batch 2 is nan"):
        product(CE, Batches(batches))


def operator(data: Any, dropout: float = 0.5) -> tuple[Any, dict[str, Tensor]]:
    loss, params = functional_loss(mlp(nn.Dropout(dropout)), CE)
    return hessian(loss, params, data), params


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i] + 0.3 * torch.randn(5).double(), Y[i]


def test_shuffling_with_dropout_is_reported_once() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    with pytest.warns(DataWarning, match="shuffle=False"):
        A, params = operator(loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        A(random_like(params))


def test_random_augmentation_is_reported() -> None:
    with pytest.warns(DataWarning, match="augmented"):
        operator(DataLoader(Augmented(), batch_size=4), dropout=0.0)


def test_shuffling_alone_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    state, theirs = torch.get_rng_state(), generator.get_state()
    for own in (None, generator):
        loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=own)
        A, params = operator(loader, dropout=0.0)
        v = random_like(params)
        assert (flat(A(v)) - flat(operator((X, Y), dropout=0.0)[0](v))).abs().max() < 1e-12
    torch.set_rng_state(state)
    operator(DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=generator), dropout=0.0)
    assert torch.equal(generator.get_state(), theirs)


@pytest.mark.parametrize("cache", [0, 2**30])
def test_dropout_draws_the_same_mask_in_every_product(cache: int) -> None:
    model = mlp(nn.Dropout(0.5))
    loss, params = functional_loss(model, CE)
    A = hessian(loss, params, Batches(cut((X, Y), [6, 4])), cache=cache)
    v = random_like(params)
    first = flat(A(v))
    torch.randn(7)
    with untouched(model):
        second = flat(A(v))
    assert torch.equal(first, second)
    dense = A.to_dense()
    assert (dense - dense.mT).abs().max() < 1e-14
    masked = (dense - hessian(*functional_loss(mlp(), CE), (X, Y)).to_dense()).abs().max()
    assert masked > 1e-4


Pair = namedtuple("Pair", "x y")


@dataclass
class Sample:
    x: Tensor
    y: Tensor


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: {"x": x, "y": y},
        lambda x, y: UserDict(x=x, y=y),
        Pair,
        Sample,
        lambda x, y: {"x": {"inner": (x,)}, "y": y, "note": "kept"},
    ],
)
def test_batches_of_any_shape_are_weighed_and_passed_through(make: Any) -> None:
    def read(batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, (tuple, list)):
            return batch[0], batch[1]
        x, y = (batch["x"], batch["y"]) if not isinstance(batch, Sample) else (batch.x, batch.y)
        return (x["inner"][0] if isinstance(x, dict) else x), y

    loss, params = functional_loss(mlp(), loss_fn=lambda m, batch: CE(m(read(batch)[0]), read(batch)[1]))
    v = random_like(params)
    split = hessian(loss, params, Batches([make(x, y) for x, y in cut((X, Y), [8, 2])]))
    assert (flat(split(v)) - flat(hessian(loss, params, (X, Y))(v))).abs().max() < 1e-12


def test_the_mean_over_a_pass_of_minibatches_is_the_matrix() -> None:
    A, params = operator(Batches(cut((X, Y), [5, 3, 2])), dropout=0.0)
    v = random_like(params)
    stream = A.minibatches()
    mean = sum(flat(next(stream)(v)) for _ in range(3)) / 3
    assert (mean - flat(A(v))).abs().max() < 1e-12


class Counted(Dataset[Tensor]):
    """Counts what is read, in any process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.read = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Tensor:
        self.read += 1
        return X[i]


def test_a_loader_with_a_worker_reads_ahead_and_one_pass_serves_all_probes() -> None:
    data = Counted(8)
    loader = DataLoader(data, batch_size=2, num_workers=1, prefetch_factor=2)
    batches = Reader(Batches(loader), torch.device("cpu")).one_pass()
    next(batches)
    patience = time.monotonic() + 60
    while data.read < 4 and time.monotonic() < patience:
        time.sleep(0.01)
    assert data.read >= 4  # two batches, of which one was asked for
    del batches

    loss, params = functional_loss(mlp(), loss_fn=lambda model, x: model(x).square().mean())
    A = hessian(loss, params, Batches(loader), cache=0)
    stack = {name: torch.stack([random_like(params, seed)[name] for seed in range(8)]) for name in params}
    A.matmat(stack)  # what is measured at the first block is not of interest
    data.read.zero_()
    A.matmat(stack)
    assert data.read == len(data)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator:UserWarning")
@pytest.mark.parametrize(
    ("pin", "device", "ahead"), [(True, "cuda", True), (False, "cuda", False), (True, "cpu", False)]
)
def test_only_what_a_loader_pinned_goes_to_a_gpu_without_waiting(pin: bool, device: str, ahead: bool) -> None:
    waited = []

    class Moves(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.to and args[1] == torch.device(device):  # there need not be such a device
                waited.append(kwargs["non_blocking"])
                return args[0]
            return func(*args, **(kwargs or {}))

    loader = DataLoader(TensorDataset(X, Y), batch_size=5, pin_memory=pin)
    with Moves():
        list(Batches(loader, device=device))
    assert waited == [ahead] * 4
