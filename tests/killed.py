"""A run on a network for digits, killed by SIGKILL and taken up, again and again: `python -m tests.killed KILLS SEED`.

Each part is a process of its own, with the operator made anew in it, and saves after every product. Prints one JSON
object: how often it was killed, how often while the run was on, the most calls of the operator that a kill cost, how
many runs ended, and how many of those did not end, bit for bit, like the run that nobody killed.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eigenfunc import Batches, checkpoint, demo, eigsh, functional_loss, hessian, tree
from eigenfunc.checkpoint import Checkpoint


def problem() -> tuple[Any, Any, Any]:
    images, labels = demo.digits()
    torch.manual_seed(0)
    net = demo.network("cnn")
    demo.train(net, images[:500], labels[:500], seed=0, epochs=1)
    loss, params = functional_loss(net.double(), nn.functional.cross_entropy)
    images, labels = images[:60].double(), labels[:60]
    return loss, params, Batches([(images[:40], labels[:40]), (images[40:], labels[40:])])


def solve(parts: tuple[Any, Any, Any], path: Path | None, calls: int, out: Path) -> None:
    """Writes the result to `out`; each call of the operator adds a byte to the pipe `calls`."""
    A = hessian(*parts)

    def counted(v: Any) -> Any:
        image = A.matvec(v)
        os.write(calls, b".")
        return image

    store = None if path is None else Checkpoint(path, minutes=0)
    solution = eigsh(
        replace(A, matvec=counted), 6, which="LA", tol=1e-8, seed=1, basis_size=16, checkpoint=store, throw=False
    )
    facts = {**solution.report(), "seconds": 0.0}
    written = io.BytesIO()  # a file would hold its own name
    torch.save([json.dumps(facts), solution.residuals, solution.values, *tree.leaves(solution.vectors)], written)
    out.write_bytes(written.getvalue())


class Part:
    """One process."""

    def __init__(self, parts: tuple[Any, Any, Any], path: Path | None, out: Path) -> None:
        self.reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                solve(parts, path, writing, out)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(writing)

    def end(self, after: float | None = None) -> tuple[int, int]:
        """(signal or exit code, calls made), killed after some seconds."""
        if after is not None:
            time.sleep(after)
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        calls = 0
        while chunk := os.read(self.reading, 65536):
            calls += len(chunk)
        os.close(self.reading)
        return os.waitstatus_to_exitcode(status), calls


def progress(path: Path) -> int | None:
    """Calls of the operator up to where the run was saved."""
    saved = checkpoint.read(path)
    if saved is None:
        return None
    return int(saved.facts["products"]["passes"] + saved.facts.get("probe", {"spent": 0})["spent"])


def main(kills: int, seed: int) -> dict[str, int]:
    checkpoint.SHARE = 1e9  # save whenever that is due, whatever it costs
    chance = random.Random(seed)
    parts = problem()
    with tempfile.TemporaryDirectory() as folder:
        path, out, truth = Path(folder, "run.ckpt"), Path(folder, "out"), Path(folder, "truth")
        begun = time.perf_counter()
        assert Part(parts, None, truth).end()[0] == 0
        length = 1.5 * (time.perf_counter() - begun)
        result = {"killed": 0, "midway": 0, "lost": 0, "ended": 0, "different": 0}
        while True:
            before = progress(path)
            last = result["killed"] >= kills
            code, calls = Part(parts, path, out).end(None if last else chance.uniform(0, length))
            if code == 0:
                result["ended"] += 1
                result["different"] += out.read_bytes() != truth.read_bytes()
                if last:
                    return result
                path.unlink()
                continue
            assert code == -signal.SIGKILL, code
            result["killed"] += 1
            after = progress(path)
            if after is not None:
                result["midway"] += 1
                done = (
                    calls if before is None else before + max(calls - 1, 0)
                )  # the first call shows that A is the same
                result["lost"] = max(result["lost"], done - after)


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
