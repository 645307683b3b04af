"""The rules against closed forms, simulated quadratics, and histories made so that they must speak or be silent."""

from __future__ import annotations

import math
from functools import partial
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from eigenfunc import alerts
from eigenfunc.alerts import (
    jump,
    negative_curvature,
    non_finite,
    optimizer_limit,
    overshoot,
    repeated_batch,
    stability,
    stability_limit,
)
from eigenfunc.errors import InputError
from eigenfunc.preconditioners import adam_preconditioner, stride
from eigenfunc.records import Alert, History, Observation, Record


def looks(values: list[float], which: str = "LA") -> list[Record]:
    """Certified looks, ten steps apart."""
    return [Record(10 * i, (x,), (1e-6,), (1e-6,), (True,), which=which) for i, x in enumerate(values)]


def glance(step: int, value: float, which: str = "LA") -> Record:
    return Record(step, (value,), (1.0,), (1.0,), (False,), kind="glance", which=which)


def losses(values: list[float]) -> list[Observation]:
    return [Observation(i, loss=x) for i, x in enumerate(values)]


def diverges(optimizer_of: object, curvature: float) -> bool:
    """Whether the method's own iteration on ½ · curvature · x² grows."""
    x = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = optimizer_of([x])  # type: ignore[operator]
    sizes = []
    for _ in range(1000):
        x.grad = curvature * x.detach()
        optimizer.step()
        sizes.append(float(x.detach().abs()))
    return not max(sizes[-100:]) < 1e-2 * max(sizes[:100])


@pytest.mark.parametrize(
    ("rate", "momentum", "dampening", "nesterov"),
    [
        (0.1, 0.0, 0.0, False),
        (2.0, 0.9, 0.0, False),
        (0.3, 0.5, 0.3, False),
        (0.01, 0.5, 0.0, True),
        (1.0, 0.9, 0.0, True),
    ],
)
def test_the_limit_is_where_torch_s_sgd_diverges_on_a_quadratic(
    rate: float, momentum: float, dampening: float, nesterov: bool
) -> None:
    limit = stability_limit(rate, momentum, dampening=dampening, nesterov=nesterov)
    sgd = partial(torch.optim.SGD, lr=rate, momentum=momentum, dampening=dampening, nesterov=nesterov)
    assert not diverges(sgd, 0.98 * limit)
    assert diverges(sgd, 1.02 * limit)
    assert optimizer_limit(sgd([nn.Parameter(torch.ones(1))])) == (rate, pytest.approx(limit))


def test_weight_decay_counts_as_curvature() -> None:
    sgd = partial(torch.optim.SGD, lr=0.1, weight_decay=3.0)
    limit = optimizer_limit(sgd([nn.Parameter(torch.ones(1))]))[1]
    assert limit == pytest.approx(17.0)
    assert not diverges(sgd, 16.9)
    assert diverges(sgd, 17.1)


def test_published_limits() -> None:
    assert stability_limit(0.1) == pytest.approx(20)
    assert stability_limit(0.1, 0.9) == pytest.approx(38)
    x = [nn.Parameter(torch.ones(1))]
    for adaptive in (torch.optim.Adam, torch.optim.AdamW):
        assert optimizer_limit(adaptive(x, lr=1e-3)) == (1e-3, pytest.approx(38_000))  # 38 / η
    assert optimizer_limit(torch.optim.RMSprop(x, lr=0.01))[1] == pytest.approx(200)
    assert optimizer_limit(torch.optim.NAdam(x))[1] is None
    assert stability_limit(0.0) == math.inf


def test_the_limit_of_frozen_adam_is_where_its_recurrence_grows() -> None:
    """m ← β m + (1 − β) a x, x ← x − η m: the spectral radius crosses 1 at (2 + 2β)/((1 − β) η)."""
    rate, beta = 0.01, 0.9
    for share, grows in ((0.999, False), (1.001, True)):
        a = share * stability_limit(rate, beta, dampening=beta)
        matrix = torch.tensor([[beta, (1 - beta) * a], [-rate * beta, 1 - rate * (1 - beta) * a]], dtype=torch.float64)
        assert (torch.linalg.eigvals(matrix).abs().max() > 1) == grows


@pytest.mark.parametrize("arguments", [(-1.0, 0.0), (0.1, 1.0), (math.nan, 0.0)])
def test_rates_that_are_none_are_refused(arguments: tuple[float, float]) -> None:
    with pytest.raises(InputError):
        stability_limit(*arguments)


def test_stability_holds_the_last_value_against_the_rate_of_now() -> None:
    seen = looks([10.0])
    before = [Observation(i, rate=0.1, limit=20.0) for i in range(5)]
    assert stability(History(seen, before)) is None
    found = stability(History(seen, [*before, Observation(5, rate=0.3, limit=2 / 0.3)]))
    assert found is not None
    assert (found.step, found.value, found.certainty) == (5, 10.0, "certified")
    assert found.threshold == pytest.approx(2 / 0.3)
    assert "look at step 0" in found.message
    assert stability(History(seen, before), ratio=0.4) is not None


def test_a_glance_proves_a_crossing_from_one_side_and_says_so() -> None:
    found = stability(History([glance(3, 30.0)], [Observation(3, limit=20.0)]))
    assert found is not None
    assert found.certainty == "one-sided"
    assert "≥ 30" in found.message


def test_a_glance_below_does_not_lift_what_a_look_has_found() -> None:
    rate = [Observation(15, limit=20.0)]
    found = stability(History([*looks([5.0, 30.0]), glance(15, 6.0)], rate))
    assert found is not None
    assert (found.value, found.certainty) == (30.0, "certified")
    assert stability(History([*looks([30.0, 5.0]), glance(15, 6.0)], rate)) is None  # but a later look does


@given(st.lists(st.floats(-100, 100), min_size=6, max_size=21), st.sampled_from([3.5, 6.0]))
def test_jumps_are_those_of_the_textbook_s_score(values: list[float], threshold: float) -> None:
    values[0] = -1.0  # so that no logarithm is taken
    *past, last = values
    middle = torch.tensor(past, dtype=torch.float64).quantile(0.5)
    spread = (torch.tensor(past, dtype=torch.float64) - middle).abs().quantile(0.5)
    scale = max(float(spread) / NormalDist().inv_cdf(0.75), 0.05 * abs(float(middle)))
    rise = last - float(middle)
    if abs(rise - threshold * scale) < 1e-3 * (1 + abs(rise)):
        return  # within the rounding of 1.4826
    found = jump(History((), losses(values)), of="loss", threshold=threshold)
    assert (found is not None) == (rise > threshold * scale)


@given(st.lists(st.floats(0.1, 10), min_size=8, max_size=20), st.floats(1e-3, 1e3), st.floats(0.1, 100))
def test_scores_of_positive_values_do_not_depend_on_their_unit(values: list[float], unit: float, last: float) -> None:
    found, scaled = (
        jump(History((), losses([c * x for x in (*values, last)])), of="loss", threshold=3.0) for c in (1.0, unit)
    )
    if found is None or scaled is None:
        held = found or scaled
        assert held is None or held.value == pytest.approx(held.threshold, rel=1e-9)
    else:
        assert scaled.threshold == pytest.approx(unit * found.threshold)


_STEPS = [
    partial(torch.optim.SGD),
    partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    partial(torch.optim.SGD, momentum=0.8, dampening=0.3, maximize=True),
    partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    partial(torch.optim.Adam, betas=(0.8, 0.99), weight_decay=0.0),
    partial(torch.optim.AdamW, weight_decay=0.3),
    partial(torch.optim.AdamW, amsgrad=True, maximize=True),
    partial(torch.optim.RAdam, betas=(0.9, 0.5)),
    partial(torch.optim.RMSprop, alpha=1e-9),
    partial(torch.optim.Adagrad, initial_accumulator_value=1e6),
]


@pytest.mark.parametrize("made", _STEPS)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 6))
def test_the_stride_is_the_step_that_the_optimiser_then_takes(made: object, seed: int, steps: int) -> None:
    """Gradients change signs but no sizes, so v̂ stands still, and the metric is that of the step; two rates."""
    g = torch.Generator().manual_seed(seed)
    params = {
        name: nn.Parameter(torch.randn(shape, generator=g).double()) for name, shape in (("a", (3, 2)), ("b", (4,)))
    }
    sizes = {name: torch.rand(p.shape, generator=g).double() + 0.5 for name, p in params.items()}
    groups = [{"params": [params["a"]], "lr": 0.01}, {"params": [params["b"]], "lr": 0.003}]
    optimizer = made(groups)  # type: ignore[operator]
    flat = {name: p.detach() for name, p in params.items()}
    for step in range(steps + 1):
        for name, p in params.items():
            p.grad = sizes[name] * torch.randn(p.shape, generator=g).sign().double()
        before = {name: p.detach().clone() for name, p in params.items()}
        adaptive = not isinstance(optimizer, torch.optim.SGD)
        known = step > 0 or not adaptive
        told = stride(optimizer, flat)
        assert (told is not None) == known
        d = adam_preconditioner(optimizer, flat) if adaptive and known else {name: torch.ones(()) for name in flat}
        optimizer.step()
        if told is not None:
            moved = sum(float((d[name] * (flat[name] - before[name]).double() ** 2).sum()) for name in flat)
            assert 0.01 * told == pytest.approx(math.sqrt(moved), rel=1e-5)


def test_a_stride_that_is_not_known_is_not_told() -> None:
    x, y = (nn.Parameter(torch.ones(3)) for _ in range(2))
    sgd = torch.optim.SGD([x, y], lr=0.1, momentum=0.9)
    assert stride(sgd, {"x": x.detach()}) is None  # no gradient yet
    x.grad = torch.full((3,), 2.0)
    assert stride(sgd, {"x": x.detach()}) == stride(sgd, {"x": x.detach(), "y": y.detach()}) == pytest.approx(12**0.5)
    assert stride(sgd, {"z": torch.ones(3)}) is None
    sgd.step()
    x.grad = None
    assert stride(sgd, {"x": x.detach()}) == pytest.approx(12**0.5)  # the last step once more
    assert stride(torch.optim.NAdam([x]), {"x": x.detach()}) is None
    sgd.param_groups[0]["lr"] = 0.0
    assert stride(sgd, {"x": x.detach()}) is None
    x.grad = torch.full((3,), math.inf)
    assert stride(torch.optim.SGD([x], lr=0.1), {"x": x.detach()}) is None


@given(
    st.floats(0.1, 100), st.floats(1e-3, 1), st.floats(0.01, 10), st.lists(st.floats(0.05, 5), min_size=1, max_size=30)
)
def test_overshoot_is_the_most_that_curvature_adds_to_a_quadratic_loss(
    top: float, rate: float, length: float, values: list[float]
) -> None:
    steps = [Observation(i, loss=x, rate=rate, stride=length) for i, x in enumerate(values)]
    last = sorted(values[-10:])
    middle = (last[(len(last) - 1) // 2] + last[len(last) // 2]) / 2
    rise = float(torch.tensor([rate * length, 0.0]) @ torch.diag(torch.tensor([top, top / 2])) @
                 torch.tensor([rate * length, 0.0])) / 2  # fmt: skip
    seen = [glance(0, top)]
    for share in (0.2, 1.0):
        if abs(rise / (share * middle) - 1) > 1e-4:
            found = overshoot(History(seen, steps), share=share)
            assert (found is not None) == (rise > share * middle)
            if found is not None:
                assert (found.value, found.threshold) == (pytest.approx(rise, rel=1e-5), pytest.approx(share * middle))
                assert found.certainty == "one-sided"


def test_overshoot_is_silent_where_something_is_missing_or_losses_have_no_floor_at_zero() -> None:
    whole = Observation(3, loss=1.0, rate=1.0, stride=10.0)
    seen = looks([10.0])
    found = overshoot(History(seen, [whole]))
    assert found is not None
    assert found.certainty == "certified"
    assert overshoot(History((), [whole])) is None
    for lack in ({"loss": None}, {"rate": None}, {"stride": None}, {"loss": -1.0}, {"loss": 0.0}, {"loss": math.nan}):
        assert overshoot(History(seen, [whole._replace(**lack)])) is None  # type: ignore[arg-type]
    assert overshoot(History(looks([-10.0]), [whole])) is None


def test_at_the_edge_of_stability_no_overshoot_is_told() -> None:
    """Half of λ₁ on its limit is no matter, for the step is short there: λ₁η/2 = 1, ½λ₁‖Δ‖² = η‖g‖²."""
    rate, slope, loss = 0.1, 0.3, 0.2
    edge = History(looks([2 / rate]), [Observation(0, loss=loss, rate=rate, limit=2 / rate, stride=slope)])
    assert stability(edge, ratio=0.99) is not None
    assert overshoot(edge) is None
    found = overshoot(edge, share=0.01)
    assert found is not None
    assert found.value == pytest.approx(rate * slope**2)


def test_jumps_are_measured_against_certified_looks_and_told_once() -> None:
    calm = looks([10.0, 10.1, 9.9, 10.0, 10.2, 10.0])
    assert jump(History([*calm, glance(70, 10.3)])) is None
    found = jump(History([*calm, glance(70, 30.0)]))
    assert found is not None
    assert found.certainty == "one-sided"
    lagging = [glance(70 + i, 4.0 + 0.01 * i) for i in range(20)]
    assert jump(History([*calm, *lagging, *looks([0.0] * 10 + [10.1])[-1:]])) is None  # the truth is no jump
    late = History([*calm, glance(70, 30.0)], [Observation(71, loss=1.0)])
    assert jump(late) is None  # it was told at step 70
    failed = Record(80, finite=False)
    assert jump(History([*calm, glance(70, 30.0), failed])) is None


def test_too_few_values_make_no_judgement() -> None:
    assert jump(History(looks([1.0] * 5 + [100.0])), least=6) is None
    assert jump(History(looks([1.0] * 5 + [100.0])), least=5) is not None


def test_negative_curvature_speaks_when_it_grows_and_matters() -> None:
    usual = looks([-0.1] * 4, "SA")
    assert negative_curvature(History([*usual, *looks([-0.1] * 4 + [-0.15], "SA")[-1:]])) is None
    found = negative_curvature(History([*usual, *looks([-0.1] * 4 + [-0.3], "SA")[-1:]]))
    assert found is not None
    assert (found.value, found.threshold) == (-0.3, pytest.approx(-0.2))
    both = [Record(i, (50.0, -0.1 - 0.3 * (i == 4)), (), (), (True, True), which="BE") for i in range(5)]
    assert negative_curvature(History(both)) is None  # below a tenth of the largest
    assert negative_curvature(History(both), share=0.0) is not None
    assert negative_curvature(History(looks([-1.0] * 3 + [-9.0], "LA"))) is None  # LA says nothing of that end


@pytest.mark.parametrize("seen", [{"loss": math.nan}, {"grad_norm": math.inf}])
def test_what_is_not_finite_is_told(seen: dict[str, float]) -> None:
    assert non_finite(History((), [Observation(1, loss=1.0, grad_norm=1.0)])) is None
    found = non_finite(History((), [Observation(1, **seen)]))
    assert found is not None
    assert found.step == 1
    assert non_finite(History([Record(2, finite=False, status="a parameter holds NaN")])) is not None


def test_a_batch_that_comes_again_and_again_is_told_but_not_training_on_one() -> None:
    def run(hashes: str) -> Alert | None:
        return repeated_batch(History((), [Observation(i, batch=h) for i, h in enumerate(hashes)]))

    assert run("aaaaaa") is None
    assert run("abcabcabc") is None
    assert run("abcc") is None
    assert run("abccc") is not None


@given(st.integers(0, 2**31), st.sampled_from(["λ₁", "loss"]))
def test_rules_change_nothing_and_say_the_same_again(seed: int, of: str) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(30, generator=g).add(0.1).tolist()
    history = History(tuple(looks(values)), tuple(losses(values)))
    for rule in alerts.RULES:
        assert rule(history) == rule(history)
    assert history == History(tuple(looks(values)), tuple(losses(values)))
