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

from eigenfunc import Solution, eigsh, hessian, plot
from eigenfunc.errors import InputError
from eigenfunc.landscape import landscape
from eigenfunc.stochastic.density import Density, spectral_density
from tests.test_landscape import quadratic, small


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


def estimated(outliers: list[float], **on: Any) -> Density:
    """The density of a matrix with a bulk in [0, 1], and with pairs that are known."""
    g = torch.Generator().manual_seed(0)
    entries = torch.cat([torch.tensor(outliers, dtype=torch.float64), torch.rand(60, generator=g).double()])
    vectors = torch.eye(len(entries), dtype=torch.float64)[: len(outliers)]
    pairs = SimpleNamespace(vectors=vectors) if outliers else None
    made = spectral_density(torch.diag(entries), num_probes=3, num_steps=20, pairs=pairs, seed=0)
    return made.on(**on) if on else made


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
    assert [tick for tick in axes.get_xticks() if 0.3 < tick < 1.7] == [1] or len(values) > 1
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


@pytest.mark.parametrize("outliers", [[], [5.0], [2e-2, 1e4, -30.0]])
@pytest.mark.parametrize("on", [{}, {"threshold": 1e-2}, {"grid": [0.0, 0.5, 1.0, 2.0]}])
def test_a_density_is_drawn_as_it_is(outliers: list[float], on: dict[str, Any]) -> None:
    density = estimated(outliers, **on)
    axes = plot.density(density)
    curve = axes.lines[0]
    np.testing.assert_array_equal(curve.get_xdata(), density.grid.numpy())
    floor = axes.get_ylim()[0]
    above = density.density.numpy() > floor
    assert above.sum() >= 3
    np.testing.assert_array_equal(np.asarray(curve.get_ydata())[above], density.density.numpy()[above])
    assert (np.asarray(curve.get_ydata())[~above] <= floor).all()
    corners = axes.collections[0].get_paths()[0].vertices
    for upper, row in ((False, density.band[0]), (True, density.band[1])):
        for x, y in zip(density.grid.tolist(), row.tolist(), strict=True):
            at = corners[corners[:, 0] == x][:, 1]
            shown = at.max() if upper else at.min()
            assert shown == y if y > floor else shown <= floor
    marks = [sorted(line.get_xdata()) for line in axes.lines[1:]]
    assert marks == ([pytest.approx(sorted(outliers))] if outliers else [])
    assert (axes.get_xscale(), axes.get_yscale()) == ("symlog" if len(outliers) > 1 else "linear", "log")
    low, high = axes.get_xlim()
    assert all(low <= x <= high for x in [*density.grid.tolist(), *outliers])
    assert axes.get_ylim()[1] > float(density.band.max())
    assert f"n = {60 + len(outliers)}" in axes.get_title()


def test_eigenvalues_that_stand_alone_are_above_the_lower_edge() -> None:
    g = torch.Generator().manual_seed(0)
    alone = [1.0, 10.0, 100.0, 1000.0]
    entries = torch.cat([torch.tensor(alone).double(), 1e-3 * torch.rand(200, generator=g).double()])
    density = spectral_density(torch.diag(entries), num_probes=3, num_steps=20, seed=0).on(threshold=1e-3)
    axes = plot.density(density)
    x, y = (np.asarray(row) for row in axes.lines[0].get_data())
    for value in alone:
        assert y[np.abs(x - value).argmin()] > axes.get_ylim()[0]


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
