"""What a search for false statements has found, each mended."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor

from eigenfunc.eigsh import eigsh


def _diagonal_with_cut_pair(n: int, k: int, gap: float) -> Tensor:
    """Falling values of which the k-th and the next are `gap` apart."""
    values = torch.linspace(1, -0.5, n, dtype=torch.float64)
    values[k] = values[k - 1] - gap
    return values


@settings(max_examples=25, deadline=None)
@example(n=12, k=3, power=-11, which="LA", seed=1)
@given(
    n=st.integers(6, 24),
    k=st.integers(1, 4),
    power=st.floats(-12, -2),
    which=st.sampled_from(["LA", "SA", "BE"]),
    seed=st.integers(0, 99),
)
def test_angles_know_of_the_next_pair_where_the_basis_holds_the_whole_space(
    n: int, k: int, power: float, which: str, seed: int
) -> None:
    values = _diagonal_with_cut_pair(n, k, 10**power)
    sign = -1.0 if which == "SA" else 1.0
    solution = eigsh(torch.diag(sign * values), (k, 1) if which == "BE" else k, which=which, seed=seed)
    for rank, claimed in enumerate(solution.angles[:k].tolist()):
        vector = solution.vectors[rank].clone()
        vector[rank] = 0
        assert float(torch.linalg.vector_norm(vector)) <= claimed
