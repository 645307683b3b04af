"""Extreme eigenpairs of a symmetric operator, with a certificate."""

from __future__ import annotations

import os
import time
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eigenfunc import endgame, resume, scope
from eigenfunc.certificate import SHORTER, Products, Riders, seeded, start_block
from eigenfunc.checkpoint import Checkpoint, Saved
from eigenfunc.distributed.team import Group
from eigenfunc.plan import ends, plan as planned
from eigenfunc.solution import Solution
from eigenfunc.thick_restart import Run, search
from eigenfunc.tree import Tree
from eigenfunc.verdict import conclude

Which = Literal["LM", "LA", "SA", "BE"]


def eigsh(
    A: Any,
    k: int | tuple[int, int] = 6,
    *,
    which: Which = "LM",
    tol: float = 1e-4,
    v0: Tree | None = None,
    seed: int | None = None,
    basis_size: int | None = None,
    block_size: int | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_path: str | os.PathLike[str] | None = None,
    basis_device: str | torch.device | None = None,
    memory_budget: int | None = None,
    max_matvecs: int | None = None,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    group: Group = None,
    progress: bool = False,
    throw: bool = True,
) -> Solution:
    """The k extreme eigenpairs of a symmetric operator, by thick-restart Lanczos, with proof.

    A           `LinearOperator`, or what `aslinearoperator` takes
    k           how many; for BE also (number at the top, number at the bottom)
    which       LM largest in magnitude, LA largest, SA smallest, BE both ends (the odd one at the top)
    tol         relative to each eigenvalue: converged means ‖A v − λ v‖ ≤ max(tol·|λ|, noise)
    v0          start vector, shaped as `A.like`, or a stack of them (p, *leaf), old eigenvectors say; default: random
    seed        of all random numbers; default: a fresh one, told in `stats.seed`
    basis_size  vectors kept; default 2k+10, at least k+20, for LM and LA; 120 for SA and BE, where the edge of the
                spectrum is dense, or 4k+20 from 60 on where n is large; n where n is small
    block_size  vectors multiplied at once; default 1, or 8 where k ≥ 10, nothing is cached and a block of products is
                measured to be so cheap that it makes up for needing more of them
    basis_dtype torch.float16 or torch.bfloat16 halve the memory of the basis and limit residuals to about 1e-4 and
                1e-3 of ‖A‖, the errors of values to their squares; default: the dtype of the products
    basis_path  a folder on a disk for files without names that hold the basis and the eigenvectors, gone with the
                tensors or the process; for vectors on the CPU. Results are those without it
    basis_device "cpu" for a basis in page-locked main memory beside an accelerator, read up to six times in a step
    memory_budget bytes that the solver may take beside the model and the products' own, on each process of a group (see
                `Plan.memory_bytes`). Where they do not suffice the basis is made smaller, down to 1.5k + 4; or halved
                by float16, for LM and LA and a tol of at least 1e-4; or put aside as by `basis_device` or `basis_path`
    max_matvecs products that may be spent on solving; those that verify (k fresh ones, the probe, the noise: k + 10
                as a rule, more where values lie close beyond the wanted ones) come on top. Default max(1000, 50 k)
    checkpoint  a file, or a `Checkpoint`, which says more of it: the run is saved there, and where the same call finds
                the file it goes on from it, to the same result bit for bit
    group       processes of torch.distributed, each of which calls this with the same arguments and
                the same operator, of `data_parallel` say, and keeps its part of the basis. A product gathers the whole
                vector from them, an inner product is a sum over them; the seed is that of the first
    throw       raise `NotConverged`, which carries the solution, unless every pair converged

    Memory: basis_size + block_size vectors, and about 5k more at the end; with a group that over its size, beside a few
    whole vectors and the k that are returned. Before pairs are called converged, the eigenvalues beyond them are
    counted: by Sylvester's law of inertia from what was multiplied, and by a Lanczos chain from a random vector for the
    rest. Whatever the spectrum and the start vector, the chance that an eigenvalue beyond the tolerance of the last
    wanted one escapes is at most one in a thousand on each side; `bounds` are widened by what could not be excluded.
    Residuals come from fresh products. There is no `sigma`: values inside need the inverse of A − σ, at no fair price.

    Raises `InputError` for arguments out of range, `BudgetError` where nothing fits into the budget, `StorageError`
    where disk or main memory do not take the basis, `TreeError` for a `v0` of another structure, `NonFiniteError` for a
    product with NaN, `TransformError` inside a torch.func transform, `CheckpointError` for a file that is damaged, of
    another problem or not to be written, `Stopped` where the checkpoint asks for it, and `NotConverged`.

    K. Wu and H. Simon, Thick-restart Lanczos method, SIAM J. Matrix Anal. Appl. 22 (2000).
    """
    begun = time.perf_counter()
    products = Products(A, group)
    asked: resume.Asked = {"which": which, "k": ends(k, which), "tol": tol}
    asked |= {} if memory_budget is not None else {"basis_dtype": str(basis_dtype)}
    store, old = resume.opened(checkpoint, products, asked)
    if old is not None:
        basis_size, block_size, seed = resume.defaults(old, basis_size, block_size, seed)
        begun -= old.facts["seconds"]
    sizes: dict[str, Any] = {"basis_size": basis_size, "block_size": block_size, "basis_dtype": basis_dtype}
    where: dict[str, Any] = {"basis_path": basis_path, "basis_device": basis_device, "memory_budget": memory_budget}
    plan = planned(products.A, k, which=which, tol=tol, max_matvecs=max_matvecs, group=group, **sizes, **where)
    generator, seed = seeded(products.agreed(seed))
    asked |= {name: getattr(plan, name) for name in ("basis_size", "block_size", "probes")} | {"seed": seed}
    asked["basis_dtype"] = str(plan.basis_dtype)
    saving = None if store is None else _Saving(store, old, asked)
    return _solve(Run(plan, products, generator, None, plan.basis_dtype), v0, saving, progress, begun, seed, throw)


class _Saving(NamedTuple):
    """Where a run is saved, and what it goes on from."""

    store: Checkpoint
    old: Saved | None
    asked: resume.Asked


def _solve(
    run: Run, v0: Tree | None, saving: _Saving | None, progress: bool, begun: float, seed: int, throw: bool
) -> Solution:
    plan = run.plan
    with (
        run.products.summed(),
        scope.full_precision(run.products.device),
        torch.no_grad(),
        tqdm(
            disable=not progress,
            desc=f"eigsh {plan.which}",
            total=sum(plan.expected_matvecs) // 2,  # a guess: beyond it the bar only counts
            unit=" products",
            leave=False,
        ) as bar,
    ):
        run.bar = bar if progress else None
        if saving is None:
            _start(run, v0)
        else:
            store, old, asked = saving
            witness = _start(run, v0) if old is None else resume.restore(store, old, run, asked)
            saves = 0 if old is None else old.facts["saves"]
            run.journal = resume.journal(store, run, asked, witness, begun, saves)
        return _finish(run, plan.basis_dtype is not None, seed=seed, begun=begun, throw=throw)


def _start(run: Run, v0: Tree | None) -> resume.Witness:
    """From the vectors that were given, or random ones; a single one is that which was calibrated with."""
    plan, products, generator = run.plan, run.products, run.generator
    given = None if v0 is None else start_block(v0, plan.block_size, products, generator)
    drawn = generator.get_state()
    if plan.block_size > 1:
        return resume.Witness(drawn, _start_block(run, given))
    tried, image = products.calibrate(generator)
    run.verification = products.matvecs - (given is None)
    run.start(tried, image) if given is None else run.start(given, products(given))
    return resume.Witness(drawn, image)


def _start_block(run: Run, given: Tensor | None) -> Tensor:
    """With the first two blocks go the two products that calibrate; the image of the first of these is returned."""
    plan, products, generator = run.plan, run.products, run.generator
    tried = products.random(generator)
    q = start_block(None, plan.block_size, products, generator) if given is None else given
    images = products.first(torch.cat([q, tried]))
    run.start(q, images[:-1])
    riders = Riders(products, SHORTER * tried)
    run.look()
    if run.j < plan.n and not run.full and run.spent < plan.max_matvecs:
        run.advance(riders)
    products.compare(images[-1:], riders.arrived())
    run.verification = 2
    return images[-1:].clone()


def _finish(run: Run, coarse: bool, *, seed: int, begun: float, throw: bool) -> Solution:
    remedy = f"raise max_matvecs (now {run.plan.max_matvecs}) or basis_size (now {run.plan.basis_size})"
    if coarse:
        run, (certified, limits, *_) = endgame.search_coarse(run)
        rounds, remedy = 1, f"leave out basis_dtype, which limits residuals here, or {remedy}"
    else:
        certified, limits, rounds = search(run)
    return conclude(run, certified, limits, rounds=rounds, seed=seed, begun=begun, remedy=remedy, throw=throw)
