"""The overhead of `SpectrumTracker` on a CNN, and that the weights come out the same: `python -m benchmarks.tracking`.

Processor time, so that other programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from eigenfunc import demo, functional_loss
from eigenfunc.track import SpectrumTracker


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * width, 10),
    )


def run(share: float | None, steps: int, width: int, samples: int) -> tuple[nn.Module, SpectrumTracker, float]:
    images, labels = demo.digits()
    torch.manual_seed(0)
    net, g = network(width), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    loss, _ = functional_loss(net, cross_entropy)
    data = images[:samples], labels[:samples]
    tracker = SpectrumTracker(loss, data, max_overhead=share or 1.0, optimizer=optimizer)
    tracker.core = replace(tracker.core, clock=time.process_time)
    begun = time.process_time()
    for step, index in enumerate(torch.randint(len(labels), (steps, 128), generator=g)):
        optimizer.zero_grad()
        value = cross_entropy(net(images[index]), labels[index])
        torch.autograd.backward(value)
        optimizer.step()
        if share is not None:
            tracker.observe(step, loss=value)
            tracker(net, step)
    return net, tracker, time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    logging.disable()
    settings = arguments.steps, arguments.width, arguments.samples
    plain, _, seconds = run(None, *settings)
    print(f"{sum(p.numel() for p in plain.parameters())} parameters, {1e3 * seconds / arguments.steps:.2f} ms a step")
    for share in (0.02, 0.05, 0.1, 0.2):
        net, tracker, _ = run(share, *settings)
        same = all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.parameters(), strict=True))
        looks = [record.step for record in tracker.records if record.kind == "look"]
        glances = len(tracker.records) - len(looks)
        print(
            f"budget {share:.0%}: overhead {tracker.overhead:.2%}, looks at {looks}, {glances} glances, "
            f"weights {'bitwise the same' if same else 'DIFFERENT'}"
        )
        if not looks:
            print(f"  {tracker.summary()}")


if __name__ == "__main__":
    main()
