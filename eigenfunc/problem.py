"""Problem files of the command line: Python that says which loss to look at, where, and over which data."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eigenfunc.errors import EigenfuncError, InputError

EXAMPLE = """A problem file defines make_problem(), which returns (loss, params, data):

    import torch
    from eigenfunc import functional_loss

    def make_problem():
        model = torch.nn.Linear(4, 3)
        inputs, targets = torch.randn(100, 4), torch.randint(0, 3, (100,))
        loss, params = functional_loss(model, torch.nn.CrossEntropyLoss())
        return loss, params, (inputs, targets)   # data: one batch, a DataLoader, or Batches([...])

With torchrun --nproc-per-node N -m eigenfunc run PROBLEM.py the batches of a DataLoader or of Batches are dealt out to
N processes. Where data is a function, data(rank, world_size) gives the share of a process; alone it is data(0, 1).
"""


@contextmanager
def traced(path: Path) -> Iterator[None]:
    """Turns an exception from the user's own code into bad input, after printing where it came from."""
    try:
        yield
    except EigenfuncError:
        raise
    except Exception as error:
        traceback.print_exception(error)
        raise InputError(f"{path} failed with {type(error).__name__}; see above") from None


def load(path: Path) -> tuple[Any, Any, Any]:
    """(loss, params, data) from make_problem() in the file; `InputError` with an example where that fails."""
    if not path.is_file():
        raise InputError(f"there is no file {path}\n{EXAMPLE}")
    spec = importlib.util.spec_from_file_location("eigenfunc_problem", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file\n{EXAMPLE}")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with traced(path):
            spec.loader.exec_module(module)
            make = getattr(module, "make_problem", None)
            if not callable(make):
                raise InputError(f"{path} does not define make_problem()\n{EXAMPLE}")
            made = make()
    finally:
        sys.path[:] = before
    if not isinstance(made, tuple) or len(made) != 3:
        what = f"{len(made)} items" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise InputError(f"make_problem() in {path} must return (loss, params, data), it returned {what}\n{EXAMPLE}")
    if not callable(made[0]):
        raise InputError(
            f"the loss that make_problem() in {path} returns is a {type(made[0]).__name__}, not a function "
            f"(params, batch) -> ()\n{EXAMPLE}"
        )
    return made
