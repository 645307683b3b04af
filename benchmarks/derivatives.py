"""The gradient of `sharpness` beside an uncached product, one thread: `python -m benchmarks.derivatives`.

An `hvp`, `sharpness` alone, and its gradient: in turns, and each in a loop of its own, as a user would run it. What the
gradient costs beyond the value is given in products, by the clock (medians) and by the multiplications of matrices and
convolutions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.products import machine
from eigenfunc import hvp, sharpness

Params = dict[str, Tensor]


def mlp(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    hidden = torch.tanh(F.linear(torch.tanh(F.linear(batch[0], p["w1"], p["b1"])), p["w2"], p["b2"]))
    return F.cross_entropy(F.linear(hidden, p["w3"], p["b3"]), batch[1])


def cnn(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    hidden = torch.tanh(F.conv2d(torch.tanh(F.conv2d(batch[0], p["w1"], p["b1"])), p["w2"], p["b2"]))
    return F.cross_entropy(F.linear(hidden.flatten(1), p["w3"], p["b3"]), batch[1])


SHAPES: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "MLP": (mlp, (256, 784), ((512, 784), (512, 512), (10, 512)))
} | {
    f"CNN, {samples} samples": (cnn, (samples, 1, 16, 16), ((16, 1, 3, 3), (16, 16, 3, 3), (10, 2304)))
    for samples in (32, 64, 128, 512)
}


class Outcome(NamedTuple):
    product: float  # seconds
    value: float  # the rest in products
    gradient: float
    beyond: float
    alone: float  # beyond the value, each in a loop of its own
    beyond_flops: float


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measure(loss: Any, size: tuple[int, ...], shapes: Any, num_steps: int, rounds: int, progress: Any) -> Outcome:
    params = {f"w{i}": draw(*s, seed=i, scale=s[1:].numel() ** -0.5) for i, s in enumerate(map(torch.Size, shapes), 1)}
    params |= {f"b{i}": torch.zeros(s[0]) for i, s in enumerate(shapes, 1)}
    batch = draw(*size, seed=0), torch.arange(size[0]) % 10
    v = {name: draw(*leaf.shape, seed=20 + i) for i, (name, leaf) in enumerate(params.items())}

    def value(p: Params) -> Tensor:
        return sharpness(loss, p, batch, num_steps=num_steps, v0=v)

    tasks: list[Callable[[], object]] = [
        lambda: hvp(loss, params, batch, v),
        lambda: value(params),
        lambda: torch.func.grad(value)(params),
    ]
    flops = []
    for task in tasks:
        with FlopCounterMode(display=False) as counter:
            task()
        flops.append(counter.get_total_flops())
    turns = []
    for _ in range(rounds):
        turns.append([clock(task) for task in tasks])
        progress.update()
    product, plain, gradient = (statistics.median(taken) for taken in zip(*turns, strict=True))
    alone = [statistics.median(clock(task) for _ in range(rounds)) for task in tasks]
    return Outcome(
        product,
        plain / product,
        gradient / product,
        (gradient - plain) / product,
        (alone[2] - alone[1]) / alone[0],
        (flops[2] - flops[1]) / flops[0],
    )


def clock(task: Callable[[], object]) -> float:
    begun = time.perf_counter()
    task()
    return time.perf_counter() - begun


def table(results: dict[str, Outcome]) -> str:
    head = (
        "model | product | value | its gradient | gradient beyond the value | each in its own loop | in multiplications"
    )
    lines = [f"| {head} |", "|---" * 7 + "|"]
    for name, (product, *rest) in results.items():
        lines.append(f"| {name} | {1e3 * product:.1f} ms | {' | '.join(f'{x:.2f}' for x in rest)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tqdm(total=len(SHAPES) * args.rounds) as progress:
        results = {name: measure(*shape, args.steps, args.rounds, progress) for name, shape in SHAPES.items()}
    print(f"{machine()}; float32, {args.steps} steps, {args.rounds} rounds in turns, medians, in products")
    print("", table(results), sep="\n")


if __name__ == "__main__":
    main()
