"""How far an eigenvalue over the data at hand may be from that over the population the data was drawn from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.curvature.denominators import batches_of
from eigenfunc.curvature.hessian import hessian
from eigenfunc.curvature.products import Loss
from eigenfunc.data import Reader
from eigenfunc.errors import DataError
from eigenfunc.operator import LinearOperator
from eigenfunc.solution import Solution
from eigenfunc.tree import Tree


def sampling_error(
    loss: Loss,
    params: Tree,
    data: Any,
    solution: Solution,
    *,
    matrix: Callable[..., LinearOperator] = hessian,
) -> Tensor:
    """Standard errors (k,) float64 of the eigenvalues of `solution` as estimates of those of the population.

    data    what `solution` was found over, as batches drawn independently of one another (in shuffled order, say);
            two at least, better twenty, for the error is as uncertain as the variance of so few numbers
    matrix  what `solution` belongs to: `hessian`, `ggn`, `fisher`

    One pass with k products a batch. To first order an eigenvalue moves by vᵀ ΔH v when the matrix does by ΔH
    (Parlett, The Symmetric Eigenvalue Problem, section 4.5), so that its variance is that of the weighted mean of the
    vᵀ H_b v over batches, a ratio of two sums (W. Cochran, Sampling Techniques, 1977, section 6.3). What is left out
    is of second order: the largest eigenvalue is a convex function of the matrix, so by Jensen's inequality that over
    a sample lies above the population's on average, by about Σ_j Var(v_jᵀ H v) / (λ − λ_j), and the smallest below.
    Where eigenvalues are closer than these errors, values and errors describe the group and not each by itself.

    Raises `DataError` for fewer than two batches with weight, `TreeError` where vectors and parameters do not match.
    """
    tree.check_like(solution.vectors, params, "solution.vectors", stacked=True, dtypes=False)
    device = tree.device(params)
    vectors = tree.tree_map(lambda x, ref: x.detach().to(ref), solution.vectors, params)
    lengths = tree.dots(vectors, vectors)
    batches = replace(batches_of(loss, data), device=None)
    reader = Reader(batches_of(loss, data).on(device), device)
    weights, quotients = [], []
    for _, weight, batch in reader.one_pass():
        if weight > 0:
            A = matrix(loss, params, replace(batches, data=[batch], microbatch=None), cache=0, check=False)
            quotients.append((tree.dots(vectors, A.matmat(vectors)) / lengths).cpu())
            weights.append(weight)
    count = len(weights)
    if count < 2:
        raise DataError(f"the sampling error needs two batches with weight at least, the data has {count}")
    w, q = torch.tensor(weights, dtype=torch.float64), torch.stack(quotients)
    whole = w.sum()
    unit = q.abs().amax().clamp_min(torch.finfo(q.dtype).tiny)  # squares may leave the range of float64
    q = q / unit
    spread = torch.linalg.vector_norm(w[:, None] * (q - (w @ q) / whole), dim=0) * math.sqrt(count / (count - 1)) * unit
    error: Tensor = spread if batches.reduction == "sum" else spread / whole
    return error
