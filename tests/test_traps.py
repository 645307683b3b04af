"""Losses, data and surroundings that would make a product silently wrong, or change something of the user's."""

from __future__ import annotations

import copy
import random
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from eigenfunc import Batches, compute_hessian_eigenthings, eigsh, functional_loss, ggn, hessian, hvp
from eigenfunc.errors import DataError, ObjectiveError
from tests.helpers import (
    assert_blocks_close,
    cut,
    dense_hessian,
    flat,
    labelled,
    mlp,
    plain,
    random_like,
    rotated,
    seeded,
    untouched,
)

X, Y = labelled(12, 3, 2)


def net(*between: nn.Module) -> nn.Module:
    return mlp(*between, sizes=(3, 4, 2))


def test_a_criterion_that_penalises_the_parameters_is_differentiated_whole() -> None:
    model = net()

    def criterion(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out, target) + sum((p**3).sum() for p in model.parameters())  # type: ignore[return-value]

    loss, params = functional_loss(model, criterion)
    v = random_like(params)
    plainly = dense_hessian(plain(net(), lambda m: F.cross_entropy(m(X), Y)), params) @ flat(v)
    expected = plainly + 6 * flat(params) * flat(v)
    assert_blocks_close(hessian(loss, params, (X, Y))(v), expected, 1e-11)
    assert_blocks_close(hvp(loss, params, (X, Y), v), expected, 1e-11)


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(3).double())
        self.b = nn.Parameter(torch.ones(3).double())
        self.both = [self.a]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.both[0] * self.b


def test_a_parameter_read_from_elsewhere_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="'a' not from the `params`"):
        hessian(*functional_loss(Aliased(), F.mse_loss), (X, X + 1))


def test_equal_losses_do_not_pass_for_an_order_that_is_kept() -> None:
    data = TensorDataset(X * torch.arange(1, 13).double()[:, None], Y)
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    loss, params = functional_loss(model, F.cross_entropy)
    v = random_like(params)
    expected = hessian(loss, params, data.tensors)(v)
    for cache in (0, 400, 700, 10**6):
        A = hessian(loss, params, DataLoader(data, batch_size=4, shuffle=True), cache=cache)
        for _ in range(3):
            assert_blocks_close(A(v), flat(expected), 1e-12)


class InPlace(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.drop = nn.Linear(3, 8), nn.Linear(8, 2), nn.Dropout(0.5, inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        dropped = self.drop(h)
        return self.outer(torch.tanh((h if self.drop.inplace else dropped) + dropped))


def test_dropout_in_place_changes_what_is_read_afterwards() -> None:
    products = []
    for inplace in (True, False):
        with seeded():
            model = InPlace(inplace).double()
        loss, params = functional_loss(model, F.cross_entropy)
        products.append(flat(hessian(loss, params, (X, Y))(random_like(params))))
    assert (products[0] - products[1]).norm() < 1e-12 * products[1].norm()


def test_every_batch_is_compared_with_its_pieces() -> None:
    shares = torch.tensor([1.0, 5.0]).double()
    weighed = nn.CrossEntropyLoss(weight=shares)
    data = (X, Y.sort().values)
    free, params = functional_loss(net(), loss_fn=lambda m, b: weighed(m(b[0]), b[1]))
    with pytest.raises(DataError, match="weights are not those"):
        hessian(free, params, Batches([data], microbatch=2))
    for between in ([nn.BatchNorm1d(4)], [nn.BatchNorm1d(4), nn.Dropout(0.5)]):
        for size in (1, 2, 3):
            with pytest.raises(DataError, match="eave microbatch out"):
                hessian(*functional_loss(net(*between), F.cross_entropy), Batches([(X, Y)], microbatch=size))
    listed = {"x": X, "y": Y, "w": [1.0] * 12}
    loss, params = functional_loss(net(), loss_fn=lambda m, b: F.cross_entropy(m(b["x"]), b["y"]))
    with pytest.raises(DataError, match="one entry a sample"):
        hessian(loss, params, Batches([listed], microbatch=4))


def test_the_operator_draws_the_same_masks_inside_a_transform() -> None:
    loss, params = functional_loss(net(nn.Dropout(0.5)), F.cross_entropy)
    A, v = hessian(loss, params, Batches(cut((X, Y), 8))), random_like(params)
    assert_blocks_close(torch.func.jvp(A.matvec, (v,), (v,))[0], flat(A(v)), 1e-12)


def test_an_operator_whose_parameters_moved_says_so() -> None:
    model = net()
    loss, params = functional_loss(model, F.cross_entropy)
    A = hessian(loss, params, (X, Y))
    with torch.no_grad():
        model[0].weight.add_(1)  # type: ignore[index, union-attr]
    for product in (A, A.matmat):
        with pytest.raises(ObjectiveError, match=r"'0\.weight' was changed in place"):
            product({name: x[None] if product == A.matmat else x for name, x in params.items()})


def test_autocast_around_a_call_changes_nothing() -> None:
    loss, params = functional_loss(net().float(), F.cross_entropy)
    A, v = hessian(loss, params, (X.float(), Y)), random_like(params)
    B = rotated(1 / torch.arange(1, 60).double(), 0, torch.float32)
    outside = A(v), hvp(loss, params, (X.float(), Y), v), eigsh(B, 3, seed=0).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = A(v), hvp(loss, params, (X.float(), Y), v), eigsh(B, 3, seed=0).values
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(inside[0][name], outside[0][name]) for name in params)
    assert all(torch.equal(inside[1][name], outside[1][name]) for name in params)
    assert torch.equal(inside[2], outside[2])


def test_the_drop_in_sees_through_a_partial() -> None:
    loader = cut((X, Y), 8)
    found = [
        compute_hessian_eigenthings(net(), loader, criterion, 1, mode="lanczos")[0][0]
        for criterion in (nn.CrossEntropyLoss(reduction="sum"), partial(F.cross_entropy, reduction="sum"))
    ]
    assert abs(found[0] - found[1]) < 1e-8


class Momentum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = nn.Linear(3, 2).double(), nn.Linear(3, 2).double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.slow.weight.mul_(0.9).add_(self.fast.weight, alpha=0.1)
        return self.fast(x) + self.slow(x)


def test_a_forward_pass_that_writes_into_constants_is_refused_before_it_has() -> None:
    model = Momentum()
    with untouched(model), pytest.raises(ObjectiveError, match=r"constant parameter 'slow\.weight'"):
        hessian(*functional_loss(model, F.cross_entropy), (X, Y))


def test_threads_do_not_disturb_one_another() -> None:
    loss, params = functional_loss(net(nn.Dropout(0.5)), F.cross_entropy)
    A, v = hessian(loss, params, (X, Y), cache=0), random_like(params)
    expected, state, wrong = flat(A(v)), torch.get_rng_state(), []

    def work() -> None:
        for _ in range(20):
            try:
                if not torch.equal(flat(A(v)), expected):
                    wrong.append("product")
                hvp(loss, params, (X, Y), v)
            except Exception as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.mkldnn.enabled


class Drawing(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        np.random.rand(1)
        random.random()
        return X[i], Y[i]


def test_no_random_state_moves_wherever_it_is_kept() -> None:
    generator = torch.Generator().manual_seed(5)
    data = Drawing()
    loader = DataLoader(data, batch_size=4, sampler=RandomSampler(data, generator=generator))
    before = generator.get_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    loss, params = functional_loss(net(), F.cross_entropy)
    hessian(loss, params, loader, cache=0)(random_like(params))
    hessian(loss, params, Batches(loader, microbatch=2))
    assert torch.equal(generator.get_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[union-attr]


def test_a_loss_may_take_its_labels_out_of_the_batch() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        labels = batch.pop("labels")
        return F.cross_entropy(model(batch["x"].double()), labels)

    batch = {"x": torch.arange(36).reshape(12, 3), "labels": Y}
    loss, params = functional_loss(net(), loss_fn=loss_fn)
    A = hessian(loss, params, batch, cache=0)
    A(random_like(params))
    hvp(loss, params, batch, random_like(params))
    assert set(batch) == {"x", "labels"}


@pytest.mark.parametrize("way", ["auto", "graph", "jvp", "dual", "vjp"])
def test_blocks_of_a_product_have_memory_of_their_own(way: str) -> None:
    params = {"a": X[0], "b": X[1]}
    A = hessian(lambda p, batch: ((p["a"] + p["b"]) ** 2).sum() + p["a"].sum() ** 2, params, X, product=way)
    image = A({"a": X[2], "b": X[3]})
    kept = image["b"].clone()
    image["a"].mul_(2)
    assert torch.equal(image["b"], kept)


def test_a_cache_of_parametrised_weights_is_refused() -> None:
    model = nn.utils.parametrizations.orthogonal(nn.Linear(3, 2).double())
    loss, params = functional_loss(model, F.cross_entropy)
    v = random_like(params)
    expected = hessian(loss, params, (X, Y), cache=0)(v)
    with nn.utils.parametrize.cached():
        for product in (lambda: hvp(loss, params, (X, Y), v), lambda: hessian(loss, params, (X, Y))):
            with pytest.raises(ObjectiveError, match="cached"):
                product()
    assert_blocks_close(hvp(loss, params, (X, Y), v), flat(expected), 1e-11)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.body(x)
        return self.features


def test_what_a_forward_pass_keeps_is_not_left_in_the_model() -> None:
    model = Remembering()
    loss, params = functional_loss(model, F.cross_entropy)
    hvp(loss, params, (X, Y), random_like(params))
    hessian(loss, params, (X, Y))
    assert not hasattr(model, "features")
    model(X.detach())
    kept = model.features
    hvp(loss, params, (X, Y), random_like(params))
    assert model.features is kept
    copy.deepcopy(Remembering())


def test_without_grad_a_product_has_no_history() -> None:
    model = net()
    loss, _ = functional_loss(model, F.cross_entropy)
    params = dict(model.named_parameters())
    v = random_like({name: p.detach() for name, p in params.items()})
    with torch.no_grad():
        assert not any(x.requires_grad for x in hvp(loss, params, (X, Y), v).values())
    assert any(x.requires_grad for x in hvp(loss, params, (X, Y), v).values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_right_or_refused_by_name() -> None:
    model = net()
    loss, params = functional_loss(torch.compile(model, backend="eager"), F.cross_entropy)  # type: ignore[arg-type]
    v = random_like(params)
    inner = {name.removeprefix("_orig_mod."): x for name, x in params.items()}
    expected = dense_hessian(plain(net(), lambda m: F.cross_entropy(m(X), Y)), inner)
    found = hessian(loss, params, (X, Y))(v)
    renamed = {name.removeprefix("_orig_mod."): x for name, x in v.items()}
    assert_blocks_close(
        {name.removeprefix("_orig_mod."): x for name, x in found.items()}, expected @ flat(renamed), 1e-10
    )


def _penalty(kind: str, model: nn.Module) -> Any:
    size = next(model.parameters()).norm()
    return {"item": size.item, "float": size.__float__, "detach": size.detach, "tensor": lambda: size}[kind]()


@pytest.mark.parametrize("matrix", [hessian, ggn])
@pytest.mark.parametrize("kind", ["item", "float"])
def test_a_number_taken_out_of_the_graph_is_refused_where_the_loss_computes_with_it(kind: str, matrix: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return _penalty(kind, self.inner) * self.inner(x)

    x, y = labelled(6)
    with pytest.raises(ObjectiveError, match=r"computes with a number.*\.detach\(\)"):
        matrix(*functional_loss(Scaled(), nn.CrossEntropyLoss()), (x, y))


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
@pytest.mark.parametrize("kind", ["detach", "tensor"])
def test_numbers_that_are_only_logged_or_meant_as_constants_are_not(kind: str) -> None:
    model, log = mlp(nn.Dropout(0.5)), []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        value = _penalty(kind, model) * nn.functional.cross_entropy(model(batch[0]), batch[1])
        log.append(value.item())
        return value if value.item() > -1 else -value

    loss, params = functional_loss(model, loss_fn=loss_fn)
    with untouched(model):
        A = hessian(loss, params, labelled(6))
    assert log
    assert torch.isfinite(flat(A(params))).all()
