"""Cost and accuracy of one Hessian-vector product in eager gradients, beside other libraries.

`python -m benchmarks.products`; the peers come with `pip install -c .ci/constraints.txt -e '.[bench]'`. One thread;
in each round every way runs once, in shuffled order: a call to warm up, then at least `_LEAST` seconds. A figure is the
median over rounds of seconds per probe over seconds per gradient of the same round. Errors are those of the worst
parameter block against plain double backward in float64. What fails on fused attention runs again under the MATH one.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.models import NAMES, Problem, exact, loss_of, math_attention, probe_vectors, problem, worst_block
from eigenfunc import functional_loss, hessian, hvp

_PROBES = 8
_LEAST = 0.2  # seconds that one measurement lasts at least
_WRONG = 1e-2  # an error above this is marked in the table

Blocks = list[Tensor]  # one tensor a parameter, in the module's order
GRADIENT = "eager gradient"
KEPT, KEPT_BLOCK = "eigenfunc, graph kept", "eigenfunc, graph kept, matmat of 8"
STREAMED, STREAMED_BLOCK = "eigenfunc, streamed", "eigenfunc, streamed, matmat of 8"


@dataclass(frozen=True)
class Way:
    """A product set up for one problem: `call` is timed, `blocks` splits what it returned by parameter."""

    call: Callable[[], Any]
    blocks: Callable[[Any], Sequence[Tensor]] = list
    probes: int = 1
    description: str = ""


@dataclass
class Outcome:
    """What became of a way on a problem. `failure` is the class of the first exception, before any help."""

    probes: int = 1
    failure: str | None = None
    message: str = ""
    helped: bool = False  # runs under MATH attention only
    error: float | None = None
    description: str = ""
    seconds: list[float] = field(default_factory=list)  # per probe, one entry a round


def _named(p: Problem, vs: Blocks) -> dict[str, Tensor]:
    return dict(zip((name for name, _ in p.model.named_parameters()), vs, strict=True))


def _by_name(p: Problem) -> Callable[[dict[str, Tensor]], Blocks]:
    return lambda out: [out[name] for name, _ in p.model.named_parameters()]


def _operator(p: Problem, vs: Blocks, block: bool, **options: Any) -> Way:
    A = hessian(*functional_loss(p.model, p.criterion), p.batch, **options)
    many, one = _named(p, vs), _named(p, [v[0] for v in vs])
    return Way(lambda: A.matmat(many) if block else A(one), _by_name(p), _PROBES if block else 1, A.describe())


def pure(p: Problem, vs: Blocks) -> Way:
    loss, params = functional_loss(p.model, p.criterion)
    v = _named(p, [x[0] for x in vs])
    return Way(lambda: hvp(loss, params, p.batch, v), _by_name(p))


def gradient(p: Problem, vs: Blocks) -> Way:
    leaves = list(p.model.parameters())
    return Way(lambda: torch.autograd.grad(loss_of(p, p.model), leaves))


def math_gradient(p: Problem, vs: Blocks) -> Way:
    call = gradient(p, vs).call

    def under_math() -> Any:
        with math_attention(p):
            return call()

    return Way(under_math)


def double_backward(p: Problem, vs: Blocks) -> Way:
    leaves, v = list(p.model.parameters()), [x[0] for x in vs]

    def call() -> Any:
        slopes = torch.autograd.grad(loss_of(p, p.model), leaves, create_graph=True)
        return torch.autograd.grad(slopes, leaves, v)

    return Way(call)


def eigenthings(p: Problem, vs: Blocks) -> Way:
    from hessian_eigenthings.operators.hessian import HessianOperator

    A = HessianOperator(p.model, [p.batch], lambda model, batch: p.criterion(model(batch[0]), batch[1]))
    flat = torch.cat([v[0].flatten() for v in vs])

    def blocks(out: Tensor) -> Blocks:
        pieces = torch.split(out, [v[0].numel() for v in vs])
        return [piece.view_as(v[0]) for piece, v in zip(pieces, vs, strict=True)]

    return Way(lambda: A.matvec(flat), blocks)


def _curvlinops(p: Problem, vs: Blocks, block: bool) -> Way:
    from curvlinops import HessianLinearOperator

    leaves = list(p.model.parameters())
    A = HessianLinearOperator(p.model, p.criterion, leaves, [p.batch], check_deterministic=False)
    if block:
        columns = [v.movedim(0, -1).contiguous() for v in vs]
        return Way(lambda: A @ columns, lambda out: [x.movedim(-1, 0) for x in out], _PROBES)
    v = [x[0] for x in vs]
    return Way(lambda: A @ v)


def _pyhessian(p: Problem, vs: Blocks, loader: bool) -> Way:
    from pyhessian import hessian as PyHessian
    from pyhessian.utils import hessian_vector_product

    held = PyHessian(p.model, p.criterion, cuda=False, **({"dataloader": [p.batch]} if loader else {"data": p.batch}))
    v = [x[0] for x in vs]
    if loader:
        return Way(lambda: held.dataloader_hv_product(v)[1])
    return Way(lambda: hessian_vector_product(held.gradsH, held.params, v))


WAYS: dict[str, Callable[[Problem, Blocks], Way]] = {
    GRADIENT: gradient,
    "eager gradient again, MATH attention": math_gradient,
    KEPT: lambda p, vs: _operator(p, vs, block=False),
    KEPT_BLOCK: lambda p, vs: _operator(p, vs, block=True),
    STREAMED: lambda p, vs: _operator(p, vs, block=False, cache=0),
    STREAMED_BLOCK: lambda p, vs: _operator(p, vs, block=True, cache=0),
    "eigenfunc, pure hvp": pure,
    "double backward, rebuilt each time": double_backward,
    "hessian-eigenthings": eigenthings,
    "curvlinops": lambda p, vs: _curvlinops(p, vs, block=False),
    "curvlinops, matrix of 8": lambda p, vs: _curvlinops(p, vs, block=True),
    "PyHessian, one batch (graph kept)": lambda p, vs: _pyhessian(p, vs, loader=False),
    "PyHessian, data loader": lambda p, vs: _pyhessian(p, vs, loader=True),
}


def _set_up(p: Problem, name: str, vs: Blocks, truth: Blocks) -> tuple[Callable[[], Any] | None, Outcome]:
    """The call to time, warmed up, or None where the way fails with and without help."""
    outcome = Outcome()
    for helped in (False, True) if p.attention else (False,):
        own = Problem(p.name, copy.deepcopy(p.model), p.batch, p.criterion, p.attention)
        try:
            with math_attention(p) if helped else nullcontext():
                way = WAYS[name](own, vs)
                out = way.call()
        except Exception as error:
            if outcome.failure is None:
                outcome.failure, outcome.message = type(error).__name__, str(error).strip().partition("\n")[0]
            continue
        outcome.helped, outcome.probes, outcome.description = helped, way.probes, way.description
        if WAYS[name] not in (gradient, math_gradient):
            outcome.error = worst_block([x.detach() for x in way.blocks(out)], truth)
        return way.call, outcome
    return None, outcome


def _timed(call: Callable[[], Any], repeats: int, around: AbstractContextManager[None]) -> float:
    with around:
        call()  # so that no way pays for the memory and caches that the one before has left
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


def measure(p: Problem, rounds: int, progress: tqdm[Any]) -> dict[str, Outcome]:
    vs = probe_vectors(p, _PROBES)
    truth = exact(p, vs)
    outcomes: dict[str, Outcome] = {}
    calls: dict[str, tuple[Callable[[], Any], int]] = {}

    def around(name: str) -> AbstractContextManager[None]:
        return math_attention(p) if outcomes[name].helped else nullcontext()

    for name in WAYS:
        call, outcomes[name] = _set_up(p, name, vs, truth)
        if call is not None:
            once = _timed(call, 1, around(name))
            calls[name] = (call, max(1, math.ceil(_LEAST / once)))
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            gc.collect()
            seconds = _timed(*calls[name], around(name))
            outcomes[name].seconds.append(seconds / outcomes[name].probes)
        progress.update()
    return outcomes


def spread(values: Sequence[float]) -> str:
    """Median and quartiles."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}–{high:.2f}]"


def ratios(outcomes: dict[str, Outcome], name: str, of: str = GRADIENT) -> list[float]:
    """Seconds per probe over those of another way, round by round; empty where either has failed."""
    return [x / y for x, y in zip(outcomes[name].seconds, outcomes[of].seconds, strict=False)]


def _cell(outcomes: dict[str, Outcome], name: str) -> str:
    outcome = outcomes[name]
    if not outcome.seconds:
        return str(outcome.failure)
    if name == GRADIENT:
        return f"{1e3 * statistics.median(outcome.seconds):.1f} ms"
    text = spread(ratios(outcomes, name))
    if outcome.helped:
        text = f"{outcome.failure}; MATH: {text}"
    if name == STREAMED_BLOCK:
        text += f", {spread(ratios(outcomes, name, STREAMED))} of singles"
    return text + (", **wrong**" if (outcome.error or 0) > _WRONG else "")


def table(results: dict[str, dict[str, Outcome]]) -> str:
    lines = [f"| way | {' | '.join(results)} | worst block error |", "|---" * (len(results) + 2) + "|"]
    for name in WAYS:
        errors = [outcomes[name].error for outcomes in results.values()]
        column = " / ".join("–" if error is None else f"{error:.0e}" for error in errors)
        lines.append(f"| {name} | {' | '.join(_cell(o, name) for o in results.values())} | {column} |")
    return "\n".join(lines)


def targets(results: dict[str, dict[str, Outcome]]) -> str:
    def median(model: str, name: str, of: str = GRADIENT) -> float:
        return statistics.median(ratios(results[model], name, of) or [math.inf])

    checks = [(f"{KEPT}, median over models", statistics.median(median(model, KEPT) for model in results), 2.2)]
    checks += [(f"{KEPT_BLOCK} over singles, {model}", median(model, KEPT_BLOCK, KEPT), 1.0) for model in results]
    streamed = [model for model in results if model in ("MLP", "GPT")]
    checks += [(f"{STREAMED_BLOCK} over singles, {m}", median(m, STREAMED_BLOCK, STREAMED), 0.6) for m in streamed]
    return "\n".join(
        f"- {what}: {value:.2f}, target ≤ {limit}: {'met' if value <= limit else 'MISSED'}"
        for what, value, limit in checks
    )


def shared(p: Problem) -> float:
    """Multiplications of one graph of the gradient and a block of products from it, over those of as many graphs with
    one product each: what a block saves over streamed data where every multiplication takes as long."""
    leaves, v = list(p.model.parameters()), [x[0] for x in probe_vectors(p, 1)]
    with math_attention(p):
        with FlopCounterMode(display=False) as graph:
            slopes = torch.autograd.grad(loss_of(p, p.model), leaves, create_graph=True)
        with FlopCounterMode(display=False) as product:
            torch.autograd.grad(slopes, leaves, v)
    one, each = graph.get_total_flops(), product.get_total_flops()
    return (one + _PROBES * each) / (_PROBES * (one + each))


def machine() -> str:
    info = Path("/proc/cpuinfo")
    named = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cpu = named[0].partition(":")[2].strip() if named else platform.processor()
    return f"{cpu}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PyHessian's backward(create_graph=True), at every product
    rounds = 3 if args.quick else args.rounds
    problems = {name: problem(name) for name in args.models}
    with tqdm(total=rounds * len(problems)) as progress:
        results = {name: measure(p, rounds, progress) for name, p in problems.items()}
    print(f"{machine()}; {rounds} rounds, medians [quartiles]; float32")
    print(", ".join(f"{name}: {p.size:,} parameters" for name, p in problems.items()), end="\n\n")
    print(table(results), targets(results), sep="\n\n")
    shares = ", ".join(f"{shared(p):.2f} ({name})" for name, p in problems.items())
    print(f"- a streamed block over singles, in multiplications: {shares}", end="\n\n")
    for name, outcomes in results.items():
        print(f"{name}: {outcomes[KEPT].description}")
        print("".join(f"  {way}: {o.failure}: {o.message[:200]}\n" for way, o in outcomes.items() if o.failure), end="")
    if args.json:
        models = {name: {way: asdict(o) for way, o in outcomes.items()} for name, outcomes in results.items()}
        args.json.write_text(json.dumps({"machine": machine(), "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
