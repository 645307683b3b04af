"""Each mend: what it stands for is unchanged, and what it mends fails or is wrong without it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from eigenfunc import hessian, hvp
from eigenfunc.curvature import elementary, products
from eigenfunc.curvature.mends import MENDS, Seen, mended
from eigenfunc.errors import ProductError
from tests.helpers import difference, normal

X = normal(4, 6)
LABELS = torch.tensor([0, 2, 1, 5])


def attention(p: Tensor) -> Tensor:
    q = p.reshape(1, 1, 4, 6)
    return F.scaled_dot_product_attention(q, q.sin(), q.cos()).pow(3).sum()


def nested_attention(p: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attention(p)


def inner_attention(p: Tensor) -> Tensor:
    x = p.reshape(4, 1, 6)
    weight = torch.eye(6).double().repeat(3, 1)
    out = F.multi_head_attention_forward(
        x, x, x, 6, 2, weight, torch.zeros(18).double(), None, None, False, 0.0, torch.eye(6).double(),
        torch.zeros(6).double(), need_weights=False,
    )[0]  # fmt: skip
    return out.pow(3).sum()


def without_grad(p: Tensor) -> Tensor:
    with torch.no_grad():
        scale = p.square().mean()
    return (p**3).sum() * scale


def masked(p: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return F.dropout(p.mT * 2, 0.4).pow(3).sum()


class Recurrent(nn.LSTM):
    """Weights cut out of one flat vector."""

    def loss(self, p: Tensor) -> Tensor:
        sizes = [w.numel() for w in self.parameters()]
        pieces = torch.split(p.reshape(-1)[: sum(sizes)].float(), sizes)
        weights = {name: x.reshape(w.shape) for (name, w), x in zip(self.named_parameters(), pieces, strict=True)}
        return torch.func.functional_call(self, weights, (X[:, None, :2].float(),))[0].pow(2).sum()


NEEDS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "attention inside multi-head attention": ("math attention", inner_attention),
    "checkpoint": ("plain checkpoints", lambda p: checkpoint(torch.sin, p**2, use_reentrant=False).sum()),
    "checkpoint, reentrant": ("plain checkpoints", lambda p: checkpoint(torch.sin, p**2, use_reentrant=True).sum()),
    "no_grad": ("constants", without_grad),
    "data": ("constants", lambda p: (p**3 * (2 * p).data).sum()),
    "requires_grad_": ("constants", lambda p: (p * 2).requires_grad_().pow(3).sum()),
    "attention under another backend": ("elementary formulas", nested_attention),
    "dropout": ("elementary formulas", masked),
    "mse": ("elementary formulas", lambda p: F.mse_loss(p, X)),
    "huber": ("elementary formulas", lambda p: F.huber_loss(p**2, X)),
    "soft margin": ("elementary formulas", lambda p: F.soft_margin_loss(p**2, X.sign())),
    "multi margin": ("elementary formulas", lambda p: F.multi_margin_loss(p**2, LABELS, p=2)),
    "multilabel margin": (
        "elementary formulas",
        lambda p: F.multilabel_margin_loss(p**2, torch.tensor([[0, 3, -1, 1, 1, 1]] * 4)),
    ),
    "ctc": (
        "elementary formulas",
        lambda p: F.ctc_loss(p[:, None].log_softmax(-1), torch.tensor([[1, 2]]), (4,), (2,)),
    ),
    "hardsigmoid": ("elementary formulas", lambda p: F.hardsigmoid(p).pow(3).sum()),
    "sparse embedding": ("elementary formulas", lambda p: F.embedding(LABELS[:3], p, sparse=True).pow(3).sum()),
    "padded embedding": ("elementary formulas", lambda p: F.embedding(LABELS[:3], p, padding_idx=2).sum().pow(3)),
    "embedding bag": ("elementary formulas", lambda p: F.embedding_bag(LABELS[None, :3], p).pow(3).sum()),
    "pdist": ("elementary formulas", lambda p: F.pdist(p).pow(3).sum()),
    "cdist": ("elementary formulas", lambda p: torch.cdist(p, X + 1).pow(3).sum()),
    "weight norm": ("elementary formulas", lambda p: torch._weight_norm(p, p[:, :1] ** 2).pow(3).sum()),
    "lstm": ("elementary formulas", Recurrent(2, 1).loss),
}  # fmt: skip


def truth(f: Callable[[Tensor], Tensor], p: Tensor, v: Tensor) -> Tensor:
    """H v by fourth-order differences of plain gradients; a constant's change is taken out by holding it."""

    def slope(t: Tensor) -> Tensor:
        leaf = (p + t * v).requires_grad_()
        f(leaf).backward()
        assert leaf.grad is not None
        return leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad

    return difference(slope, 1e-4)


EXPECTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no_grad": lambda p, v: 6 * p * v * p.square().mean(),
    "data": lambda p, v: 12 * p**2 * v,
    "padded embedding": lambda p, v: (
        torch.tensor([1.0, 1, 0, 0])[:, None] * 6 * p[:3].sum() * v[:2].sum() * torch.ones(6)
    ),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_a_mend_mends_is_right_with_it_and_fails_without_it(name: str) -> None:
    mend, f = NEEDS[name]
    v = normal(4, 6, seed=3)
    expected = EXPECTED[name](X, v) if name in EXPECTED else truth(f, X, v)
    tolerance = 1e-2 if name == "lstm" else 1e-7

    def error(mends: Sequence[str]) -> float:
        with ExitStack() as stack:
            for chosen in mends:
                stack.enter_context(MENDS[chosen](Seen()))
            found = products.jvp(lambda leaves: products.scalar(f(leaves[0])), [X]).single([v])[0]
        return float((found - expected).norm() / expected.norm())

    assert error(list(MENDS)) < tolerance
    try:
        without = error([other for other in MENDS if other != mend])
    except (RuntimeError, NotImplementedError):
        without = float("inf")
    assert without > 100 * tolerance
    pure = hvp(lambda p, batch: f(p), X, None, v)
    assert (pure - expected).norm() < tolerance * expected.norm()
    A = hessian(lambda p, batch: f(p), X, X)
    assert (A(v) - expected).norm() < tolerance * expected.norm()


REDUCTIONS = st.sampled_from(["mean", "sum", "none"])


@given(reduction=REDUCTIONS, seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_formulas_have_the_values_of_what_they_stand_for(reduction: str, seed: int, data: st.DataObject) -> None:
    x, y = normal(5, 4, seed=seed), normal(5, 4, seed=seed + 1)
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (5,), generator=g)
    sets = torch.randint(-1, 4, (5, 4), generator=g)
    share, p = normal(4, seed=seed).abs(), data.draw(st.sampled_from([1, 2]))
    pairs = [
        (elementary.mse_loss(x, y, reduction), F.mse_loss(x, y, reduction=reduction)),
        (elementary.huber_loss(x, y, reduction, 0.7), F.huber_loss(x, y, reduction=reduction, delta=0.7)),
        (elementary.soft_margin_loss(x, y.sign(), reduction), F.soft_margin_loss(x, y.sign(), reduction=reduction)),
        (
            elementary.multi_margin_loss(x, labels, p, 0.7, share, reduction),
            F.multi_margin_loss(x, labels, p, 0.7, share, reduction=reduction),
        ),
        (elementary.multilabel_margin_loss(x, sets, reduction), F.multilabel_margin_loss(x, sets, reduction=reduction)),
        (elementary.multilabel_margin_loss(x[0], sets[0]), F.multilabel_margin_loss(x[0], sets[0])),
        (elementary.hardsigmoid(4 * x), F.hardsigmoid(4 * x)),
        (elementary.weight_norm(x, y[:, :1], 0), torch._weight_norm(x, y[:, :1].contiguous(), 0)),
    ]
    for power in (0.0, 1.0, 2.0, 3.0, float("inf")):
        pairs.append((elementary.cdist(x, y, power), torch.cdist(x, y, power)))
        pairs.append((elementary.pdist(x, power), F.pdist(x, power)))
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() < 1e-13


@given(reduction=REDUCTIONS, seed=st.integers(0, 1000), steps=st.integers(1, 9), longest=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_ctc_has_the_value_of_torchs(reduction: str, seed: int, steps: int, longest: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(steps, 3, 4, generator=g).double().log_softmax(-1)
    targets = torch.randint(1, 4, (3, longest), generator=g)
    lengths = torch.randint(0, longest + 1, (3,), generator=g)
    durations = torch.randint(1, steps + 1, (3,), generator=g)
    for zero in (True, False):
        ours = elementary.ctc_loss(scores, targets, durations, lengths, 0, reduction, zero)
        theirs = F.ctc_loss(scores, targets, durations, lengths, 0, reduction, zero)
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    flat = torch.cat([row[:n] for row, n in zip(targets, lengths, strict=True)])
    if len(flat):
        ours = elementary.ctc_loss(scores, flat, tuple(durations.tolist()), tuple(lengths.tolist()), 0, "none", True)
        theirs = F.ctc_loss(scores, targets, durations, lengths, 0, "none", True)
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_have_the_values_of_torchs(mode: str) -> None:
    weight = normal(9, 4)
    rows, flat = torch.tensor([[0, 1, 2], [3, 3, 4]]), torch.arange(7)
    calls: list[tuple[Any, dict[str, Any]]] = [
        ((rows, weight), {}),
        ((rows, weight), {"padding_idx": 3}),
        ((flat, weight, torch.tensor([0, 3, 3, 5])), {}),
        ((flat, weight, torch.tensor([0, 3, 5, 7])), {"include_last_offset": True}),
    ]
    if mode == "sum":
        calls.append(((rows, weight), {"per_sample_weights": normal(2, 3)}))
    for args, options in calls:
        ours = elementary.embedding_bag(*args, mode=mode, **options)
        assert (ours - F.embedding_bag(*args, mode=mode, **options)).abs().max() < 1e-15


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
@pytest.mark.parametrize("grouped", [False, True])
def test_attention_has_the_values_of_torchs(mask: str | None, grouped: bool) -> None:
    q, k, v = normal(2, 4, 5, 6), normal(2, 2 if grouped else 4, 5, 6), normal(2, 2 if grouped else 4, 5, 6)
    bias = {None: None, "boolean": normal(5, 5) > -0.5, "additive": normal(5, 5)}[mask]
    options: dict[str, Any] = {"attn_mask": bias, "scale": 0.3, "enable_gqa": grouped}
    for causal in (False, True) if mask is None else (False,):
        ours = elementary.attention(q, k, v, is_causal=causal, **options)
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=causal, **options)
        assert (ours - theirs).abs().max() < 1e-14


def test_calls_with_other_arguments_are_left_alone() -> None:
    with mended() as seen:
        weighed = F.mse_loss(X, X + 1, weight=torch.full_like(X, 2.0))
        with pytest.raises(TypeError):
            F.mse_loss(X, X, nonsense=3)  # type: ignore[call-arg]
    assert abs(weighed - F.mse_loss(X, X + 1, weight=torch.full_like(X, 2.0))) < 1e-15
    assert not seen.names


def test_a_mend_that_changes_the_gradient_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(elementary.SWAPS, F.huber_loss, lambda input, target, **_: (input - target).square().sum())
    with pytest.raises(ProductError, match="huber_loss"):
        hessian(lambda p, batch: F.huber_loss(p**2, batch), X, X + 1)


def test_the_operator_names_the_mends_that_it_met() -> None:
    A = hessian(lambda p, batch: F.mse_loss(torch.cdist(p, batch), batch[:, :4]), X, X + 1)
    assert "mends met: cdist, mse_loss" in A.describe()
    assert "mends" not in hessian(lambda p, batch: (p**3).sum(), X, X).describe()


def test_checkpoints_are_put_back_and_other_threads_keep_theirs() -> None:
    module: Any = torch.utils.checkpoint
    originals = (module.CheckpointFunction, module._checkpoint_without_reentrant_generator)
    calls: list[int] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin()

    def elsewhere() -> None:
        leaf = X.clone().requires_grad_()
        checkpoint(counted, leaf, use_reentrant=False).sum().backward()

    with mended(), mended():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(calls) == 2  # forward, and recomputed in backward
    with pytest.raises(ZeroDivisionError), mended():
        raise ZeroDivisionError
    assert (module.CheckpointFunction, module._checkpoint_without_reentrant_generator) == originals


def test_forward_gradients_are_on_again_after_no_grad_and_after_an_exception() -> None:
    with mended():
        with torch.no_grad():
            pass
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            raise ZeroDivisionError
    switch: Any = torch._C
    assert switch._is_fwd_grad_enabled()
