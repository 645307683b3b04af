"""Hypothesis strategies: spectra, parameter trees, operators and solver cases that shrink to readable ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from eigenfunc.operator import LinearOperator
from eigenfunc.testing.layouts import LAYOUTS, parameter_tree
from eigenfunc.testing.losses import LOSSES, SmallLoss, small_loss
from eigenfunc.testing.problems import EXTREMES, TOLERANCES, WHICH, Case, Problem
from eigenfunc.testing.spectra import FAMILIES, spectrum
from eigenfunc.tree import Tree

DTYPES = tuple(EXTREMES)
_SEEDS = st.integers(0, 2**16)


@st.composite
def _sized(draw: st.DrawFn, families: Sequence[str], min_n: int, max_n: int) -> tuple[str, int]:
    family = draw(st.sampled_from(families))
    own = [n for n in FAMILIES[family].sizes if min_n <= n <= max_n]
    sizes = st.integers(min_n, min(max_n, FAMILIES[family].largest))
    return family, draw(st.one_of(sizes, st.sampled_from(own)) if own else sizes)


@st.composite
def spectra(draw: st.DrawFn, *, families: Sequence[str] = tuple(FAMILIES), min_n: int = 1, max_n: int = 210) -> Tensor:
    """(n,) float64 eigenvalues, unordered and of magnitude about one, of the families that break solvers."""
    family, n = draw(_sized(families, min_n, max_n))
    return spectrum(family, n, draw(_SEEDS))


def scales(dtype: str = "float64") -> st.SearchStrategy[float]:
    """1, another ordinary factor, or one at which squares leave the range: 1e±200 in float64, 1e±25 in float32."""
    far = EXTREMES[dtype]
    ordinary = st.integers(-6, 6).map(lambda power: 10.0**power)
    return st.one_of(st.sampled_from([1.0, -1.0]), ordinary, st.sampled_from([10.0**far, 10.0**-far]))


@st.composite
def parameter_trees(
    draw: st.DrawFn, *, layouts: Sequence[str] = LAYOUTS, dtypes: Sequence[str] = DTYPES, max_n: int = 60
) -> Tree:
    """Pytrees of float tensors, all zero: a bare one, or dicts, lists, tuples, named tuples and nests of them, with
    leaves of all shapes, () and (0,) among them. At least one entry in all."""
    dtype: torch.dtype = getattr(torch, draw(st.sampled_from(dtypes)))
    return parameter_tree(draw(st.integers(1, max_n)), draw(st.sampled_from(layouts)), draw(_SEEDS), dtype)


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    dtypes: Sequence[str] = DTYPES,
    min_n: int = 1,
    max_n: int = 210,
    scaled: bool = True,
) -> Problem:
    """Symmetric operators of known spectrum on any tree: `.operator()`, `.values`, `.truth`; see `Problem`."""
    family, n = draw(_sized(families, min_n, max_n))
    dtype = draw(st.sampled_from(dtypes))
    return Problem(
        family,
        n,
        seed=draw(_SEEDS),
        dtype=dtype,
        scale=draw(scales(dtype)) if scaled else 1.0,
        shift=draw(st.sampled_from([0.0, 0.0, 0.5, -0.5, 2.0])),
        layout=draw(st.sampled_from(LAYOUTS)),
        dense=n <= 400 and draw(st.booleans()),
    )


def operators(
    *,
    families: Sequence[str] = tuple(FAMILIES),
    dtypes: Sequence[str] = DTYPES,
    min_n: int = 1,
    max_n: int = 210,
    scaled: bool = False,
) -> st.SearchStrategy[LinearOperator]:
    """Symmetric `LinearOperator`s of every family on any tree; use `problems` to know their eigenvalues."""
    drawn = problems(families=families, dtypes=dtypes, min_n=min_n, max_n=max_n, scaled=scaled)
    return drawn.map(lambda problem: problem.operator())


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    dtypes: Sequence[str] = DTYPES,
    which: Sequence[str] = WHICH,
    max_k: int = 8,
    max_n: int = 210,
    scaled: bool = True,
    tols: Sequence[float] | None = None,
) -> Case:
    """A problem and what is asked about it, for solvers; `tols` None takes what suits the dtype."""
    problem = draw(problems(families=families, dtypes=dtypes, max_n=max_n, scaled=scaled))
    return Case(
        problem,
        k=draw(st.integers(1, min(max_k, problem.n))),
        which=draw(st.sampled_from(which)),
        tol=draw(st.sampled_from(tols or TOLERANCES[problem.dtype])),
        seed=draw(_SEEDS),
    )


@st.composite
def small_losses(draw: st.DrawFn, *, kinds: Sequence[str] = tuple(LOSSES)) -> SmallLoss:
    """Losses `(params, batch) -> ()` with their Hessians in closed form; see `SmallLoss`."""
    return small_loss(draw(st.sampled_from(kinds)), draw(_SEEDS))
