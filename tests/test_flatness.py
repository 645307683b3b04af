"""Flatness: against closed forms on quadratics, dense float64 matrices of nets, brute force, and counted intervals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eigenfunc import Batches, eigsh, functional_loss, hessian, tree
from eigenfunc.errors import DataError, InputError
from eigenfunc.flatness import Flatness, flatness
from eigenfunc.nearby import Rises, average_sharpness, worst_sharpness
from tests.helpers import cut, dense_hessian, labelled, mlp, never, plain, seeded, untouched
from tests.test_landscape import small
from tests.test_trust_region import ONE, highest, quadratic

SPECTRUM = [5.0, 3.0, 1.0, 0.5, 0.2, 0.0, -0.5, -1.0]


def net(batch_sizes: int = 11) -> tuple[Any, Any, Batches, nn.Module, Tensor, Tensor]:
    model, batch = mlp(sizes=(3, 4, 2)), labelled(24, 3, 2)
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
    return loss, params, Batches(cut(batch, batch_sizes)), model, *batch


@pytest.mark.parametrize("slope", [0.0, 1e-6, 0.3, 40.0])
@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_a_quadratic_loss_has_the_closed_forms(slope: float, rho: float) -> None:
    loss, params, g, A = quadratic(SPECTRUM, slope)
    found = flatness(loss, params, ONE, rho=rho, num_samples=64, seed=1)
    n, top, truth = 8, max(SPECTRUM), highest(A, g, rho)
    assert abs(found.lambda_max - top) <= found.lambda_bound <= 1e-2
    assert found.loss == pytest.approx(1)
    assert found.gradient_norm == pytest.approx(slope, abs=1e-12)
    assert found.trace.value == pytest.approx(float(A.trace()))  # over n products: exact
    assert found.mean_curvature.value == pytest.approx(float(A.trace()) / n)
    assert found.model.low <= truth * (1 + 1e-9) + 1e-15
    assert truth * (1 - 1e-9) <= found.model.high <= found.model.low + 1e-2 * rho**2
    assert 0.999 * truth <= found.worst.value <= truth + found.worst.noise + 1e-12
    one_step = float(loss(rho * g / slope, ONE)) - 1 if slope else 0.0
    assert found.worst.one_step == pytest.approx(one_step, rel=1e-9, abs=found.worst.noise)
    low, high = found.average.interval(0.999)
    assert low <= rho**2 * float(A.trace()) / (2 * (n + 2)) <= high
    assert found.effective_dimension is None  # of an indefinite matrix
    unclimbed = flatness(loss, params, ONE, rho=rho, num_steps=0, seed=1)  # from where the model leads
    assert unclimbed.worst.value >= 0.99 * truth


def test_gaussian_displacements_and_a_convex_loss() -> None:
    loss, params, _, A = quadratic([4.0, 2.0, 1.0, 0.1], 0.2)
    found = flatness(loss, params, ONE, sigma=0.3, delta=0.5, num_samples=400, seed=0)
    low, high = found.average.interval(0.999)
    assert low <= 0.3**2 * float(A.trace()) / 2 <= high
    assert high - low < 0.5 * float(A.trace()) * 0.09
    assert found.effective_dimension is not None
    truth = sum(x / (x + 0.5) for x in (4.0, 2.0, 1.0, 0.1))
    assert found.effective_dimension.value == pytest.approx(truth, rel=1e-9)
    assert found.dimension_of == "Hessian"


def test_intervals_of_the_average_hold_the_truth_as_often_as_they_say() -> None:
    loss, params, _, A = quadratic([10.0, 1.0, 1.0, -0.5, 0.1], 3.0)
    truth = float(A.trace()) / (2 * 7)
    inside = 0
    for seed in range(150):
        low, high = average_sharpness(loss, params, ONE, rho=1.0, num_samples=12, seed=seed).interval(0.95)
        inside += low <= truth <= high
    assert 134 <= inside < 150  # binomial(150, 0.95): 142.5 ± 2.7


def test_a_net_against_its_dense_matrices() -> None:
    loss, params, data, model, inputs, targets = net()

    def whole(module: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(module(inputs), targets)

    H = dense_hessian(plain(model, whole), params)
    found = flatness(loss, params, data, rho=0.2, delta=0.01, num_matvecs=16 * 26, num_samples=128, seed=0)
    rises = torch.linalg.eigvalsh(H)
    assert abs(found.lambda_max - float(rises[-1])) <= found.lambda_bound
    assert found.trace.value == pytest.approx(float(H.trace()), rel=1e-9)
    jacobian = torch.cat(
        [
            torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (inputs,)))(params)[name].flatten(2)
            for name in sorted(params)
        ],
        dim=2,
    )
    p = torch.softmax(model(inputs), 1).detach()
    outer = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    G = torch.einsum("bci,bcd,bdj->ij", jacobian, outer, jacobian).detach() / 24
    curved = torch.linalg.eigvalsh(G).clamp_min(0)
    assert found.effective_dimension is not None
    low, high = found.effective_dimension.interval(0.999)
    assert low <= float((curved / (curved + 0.01)).sum()) <= high
    assert found.effective_dimension.stderr < 0.01 * found.effective_dimension.value
    g = torch.Generator().manual_seed(5)
    directions = torch.randn(20_000, len(H), generator=g, dtype=torch.float64)
    directions *= 0.2 * torch.rand(20_000, 1, generator=g).double() ** (1 / len(H)) / directions.norm(dim=1)[:, None]
    stacked = tree.tree_map(lambda x, d: x + d, params, tree.unravel(directions, params))
    outputs = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (inputs,)))(stacked)
    losses = torch.func.vmap(lambda z: nn.functional.cross_entropy(z, targets))(outputs).detach()
    samples = losses - whole(model).detach()
    assert abs(float(samples.mean()) - found.average.value) < 4 * math.hypot(
        float(samples.std()) / math.sqrt(20_000), found.average.stderr
    )
    assert found.worst.value >= float(samples.max())
    assert found.worst.value >= found.worst.one_step > 0


def test_the_worst_rise_is_one_that_is_taken_inside_the_ball() -> None:
    loss, params, data, *_, inputs, targets = net()
    for rho in (0.1, 3.0):
        found = worst_sharpness(loss, params, data, rho=rho, seed=0)
        assert float(found.offset.norm()) <= rho
        there = tree.tree_map(lambda x, d: x + d, params, tree.unravel(found.offset, params))
        taken = float(loss(there, (inputs, targets)) - loss(params, (inputs, targets)))
        assert found.value == pytest.approx(taken, abs=found.noise)


def test_worst_rises_in_the_plane_against_a_grid() -> None:
    """Bumps on a slope: ascent never claims more than there is, and finds the hill that the slope leads up to."""

    def loss(p: Tensor, batch: Tensor) -> Tensor:
        return torch.sin(3 * p[0]) * torch.cos(2 * p[1]) + 0.5 * p[1] + 0 * batch.sum()

    axis = torch.linspace(-1, 1, 801).double()
    grid = torch.cartesian_prod(axis, axis)
    for angle in range(6):
        params = 2 * torch.tensor([math.cos(angle), math.sin(angle)]).double()
        for rho in (0.1, 1.0):
            around = params + rho * grid[grid.norm(dim=1) <= 1]
            truth = float((torch.sin(3 * around[:, 0]) * torch.cos(2 * around[:, 1]) + 0.5 * around[:, 1]).max())
            truth -= float(loss(params, ONE))
            found = worst_sharpness(loss, params, ONE, rho=rho, num_steps=20, seed=0)
            assert found.value <= truth + 10 * rho * 0.0025
            if rho == 0.1:
                assert found.value >= 0.995 * truth


def test_maxima_inside_the_ball_are_found_and_none_is_zero() -> None:
    centre = torch.tensor([0.3, -0.2, 0.1]).double()

    def hill(p: Tensor, batch: Tensor) -> Tensor:
        return -((p - centre) ** 2).sum() / 2 + 0 * batch.sum()

    found = worst_sharpness(hill, torch.zeros(3).double(), ONE, rho=2.0, num_steps=40, seed=0)
    assert found.value == pytest.approx(float(centre @ centre) / 2, rel=1e-6)
    begun = worst_sharpness(hill, torch.zeros(3).double(), ONE, rho=2.0, num_steps=1, starts=[0.999 * centre], seed=0)
    assert begun.value >= 0.999 * float(centre @ centre) / 2  # all steps overshoot: none is taken
    at_the_top = flatness(hill, centre, ONE, rho=0.5, seed=0)
    assert at_the_top.worst.value == 0
    assert float(at_the_top.worst.offset.norm()) == 0
    assert at_the_top.model.low <= 0 <= at_the_top.model.high < 1e-9
    assert at_the_top.delta is None
    assert "λmax is not positive" in str(at_the_top)
    assert at_the_top.average.value < 0


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**40])
def test_measures_scale_with_the_loss(scale: float) -> None:
    loss, params, *_ = quadratic(SPECTRUM, 0.3)
    one = flatness(loss, params, ONE, seed=0)
    many = flatness(lambda p, batch: scale * loss(p, batch), params, ONE, delta=scale, seed=0)
    assert many.lambda_max == pytest.approx(scale * one.lambda_max, rel=1e-6)
    assert many.trace.value == pytest.approx(scale * one.trace.value, rel=1e-6)
    assert many.worst.value == pytest.approx(scale * one.worst.value, rel=1e-6)
    assert many.average.value == pytest.approx(scale * one.average.value, rel=1e-6)
    assert many.model.low == pytest.approx(scale * one.model.low, rel=1e-3)
    assert many.model.high == pytest.approx(scale * one.model.high, rel=1e-3)


def test_the_cut_into_batches_does_not_matter_and_sums_are_sums() -> None:
    loss, params, data, _, inputs, targets = net()
    options = {"num_samples": 4, "num_steps": 2, "seed": 0}
    cut, whole = (flatness(loss, params, x, **options) for x in (data, (inputs, targets)))
    summed, _ = functional_loss(loss.module, nn.CrossEntropyLoss(reduction="sum"))
    added = flatness(summed, params, Batches(data.data, reduction="sum"), **options)
    for other, factor in ((whole, 1.0), (added, 24.0)):
        assert other.loss == pytest.approx(factor * cut.loss, rel=1e-10)
        assert other.lambda_max == pytest.approx(factor * cut.lambda_max, rel=1e-6)
        assert other.worst.value == pytest.approx(factor * cut.worst.value, rel=1e-6)
        assert other.average.value == pytest.approx(factor * cut.average.value, rel=1e-6)


def test_the_noise_of_single_precision_is_measured_and_covers() -> None:
    """The same net in both precisions, at the same displacements of the same, representable, parameters."""
    loss, params, data, *_ = net()
    narrow = tree.tree_map(lambda x: x.float(), params)
    exact = tree.tree_map(lambda x: x.double(), narrow)
    small = Batches([(x.float(), y) for x, y in data.data])
    single = Rises(loss, narrow, small)
    double = Rises(loss, exact, Batches([(x.double(), y) for x, y in small.data]))
    g = torch.Generator().manual_seed(0)
    noise = single.noise(0.05, g)
    offsets = 0.05 * single.directions(64, g)
    moved = torch.stack([single.displaced(x) for x in offsets])
    errors = single(offsets) - double(moved)
    measured = float(torch.sqrt((errors**2).mean()))
    assert measured / 4 < noise < 1e3 * measured
    assert float(errors.abs().max()) < 4 * noise
    assert double.noise(0.05, g) < 1e-14


def test_nothing_of_the_model_changes_and_a_seed_repeats() -> None:
    loss, params, data, model = small()
    with untouched(model):
        first = flatness(loss, params, data, num_samples=4, num_steps=2, seed=3)
        again = flatness(loss, params, data, num_samples=4, num_steps=2, seed=3)
    assert first.average.value == again.average.value
    assert first.worst.value == pytest.approx(again.worst.value, rel=1e-6)
    fresh = average_sharpness(loss, params, data, num_samples=4)
    assert average_sharpness(loss, params, data, num_samples=4, seed=fresh.seed).value == fresh.value


def test_random_losses_draw_the_same_at_every_point_and_a_slope_has_no_average() -> None:
    def loss(p: Tensor, batch: Tensor) -> Tensor:
        return (torch.rand(4, dtype=torch.float64) * p).sum() + 1 + 0 * batch.sum()

    data = Batches([torch.zeros(2), torch.ones(3)])
    state = torch.get_rng_state()
    params = torch.ones(4).double()
    found = average_sharpness(loss, params, data, rho=1.0, num_samples=5, seed=0)
    assert abs(found.value) < 1e-14
    assert found.stderr < 1e-13
    slope = Rises(loss, params, data).gradient()
    assert worst_sharpness(loss, params, data, rho=0.5, seed=0).one_step == pytest.approx(0.5 * float(slope.norm()))
    assert torch.equal(state, torch.get_rng_state())


def test_displacements_fill_the_ball_evenly() -> None:
    found = average_sharpness(lambda p, b: (p @ p) / 2 + 0 * b.sum(), torch.zeros(3).double(), ONE, rho=1.0,
                              num_samples=600, seed=0)  # fmt: skip
    assert found.value == pytest.approx(0.3, abs=0.02)  # ½ ρ² n/(n + 2), give or take 0.0054


@pytest.mark.parametrize("size", [1e-4, 1e-9])
def test_noise_of_any_origin_is_measured(size: float) -> None:
    def loss(p: Tensor, batch: Tensor) -> Tensor:
        return (p @ p) / 2 + size * torch.sin(1e11 * torch.exp(p.sum())) + 0 * batch.sum()

    rises = Rises(loss, torch.ones(5).double(), ONE)
    noise = rises.noise(0.5, torch.Generator().manual_seed(0))
    assert size / 3 < noise < 3 * size  # √2 · size/√2
    coarse = Rises(lambda p, b: loss(p, b).bfloat16(), torch.ones(5), ONE)
    assert coarse.noise(1e-3, torch.Generator().manual_seed(0)) >= 2.5 * 2**-8  # though no loss differs from another


def test_one_parameter_and_a_bundle_of_leaves() -> None:
    single = flatness(lambda p, b: (2 * p**2).sum() + 0 * b.sum(), torch.tensor([0.5]).double(), ONE, rho=0.1, seed=0)
    assert single.lambda_max == pytest.approx(4)
    assert single.worst.value == pytest.approx(2 * 0.6**2 - 2 * 0.5**2)
    params = {"z": torch.ones(3), "a": [torch.ones(2).double(), torch.tensor(2.0)]}

    def loss(p: Any, batch: Tensor) -> Tensor:
        assert [leaf.dtype for leaf in tree.leaves(p)] == [leaf.dtype for leaf in tree.leaves(params)]
        return sum((leaf.double() ** 2).sum() for leaf in tree.leaves(p)) + 0 * batch.sum()

    found = flatness(loss, params, ONE, rho=0.3, seed=0)
    assert found.lambda_max == pytest.approx(2, rel=1e-4)
    assert found.worst.value == pytest.approx(2 * 3 * 0.3 + 0.09, rel=1e-4)  # ‖p‖ = 3


def test_the_table_says_what_bounds_what() -> None:
    loss, params, data, *_ = net()
    found = flatness(loss, params, data, seed=0)
    assert isinstance(found, Flatness)
    lines = {line.split("  ")[0].strip() or line.strip().split("  ")[0]: line for line in str(found).splitlines()}
    assert "certified bound" in lines["λmax"]
    assert "≥" in lines["worst rise, ‖δ‖ ≤ 0.05"]
    assert "no bound of the loss" in lines["quadratic model"]
    assert f"{found.lambda_max:.6g}" in lines["λmax"]
    assert "Gauss–Newton" in lines["effective dimension"]


def relu_net() -> tuple[Any, list[dict[str, Tensor]], tuple[Tensor, Tensor]]:
    """A loss, and two points of the same function: the second has its layers scaled by 8 and 1/8."""
    with seeded():
        model = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)).double()
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
    scaled = {"0.weight": 8 * params["0.weight"].detach(), "2.weight": params["2.weight"].detach() / 8}
    return loss, [params, scaled], labelled(30, 3, 2)


def test_plain_measures_change_under_rescaling_and_relative_ones_do_not() -> None:
    """docs/flatness.md: the same function has any curvature (Dinh et al.), but in units of its weights (ASAM) one."""
    loss, points, data = relu_net()
    plainly, relative = [], []
    for at in points:

        def by_weight(u: Any, batch: Any, at: Any = at) -> Tensor:
            return loss({name: w.detach() * (1 + u[name]) for name, w in at.items()}, batch)

        plainly.append(flatness(loss, at, data, seed=0, num_steps=4))
        u = {name: torch.zeros_like(w) for name, w in at.items()}
        relative.append(flatness(by_weight, u, data, rho=0.3, tol=1e-6, num_steps=4, seed=0))
    assert plainly[1].loss == pytest.approx(plainly[0].loss, rel=1e-12)
    assert plainly[1].lambda_max > 10 * plainly[0].lambda_max
    assert plainly[1].trace.value > 10 * plainly[0].trace.value
    assert plainly[1].worst.value > 2 * plainly[0].worst.value
    one, other = relative
    assert other.lambda_max == pytest.approx(one.lambda_max, rel=1e-6)
    assert other.trace.value == pytest.approx(one.trace.value, rel=1e-6)
    assert other.worst.value == pytest.approx(one.worst.value, rel=1e-6)
    assert other.average.value == pytest.approx(one.average.value, rel=1e-6)
    H = hessian(loss, points[1], data).precondition({name: 1 / w.detach() ** 2 for name, w in points[1].items()})
    assert float(eigsh(H, 1, which="LA", tol=1e-6, seed=0).values[0]) == pytest.approx(one.lambda_max, rel=1e-6)


def test_the_code_in_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs" / "flatness.md").read_text(encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        exec(text.split("```python\n")[1].split("```")[0], {})
    assert "worst rise, ‖δ‖ ≤ 0.5" in capsys.readouterr().out


BAD: dict[str, dict[str, Any]] = {
    "no radius": {"rho": 0.0},
    "negative": {"rho": -1.0},
    "endless": {"rho": math.inf},
    "a flag": {"rho": True},
    "no spread": {"sigma": 0.0},
    "delta": {"delta": -0.1},
    "one sample": {"num_samples": 1},
    "half a step": {"num_steps": 0.5},
    "few products": {"num_matvecs": 3},
    "seed": {"seed": -1},
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_out_of_range_are_refused_before_the_loss_is_called(name: str) -> None:
    with pytest.raises(InputError):
        flatness(never, torch.ones(4).double(), ONE, **BAD[name])


def test_displacements_that_drown_in_the_rounding_of_the_parameters_are_refused() -> None:
    with pytest.raises(InputError, match=r"bfloat16.*wider dtype"):
        flatness(never, torch.ones(100).bfloat16(), ONE, rho=0.01)
    with pytest.raises(InputError, match="float32"):
        flatness(never, 1e6 * torch.ones(100), ONE, rho=0.05)
    with pytest.raises(InputError, match="float32"):
        flatness(never, 1e3 * torch.ones(100), ONE, rho=10.0, sigma=1e-7)


def test_losses_that_end_nearby_have_no_average_but_a_lower_bound() -> None:
    def loss(p: Tensor, batch: Tensor) -> Tensor:
        return -torch.log(1 - p).sum() + 0 * batch.sum()

    params = torch.zeros(2).double()
    with pytest.raises(DataError, match="no average"):
        average_sharpness(loss, params, ONE, rho=3.0, seed=0)
    found = worst_sharpness(loss, params, ONE, rho=2.0, seed=0)
    assert math.isnan(found.one_step)  # log of a negative number
    assert math.isfinite(found.value)
    with pytest.raises(DataError, match="the loss at the parameters"):
        average_sharpness(lambda p, b: loss(p, b) + math.inf, params, ONE, rho=0.1)
