"""Every function under every transform, as docs/composition.md says."""

from __future__ import annotations

import pytest
from torch._dynamo.utils import counters

from eigenfunc import tree
from eigenfunc.errors import TransformError
from tests.composition import FUNCTIONS, PAGE, REFUSED, TRANSFORMS, Function, renewed

CELLS = [(f, t) for f in FUNCTIONS for t in TRANSFORMS if (f, t) not in REFUSED]


def assert_holds(found: object, truth: object, tolerance: float) -> None:
    ours, theirs = tree.leaves(found), tree.leaves(truth)
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    size = max(float(y.abs().max()) for y in theirs)
    assert size > 1e-2
    assert max(float((x - y).abs().max()) for x, y in zip(ours, theirs, strict=True)) <= tolerance * size


@pytest.mark.parametrize(("function", "transform"), CELLS)
def test_cell(function: str, transform: str) -> None:
    counters.clear()
    column = TRANSFORMS[transform]
    assert_holds(*column.pair(FUNCTIONS[function]), column.tolerance)
    assert not counters["graph_break"]


@pytest.mark.parametrize(("function", "transform"), REFUSED)
def test_what_is_refused_says_so(function: str, transform: str) -> None:
    raised = Exception if "compile" in transform else TransformError
    with pytest.raises(raised, match="TransformError" if "compile" in transform else "nested"):
        TRANSFORMS[transform].pair(FUNCTIONS[function])


def test_a_wrong_derivative_would_be_noticed() -> None:
    whole = FUNCTIONS["hvp"]
    lossy = Function(whole.call, lambda *at: whole.run(*at) + 1e-3 * (whole.run(*at).detach()), whole.truth, 1)
    for transform in ("grad", "jvp", "jacrev"):
        with pytest.raises(AssertionError):
            assert_holds(*TRANSFORMS[transform].pair(lossy), TRANSFORMS[transform].tolerance)


def test_the_page_is_the_one_that_the_registry_gives() -> None:
    assert PAGE.read_text() == renewed(PAGE.read_text()), "run `python -m tests.composition`"
    assert all(f.call in PAGE.read_text() for f in FUNCTIONS.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiled_for_real(function: str) -> None:
    for transform in ("compile", "compile∘grad"):
        if (function, transform) not in REFUSED:
            column = TRANSFORMS[transform]
            assert_holds(*column.pair(FUNCTIONS[function], "inductor"), column.tolerance)  # type: ignore[call-arg]
