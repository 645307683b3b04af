"""Wall time from a model to ten right eigenpairs, beside other libraries: `python -m benchmarks.end_to_end`.

The k eigenvalues largest in magnitude (the end that all the libraries know), float32, one thread, set-up included. An
answer is right when every pair has ‖H v − λ v‖ ≤ tol·|λ|, with products by plain double backward in float64, the
vectors are independent, and no eigenvalue is missed. Each library runs with the cheapest settings found that make it
right: the others' Lanczos steps, basis sizes and tolerances are chosen for them with knowledge of the spectrum, and
all Lanczos methods start from one vector. What fails on fused attention runs again under the MATH one. In each round
all right libraries run once, in shuffled order from the second round on; the first is made up of the runs that proved
right. Figures are medians [quartiles]. Peers: `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import random
import statistics
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.libraries import LIBRARIES, OURS, Answer, Projected, Settings, start_vector
from benchmarks.models import Problem, loss_of, math_attention, problem
from benchmarks.products import machine, spread
from eigenfunc.krylov import lanczos as kernel

NAMES = ("MLP", "ResNet", "ResNet, eval mode, batch 8", "GPT")
_STEPS = 300  # at most, of the Lanczos run that other libraries' settings are read from


@dataclasses.dataclass
class Outcome:
    settings: Settings = dataclasses.field(default_factory=dict)
    products: int = 0
    failure: str = ""  # the first exception, before any help
    helped: bool = False  # under MATH attention only
    residual: float | None = None  # the worst over |λ|
    wrong: str = "no answer"  # why, or nothing
    seconds: list[float] = dataclasses.field(default_factory=list)
    figures: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def take(self, answer: Answer, seconds: float) -> None:
        self.seconds.append(seconds)
        self.figures.append(answer.figures | {"share": answer.figures.get("set_up", 0) / seconds})


class Truth:
    """Products by double backward through a graph kept in the given precision, under MATH attention."""

    def __init__(self, p: Problem, dtype: torch.dtype) -> None:
        inputs, targets = p.batch
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        self.p = Problem(p.name, copy.deepcopy(p.model).to(dtype), (inputs, targets), p.criterion, p.attention)
        self.leaves = list(self.p.model.parameters())
        with math_attention(p):
            self.slopes = torch.autograd.grad(loss_of(self.p, self.p.model), self.leaves, create_graph=True)

    def __call__(self, v: Tensor) -> Tensor:
        pieces = torch.split(v.to(self.leaves[0].dtype), [x.numel() for x in self.leaves])
        blocks = [piece.view_as(x) for piece, x in zip(pieces, self.leaves, strict=True)]
        with math_attention(self.p):
            out = torch.autograd.grad(self.slopes, self.leaves, blocks, retain_graph=True)
        return torch.cat([x.flatten() for x in out])

    def residual(self, answer: Answer) -> tuple[float, float]:
        """The worst ‖H v − λ v‖/|λ| of unit v, and the largest inner product of two of them."""
        vectors = answer.vectors().double()
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        worst = 0.0
        for value, v in zip(answer.values.tolist(), vectors, strict=True):
            worst = max(worst, float(torch.linalg.vector_norm(self(v) - value * v)) / abs(value))
        return worst, float((vectors @ vectors.mT - torch.eye(len(vectors))).abs().max())


def project(p: Problem, k: int, tol: float) -> Projected:
    """Lanczos from the common start vector, until the k pairs are right to a thirtieth of `tol`."""
    product = Truth(p, torch.float32)
    q = start_vector(p)[None]
    q = q / torch.linalg.vector_norm(q)
    state = kernel.init(q, q, _STEPS + 1)
    for j in range(_STEPS):
        state = kernel.step(state, lambda row: product(row[0])[None], j)
        seen = Projected(state.t[: j + 1, : j + 1], float(state.t[j + 1, j]))
        if j > 2 * k and seen.settled(k, tol / 30):
            break
    return seen


def fresh(p: Problem) -> Problem:
    gc.collect()
    return Problem(p.name, copy.deepcopy(p.model), p.batch, p.criterion, p.attention)


def run(p: Problem, name: str, k: int, outcome: Outcome, settings: Settings) -> tuple[Answer, float]:
    own = fresh(p)
    begun = time.perf_counter()
    with math_attention(p) if outcome.helped else nullcontext():
        answer = LIBRARIES[name].solve(own, k, **settings)
    return answer, time.perf_counter() - begun


class Bench:
    def __init__(self, p: Problem, k: int, tol: float, patience: float) -> None:
        self.p, self.k, self.tol, self.patience = p, k, tol, patience
        self.projected = project(p, k, tol)
        self.exact = Truth(p, torch.float64)
        self.outcomes: dict[str, Outcome] = {}

    def find(self, name: str) -> None:
        """Try the settings of a library in turn until one is right; after the second, only while `patience` lasts."""
        outcome = self.outcomes[name] = Outcome()
        left = self.patience
        for tried, settings in enumerate(LIBRARIES[name].settings(self.projected, self.k, self.tol)):
            if name == "PyHessian":
                settings = settings | {"patience": left}
            attempt = self._attempt(name, outcome, settings)
            if attempt is None:
                break
            answer, seconds = attempt
            outcome.wrong, outcome.settings, outcome.products = self._judge(answer, outcome), settings, answer.products
            left -= seconds
            if not outcome.wrong:
                outcome.take(answer, seconds)
            if not outcome.wrong or (left < 0 and tried > 0):
                break

    def _attempt(self, name: str, outcome: Outcome, settings: Settings) -> tuple[Answer, float] | None:
        while True:
            try:
                return run(self.p, name, self.k, outcome, settings)
            except TimeoutError as error:
                told = outcome.residual is not None
                outcome.wrong = f"{outcome.wrong}; stricter settings: {error}" if told else str(error)
                return None
            except Exception as error:
                message = str(error).strip().partition("\n")[0]
                outcome.failure = outcome.failure or f"{type(error).__name__}: {message}"
                if outcome.helped or not self.p.attention:
                    return None
                outcome.helped = True

    def _judge(self, answer: Answer, outcome: Outcome) -> str:
        outcome.residual, overlap = self.exact.residual(answer)
        if outcome.residual > self.tol:
            return "residual"
        if overlap > 0.5:
            return "copies"
        known = self.projected.values(self.k)
        found = answer.values.double()[torch.argsort(answer.values.abs(), descending=True)]
        return "missed" if bool(((found - known).abs() > 2 * self.tol * known.abs()).any()) else ""

    def round(self, order: random.Random) -> None:
        right = [name for name, outcome in self.outcomes.items() if not outcome.wrong]
        for name in order.sample(right, len(right)):
            outcome = self.outcomes[name]
            outcome.take(*run(self.p, name, self.k, outcome, outcome.settings))


def table(outcomes: dict[str, Outcome]) -> str:
    lines = [
        "| library | settings | products | seconds | worst residual over λ | verdict | over eigenfunc |",
        "|---" * 7 + "|",
    ]
    for name, outcome in outcomes.items():
        settings = ", ".join(f"{key} {value:g}" for key, value in outcome.settings.items() if key != "patience")
        residual = "–" if outcome.residual is None else f"{outcome.residual:.1e}"
        verdict = f"not right: {outcome.wrong}" if outcome.wrong else "right"
        if outcome.failure:
            verdict = f"raises: {outcome.failure[:90]}" + (f"; MATH: {verdict}" if outcome.helped else f"; {verdict}")
        seconds = ratio = "–"
        if outcome.seconds:
            seconds, ratio = spread(outcome.seconds), f"{over(outcomes, name):.2f}"
        cells = [name, settings, str(outcome.products or "–"), seconds, residual, verdict, ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def over(outcomes: dict[str, Outcome], name: str) -> float:
    """Seconds over those of eigenfunc; a median over rounds."""
    pairs = zip(outcomes[name].seconds, outcomes[OURS].seconds, strict=False)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def summary(outcomes: dict[str, Outcome]) -> str:
    ours = outcomes[OURS]
    if not ours.seconds:
        return f"- eigenfunc: {ours.failure or ours.wrong}"
    peers = {name: over(outcomes, name) for name, outcome in outcomes.items() if outcome.seconds and name != OURS}
    best = min(peers, key=lambda name: peers[name], default=None)
    told = ours.figures[-1]
    outside, set_up = (statistics.median(figures[key] for figures in ours.figures) for key in ("outside", "share"))
    return (
        f"- best peer that is right over eigenfunc: {'none is' if best is None else f'{peers[best]:.2f} ({best})'}\n"
        f"- eigenfunc: {ours.products} products ({told['verification']} of them to verify), {told['passes']} passes; "
        f"{outside:.0%} of `eigsh` outside products, {set_up:.0%} of the whole for set-up; {told['way']}"
    )


def made(name: str) -> Problem:
    """That of `benchmarks.models`; in eval mode with the statistics of a smaller batch."""
    p = problem(name.partition(",")[0], 8 if "eval" in name else None)
    if "eval" in name:
        for module in p.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            p.model(p.batch[0])
        p.model.eval()
    return dataclasses.replace(p, name=name)


def measure(p: Problem, args: argparse.Namespace, progress: tqdm[Any]) -> dict[str, Outcome]:
    progress.set_description(f"{p.name}, looking ahead")
    bench = Bench(p, args.k, args.tol, args.patience)
    progress.update()
    for name in LIBRARIES:
        progress.set_description(f"{p.name}, {name}")
        bench.find(name)
        progress.update()
    order = random.Random(0)
    for turn in range(1, args.rounds):
        progress.set_description(f"{p.name}, round {turn + 1}")
        bench.round(order)
        progress.update()
    return bench.outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--patience", type=float, default=20, help="seconds for a library to become right")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PyHessian's backward(create_graph=True)
    with tqdm(total=len(args.models) * (len(LIBRARIES) + args.rounds)) as progress:
        results = {name: measure(made(name), args, progress) for name in args.models}
    print(f"{machine()}; {args.rounds} rounds, medians [quartiles]; float32, k = {args.k}, LM, tol {args.tol:g}")
    for name, outcomes in results.items():
        print(f"\n{name}: {made(name).size:,} parameters", table(outcomes), summary(outcomes), sep="\n\n")
    if args.json:
        raw = {name: {x: dataclasses.asdict(o) for x, o in outcomes.items()} for name, outcomes in results.items()}
        args.json.write_text(json.dumps({"machine": machine(), "models": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
