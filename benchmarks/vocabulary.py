"""Peak memory of a Gauss–Newton product with a large vocabulary: `python -m benchmarks.vocabulary`.

An embedding of width 64, tanh, and a linear layer to 50,000 classes under cross entropy, so that tensors shaped as the
logits are all that counts. Peak resident set over what was resident right before, each in a process of its own: one
step's loss and gradient in plain torch; an operator without checks and one product, its graphs kept or not; the pure
product; the operator as it comes, proof and all, and one product; the same of a criterion that is not recognised.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.memory import _MB, _peak, _resident
from eigenfunc import functional_loss, hvp
from eigenfunc.curvature.ggn import ggn, ggnvp

CLASSES, WIDTH = 50_000, 64
CRITERION = nn.CrossEntropyLoss()


def problem(classes: int, tokens: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(classes, WIDTH), nn.Tanh(), nn.Linear(WIDTH, classes))
    return model, (torch.randint(classes, (tokens,)), torch.randint(classes, (tokens,)))


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    CRITERION(model(batch[0]), batch[1]).backward()


def operator(
    criterion: Callable[[Tensor, Tensor], Tensor] = CRITERION, **options: object
) -> Callable[[nn.Module, tuple[Tensor, Tensor]], None]:
    def run(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        loss, params = functional_loss(model, criterion)
        ggn(loss, params, batch, **options)({name: torch.ones_like(x) for name, x in params.items()})  # type: ignore[arg-type]

    return run


def pure(product: Callable[..., object]) -> Callable[[nn.Module, tuple[Tensor, Tensor]], None]:
    def run(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        loss, params = functional_loss(model, CRITERION)
        product(loss, params, batch, {name: torch.ones_like(x) for name, x in params.items()})

    return run


WAYS: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor]], None]] = {
    "step": step,
    "kept": operator(check=False),
    "graph": operator(check=False, cache=0),
    "dual": operator(check=False, product="dual"),
    "jvp": operator(check=False, product="jvp"),
    "ggnvp": pure(ggnvp),
    "default": operator(),
    "default, streamed": operator(cache=0),
    "default, a lambda": operator(lambda outputs, targets: CRITERION(outputs, targets)),
    "hvp": pure(hvp),
}


def measure(way: str, tokens: int) -> int:
    """Bytes that `way` needs at its peak, in this process: to be called once in it."""
    torch.set_num_threads(1)
    WAYS[way](*problem(50, 16))  # what loads or allocates at first use is not the product's
    model, batch = problem(CLASSES, tokens)
    gc.collect()
    before = _resident()
    WAYS[way](model, batch)
    return _peak() - before


def measured(way: str, tokens: int, repeats: int) -> list[int]:
    """`measure` in fresh processes."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.vocabulary", "--measure", way, str(tokens)]
    return [int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(repeats)]


def report(results: dict[str, dict[str, list[int]]]) -> str:
    lines = ["| tokens | logits | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 2) + "|"]
    for tokens, peaks in results.items():
        base = statistics.median(peaks["step"])
        cells = [f"{base / _MB:.0f} MB"]
        cells += [f"{statistics.median(peaks[way]) / base:.2f}" for way in WAYS if way != "step"]
        lines.append(f"| {tokens} | {int(tokens) * CLASSES * 4 / _MB:.0f} MB | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "In steps. Target: at most 1.5 of them for a product."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1, help="processes for each figure, a median")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers, in bytes")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "TOKENS"), help="print one figure of this process")
    args = parser.parse_args()
    if args.measure:
        print(measure(args.measure[0], int(args.measure[1])))
        return
    results: dict[str, dict[str, list[int]]] = {str(tokens): {} for tokens in args.tokens}
    for tokens, way in tqdm([(tokens, way) for tokens in args.tokens for way in WAYS]):
        results[str(tokens)][way] = measured(way, tokens, args.repeats)
    print(report(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
