"""The examples of the documentation run, and show what they say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent.parent / "docs" / "examples"


def run(name: str) -> Any:
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"]()


def test_training_that_pays_for_sharpness_ends_flatter_and_as_well() -> None:
    results = run("flat_training")
    (plain, sharp), (regularised, flat) = results[0.0], results[0.3]
    assert flat < 0.7 * sharp
    assert regularised < plain + 0.05


def test_the_derivative_by_the_input_scale_is_that_of_differences() -> None:
    first, difference, second = run("input_scale")
    assert abs(first - difference) < 1e-6 * abs(difference)
    assert torch.isfinite(second)


def test_an_ensemble_comes_out_in_one_call() -> None:
    values, residuals = run("ensemble")
    assert values.shape == (5, 4)
    assert residuals.max() < 1e-8


def test_every_sample_has_a_sharpness() -> None:
    values, losses = run("per_sample")
    assert values.shape == losses.shape == (40,)
    assert (values > 0).all()


def test_the_saddle_free_step_leaves_the_last_saddle_where_descent_still_waits() -> None:
    slow, fast = run("saddle_free").values()
    waiting = 0.003**2 / 2  # the loss before the last mode is learnt
    assert ((slow > 0.7 * waiting) & (slow < 1.3 * waiting)).all()
    assert fast.max() < 1e-3 * waiting
