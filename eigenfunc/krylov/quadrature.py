"""Gauss quadrature for the spectral measure of a vector, as pure functions of tensors.

The spectral measure of v puts the mass ⟨u_i, v⟩² on each eigenvalue λ_i, so that its integral of f is ⟨v, f(A) v⟩.
m Lanczos steps from v give its Gauss rule, exact for polynomials of degree 2m − 1: the nodes are the eigenvalues of
the tridiagonal T, the weights the squared first entries of its eigenvectors.

G. Golub and J. Welsch, Math. Comp. 23 (1969); G. Golub and G. Meurant, Matrices, Moments and Quadrature with
Applications (2010), ch. 6; S. Ubaru, J. Chen and Y. Saad, SIAM J. Matrix Anal. Appl. 38 (2017), for the traces.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.krylov.lanczos import MatVec, lanczos
from eigenfunc.tree import Tree

_CLOSE = 1e-8  # nodes within this of ‖T‖ are one: moved to their mean, they err by its square, which is rounding


class Quadrature(NamedTuple):
    """Σ_i weights_i f(nodes_i) ≈ ⟨v, f(A) v⟩."""

    nodes: Tensor  # (..., m) float64, rising but for those without weight, which come last
    weights: Tensor  # (..., m) float64, not negative; zero from a breakdown on


def gauss(alphas: Tensor, betas: Tensor, alive: Tensor) -> Quadrature:
    """The Gauss rules, of weights that sum to one, of `alphas`, `betas` and `alive` (..., m) as `lanczos` gives them.

    What lies behind a breakdown gets no weight, and for its node the mean of the measure, at which every function is
    defined that is so on the spectrum. `betas[..., -1]` is not used. For values alone: the derivatives of `eigh` are
    infinite where nodes coincide.
    """
    values, vectors = torch.linalg.eigh(_jacobi(alphas, betas, alive))
    return _rule(values, vectors[..., 0, :], alive.sum(-1, keepdim=True), alphas[..., :1])


def quadrature(matvec: MatVec, v0: Tree, num_steps: int) -> Quadrature:
    """Nodes (m,) and weights (m,), m = `num_steps`, of the Gauss rule of the spectral measure of `v0` under A.

    The weights sum to ‖v0‖². Where the Krylov space is exhausted the rule is the measure itself, and what is left of
    the m nodes has weight zero; a zero `v0` gives weights of zero.

    Pure, as `lanczos` is: for `vmap`, `grad`, `jvp` and `torch.compile`. The derivatives of Σ w_i f(θ_i) by `v0` and by
    what `matvec` closes over are those of ⟨v, f(A) v⟩ wherever the rule is exact, multiple eigenvalues and exhausted
    spaces included: nodes closer than 1e-8 of ‖T‖ are taken as one, since as two they would have no derivatives.
    Second derivatives are right short of that, and miss terms where nodes were joined or the space was exhausted. Where
    two eigenvalues agree to rounding and m steps all but exhaust the space, `jvp` and `jacfwd` go through tangents so
    large that no digit may be left; `grad` keeps some four.
    """
    run = lanczos(matvec, v0, num_steps)
    t = _jacobi(run.alphas, run.betas, run.alive)
    values, vectors = torch.linalg.eigh(t.detach())
    index = torch.arange(num_steps, device=values.device)
    first = torch.where(index < run.alive.sum(), vectors[0], 0.0)
    # one vector for each cluster of nodes: the direction that e_1 has in its eigenspace, for e_1 is blind to the others
    close = values[1:] - values[:-1] <= _CLOSE * values.abs().amax()
    cluster = index - torch.cat([torch.zeros_like(index[:1]), close.cumsum(0)])
    heads = vectors @ torch.where(cluster[:, None] == index, first[:, None], 0.0)
    lengths = torch.linalg.vector_norm(heads, dim=0)
    kept = lengths > 0
    heads = heads / torch.where(kept, lengths, 1.0)
    spare = torch.diag(torch.where(kept, 0.0, _spare(run.alphas, run.betas)))
    values, turn = torch.linalg.eigh(heads.mT @ t @ heads + spare)
    rule = _rule(values, lengths @ turn, kept.sum(-1, keepdim=True), run.alphas[:1])
    return Quadrature(rule.nodes, rule.weights * tree.dot(v0, v0))


def _rule(values: Tensor, first: Tensor, count: Tensor, mean: Tensor) -> Quadrature:
    """The `count` lowest `values`, weighed by the squares of `first`, then nodes without weight at `mean`."""
    kept = torch.arange(values.shape[-1], device=values.device) < count
    return Quadrature(torch.where(kept, values, mean), torch.where(kept, first**2, 0.0))


def _jacobi(alphas: Tensor, betas: Tensor, alive: Tensor) -> Tensor:
    """T (..., m, m), in which each dead row has an eigenvalue of its own above all others."""
    off = torch.where(alive[..., 1:], betas[..., :-1], 0.0)
    t = torch.diag_embed(torch.where(alive, alphas, _spare(alphas, betas)))
    return t + torch.diag_embed(off, offset=1) + torch.diag_embed(off, offset=-1)


def _spare(alphas: Tensor, betas: Tensor) -> Tensor:
    """Distinct values (..., m), one to two times an upper bound of ‖T‖: derivatives of eigh need distinct ones."""
    size = (alphas.abs().amax(-1, keepdim=True) + 2 * betas.abs().amax(-1, keepdim=True)).detach()
    index = torch.arange(1, alphas.shape[-1] + 1, device=alphas.device)
    return torch.where(size > 0, size, 1.0) * (1 + index / alphas.shape[-1])
