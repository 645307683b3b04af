"""Outliers of classifiers: how many there are, that gradients live in their span, that batch norm suppresses them.

L. Sagun et al., Empirical analysis of the Hessian of over-parametrized neural networks, 2017; V. Papyan, Measurements
of three-level hierarchical structure in the outliers in the spectrum of deepnet Hessians, ICML 2019; G. Gur-Ari, D.
Roberts and E. Dyer, Gradient descent happens in a tiny subspace, 2018; B. Ghorbani, S. Krishnan and Y. Xiao, An
investigation into neural net optimization via Hessian eigenvalue density, ICML 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.science.setting import SEEDS, Json, Problem, cached, drawn, first, of_classes, slope
from eigenfunc import Solution, eigsh, ggn, hessian
from eigenfunc.overlap import gradient_overlap, subspace_overlap
from eigenfunc.stochastic.density import Density, spectral_density

CLASSES = (3, 5, 10)
LATE = (0.13, 0.08, 0.04)
SHARE_STEPS = (20, 50, *range(100, 401, 30))
Data = tuple[Tensor, Tensor]


def classifier(loss: str, classes: int) -> tuple[Problem, float]:
    """The network and its rate."""
    if loss == "ce":
        return Problem((64, 128, 128, classes), "relu", "ce"), 0.1
    return Problem((64, 64, 64, 64, classes), "relu", "mse"), 0.05


def levels(loss: str, classes: int) -> tuple[float, ...]:
    """Training losses at whose first crossing a snapshot is taken."""
    return (0.7 * math.log(classes), 0.4 * math.log(classes), 0.25) if loss == "ce" else (0.3, 0.2, 0.12)


def path(problem: Problem, rate: float, data: Data, batch: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """SGD: the parameters after each step, in place."""
    w = problem.start(seed).requires_grad_()
    for step, some in enumerate(drawn(data, batch, seed), 1):
        _, g = slope(problem, w, some)
        with torch.no_grad():
            w -= rate * g
        yield step, w.detach()


def at_levels(
    problem: Problem, rate: float, data: Data, batch: int, seed: int, losses: Iterable[float], most: int = 4000
) -> Iterator[tuple[int, float, Tensor]]:
    """Snapshots where the loss over all data first falls below each level."""
    left = list(losses)
    for step, w in path(problem, rate, data, batch, seed):
        if step % 2 == 0:
            with torch.no_grad():
                value = float(problem(w, data))
            while left and value < left[0]:
                left.pop(0)
                yield step, value, w
        if not left or step >= most:
            return


def gap(values: Tensor, last: int) -> tuple[int, float]:
    """The k ≤ `last` with the largest λ_k / λ_{k+1}, and that ratio."""
    ratios = values[:last] / values[1 : last + 1].clamp_min(1e-12)
    k = int(ratios.argmax())
    return k + 1, float(ratios[k])


def leading(make: Callable[..., Any], problem: Problem, w: Tensor, data: Data, k: int, tol: float = 1e-3) -> Solution:
    return eigsh(make(problem, w, data, check=False), k, which="LA", tol=tol, seed=0)


def count(loss: str, classes: int, seed: int, number: int | None = None) -> Json:
    """Outliers of the Hessian and of the Gauss–Newton matrix at snapshots of one run."""
    problem, rate = classifier(loss, classes)
    data = of_classes(classes)
    expected = classes - 1 if loss == "ce" else classes
    rows = []
    for step, value, w in at_levels(problem, rate, data, 64, seed, levels(loss, classes)[:number]):
        whole = leading(hessian, problem, w, data, 2 * classes + 3)
        part = leading(ggn, problem, w, data, 2 * classes + 3)
        (found, ratio), (other, _) = (gap(s.values, 2 * classes + 2) for s in (whole, part))
        tops = [{0: s.vectors[:expected]} for s in (whole, part)]
        rows.append({
            "step": step, "loss": value, "expected": expected, "hessian": found, "ggn": other, "gap": ratio,
            "overlap": float(subspace_overlap(*tops)), "values": whole.values.tolist(),
        })  # fmt: skip
    return {"rows": rows}


def late(classes: int, seed: int, losses: tuple[float, ...]) -> Json:
    """The count under cross-entropy, Hessian alone, where the window has been left."""
    problem, rate = classifier("ce", classes)
    data = of_classes(classes)
    rows = []
    for step, value, w in at_levels(problem, rate, data, 64, seed, losses):
        found, ratio = gap(leading(hessian, problem, w, data, 2 * classes + 3).values, 2 * classes + 2)
        rows.append({"step": step, "loss": value, "hessian": found, "gap": ratio})
    return {"rows": rows}


def shares(seed: int, steps: tuple[int, ...]) -> Json:
    """How much of the gradient, of batch gradients and of a random vector the ten top eigenvectors span."""
    problem, rate = classifier("ce", 10)
    data = first(1797)
    batches, rows = drawn(data, 64, 50 + seed), []
    for step, w in path(problem, rate, data, 64, seed):
        if step in steps:
            found = leading(hessian, problem, w, data, 10)
            small = [float(gradient_overlap(problem, w, next(batches), found)) for _ in range(5)]
            r = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))
            rows.append({
                "step": step, "full": float(gradient_overlap(problem, w, data, found)), "batch": sum(small) / 5,
                "random": float(((found.vectors @ r) ** 2).sum() / (r @ r)),
            })  # fmt: skip
        if step == max(steps):
            return {"rows": rows}
    raise AssertionError


def norms(seed: int) -> Json:
    """λ₁ and λ₁/λ₁₁ with and without batch norm, where the loss first falls below 0.2 and 0.1."""
    data = first(1000)
    found: Json = {}
    for name, normalised in (("without", False), ("with", True)):
        problem = Problem((64, 64, 64, 64, 10), "relu", "ce", normalised)
        found[name] = [
            {"step": step, "loss": value, "values": leading(hessian, problem, w, data, 11).values.tolist()}
            for step, value, w in at_levels(problem, 0.1, data, 128, seed, (0.2, 0.1))
        ]
    return found


def density(seed: int = 0) -> Density:
    """The spectrum at the second snapshot for ten classes, with nine outliers known."""
    problem, rate = classifier("ce", 10)
    data = first(1797)
    _, _, w = list(at_levels(problem, rate, data, 64, seed, levels("ce", 10)[:2]))[-1]
    A = hessian(problem, w, data, check=False)
    pairs = eigsh(A, 9, which="LA", tol=1e-3, seed=0)
    return spectral_density(A, num_probes=6, num_steps=60, pairs=pairs, seed=0)


def runs(folder: Path | None, seeds: Iterable[int] = SEEDS) -> Json:
    seeds = list(seeds)
    counts = {
        f"{loss}, C = {classes}": [cached(folder, "outliers", count, loss, classes, seed) for seed in seeds]
        for loss in ("ce", "mse")
        for classes in CLASSES
    }
    return {
        "counts": counts,
        "late": {str(c): [cached(folder, "late", late, c, seed, LATE) for seed in seeds] for c in CLASSES},
        "shares": [cached(folder, "shares", shares, seed, SHARE_STEPS) for seed in seeds],
        "norms": [cached(folder, "norms", norms, seed) for seed in seeds],
    }
