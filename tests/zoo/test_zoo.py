"""Every case of the zoo: right, or refused where no right answer exists, and never wrong."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.zoo.check import Kind, coarseness, outcome, tolerance
from tests.zoo.everything import CASES

NAMES = [pytest.param(name, marks=[pytest.mark.zoo] if case.needs else []) for name, case in CASES.items()]
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]


def _skip_without_packages(name: str) -> None:
    if missing := CASES[name].missing():
        pytest.skip(f"{name} needs {', '.join(missing)}")


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_three_times_finer_than_what_is_asked(name: str) -> None:
    _skip_without_packages(name)
    for dtype in (torch.float64, torch.float32):
        assert 3 * coarseness(name, dtype) <= tolerance(CASES[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_hessian_is_right_or_refused_where_no_second_derivative_exists(name: str, dtype: torch.dtype) -> None:
    _skip_without_packages(name)
    found = outcome(name, dtype, "hessian")
    allowed = {"right", "refused"} if CASES[name].refusable else {"right"}
    assert found.verdict in allowed, f"{found.verdict}, off by {found.worst:.1e}: {found.words}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_hvp_is_right_or_raises(name: str, dtype: torch.dtype) -> None:
    _skip_without_packages(name)
    found = outcome(name, dtype, "hvp")
    assert found.verdict != "WRONG", f"off by {found.worst:.1e}: {found.words}"


def _counts(kind: Kind) -> Counter[str]:
    """Verdicts over all cases and both precisions; "excused" are refusals of what has no second derivative."""
    for name in CASES:
        _skip_without_packages(name)
    counts: Counter[str] = Counter()
    for name, case in CASES.items():
        for dtype in (torch.float64, torch.float32):
            verdict = outcome(name, dtype, kind).verdict
            counts["excused" if case.refusable and verdict != "right" and verdict != "WRONG" else verdict] += 1
    return counts


@pytest.mark.zoo
def test_hessian_is_right_on_19_of_20() -> None:
    """Of all cases, those that are rightly refused not left out."""
    counts = _counts("hessian")
    assert counts["right"] >= 0.95 * counts.total(), counts


@pytest.mark.zoo
def test_hvp_is_right_on_4_of_5() -> None:
    counts = _counts("hvp")
    assert counts["right"] >= 0.8 * counts.total(), counts
