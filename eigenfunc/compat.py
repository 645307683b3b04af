"""Drop-in for `compute_hessian_eigenthings` as hessian-eigenthings 0.x documented it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eigenfunc import tree
from eigenfunc.curvature.hessian import hessian
from eigenfunc.data import Batches, Reader
from eigenfunc.eigsh import eigsh
from eigenfunc.errors import ConvergenceWarning, InputError
from eigenfunc.objective import functional_loss
from eigenfunc.operator import LinearOperator
from eigenfunc.power_iteration import power_iteration
from eigenfunc.solution import Solution


def compute_hessian_eigenthings(
    model: nn.Module,
    dataloader: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    num_eigenthings: int = 10,
    full_dataset: bool = True,
    mode: str = "power_iter",
    use_gpu: bool = True,
    fp16: bool = False,
    max_samples: int = 2**16,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """The eigenpairs of largest magnitude of the Hessian of `loss(model(inputs), targets)` over `dataloader`.

    Returns (eigenvals (k,), eigenvecs (k, n)): NumPy arrays, eigenvalues in descending order of value, eigenvectors
    as rows in the order of `model.parameters()`, trainable ones only. Batches count as in `Batches`.

    full_dataset  False: power iteration draws a mini-batch at each step, Lanczos looks at the first batch alone
    mode          "power_iter", with power_iter_steps=20, power_iter_err_threshold=1e-4, momentum=0.0, to_numpy=True;
                  "lanczos", with which="LM", max_steps (restart cycles), tol=1e-6, init_vec, and num_lanczos_vectors,
                  which is raised to what a proof of completeness needs, k+20 or 2k+10
    use_gpu       accepted and not needed: everything runs where the model is
    fp16          accepted and without effect, with a warning: products have the dtype of the parameters
    max_samples   larger batches are cut; so is it under its older name, max_possible_gpu_samples

    Unlike the original it says so, with a `ConvergenceWarning`, when pairs come back that have not converged; new
    code does better with `hessian` and `eigsh`. Raises their errors, `InputError` for an unknown mode, and
    `TypeError` for unknown keywords.
    """
    max_samples = kwargs.pop("max_possible_gpu_samples", max_samples)
    if mode not in ("power_iter", "lanczos"):
        raise InputError(f"mode must be 'power_iter' or 'lanczos', got {mode!r}")
    if fp16:
        warnings.warn(
            "fp16=True has no effect: products are formed in the dtype of the parameters; use model.half()",
            UserWarning,
            stacklevel=2,
        )
    objective, params = functional_loss(model, loss)
    whole_batches = any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in model.modules())
    summed = "sum" in (getattr(loss, "reduction", None), getattr(loss, "keywords", {}).get("reduction"))
    data = Batches(dataloader, reduction="sum" if summed else "mean", microbatch=None if whole_batches else max_samples)
    if mode == "lanczos" and not full_dataset:
        data = replace(data, data=[Reader(data, torch.device("cpu")).first()[1]])
    A = hessian(objective, params, data)
    if mode == "lanczos":
        solution, to_numpy = _lanczos(A, num_eigenthings, **kwargs), True
    else:
        solution, to_numpy = _power(A, num_eigenthings, stochastic=not full_dataset, **kwargs)
    if not solution.success:
        warnings.warn(f"{solution.status}: {solution.message}", ConvergenceWarning, stacklevel=2)
    order = torch.argsort(solution.values, descending=True)
    rows = torch.cat([solution.vectors[name].flatten(1) for name in params], dim=1).cpu()[order]
    values = solution.values[order]
    return (values.numpy(), rows.numpy()) if to_numpy else (values, rows)


def _power(
    A: LinearOperator,
    k: int,
    *,
    stochastic: bool,
    power_iter_steps: int = 20,
    power_iter_err_threshold: float = 1e-4,
    momentum: float = 0.0,
    to_numpy: bool = True,
) -> tuple[Solution, bool]:
    solution = power_iteration(
        A,
        k,
        momentum=momentum,
        tol=power_iter_err_threshold,
        max_steps=power_iter_steps,
        stochastic=stochastic,
        throw=False,
    )
    return solution, to_numpy


def _lanczos(
    A: LinearOperator,
    k: int,
    *,
    which: Any = "LM",
    max_steps: int | None = None,
    tol: float = 1e-6,
    num_lanczos_vectors: int | None = None,
    init_vec: Any = None,
) -> Solution:
    start = None
    if init_vec is not None:
        # in the order of the parameters, which is not the order of the tree's leaves
        flat = torch.as_tensor(np.asarray(init_vec)).flatten().to(tree.device(A.like))
        if flat.numel() != A.size:
            raise InputError(f"init_vec has {flat.numel()} entries, the model {A.size} trainable parameters")
        pieces = torch.split(flat, [ref.numel() for ref in A.like.values()])
        start = {name: x.reshape(ref.shape).to(ref) for x, (name, ref) in zip(pieces, A.like.items(), strict=True)}
    basis_size = max(num_lanczos_vectors or 0, 2 * k + 10, k + 20)
    budget = None if max_steps is None else max_steps * basis_size
    return eigsh(A, k, which=which, tol=tol, v0=start, basis_size=basis_size, max_matvecs=budget, throw=False)
