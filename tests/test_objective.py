"""functional_loss: every form of loss, every kind of parameter, and the user's module left whole."""

from __future__ import annotations

import re
from collections import UserDict
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from eigenfunc import Batches, fisher, fishervp, functional_loss, ggn, ggnvp, hessian, hvp
from eigenfunc.errors import InputError, ObjectiveError, TreeError
from tests.helpers import assert_blocks_close, dense_hessian, flat, labelled, mlp, plain, random_like, untouched

X, Y = labelled(12)
CE = nn.CrossEntropyLoss()


def assert_right(model: nn.Module, value: Any, loss: Any, params: Any, batch: Any) -> None:
    """The product with the Hessian of `loss` against double backward on a plain copy of the module."""
    H = dense_hessian(plain(model, value), params)
    v = random_like(params)
    with untouched(model):
        product = hessian(loss, params, batch)(v)
    assert_blocks_close(product, H @ flat(v), 1e-10)


def test_a_criterion_takes_pairs() -> None:
    model = mlp()
    loss, params = functional_loss(model, CE)
    assert list(params) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not any(p.requires_grad for p in params.values())
    assert torch.equal(loss(params, (X, Y)), CE(model(X), Y))
    assert_right(model, lambda m: CE(m(X), Y), loss, params, (X, Y))


def test_a_loss_fn_takes_anything_and_may_reach_into_the_model() -> None:
    model = mlp()

    def loss_fn(m: Any, batch: Any) -> Tensor:
        return CE(m[2](m[1](m[0](batch["x"]))), batch["y"]) + 0.1 * sum((p**2).sum() for p in m.parameters())

    loss, params = functional_loss(model, loss_fn=loss_fn)
    batch = {"x": X, "y": Y}
    assert_right(model, lambda m: CE(m(X), Y) + 0.1 * sum((p**2).sum() for p in params_of(m)), loss, params, batch)


def params_of(m: nn.Module) -> list[Tensor]:
    return [m[0].weight, m[0].bias, m[2].weight, m[2].bias]  # type: ignore[index]


class Labelled(nn.Module):
    """Returns its loss as models of the transformers library do."""

    def __init__(self, mapping: bool) -> None:
        super().__init__()
        self.body = mlp()
        self.mapping = mapping

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        loss = CE(self.body(x), labels)
        return {"loss": loss} if self.mapping else SimpleNamespace(loss=loss)


@pytest.mark.parametrize("mapping", [True, False])
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_without_either_a_mapping_is_unpacked_and_the_output_has_the_loss(mapping: bool, kind: Any) -> None:
    model = Labelled(mapping)
    loss, params = functional_loss(model)
    assert_right(model, lambda m: CE(m.body(X), Y), loss, params, kind(x=X, labels=Y))


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (lambda name: name.endswith("bias"), ["0.bias", "2.bias"]),
        ("*.weight", ["0.weight", "2.weight"]),
        ("2", ["2.weight", "2.bias"]),
        (["0.bias", "2.*"], ["0.bias", "2.weight", "2.bias"]),
    ],
)
def test_parameters_are_selected_by_predicate_pattern_name_or_prefix(select: Any, names: list[str]) -> None:
    model = mlp()
    loss, params = functional_loss(model, CE, select=select)
    assert list(params) == names
    assert_right(model, lambda m: CE(m(X), Y), loss, params, (X, Y))


@pytest.mark.parametrize("select", [lambda name: False, "nothing*", ["0.bias", "typo"], []])
def test_a_selection_that_matches_nothing_is_an_error(select: Any) -> None:
    with pytest.raises(InputError, match="select"):
        functional_loss(mlp(), CE, select=select)


def test_frozen_parameters_are_constants() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    loss, params = functional_loss(model, CE)
    assert "0.weight" not in params
    assert_right(model, lambda m: CE(m(X), Y), loss, params, (X, Y))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 5, bias=False)
        self.second = nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_tied_weights_count_once() -> None:
    model = Tied().double()
    loss, params = functional_loss(model, CE)
    assert list(params) == ["first.weight", "head.weight", "head.bias"]

    def value(p: dict[str, Tensor]) -> Tensor:
        W = p["first.weight"]
        return CE(torch.tanh(torch.tanh(X @ W.mT) @ W.mT) @ p["head.weight"].mT + p["head.bias"], Y)

    v = random_like(params)
    with untouched(model):
        product = hessian(loss, params, (X, Y))(v)
    assert_blocks_close(product, dense_hessian(value, params) @ flat(v), 1e-10)
    assert model.second.weight is model.first.weight


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(5, 5)
        self.other = self.one
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.other(torch.tanh(self.one(x)))))


def test_a_submodule_reached_by_two_paths_keeps_its_parameters() -> None:
    model = Shared().double()
    loss, params = functional_loss(model, CE)
    v = random_like(params)
    with untouched(model):
        product = hessian(loss, params, (X, Y))(v)
    assert isinstance(model.one.weight, nn.Parameter)

    def value(p: dict[str, Tensor]) -> Tensor:
        h = torch.tanh(X @ p["one.weight"].mT + p["one.bias"])
        h = torch.tanh(h @ p["one.weight"].mT + p["one.bias"])
        return CE(h @ p["head.weight"].mT + p["head.bias"], Y)

    assert_blocks_close(product, dense_hessian(value, params) @ flat(v), 1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_changes_no_buffer(training: bool) -> None:
    model = mlp(nn.BatchNorm1d(4)).train(training)
    loss, params = functional_loss(model, CE)
    assert_right(model, lambda m: CE(m(X), Y), loss, params, (X, Y))


def test_spectral_norm_changes_no_buffer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(spectral_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)).double()
    loss, params = functional_loss(model, CE)
    with untouched(model):
        A = hessian(loss, params, (X, Y))
        u, v = random_like(params, 1), random_like(params, 2)
        assert abs(flat(u) @ flat(A(v)) - flat(v) @ flat(A(u))) < 1e-10


def test_an_exception_in_the_forward_pass_leaves_the_model_whole() -> None:
    model = mlp()
    loss, params = functional_loss(model, CE)
    with untouched(model), pytest.raises(RuntimeError, match="mat1 and mat2"):
        hessian(loss, params, (X[:, :3], Y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_module_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="ScriptModule"):
        functional_loss(torch.jit.script(mlp()), CE)


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 3).double())
        self.order = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight)[:, self.order]


def test_an_integer_parameter_can_be_there_but_not_be_selected() -> None:
    loss, params = functional_loss(Indexed(), CE)
    hessian(loss, params, (X, Y))
    with pytest.raises(TreeError, match=r"'order' has dtype torch\.int64"):
        functional_loss(Indexed(), CE, select="*")


def test_parameters_without_values_are_refused() -> None:
    with pytest.raises(ObjectiveError, match="not initialised"):
        functional_loss(nn.LazyLinear(3), CE)
    with pytest.raises(ObjectiveError, match="meta"):
        functional_loss(nn.Linear(5, 3, device="meta"), CE)


@pytest.mark.parametrize("batch", [X, (X,), (X, Y, Y), {"x": X}])
def test_a_batch_that_is_no_pair_is_refused_with_the_remedy(batch: Any) -> None:
    loss, params = functional_loss(mlp(), CE)
    with pytest.raises(ObjectiveError, match="loss_fn="):
        hessian(loss, params, batch)


def test_one_pair_in_batches_is_taken_for_two_batches_and_refused_with_the_remedy() -> None:
    loss, params = functional_loss(mlp(), CE)
    with pytest.raises(ObjectiveError, match=r"Batches\(\[\(inputs, targets\)\]\)"):
        hessian(loss, params, Batches((X, Y)))
    assert hessian(loss, params, Batches([(X, Y)])).size == hessian(loss, params, (X, Y)).size


class Logits(SimpleNamespace, Mapping[str, Any]):
    """As models of transformers return them: attributes and keys."""

    def __getitem__(self, name: str) -> Any:
        return vars(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))


SEVERAL: dict[str, tuple[Any, str]] = {
    "tuple": (lambda z, x: (z, x), "[0]"),
    "list": (lambda z, x: [z, x], "[0]"),
    "dict": (lambda z, x: {"scores": z, "x": x}, "['scores']"),
    "output": (lambda z, x: Logits(loss=None, logits=z, x=x), ".logits"),
}


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize(("criterion", "targets"), [(CE, Y), (F.cross_entropy, Y), (nn.MSELoss(), X[:, :3])])
def test_a_criterion_on_more_than_logits_is_refused_with_the_line_that_does(
    kind: str, criterion: Any, targets: Tensor
) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Any:
            return SEVERAL[kind][0](self.body(x), x)

    model, batch = Several(), (X, targets)
    loss, params = functional_loss(model, criterion)
    v = random_like(params)
    for call in (
        lambda: hessian(loss, params, batch),
        lambda: hessian(loss, params, batch, check=False)(v),
        lambda: hvp(loss, params, batch, v),
        lambda: ggn(loss, params, batch),
        lambda: fisher(loss, params, batch),
    ):
        with pytest.raises(ObjectiveError, match="does not take what the model returns") as refusal:
            call()
    for call in (lambda: ggn(loss, params, batch, check=False)(v), lambda: ggnvp(loss, params, batch, v)):
        with pytest.raises(ObjectiveError, match=r"the model returns,? a"):
            call()
    with pytest.raises(ObjectiveError, match=r"the model returns a|and not of one tensor"):
        fishervp(loss, params, batch, v)

    line = re.search(r"loss_fn=(.*?); or", str(refusal.value))
    assert line is not None
    assert SEVERAL[kind][1] in line[1]
    mended, _ = functional_loss(model, loss_fn=eval(line[1], {"criterion": criterion}))
    assert_right(model, lambda m: criterion(m.body(X), targets), mended, params, batch)


def test_a_mistake_within_a_criterion_of_one_tensor_comes_through() -> None:
    loss, params = functional_loss(mlp(), lambda z, y: z.no_such_thing)
    with pytest.raises(AttributeError, match="no_such_thing"):
        hessian(loss, params, (X, Y))


def test_a_model_all_frozen_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="select="):
        functional_loss(mlp().requires_grad_(False), CE)


def test_both_criterion_and_loss_fn_are_refused() -> None:
    with pytest.raises(InputError, match="not both"):
        functional_loss(mlp(), CE, loss_fn=lambda m, b: m(b))


def test_a_module_born_in_inference_mode_is_copied() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        x = X * 1
    loss, params = functional_loss(model, CE)
    with torch.inference_mode():
        inside = hessian(loss, params, (x, Y))(random_like(params))
    outside = hessian(loss, params, (X, Y))(random_like(params))
    assert all(torch.equal(inside[name], outside[name]) for name in params)
