"""The tracker against closed forms, on digits, and as a guest that leaves no trace in the training it watches."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from eigenfunc import demo, functional_loss, plot
from eigenfunc.curvature.ggn import ggn
from eigenfunc.errors import EigenfuncError, InputError
from eigenfunc.records import Alert, Record, read_jsonl
from eigenfunc.track import SpectrumTracker, fingerprint
from eigenfunc.tracking import Tracking
from tests.helpers import untouched

DATA = torch.zeros(1, 1)  # one batch; the losses below do not look at it
START = torch.linspace(0.5, 3.0, 40, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


def quartic(params: dict[str, Tensor], _: Any) -> Tensor:
    """Σ x⁴/12, whose Hessian is diag(x²) and whose gradient x³/3."""
    return (params["x"] ** 4).sum() / 12


def core(**options: Any) -> Tracking:
    return Tracking(quartic, DATA, **{"tol": 1e-8, "k": 3, "every": 1} | options)


def test_a_look_tells_the_truth_of_a_closed_form() -> None:
    tracking = core(trace_matvecs=40)
    state, record = tracking.update(tracking.init(), {"x": START})
    assert record is not None
    assert record.certified
    truth = (START**2).sort(descending=True).values
    for value, bound, right in zip(record.values, record.bounds, truth[:3].tolist(), strict=True):
        assert abs(value - right) <= bound
    assert record.top == (record.values[0], record.bounds[0])
    g = (START**3 / 3) ** 2
    assert record.gradient_share == pytest.approx(float(g[-3:].sum() / g.sum()), rel=1e-6)
    assert record.trace == pytest.approx(float(truth.sum()))  # as many products as there are parameters
    assert (record.step, record.kind, record.ids, record.overlaps) == (0, "look", (0, 1, 2), ())
    assert record.matvecs > record.verification > 0
    assert state.calls == 1


def test_a_glance_is_rayleigh_and_ritz_in_the_old_span_and_claims_no_more() -> None:
    tracking = core()
    g = torch.Generator().manual_seed(0)
    seen = []

    def turned(params: dict[str, Tensor], batch: Any) -> Tensor:
        seen.append(1)
        return quartic({"x": rotation @ params["x"]}, batch)

    rotation = torch.linalg.qr(torch.randn(40, 40, generator=g, dtype=torch.float64))[0]
    tracking = Tracking(turned, DATA, k=3, tol=1e-8)
    x = rotation.mT @ START
    state, _ = tracking.update(tracking.init(), {"x": x}, 0, "look")
    moved = x + 0.1 * torch.randn(40, generator=g, dtype=torch.float64)
    after, record = tracking.update(state, {"x": moved}, 1, "glance")
    assert record is not None
    H = rotation.mT @ torch.diag((rotation @ moved) ** 2) @ rotation
    V = state.vectors["x"]
    ritz, u = torch.linalg.eigh(V @ H @ V.mT)
    assert torch.allclose(torch.tensor(record.values, dtype=torch.float64), ritz.flip(0))
    X = u.mT.flip(0) @ V
    residuals = torch.linalg.vector_norm(X @ H - ritz.flip(0)[:, None] * X, dim=1)
    assert torch.allclose(torch.tensor(record.residuals, dtype=torch.float64), residuals)
    truth = torch.linalg.eigvalsh(H)
    assert all(v <= t + 1e-12 for v, t in zip(record.values, truth.flip(0)[:3].tolist(), strict=True))
    assert all((truth - v).abs().min() <= b for v, b in zip(record.values, record.bounds, strict=True))
    assert (record.kind, record.status, record.certified, record.converged) == ("glance", "glance", False, (False,) * 3)
    assert (record.matvecs, record.passes) == (3, 1)
    assert torch.allclose(after.vectors["x"].abs(), X.abs())


def test_pairs_keep_their_numbers_through_a_crossing_and_new_ones_get_new_numbers() -> None:
    tracking = core(k=2)
    x = START.clone()
    state, _ = tracking.update(tracking.init(), {"x": x})
    x = x.clone()
    x[38], x[39] = 3.5, 3.2  # they change places
    state, crossed = tracking.update(state, {"x": x})
    assert crossed is not None
    assert crossed.ids == (1, 0)
    assert crossed.overlaps == pytest.approx((1, 1))
    x = x.clone()
    x[5] = 4.0
    _, joined = tracking.update(state, {"x": x})
    assert joined is not None
    assert joined.ids == (2, 1)
    assert joined.overlaps == pytest.approx((0, 1), abs=1e-6)


def test_half_precision_and_layers_that_thaw() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    batch = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.arange(30) % 3
    loss, _ = functional_loss(net, lambda outputs, targets: cross_entropy(outputs.float(), targets))
    tracker = SpectrumTracker(loss, batch, k=2, every=1, tol=0.1)
    net[0].requires_grad_(False)
    first, again = tracker(net), tracker(net)
    assert first is not None
    assert again is not None
    assert again.ids == first.ids
    assert again.values == pytest.approx(first.values, rel=0.05)
    net.requires_grad_(True)
    after = tracker(net)
    assert after is not None
    assert (after.ids, after.overlaps) == ((2, 3), ())


def test_adam_is_watched_on_its_preconditioned_matrix() -> None:
    x = nn.Parameter(START.clone())
    optimizer = torch.optim.Adam([x], lr=1e-3, betas=(0.9, 0.99))
    tracker = SpectrumTracker(quartic, DATA, k=3, every=1, tol=1e-8, optimizer=optimizer)
    assert tracker({"x": x.detach()}) is None  # before its first step it has no second moments
    for _ in range(3):
        optimizer.zero_grad()
        quartic({"x": x}, None).backward()
        optimizer.step()
    record = tracker({"x": x.detach()})
    assert record is not None
    d = torch.sqrt(optimizer.state[x]["exp_avg_sq"] / (1 - 0.99**3)) + 1e-8
    truth = (x.detach() ** 2 / d).sort(descending=True)
    assert record.values == pytest.approx(truth.values[:3].tolist())
    share = (x.detach() ** 3 / 3) ** 2 / d
    assert record.gradient_share == pytest.approx(float(share[truth.indices[:3]].sum() / share.sum()), rel=1e-5)
    assert record.matrix == "preconditioned hessian"
    assert (record.rate, record.limit) == (1e-3, pytest.approx(38_000))


def test_other_matrices_and_both_ends() -> None:
    net = nn.Linear(4, 3).double()
    batch = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    loss, _ = functional_loss(net, cross_entropy)
    tracker = SpectrumTracker(loss, batch, k=4, every=1, which="BE", matrix=ggn)
    record = tracker(net)
    assert record is not None
    assert record.matrix == "ggn"
    assert record.bottom is not None
    assert record.top is not None
    assert record.top[0] > 0.01 > record.bottom[0] > -1e-6


@pytest.mark.parametrize(("tol", "most"), [(1e-3, 0.65), (1e-5, 0.75)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_warm_starts_save_products_and_warm_blocks_passes(seed: int, tol: float, most: float) -> None:
    """On digits, tanh, SGD with rate 0.01; cold starts take some 21 and 27 products to solve.

    Passes of a warm block are against those of a cold start as it is by default, with single vectors, with and without
    the certificate, and against those of a cold block. Printed they are the figures of docs/howto/training.md.
    """
    images, labels = demo.digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = demo.network("mlp")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    g = torch.Generator().manual_seed(seed)

    def train(steps: int) -> None:
        for index in torch.randint(1797, (steps, 64), generator=g):
            optimizer.zero_grad()
            cross_entropy(net(images[index]), labels[index]).backward()
            optimizer.step()

    def solving(tracking: Tracking, state: Any) -> tuple[int, int]:
        """Products without the certificate, passes with it."""
        record = tracking.update(state, net, 1, "look")[1]
        assert record is not None
        assert record.certified
        return record.matvecs - record.verification, record.passes

    train(300)
    loss, _ = functional_loss(net, cross_entropy)
    single, block = (
        Tracking(loss, (images[:300], labels[:300]), tol=tol, block_size=b, trace_matvecs=0) for b in (None, 5)
    )
    before = {t: t.update(t.init(), net, 0, "look")[0] for t in (single, block)}
    for gap in (1, 9, 90):
        train(gap)
        (cold, whole), (warm, _) = (solving(single, state) for state in (single.init(), before[single]))
        print(f"\nseed {seed}, tol {tol}, {gap} steps on: products {warm / cold:.2f}", end="")
        assert warm <= cold + 1
        if gap == 1:
            assert warm <= most * cold
            (products, passes), (fresh, _) = (solving(block, state) for state in (before[block], block.init()))
            figures = products / 5 / cold, passes / whole, products / fresh
            print("; passes of a block {:.2f}, {:.2f} certified, {:.2f} of a cold block".format(*figures), end="")
            assert products / 5 <= 0.45 * cold
            assert passes <= 0.45 * whole
            assert products <= 0.75 * fresh


def network(kind: str) -> nn.Module:
    """For Adam one with all that is easily disturbed: running statistics, dropout.

    In float64: before batch norm the weights of constant pixels have gradients of mere rounding, by which Adam divides.
    """
    middle = [nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2)] if kind == "Adam" else [nn.Tanh()]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16, bias=kind == "SGD"), *middle, nn.Linear(16, 10)).double()


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_training_goes_as_it_would_without(kind: str) -> None:
    """Bitwise; with SGD the data is the training's own shuffling loader, in the midst of its pass."""
    images, labels = demo.digits()
    images = images.double()

    def trained(watched: bool) -> tuple[dict[str, Any], Any]:
        torch.manual_seed(7)
        net = network(kind)
        optimizer = getattr(torch.optim, kind)(net.parameters(), lr=0.01)
        loader = DataLoader(TensorDataset(images[:96], labels[:96]), 32, shuffle=True)
        loss, _ = functional_loss(net, cross_entropy)
        data = loader if kind == "SGD" else (images[:64], labels[:64])
        tracker = SpectrumTracker(loss, data, k=2, every=2, optimizer=optimizer, tol=1e-2, trace_matvecs=4)
        step = 0
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                value = cross_entropy(net(x), y)
                value.backward()
                if watched:
                    with untouched(net):
                        tracker.observe(step, loss=value, batch=(x, y), grad_norm=1.0)
                        tracker(net, step)
                        tracker.core.update(tracker.state, net, step, "glance")
                optimizer.step()
                step += 1
        assert len(tracker.records) == (0 if not watched else 3 if kind == "SGD" else 2)
        assert all(record.certified for record in tracker.records)
        return copy.deepcopy(net.state_dict()), torch.get_rng_state()

    with torch.random.fork_rng(devices=[]):
        plain, watched = trained(False), trained(True)
    assert torch.equal(plain[1], watched[1])
    assert all(torch.equal(plain[0][name], watched[0][name]) for name in plain[0])


def test_a_jump_of_the_rate_fires_before_the_step_is_taken_and_once() -> None:
    x = nn.Parameter(START.clone())
    optimizer = torch.optim.SGD([x], lr=0.1)
    heard: list[Alert] = []
    tracker = SpectrumTracker(quartic, DATA, k=1, every=10, optimizer=optimizer, on_alert=heard.append)
    for step in range(5):
        assert (tracker({"x": x.detach()}, step) is not None) == (step == 0)
    assert heard == []  # λ₁ = 9 < 20
    optimizer.param_groups[0]["lr"] = 0.5
    for step in range(5, 9):
        tracker({"x": x.detach()}, step)
    assert [(alert.rule, alert.step, alert.certainty) for alert in heard] == [("stability", 5, "certified")]
    assert heard[0].threshold == pytest.approx(4)
    assert tracker.alerts == heard
    optimizer.param_groups[0]["lr"] = 50.0
    tracker({"x": x.detach()}, 9)
    assert [alert.step for alert in heard] == [5, 9]  # much worse is news again


def test_without_an_optimiser_the_rate_is_told_by_hand() -> None:
    tracker = SpectrumTracker(quartic, DATA, k=1, every=100)
    tracker({"x": START}, 0)
    assert tracker.observe(1, lr=0.2) == ()
    assert [alert.rule for alert in tracker.observe(2, lr=0.3)] == ["stability"]
    mine = SpectrumTracker(quartic, DATA, k=1, every=100, limit=lambda rate: 3.8 / rate)
    mine({"x": START}, 0)
    assert mine.observe(2, lr=0.3) == ()


def test_a_run_that_diverges_is_recorded_and_not_stopped(tmp_path: Path) -> None:
    tracker = SpectrumTracker(quartic, DATA, k=2, every=1, log=tmp_path / "deep" / "run.jsonl")
    tracker({"x": START.float()}, 0)
    huge = tracker({"x": 1e15 * START.float()}, 1)  # the loss overflows
    assert huge is not None
    assert (huge.finite, huge.values, huge.certified) == (False, (), False)
    assert "infinity" in huge.status or "inf" in huge.status
    broken = tracker({"x": START.float() * math.nan}, 2)
    assert broken is not None
    assert broken.status == "a parameter holds NaN or infinity"
    assert [alert.rule for alert in tracker.alerts] == ["non-finite"]
    again = tracker({"x": START.float()}, 3)
    assert again is not None
    assert again.certified
    records, alerts = read_jsonl(tmp_path / "deep" / "run.jsonl")
    assert [repr(record) for record in records] == [repr(record) for record in tracker.records]
    assert [str(alert) for alert in alerts] == [str(alert) for alert in tracker.alerts]
    for line in (tmp_path / "deep" / "run.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_what_is_wrong_from_the_start_is_an_error() -> None:
    with pytest.raises(EigenfuncError):
        SpectrumTracker(lambda params, batch: params["x"], DATA, every=1)({"x": START})
    for options in (
        {"k": 0},
        {"every": 0},
        {"which": "XX"},
        {"max_overhead": 0.0},
        {"seed": -1},
        {"trace_matvecs": 2.5},
    ):
        with pytest.raises(InputError):
            SpectrumTracker(quartic, DATA, **options)  # type: ignore[arg-type]


def test_what_a_callback_raises_ends_the_training_after_the_record_is_kept() -> None:
    def stop(alert: Alert) -> None:
        raise KeyboardInterrupt(str(alert))

    entries: list[Record | Alert] = []
    tracker = SpectrumTracker(quartic, DATA, k=1, every=1, limit=lambda rate: 1.0, on_alert=stop, log=entries.append)
    tracker.observe(0, lr=1.0)
    with pytest.raises(KeyboardInterrupt, match="stability"):
        tracker({"x": START}, 1)
    assert [type(entry) for entry in entries] == [Record, Alert]
    assert tracker.records[0].alerts == (entries[1],)


def test_a_batch_is_known_again_by_its_contents() -> None:
    x = torch.arange(6.0)
    assert fingerprint((x, {"a": x})) == fingerprint((x.clone(), {"a": x + 0}))
    different = [(x, {"a": x + 1}), (x.reshape(2, 3), {"a": x}), (x.double(), {"a": x}), (x, {"a": 3})]
    assert len({fingerprint(batch) for batch in [(x, {"a": x}), *different]}) == 5
    tracker = SpectrumTracker(quartic, DATA)
    raised = [tracker.observe(i, batch=x + min(i, 3)) for i in range(6)]
    assert [i for i, some in enumerate(raised) if some] == [5]


def test_the_picture_shows_values_limits_and_alerts() -> None:
    pytest.importorskip("matplotlib")
    x = nn.Parameter(START.clone())
    optimizer = torch.optim.SGD([x], lr=0.1)
    tracker = SpectrumTracker(quartic, DATA, k=2, every=2, optimizer=optimizer)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 if step < 3 else 0.3
        tracker({"x": x.detach() * (1 - 0.05 * step)}, step)
    tracker({"x": x.detach() * math.nan}, 6)
    axes = plot.track(tracker.records, tracker.alerts)
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words == ["certified", "stability limit", "failed (1)", "1: stability", "2: non-finite"]
    certified = next(line for line in axes.lines if line.get_label() == "certified")
    expected = sorted((r.step, v) for r in tracker.records for v in r.values)
    assert sorted(zip(*certified.get_data(), strict=True)) == expected
    limit = next(line for line in axes.lines if line.get_label() == "stability limit")
    assert list(limit.get_ydata()) == pytest.approx([20, 20, 2 / 0.3, 2 / 0.3])
    with pytest.raises(InputError):
        plot.track([])


def test_where_the_rate_rises_the_step_to_come_is_measured_anew() -> None:
    """λ₁ = 9: at a rate of 0.2 a gradient of 1 makes ½ λ₁‖Δ‖² 0.18, and of 3 1.62, for a loss of 1."""

    def alerts(gradient: float) -> list[str]:
        x = nn.Parameter(START.clone())
        optimizer = torch.optim.SGD([x], lr=0.1)
        tracker = SpectrumTracker(quartic, DATA, k=1, every=100, optimizer=optimizer)
        for step, (size, rate) in enumerate([(1.0, 0.1), (gradient, 0.1), (gradient, 0.2)]):
            x.grad = torch.zeros_like(x)
            x.grad[0] = size
            optimizer.param_groups[0]["lr"] = rate
            tracker({"x": x.detach()}, step)
            tracker.observe(step, loss=1.0)
        return [f"{alert.rule} at {alert.step}" for alert in tracker.alerts]

    assert alerts(1.0) == []
    assert alerts(3.0) == ["overshoot at 2"]
