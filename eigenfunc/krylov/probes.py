"""Samples of the trace: one number for each probing vector."""

from __future__ import annotations

import torch
from torch import Tensor

from eigenfunc import tree
from eigenfunc.krylov.lanczos import MatVec
from eigenfunc.tree import Tree


def trace_probes(matvec: MatVec, probes: Tree) -> Tensor:
    """⟨z, A z⟩ (p,), float64, for each vector z of a stack `probes` (p, *leaf).

    Their mean is an unbiased estimate of tr A where z has uncorrelated entries of mean zero and variance one: signs,
    normal numbers, or the sphere of radius √n. `matvec` maps one vector, and runs under `vmap` over the probes.

    Pure: for `vmap` (over models, say), `grad`, `jvp`, `jacrev` and `torch.compile`. With the probes held fixed, its
    derivative is that of the estimate. M. F. Hutchinson, Commun. Stat. Simul. Comput. 19 (1990).
    """
    return tree.dots(probes, torch.func.vmap(matvec, randomness="same")(probes))
