"""The density of a whole spectrum beside other libraries, at equal numbers of products: `python -m benchmarks.density`.

The Hessian of the network with 2,820 parameters of `eigenfunc demo`, trained on handwritten digits, full data, one
thread, float32, set-up included. The truth are its eigenvalues by double backward, in float64. The error is the
Wasserstein distance between the estimated distribution and the true one, over the largest |λ|: the average way that an
eigenvalue has to be moved. curvlinops gives a smoothed density alone, whose smoothing counts. For eigenfunc, which
alone gives bands, the share of the axis is told on which the true distribution lies in the band of 95%. In each round
every library runs once, in shuffled order, with the round's seed. Peers: `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.models import Problem
from benchmarks.products import machine, spread
from eigenfunc import demo, eigsh, functional_loss, hessian, spectral_density

_POINTS = 2000


class Found(NamedTuple):
    points: Tensor  # where mass lies
    masses: Tensor
    products: int
    covered: float | None = None  # share of the axis on which the truth is in the band


@dataclass
class Outcome:
    products: int = 0
    failure: str = ""
    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    covered: list[float] = field(default_factory=list)


class Asked(NamedTuple):
    probes: int
    steps: int
    seed: int
    truth: Tensor


def trained(samples: int, epochs: int) -> Problem:
    images, labels = demo.digits()
    images, labels = images[:samples], labels[:samples]
    torch.manual_seed(0)
    net = demo.network("mlp")
    demo.train(net, images, labels, seed=0, epochs=epochs)
    return Problem("digits", net, (images, labels), nn.CrossEntropyLoss(), False)


def eigenvalues(p: Problem) -> Tensor:
    """All of them, rising, from a dense matrix by double backward in float64."""
    net, (images, labels) = p.model.double(), p.batch
    leaves = list(net.parameters())
    slopes = torch.autograd.grad(p.criterion(net(images.double()), labels), leaves, create_graph=True)
    flat = torch.cat([x.flatten() for x in slopes])
    rows = [torch.autograd.grad(flat[i], leaves, retain_graph=True) for i in range(len(flat))]
    dense = torch.stack([torch.cat([x.flatten() for x in row]) for row in rows])
    net.float()
    return torch.linalg.eigvalsh((dense + dense.mT) / 2)


def share_below(truth: Tensor, points: Tensor) -> Tensor:
    return torch.searchsorted(truth, points.contiguous(), right=True).double() / len(truth)


def distance(found: Found, truth: Tensor) -> float:
    """∫ |F − F_true| over the largest |λ|."""
    points, order = found.points.double().sort()
    at = torch.cat([points, truth]).unique()
    masses = found.masses.double()[order]
    share = torch.cat([torch.zeros(1).double(), masses.cumsum(0) / masses.sum()])
    estimated = share[torch.searchsorted(points, at[:-1].contiguous(), right=True)]
    exact = share_below(truth, at[:-1])
    return float(((estimated - exact).abs() * at.diff()).sum() / truth.abs().max())


def _ours(p: Problem, asked: Asked, k: int = 0) -> Found:
    A = hessian(*functional_loss(p.model, p.criterion), p.batch)
    pairs = eigsh(A, k, seed=asked.seed) if k else None
    probes = asked.probes
    if pairs is not None:  # what the pairs took is taken from the probes
        probes = max(1, round(probes - pairs.stats.matvecs / asked.steps))
    density = spectral_density(A, num_probes=probes, num_steps=asked.steps, pairs=pairs, seed=asked.seed)
    axis = torch.linspace(float(asked.truth[0]), float(asked.truth[-1]), _POINTS).double()
    low, high = density.cdf(axis)[1]
    exact, unit = share_below(asked.truth, axis), 1e-9  # the band ends at multiples of 1/n, up to rounding
    points = torch.cat([density.nodes.flatten(), density.values])
    weights = torch.cat(
        [density.weights.flatten() / len(density.nodes), torch.full_like(density.values, 1 / density.n)]
    )
    products = density.matvecs + (0 if pairs is None else pairs.stats.matvecs)
    return Found(points, weights, products, float(((low <= exact + unit) & (exact <= high + unit)).double().mean()))


def _eigenthings(p: Problem, asked: Asked) -> Found:
    library = importlib.import_module("hessian_eigenthings")
    A = library.HessianOperator(p.model, [p.batch], lambda model, batch: p.criterion(model(batch[0]), batch[1]))
    found = library.spectral_density(A, num_runs=asked.probes, lanczos_steps=asked.steps, seed=asked.seed)
    nodes, weights = found.raw_eigenvalues.flatten(), found.raw_weights.flatten()
    return Found(nodes[weights > 0], weights[weights > 0], asked.probes * asked.steps)


def _curvlinops(p: Problem, asked: Asked) -> Found:
    library = importlib.import_module("curvlinops")
    leaves = list(p.model.parameters())
    H = library.HessianLinearOperator(p.model, p.criterion, leaves, [p.batch], check_deterministic=False)
    torch.manual_seed(asked.seed)
    ends = float(asked.truth[0]), float(asked.truth[-1])  # given, so that it forms no products to look for them
    grid, density = library.lanczos_approximate_spectrum(H, asked.steps, num_repeats=asked.probes, boundaries=ends)
    return Found(grid, density, asked.probes * asked.steps)


def _pyhessian(p: Problem, asked: Asked) -> Found:
    library = importlib.import_module("pyhessian")
    torch.manual_seed(asked.seed)
    held = library.hessian(p.model, p.criterion, data=p.batch, cuda=False)
    nodes, weights = held.density(iter=asked.steps, n_v=asked.probes)
    return Found(torch.tensor(nodes).flatten(), torch.tensor(weights).flatten(), asked.probes * asked.steps)


LIBRARIES: dict[str, Callable[[Problem, Asked], Found]] = {
    "eigenfunc": _ours,
    "eigenfunc, ten pairs taken out": lambda p, asked: _ours(p, asked, 10),
    "hessian-eigenthings": _eigenthings,
    "curvlinops, ends given": _curvlinops,
    "PyHessian": _pyhessian,
}


def measure(p: Problem, probes: int, steps: int, rounds: int) -> dict[str, Outcome]:
    truth = eigenvalues(p)
    outcomes = {name: Outcome() for name in LIBRARIES}
    order = random.Random(0)
    for seed in tqdm(range(rounds), unit=" rounds"):
        for name in order.sample(list(LIBRARIES), len(LIBRARIES)):
            outcome = outcomes[name]
            if outcome.failure:
                continue
            begun = time.perf_counter()
            try:
                found = LIBRARIES[name](p, Asked(probes, steps, seed, truth))
            except Exception as error:
                outcome.failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                continue
            outcome.seconds.append(time.perf_counter() - begun)
            outcome.products = found.products
            outcome.errors.append(distance(found, truth))
            outcome.covered += [] if found.covered is None else [found.covered]
            p.model.zero_grad(set_to_none=True)
    return outcomes


def table(outcomes: dict[str, Outcome]) -> str:
    lines = ["| library | products | seconds | error | of the axis inside the band |", "|---" * 5 + "|"]
    for name, outcome in outcomes.items():
        if outcome.failure:
            cells = [name, "–", "–", f"raises {outcome.failure[:90]}", "–"]
        else:
            covered = f"{statistics.median(outcome.covered):.1%}" if outcome.covered else "no band"
            errors = spread([1e3 * x for x in outcome.errors])
            cells = [name, str(outcome.products), spread(outcome.seconds), f"{errors} ‰", covered]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 images, 3 rounds")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--probes", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PyHessian's backward(create_graph=True)
    rounds = 3 if args.quick else args.rounds
    p = trained(200, 5) if args.quick else trained(1797, 30)
    outcomes = measure(p, args.probes, args.steps, rounds)
    print(
        f"{machine()}; {rounds} rounds, medians [quartiles]; n = {p.size:,}, {args.probes} probes of {args.steps} steps"
    )
    print("", table(outcomes), sep="\n")
    if args.json:
        raw = {name: asdict(outcome) for name, outcome in outcomes.items()}
        args.json.write_text(json.dumps({"machine": machine(), "libraries": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
