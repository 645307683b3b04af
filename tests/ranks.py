"""What each of several processes does in tests/test_distributed.py, and how they are started and watched.

`python -m tests.ranks PART RANK SIZE FOLDER` joins a group over a file in the folder, calls the function PART, of here
or of tests/parts.py, in the folder and saves what it returns.
"""

from __future__ import annotations

import importlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eigenfunc import Batches, LinearOperator, eigsh, eigsh_blocks, fisher, functional_loss, ggn, hessian, tree
from eigenfunc.distributed.parallel import Stop, data_parallel
from eigenfunc.errors import EigenfuncError
from eigenfunc.stochastic.density import spectral_density
from eigenfunc.stochastic.diagonal import diagonal
from eigenfunc.stochastic.trace import frobenius_norm, trace
from tests.helpers import dense_hessian, flat, random_like

ROOT = Path(__file__).parent.parent
PATIENCE = 3.0  # seconds that processes wait for one that hangs
COUNT = 64
SHARDS = {2: [[7, 57], [64, 0], [1, 63]], 4: [[0, 30, 4, 30], [1, 0, 0, 63]]}
CLASS_WEIGHTS = torch.tensor([1.0, 0.2, 3.0]).double()


def start(part: str, size: int, folder: Path) -> list[subprocess.Popen[str]]:
    """The processes, whose errors go to files in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    started = []
    for rank in range(size):
        with open(folder / f"{rank}.err", "w") as errors:
            command = [sys.executable, "-m", "tests.ranks", part, str(rank), str(size), str(folder)]
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=errors, text=True))
    return started


def wait(started: list[subprocess.Popen[str]], folder: Path, limit: float) -> list[int]:
    """Exit codes; all are killed, with their errors in the assertion, if they take longer than `limit` seconds."""
    stop = time.monotonic() + limit
    try:
        return [process.wait(max(stop - time.monotonic(), 0.1)) for process in started]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end after {limit} s\n{errors(folder)}") from None
    finally:
        for process in started:
            process.kill()
            process.wait()


def errors(folder: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(folder.glob("*.err")))


def together(part: str, size: int, folder: Path, limit: float = 120.0) -> list[Any]:
    """What the processes returned, once all have ended well."""
    codes = wait(start(part, size, folder), folder, limit)
    assert codes == [0] * size, errors(folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.randn(x.shape, generator=g, dtype=torch.float64))
    inputs = torch.randn(COUNT, 4, generator=g, dtype=torch.float64)
    return model, inputs, torch.randint(0, 3, (COUNT,), generator=g)


def batches(inputs: Tensor, targets: Tensor, start: int, stop: int, size: int = 16) -> Batches:
    own = [(inputs[i : min(i + size, stop)], targets[i : min(i + size, stop)]) for i in range(start, stop, size)]
    return Batches(own)


CASES: dict[str, tuple[Any, nn.Module, dict[str, Any]]] = {
    "mean": (hessian, nn.CrossEntropyLoss(), {}),
    "sum": (hessian, nn.CrossEntropyLoss(reduction="sum"), {"reduction": "sum"}),
    "weights": (hessian, nn.CrossEntropyLoss(CLASS_WEIGHTS), {"weight": lambda batch: CLASS_WEIGHTS[batch[1]].sum()}),
    "ggn": (ggn, nn.CrossEntropyLoss(), {}),
    "fisher": (fisher, nn.CrossEntropyLoss(), {}),
}


@cache
def truth(case: str) -> Tensor:
    """The dense matrix over all of the data, in one piece."""
    model, inputs, targets = problem()
    loss, params = functional_loss(model, CASES[case][1])
    if case in ("mean", "sum", "weights"):
        return dense_hessian(lambda p: loss(p, (inputs, targets)), params)
    jacobians = torch.func.jacrev(lambda p: loss.predict(p, inputs))(params)
    J = torch.cat([jacobians[name].flatten(2) for name in sorted(params)], dim=2)
    p = loss.predict(params, inputs).softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("bim,bij,bjn->mn", J, middle, J) / len(inputs)


def _said(f: Callable[[], Any]) -> tuple[str, str]:
    """The name of the error that f raises, and what it says."""
    try:
        f()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def sums(rank: int, size: int) -> dict[str, Any]:
    """Products of all matrices, cut in all ways."""
    model, inputs, targets = problem()
    found = {}
    for shards in SHARDS[size]:
        begin = sum(shards[:rank])
        for name, (make, criterion, how) in CASES.items():
            loss, params = functional_loss(model, criterion)
            data = replace(batches(inputs, targets, begin, begin + shards[rank]), **how)
            A = data_parallel(make, loss, params, data)
            vs = tree.stack([random_like(params, seed) for seed in range(3)])
            found[str(shards), name] = (A.matvec(tree.row(vs, 0)), A.matmat(vs))
    return found


def solutions(rank: int, size: int) -> dict[str, Any]:
    """A solver and what it asks of an operator; with different lengths of shares."""
    model, inputs, targets = problem()
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
    shards = SHARDS[size][0]
    begin = sum(shards[:rank])
    A = data_parallel(hessian, loss, params, batches(inputs, targets, begin, begin + shards[rank]), cache=0)
    solution = eigsh(A, 12, tol=1e-8, seed=3)
    layers = eigsh_blocks(A, 2, by="parameter", tol=1e-8, seed=3)
    even = batches(inputs, targets, rank * COUNT // size, (rank + 1) * COUNT // size, size=8)
    B = data_parallel(hessian, loss, params, even)
    stream = B.minibatches()
    v = random_like(params)
    passed = [flat(next(stream)(v)) for _ in range(COUNT // size // 8)]
    differences = data_parallel(hessian, loss, params, even, product="finite-difference")
    differences.matvec(v)
    own = hessian(loss, params, even, product="finite-difference")
    own.matvec(v)
    return {
        "layers": {name: (found.values, found.bounds) for name, found in layers.items()},
        "own noise": own.noise(),
        "values": solution.values,
        "residuals": solution.residuals,
        "vectors": torch.stack([flat(tree.row(solution.vectors, i)) for i in range(12)]),
        "ratio": A.block_ratio(),
        "mean of mini-batches": torch.stack(passed).mean(0),
        "noise": differences.noise(),
        "words": A.describe(),
    }


def estimates(A: LinearOperator) -> dict[str, Tensor]:
    """What the estimators say of an operator, with seeds."""
    density = spectral_density(A, num_probes=3, num_steps=9, seed=5)
    found = {"density": density.density, "band": density.band, "nodes": density.nodes, "alphas": density.alphas}
    for method in ("hutchinson", "hutch++", "xtrace"):
        estimate = trace(A, num_matvecs=16, method=method, seed=5)
        found[method] = torch.tensor([estimate.value, estimate.stderr])
    found["norm"] = torch.tensor(frobenius_norm(A, num_matvecs=16, seed=5).value)
    found["diagonal"] = flat(diagonal(A, num_matvecs=16, seed=5).value)
    return found


def estimated(rank: int, size: int) -> dict[str, Any]:
    """By all processes; `alone` of all the data, by this one."""
    model, inputs, targets = problem()
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
    shards = SHARDS[size][0]
    begin = sum(shards[:rank])
    A = data_parallel(hessian, loss, params, batches(inputs, targets, begin, begin + shards[rank]))
    whole = hessian(loss, params, batches(inputs, targets, 0, COUNT))
    return {
        "together": estimates(A),
        "alone": estimates(whole),
        "layer": estimates(next(iter(A.blocks().values()))),
        "layer alone": estimates(next(iter(whole.blocks().values()))),
        "unseeded": _said(lambda: trace(A, num_matvecs=16)),
    }


def troubles(rank: int, size: int) -> dict[str, Any]:
    """Everything that goes wrong on one process; after it the others go on as before."""
    model, inputs, targets = problem()
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
    data = batches(inputs, targets, 32 * rank, 32 * rank + 32)
    v = random_like(params)
    A = data_parallel(hessian, loss, params, data)
    found: dict[str, Any] = {"before": A.matvec(v)}

    calls = []

    def failing(params: Any, batch: Any) -> Tensor:
        calls.append(1)
        if rank == 1 and calls[0] < 0:
            raise ValueError("out of luck")
        return loss(params, batch)

    B = data_parallel(hessian, failing, params, data, cache=0, check=False)
    B.matvec(v)
    calls.insert(0, -1)
    found["one fails"] = _said(lambda: B.matvec(v))
    calls[0] = 1
    found["again"] = B.matvec(v)

    bad = Batches([(inputs * float("nan"), targets)]) if rank == 1 else data
    found["one set-up fails"] = _said(lambda: data_parallel(hessian, loss, params, bad))
    found["bad option"] = _said(lambda: data_parallel(hessian, loss, params, data, product="magic"))
    found["no data"] = _said(lambda: data_parallel(hessian, loss, params, Batches([])))
    found["other seeds"] = _said(lambda: eigsh(A, 2, seed=rank))
    found["no seed"] = _said(lambda: eigsh(A, 2))
    found["turned"] = _said(lambda: A.matvec(tree.scale(1 - 2 * rank, v)))
    other = tree.tree_map(lambda leaf: leaf + 1e-15 * rank, params)
    found["other parameters"] = _said(lambda: data_parallel(hessian, loss, other, data))
    fewer = {name: x for name, x in params.items() if rank == 0 or name != "0.bias"}
    found["fewer parameters"] = _said(lambda: data_parallel(hessian, loss, fewer, data))
    reduced = replace(data, reduction=("mean", "sum")[rank])
    found["other reduction"] = _said(lambda: data_parallel(hessian, loss, params, reduced))
    samples = torch.utils.data.TensorDataset(inputs[:-1], targets[:-1])
    sampler = torch.utils.data.DistributedSampler(samples, size, rank)
    padded = torch.utils.data.DataLoader(samples, 8, sampler=sampler)
    found["padded"] = _said(lambda: data_parallel(hessian, loss, params, padded))
    found["inside vmap"] = _said(lambda: torch.func.vmap(A.matvec)(tree.lifted(v)))

    path = Path(f"run{rank}")
    found["checkpoint"] = _said(lambda: eigsh(A, 2, seed=0, checkpoint=path))
    block = 2.0 * A.restrict("0.*")
    found["checkpoint of its block"] = _said(lambda: eigsh(block, 2, seed=0, checkpoint=path))
    alone = _said(lambda: data_parallel(hessian, loss, params, data, group=dist.new_group([0])))
    found["not in the group"] = alone
    products = []
    stop = Stop(lambda: rank == 1 and len(products) >= 3)
    C = data_parallel(hessian, loss, params, data, stop=stop)
    while not stop() and len(products) < 10:
        products.append(C.matvec(v))
    found["products before the stop"] = len(products)
    single = (inputs[:10], targets[:10]) if rank == 0 else (inputs[10:], targets[10:])
    found["single batches"] = data_parallel(hessian, loss, params, single).matvec(v)
    found["after"] = A.matvec(v)
    return found


def wrapped(rank: int, size: int) -> dict[str, Any]:
    """Models under DDP, FSDP2, as DTensors and tensor parallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    plain, inputs, targets = problem()
    criterion = nn.CrossEntropyLoss()
    data = batches(inputs, targets, 7 * rank, (7, COUNT)[rank])
    mesh = init_device_mesh("cpu", (size,))
    found: dict[str, Any] = {}
    ddp = DistributedDataParallel(problem()[0])
    found["ddp refused"] = _said(lambda: functional_loss(ddp, criterion))
    found["ddp within"] = _said(lambda: functional_loss(nn.Sequential(ddp), criterion))
    criterion(ddp(inputs[32 * rank : 32 * rank + 32]), targets[32 * rank : 32 * rank + 32]).backward()
    slopes = {name: x.grad.clone() for name, x in ddp.module.named_parameters()}
    loss, params = functional_loss(ddp.module, criterion)
    v = random_like(params)
    found["ddp"] = data_parallel(hessian, loss, params, data).matvec(v)
    found["ddp local"] = hessian(loss, params, data).matvec(v)
    found["ddp local words"] = hessian(loss, params, data).describe()
    ddp.zero_grad()
    criterion(ddp(inputs[32 * rank : 32 * rank + 32]), targets[32 * rank : 32 * rank + 32]).backward()
    found["ddp trains on"] = all(torch.equal(slopes[name], x.grad) for name, x in ddp.module.named_parameters())

    fsdp = problem()[0]
    fully_shard(fsdp[0], mesh=mesh)
    fully_shard(fsdp, mesh=mesh)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallel = parallelize_module(problem()[0], mesh, plan)
    loss, _ = functional_loss(plain, criterion)
    for name, model in {"fsdp": fsdp, "tensor parallel": parallel}.items():
        found[f"{name} refused"] = _said(lambda model=model: functional_loss(model, criterion))
        full = {name: x.full_tensor() if tree.is_sharded(x) else x for name, x in model.named_parameters()}
        found[name] = data_parallel(hessian, loss, full, data).matvec(v)
    shards = {name: distribute_tensor(x, mesh, [Shard(0)]) for name, x in params.items()}
    found["DTensor refused"] = _said(lambda: hessian(loss, shards, data))
    before = [x.full_tensor() for x in fsdp.parameters()]
    criterion(fsdp(inputs[32 * rank : 32 * rank + 32]), targets[32 * rank : 32 * rank + 32]).backward()
    found["fsdp trains on"] = all(x.grad is not None for x in fsdp.parameters()) and all(
        torch.equal(x.full_tensor(), y) for x, y in zip(fsdp.parameters(), before, strict=True)
    )
    return found


def spread(rank: int, size: int) -> dict[str, Any]:
    """A basis of which each process has its columns."""
    model, inputs, targets = problem()
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
    A = data_parallel(hessian, loss, params, batches(inputs, targets, *((0, COUNT) if rank == 0 else (0, 0))))
    world = dist.group.WORLD
    found: dict[str, Any] = {}
    for name, how in SPREAD.items():
        solution = eigsh(A, 5, seed=3 + rank, group=world, **{"tol": 1e-8, "basis_size": 20, **how})
        X = torch.stack([flat(tree.row(solution.vectors, i)) for i in range(5)])
        found[name] = (solution.values, X, solution.residuals, solution.bounds, solution.stats)
    v0 = {name: x[:2] for name, x in solution.vectors.items()}
    found["v0"] = eigsh(A, 2, tol=1e-6, v0=v0, which="BE", seed=1, group=world, basis_size=20).stats.matvecs
    found["v0, one process"] = eigsh(A, 2, tol=1e-6, v0=v0, which="BE", seed=1, basis_size=20).stats.matvecs
    deflated = A.deflate(eigsh(A, 2, seed=0))
    found["deflated"] = eigsh(deflated, 1, tol=1e-8, seed=0, group=world).values
    found["tiny"] = eigsh(torch.diag(torch.arange(1.0, 4.0)).double(), 3, seed=0, group=world).values
    return found


SPREAD: dict[str, dict[str, Any]] = {
    "LM": {},
    "BE": {"which": "BE"},
    "SA": {"which": "SA", "basis_size": 43},
    "blocks": {"block_size": 3},
    "half": {"basis_dtype": torch.bfloat16, "tol": 1e-2},
}


def memory(rank: int, size: int) -> dict[str, Any]:
    """The peak memory of a run with a basis large beside all else, and of one with a tenth of its vectors."""
    n, found = 400_000, {}
    values = torch.linspace(0.1, 1.0, n, dtype=torch.float32)
    values[:4] = torch.tensor([9.0, 7.0, 5.0, 4.0])
    A = LinearOperator(lambda v: values * v, values)
    for count in (40, 400):
        solution = eigsh(A, 2, tol=1e-2, seed=0, basis_size=count, group=dist.group.WORLD)
        found[count] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, solution.stats.basis_bytes)
    return found


def pair(rank: int, size: int) -> dict[str, Any]:
    found = {"sums": sums(rank, size), "spread": spread(rank, size)}
    found["estimates"] = estimated(rank, size)
    return {**found, **solutions(rank, size), **troubles(rank, size), **wrapped(rank, size)}


def four(rank: int, size: int) -> dict[str, Any]:
    return {"sums": sums(rank, size), "spread": spread(rank, size), **solutions(rank, size)}


def _long(rank: int, event: Callable[[], None]) -> None:
    """Products for ever; rank 1 comes to its event at the third."""
    group = dist.new_group(timeout=timedelta(seconds=PATIENCE))
    model, inputs, targets = problem()
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
    A = data_parallel(hessian, loss, params, batches(inputs, targets, 32 * rank, 32 * rank + 32), group=group)
    v = random_like(params)
    for i in range(1_000_000):
        if rank == 1 and i == 3:
            event()
        try:
            A.matvec(v)
        except EigenfuncError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(7)  # a group that has lost a process is not taken down in good order


def dies(rank: int, size: int) -> None:
    _long(rank, lambda: os._exit(9))


def hangs(rank: int, size: int) -> None:
    _long(rank, lambda: time.sleep(3600))


def main() -> None:
    part, rank, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=limit)
    os.chdir(folder)
    found = (globals().get(part) or getattr(importlib.import_module("tests.parts"), part))(rank, size)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # torch's threads of communication can abort a process that is taken down


if __name__ == "__main__":
    main()
