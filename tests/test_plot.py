"""The numbers in the pictures are those of the results, and nothing else is touched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from eigenfunc import Batches, Solution, eigsh, functional_loss, hessian, plot, tree
from eigenfunc.errors import DataError, InputError, TreeError
from eigenfunc.landscape import landscape
from tests.helpers import rotated, untouched


def solved(values: list[float], converged: list[bool] | None = None, vectors: Any = None) -> Solution:
    """A solution with these values, bounds of a hundredth of them, and vectors of choice."""
    k = len(values)
    made = eigsh(torch.eye(k).double(), k, seed=0)
    numbers = torch.tensor(values, dtype=torch.float64)
    return replace(
        made,
        values=numbers,
        bounds=numbers.abs() / 100,
        converged=torch.tensor([True] * k if converged is None else converged),
        vectors=made.vectors if vectors is None else vectors,
    )


def estimated(outliers: list[float], seed: int = 0) -> Any:
    """What a density looks like to the picture."""
    g = torch.Generator().manual_seed(seed)
    nodes = torch.rand(4, 10, generator=g).double()
    grid = torch.linspace(-0.5, 1.5, 40).double()
    height = torch.exp(-(grid**2)) * torch.rand(40, generator=g).double()
    return SimpleNamespace(
        grid=grid,
        density=height,
        band=torch.stack([height / 2, height * 2]),
        nodes=nodes,
        weights=torch.full((4, 10), 0.1).double(),
        values=torch.tensor(outliers, dtype=torch.float64),
        n=100,
        width=0.05,
        threshold=None,
    )


def small() -> tuple[Any, Any, Batches, nn.Module]:
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(14, 3, generator=g).double(), torch.randint(0, 2, (14,), generator=g)
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
    return loss, params, Batches(list(zip(inputs.split(10), targets.split(10), strict=True))), model


def quadratic() -> tuple[Callable[..., Tensor], Tensor, Tensor, Solution]:
    """½ (p − c)ᵀ A (p − c) + 1, of which the quadratic model is all there is."""
    A = rotated(torch.tensor([4.0, 2.0, 1.0, -1.0]), 0)
    centre = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()

    def loss(p: Tensor, batch: Tensor) -> Tensor:
        return (p - centre) @ A @ (p - centre) / 2 + 1 + 0 * batch.sum()

    return loss, torch.zeros(4).double(), A, eigsh(A, 4, which="LA", seed=0)


def pictures() -> dict[str, Callable[..., Axes]]:
    loss, params, _, solution = quadratic()
    tree_like = {"a.weight": torch.rand(3, 2, 2), "a.bias": torch.rand(3, 2), "b.weight": torch.rand(3, 4)}
    return {
        "spectrum": lambda **kw: plot.spectrum(solved([3.0, -0.1, 1e-4], [True, True, False]), **kw),
        "density": lambda **kw: plot.density(estimated([1e3, -4.0]), **kw),
        "layers": lambda **kw: plot.layers({"a": solved([2.0, 1.0]), "b": solved([1.0, -1.0], [True, False])}, **kw),
        "vector_norms": lambda **kw: plot.vector_norms(solved([3.0, 2.0, 1.0], vectors=tree_like), **kw),
        "landscape": lambda **kw: plot.landscape(loss, params, torch.zeros(1), solution, points=5, **kw),
        "line": lambda **kw: plot.landscape(loss, params, torch.zeros(1), solution, 0, points=5, **kw),
    }


@pytest.mark.parametrize("name", pictures())
def test_pictures_return_their_axes_and_leave_matplotlib_alone(name: str) -> None:
    before = dict(matplotlib.rcParams)
    draw = pictures()[name]
    own = draw()
    assert isinstance(own, Axes)
    assert own.get_title()
    assert own.get_xlabel()
    figure = Figure()
    given_axes = figure.subplots(1, 2)[1]
    assert draw(ax=given_axes) is given_axes
    figure.canvas.draw()
    assert given_axes.has_data()
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported() -> None:
    code = "import sys, torch; from eigenfunc import eigsh, plot; plot.spectrum(eigsh(torch.eye(3), 2)).figure.canvas"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + "; assert 'matplotlib.pyplot' not in sys.modules"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", pictures())
def test_no_two_labels_of_an_axis_overlap(name: str) -> None:
    axes = pictures()[name]()
    figure: Any = axes.figure
    figure.canvas.draw()
    for axis in (axes.xaxis, axes.yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
        inside = [box for box in boxes if figure.bbox.fully_overlaps(box)]
        for i, box in enumerate(inside):
            assert not any(box.overlaps(other) for other in inside[i + 1 :]), axis
    for box in (axes.title.get_window_extent(), axes.xaxis.label.get_window_extent()):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_without_matplotlib_the_remedy_is_named(monkeypatch: Any) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"eigenfunc\[plot\]"):
        plot.spectrum(solved([1.0]))


def groups(axes: Axes) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """Ranks, values and bounds, by the label of the group."""
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container
        lengths = [abs(top[1] - bottom[1]) / 2 for bottom, top in bars.get_segments()]
        found[str(container.get_label())] = (list(line.get_xdata()), list(line.get_ydata()), lengths)
    return found


SIZES = st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.floats(-1e6, -1e-6))


@given(st.lists(st.tuples(SIZES, st.booleans()), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_a_spectrum_shows_each_value_bound_and_verdict(pairs: list[tuple[float, bool]]) -> None:
    values, verdicts = (list(row) for row in zip(*pairs, strict=True))
    solution = replace(solved(values, verdicts), bounds=torch.tensor([abs(v) / 3 for v in values]).double())
    axes = plot.spectrum(solution)
    seen: dict[int, tuple[float, float, str]] = {}
    for label, columns in groups(axes).items():
        for rank, value, bound in zip(*columns, strict=True):
            seen[int(rank)] = (value, bound, label.split(" (")[0])
    assert sorted(seen) == list(range(1, len(values) + 1))
    low, high = axes.get_ylim()
    for rank, (value, ok) in enumerate(pairs, start=1):
        shown, bound, label = seen[rank]
        assert shown == value
        assert bound == pytest.approx(abs(value) / 3, rel=1e-6)
        sign = "positive" if value > 0 else "negative" if value < 0 else "zero within the bound"
        assert label == (sign if ok else "not converged")
        assert low <= value <= high


def test_a_bound_that_reaches_zero_leaves_the_sign_open() -> None:
    solution = replace(solved([1.0, 0.1, -0.1]), bounds=torch.tensor([0.1, 0.1, 0.2]).double())
    labels = [label.get_text() for label in plot.spectrum(solution).get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels == ["positive (1)", "zero within the bound (2)"]
    assert "3 of 3" in plot.spectrum(solution).get_title()


@pytest.mark.parametrize("outliers", [[], [5.0], [1e-2, 1e4, -30.0]])
def test_a_density_is_drawn_as_it_is(outliers: list[float]) -> None:
    density = estimated(outliers)
    axes = plot.density(density)
    curve = axes.lines[0]
    np.testing.assert_array_equal(curve.get_xdata(), density.grid.numpy())
    floor = axes.get_ylim()[0]
    above = density.density.numpy() > floor
    assert above.sum() > 20
    np.testing.assert_array_equal(np.asarray(curve.get_ydata())[above], density.density.numpy()[above])
    corners = axes.collections[0].get_paths()[0].vertices
    for line, row in zip((1, 0), density.band.flip(0), strict=True):
        for x, y in zip(density.grid.tolist(), row.tolist(), strict=True):
            if y > floor:
                at = corners[corners[:, 0] == x][:, 1]
                assert (at.max() if line else at.min()) == y
    marks = [list(line.get_xdata()) for line in axes.lines[1:]]
    assert marks == ([outliers] if outliers else [])
    assert axes.get_yscale() == "log"
    low, high = axes.get_xlim()
    assert all(low <= x <= high for x in [*density.grid.tolist(), *outliers])
    assert axes.get_xscale() == ("symlog" if any(abs(x) > 20 for x in outliers) else "linear")


def cells(axes: Axes) -> np.ndarray:
    return np.ma.filled(axes.images[0].get_array().astype(float), np.nan)  # type: ignore[union-attr]


def hatched(axes: Axes) -> set[tuple[int, int]]:
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]
    return {(round(patch.get_y() + 0.5), round(patch.get_x() + 0.5)) for patch in patches}


def words(axes: Axes) -> dict[tuple[int, int], str]:
    return {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}


def test_layers_are_rows_of_values_with_the_unconverged_hatched() -> None:
    solutions = {
        "a.very.long.name.of.a.layer.that.goes.on.and.on.and.on.weight": solved([10.0, -2.0, 0.5]),
        "b": solved([1e-5, 0.0], [True, False]),
    }
    axes = plot.layers(solutions)
    np.testing.assert_array_equal(cells(axes), [[10.0, -2.0, 0.5], [1e-5, 0.0, np.nan]])
    assert hatched(axes) == {(1, 1)}
    assert words(axes) == {(0, 0): "10", (0, 1): "−2", (0, 2): "0.5", (1, 0): "1.0e-5", (1, 1): "0"}
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0].startswith("…")
    assert labels[0].endswith("on.weight")
    assert labels[1] == "b"
    assert "4 of 5 certified" in axes.get_title()
    with pytest.raises(InputError, match="no solution"):
        plot.layers({})


def test_colours_say_the_sign() -> None:
    image = plot.layers({"a": solved([10.0, 0.1, -0.1, -10.0, 0.0])}).images[0]
    red, _, blue, _ = image.to_rgba(image.get_array())[0].T  # type: ignore[union-attr]
    assert (blue[:2] > red[:2]).all()
    assert (blue[2:4] < red[2:4]).all()
    assert red[4] == pytest.approx(blue[4], abs=0.02)


NAMES = ("10.weight", "2.weight", "2.bias", "head")


@pytest.mark.parametrize(
    ("by", "rows"),
    [
        ("parameter", [["10.weight"], ["2.weight"], ["2.bias"], ["head"]]),
        ("module", [["10.weight"], ["2.weight", "2.bias"], ["head"]]),
        (["2", "*.weight"], [["2.weight", "2.bias"], ["10.weight", "2.weight"]]),
        (lambda name: name[-1], [["10.weight", "2.weight"], ["2.bias"], ["head"]]),
    ],
)
def test_shares_of_the_squared_norm_by_layer(by: Any, rows: list[list[str]]) -> None:
    """In the order of the user's own dict, not of the sorted one."""
    g = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(3, 2, i + 1, generator=g) for i, name in enumerate(NAMES)}
    axes = plot.vector_norms(solved([3.0, 2.0, 1.0], [True, True, False], vectors), by=by)
    squares = {name: (x.double() ** 2).sum((1, 2)).numpy() for name, x in vectors.items()}
    total = sum(squares.values())
    truth = [100 * sum(squares[name] for name in row) / total for row in rows]
    np.testing.assert_allclose(cells(axes), truth, rtol=1e-6)
    assert hatched(axes) == {(i, 2) for i in range(len(rows))}
    assert float(words(axes)[0, 0]) == pytest.approx(truth[0][0], abs=0.5)


def test_a_bare_vector_has_one_row_and_nonsense_is_refused() -> None:
    axes = plot.vector_norms(solved([2.0, 1.0]))
    np.testing.assert_allclose(cells(axes), [[100, 100]])
    with pytest.raises(InputError, match="'module', 'parameter'"):
        plot.vector_norms(solved([1.0]), by="layer")


def test_a_quadratic_loss_is_its_model_everywhere() -> None:
    loss, params, _, solution = quadratic()
    found = landscape(loss, params, torch.zeros(1), solution, (3, 1), radius=2.0, points=7)
    assert found.offsets.tolist() == pytest.approx([-2, -4 / 3, -2 / 3, 0, 2 / 3, 4 / 3, 2])
    u, v = solution.vectors[3], solution.vectors[1]
    for i, x in enumerate(found.offsets):
        for j, y in enumerate(found.offsets):
            assert found.losses[i, j] == pytest.approx(float(loss(params + x * u + y * v, torch.zeros(1))), rel=1e-12)
    torch.testing.assert_close(found.model, found.losses, rtol=1e-11, atol=1e-11)
    line = landscape(loss, params, torch.zeros(1), solution, 2, radius=2.0, points=5)
    torch.testing.assert_close(line.model, line.losses, rtol=1e-11, atol=1e-11)
    default = landscape(loss, params, torch.zeros(1), solution, (2, 0), points=3)
    assert float(default.offsets[-1]) == pytest.approx((2 * abs(float(loss(params, torch.zeros(1)))) / 4) ** 0.5)


def test_the_landscape_is_that_of_the_whole_data_and_touches_nothing() -> None:
    """Uneven batches by their weight, dropout with one mask, batch norm in train mode: against the loss by hand."""
    loss, params, data, model = small()
    solution = eigsh(hessian(loss, params, data), 2, seed=0)
    with untouched(model):
        found = landscape(loss, params, data, solution, points=3, radius=0.5)
        again = landscape(loss, params, data, solution, points=3, radius=0.5)
    assert torch.equal(found.losses, again.losses)
    plain, _ = functional_loss(model.eval(), nn.CrossEntropyLoss())
    found = landscape(plain, params, data, solution, points=3, radius=0.5)
    (first, second) = data
    for i, x in enumerate((-0.5, 0.0, 0.5)):
        for j, y in enumerate((-0.5, 0.0, 0.5)):
            at = {name: p + x * solution.vectors[name][0] + y * solution.vectors[name][1] for name, p in params.items()}
            truth = (10 * plain(at, first) + 4 * plain(at, second)) / 14
            assert found.losses[i, j] == pytest.approx(float(truth), rel=1e-12)


def test_random_losses_draw_the_same_at_every_point() -> None:
    """A random linear function is straight along any line only if its slope stays the same."""

    def loss(p: Tensor, batch: Tensor) -> Tensor:
        return (torch.rand(4, dtype=torch.float64) * p).sum() + 1 + 0 * batch.sum()

    data = Batches([torch.zeros(2), torch.ones(3)])
    state = torch.get_rng_state()
    found = landscape(loss, torch.ones(4).double(), data, quadratic()[3], (0, 1), radius=1.0, points=5)
    assert torch.equal(state, torch.get_rng_state())
    assert (found.losses[1:] - found.losses[:-1]).std(0).max() < 1e-12
    assert found.losses.std() > 1e-3


def test_a_landscape_is_drawn_as_it_is() -> None:
    loss, params, data, _ = small()
    solution = eigsh(hessian(loss, params, data), 2, seed=0)
    found = landscape(loss, params, data, solution, 1, points=5)
    axes = plot.landscape(loss, params, data, solution, 1, points=5)
    for line, numbers in zip(axes.lines, (found.losses, found.model), strict=True):
        assert list(line.get_xdata()) == found.offsets.tolist()
        assert list(line.get_ydata()) == numbers.tolist()
    assert "eigenvector 1" in axes.get_xlabel()
    plane = landscape(loss, params, data, solution, (1, 0), points=5)
    axes = plot.landscape(
        loss, params, data, replace(solution, converged=torch.tensor([True, False])), (1, 0), points=5
    )
    filled, model = axes.collections
    for drawn, numbers in ((filled, plane.losses), (model, plane.model)):
        assert drawn.zmin == pytest.approx(float(numbers.min()))  # type: ignore[attr-defined]
        assert drawn.zmax == pytest.approx(float(numbers.max()))  # type: ignore[attr-defined]
    assert "eigenvector 1" in axes.get_xlabel()
    assert "not converged" in axes.get_xlabel()
    assert "eigenvector 0" in axes.get_ylabel()
    assert "not converged" not in axes.get_ylabel()


def test_losses_that_blow_up_away_from_the_parameters_leave_a_gap() -> None:
    def loss(p: Tensor, batch: Tensor) -> Tensor:
        return torch.log(1 + p).sum() + 2 + 0 * batch.sum()

    params = torch.zeros(2).double()
    solution = eigsh(hessian(loss, params, torch.zeros(1)), 2, seed=0)
    found = landscape(loss, params, torch.zeros(1), solution, radius=2.0, points=5)
    assert found.losses.isnan().any()
    assert found.losses[2, 2] == 2
    plot.landscape(loss, params, torch.zeros(1), solution, radius=2.0, points=5).figure.canvas.draw()  # type: ignore[union-attr]


BAD: dict[str, dict[str, Any]] = {
    "no pair": {"pairs": ()},
    "three pairs": {"pairs": (0, 1, 2)},
    "twice the same": {"pairs": (1, 1)},
    "beyond the last": {"pairs": (0, 4)},
    "negative": {"pairs": -1},
    "not whole": {"pairs": (0.5, 1)},
    "even": {"points": 4},
    "one point": {"points": 1},
    "no radius": {"radius": 0.0},
    "endless": {"radius": float("inf")},
}


@pytest.mark.parametrize("name", BAD)
def test_landscapes_out_of_range_are_refused_before_the_loss_is_called(name: str) -> None:
    def loss(p: Tensor, batch: Tensor) -> Tensor:
        raise AssertionError("the loss was called")

    with pytest.raises(InputError):
        landscape(loss, torch.zeros(4).double(), torch.zeros(1), quadratic()[3], **BAD[name])


def test_vectors_of_another_tree_and_losses_without_a_value_are_refused() -> None:
    loss, params, _, solution = quadratic()
    with pytest.raises(TreeError, match=r"solution\.vectors"):
        landscape(loss, {"a": params}, torch.zeros(1), solution)
    with pytest.raises(DataError, match="no landscape"):
        landscape(lambda p, b: loss(p, b) + float("inf"), params, torch.zeros(1), solution)


def test_a_half_precision_point_and_a_bundle_of_leaves_keep_their_dtypes() -> None:
    params = {"z": torch.ones(3).bfloat16(), "a": [torch.ones(2), torch.tensor(2.0)]}

    def loss(p: Any, batch: Tensor) -> Tensor:
        assert [leaf.dtype for leaf in tree.leaves(p)] == [leaf.dtype for leaf in tree.leaves(params)]
        return sum((leaf.float() ** 2).sum() for leaf in tree.leaves(p)) + 0 * batch.sum()

    vectors = tree.tree_map(lambda leaf: torch.ones_like(leaf)[None] / 6**0.5, params)
    solution = replace(solved([2.0]), vectors=vectors)
    found = landscape(loss, params, torch.zeros(1), solution, 0, radius=1.0, points=3)
    assert found.losses.tolist() == pytest.approx([9 + 1 - 2 * 7 / 6**0.5, 9.0, 9 + 1 + 2 * 7 / 6**0.5], rel=5e-3)
