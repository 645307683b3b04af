"""The loss on a line or a plane through the parameters, along eigenvectors: the numbers behind `plot.landscape`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eigenfunc import scope, tree
from eigenfunc.curvature.denominators import batches_of
from eigenfunc.curvature.products import Loss, of_leaves
from eigenfunc.curvature.rehearsal import evaluated
from eigenfunc.data import Reader, average
from eigenfunc.errors import DataError, InputError
from eigenfunc.solution import Solution
from eigenfunc.tree import Tree

__all__ = ["Landscape", "landscape"]  # `losses_at` is for measures near a point


class Landscape(NamedTuple):
    """The loss at θ + x u, or at θ + x u + y v, for eigenvectors u and v of unit length.

    offsets  (points,) float64, the x, and the y: from −radius to radius, 0 in the middle
    losses   (points,) float64, or (points, points) with x along the first axis
    model    shaped as `losses`: L₀ + s·x + ½ λ x², and the same for y, with the eigenvalues λ of the solution and the
             slopes s read off the points next to the middle
    """

    offsets: Tensor
    losses: Tensor
    model: Tensor


def landscape(
    loss: Loss,
    params: Tree,
    data: Any,
    solution: Solution,
    pairs: int | Sequence[int] = (0, 1),
    *,
    radius: float | None = None,
    points: int = 25,
    progress: bool = False,
) -> Landscape:
    """Evaluate the loss on a line (one pair) or a plane (two) around `params`, forward only, and its quadratic model.

    loss, params, data  as for `hessian`; the mean (or sum) over all batches, which are read twice in all
    solution            holds the eigenvectors, shaped as `params`
    pairs               indices of one or two of them
    radius              how far to go, in units of ‖params‖; default: to where the model of the more curved
                        direction has risen or fallen by |L₀|, or a tenth of ‖params‖ where that says nothing
    points              along each direction, odd; points or points² losses are evaluated on each batch

    Nothing of the model, the data or the global random state changes, and what is drawn at random is the same at every
    point. Points are rounded to the dtypes of `params`. Raises `InputError` for arguments out of range, `TreeError`
    where the vectors do not fit `params`, `DataError` where the loss at `params` is not finite; elsewhere it may be.
    """
    chosen = (pairs,) if isinstance(pairs, int) else tuple(pairs)
    count = len(solution.values)
    if not 1 <= len(set(chosen)) == len(chosen) <= 2 or not all(isinstance(i, int) and 0 <= i < count for i in chosen):
        raise InputError(f"pairs must be one or two different indices below {count}, got {pairs!r}")
    if not isinstance(points, int) or points < 3 or points % 2 == 0:
        raise InputError(f"points must be an odd integer of at least 3, so that one of them is θ; got {points!r}")
    if radius is not None and not 0 < radius < math.inf:
        raise InputError(f"radius must be a positive number, got {radius!r}")
    tree.check_vector_space(params, "params")
    tree.check_like(solution.vectors, params, "solution.vectors", stacked=True)
    device = tree.device(params)
    directions = tree.tree_map(lambda leaf: leaf[list(chosen)], solution.vectors)
    with scope.untouched(device):
        point = scope.usable(tree.tree_map(lambda leaf: leaf.detach(), params))
        reader = Reader(batches_of(loss, data).on(device), device)
        centre = float(losses_at(loss, point, reader, lambda i: point, 1)[0])
        if not math.isfinite(centre):
            raise DataError(f"the loss at the parameters is {centre}: there is no landscape around it")
        values = solution.values[list(chosen)]
        reach = radius or _reach(centre, float(values.abs().max()), float(tree.norm(point)))
        offsets = torch.linspace(-reach, reach, points, dtype=torch.float64)
        offsets[points // 2] = 0.0
        grid = torch.cartesian_prod(*[offsets] * len(chosen)).reshape(-1, len(chosen))
        batches: Any = reader.batches.data
        sized = hasattr(batches, "__len__") and reader.batches.microbatch is None
        total = len(grid) * len(batches) if sized else None
        with tqdm(disable=not progress, total=total, desc="landscape", unit=" losses", leave=False) as bar:
            losses = losses_at(loss, point, reader, lambda i: _moved(point, directions, grid[i]), len(grid), bar.update)
    losses = losses.reshape([points] * len(chosen))
    return Landscape(offsets, losses, _model(offsets, losses, values))


def _reach(centre: float, curvature: float, length: float) -> float:
    if centre != 0 and curvature > 0:
        return math.sqrt(2 * abs(centre) / curvature)
    return 0.1 * length or 1.0


def losses_at(
    loss: Loss, point: Tree, reader: Reader, at: Callable[[int], Tree], count: int, tick: Callable[[], Any] = int
) -> Tensor:
    """The losses (count,), float64 on the CPU, at points near `point`, in one pass over the data: on each batch all see
    the same random numbers."""

    def along(index: int, batch: Any) -> Tensor:
        f = of_leaves(loss, batch, point, reader.seed + index)
        found = []
        for i in range(count):
            found.append(evaluated(f, tree.leaves(at(i))))
            tick()
        return torch.stack(found).cpu()

    parts = ((weight, partial(along, index, batch)) for index, weight, batch in reader.one_pass())
    total: Tensor = average(parts, reader.batches.reduction)
    return total


def _moved(point: Tree, directions: Tree, coordinates: Tensor) -> Tree:
    step = tree.combine(coordinates[None].to(tree.device(point)), directions, tree.work_dtype(point))
    return tree.tree_map(lambda x, moves: (x + moves[0]).to(x.dtype), point, step)


def _model(offsets: Tensor, losses: Tensor, values: Tensor) -> Tensor:
    middle = len(offsets) // 2
    spacing = float(offsets[middle + 1])
    axes = [losses] if losses.ndim == 1 else [losses[:, middle], losses[middle]]
    rises = [
        (line[middle + 1] - line[middle - 1]) / (2 * spacing) * offsets + value * offsets**2 / 2
        for line, value in zip(axes, values, strict=True)
    ]
    rise = rises[0] if losses.ndim == 1 else rises[0][:, None] + rises[1][None, :]
    model: Tensor = axes[0][middle] + rise
    return model
