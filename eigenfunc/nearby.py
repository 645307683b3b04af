"""The loss around the parameters, from evaluations alone: its average and its largest rise over a ball."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from eigenfunc import scope, tree
from eigenfunc.certificate import positive, seeded, whole
from eigenfunc.curvature.denominators import batches_of
from eigenfunc.curvature.products import Loss
from eigenfunc.data import Reader
from eigenfunc.errors import DataError, InputError
from eigenfunc.landscape import losses_at
from eigenfunc.overlap import gradient
from eigenfunc.stochastic.estimate import Estimate, spread
from eigenfunc.tree import Tree

_BLOCK = 8  # points evaluated in one pass over the data
_LOST = 0.01  # share of a displacement that rounding of the parameters may swallow
_SURE = 4.0  # standard deviations of the noise, for the largest of some dozens of values


class Rises:
    """L(θ + δ) − L(θ) over the whole data for displacements δ, flat (n,), in the work dtype of θ.

    All points of one call see the same pass over the data, and on each batch the same random numbers.
    """

    def __init__(self, loss: Loss, params: Tree, data: Any) -> None:
        tree.check_vector_space(params, "params")
        self.loss, self.data = loss, data
        self.device, self.dtype, self.size = tree.device(params), tree.work_dtype(params), tree.size(params)
        self.point = scope.usable(tree.tree_map(lambda leaf: leaf.detach(), params))
        self.eps = torch.finfo(self.dtype).eps  # of the parameters, or of the loss where that is coarser

    def __call__(self, offsets: Tensor) -> Tensor:
        """(p,) float64 on the CPU for a stack (p, n)."""
        losses = self.losses(offsets)
        return losses[1:] - losses[0]

    def losses(self, offsets: Tensor) -> Tensor:
        """(1 + p,): the loss at θ, and at each θ + δ. `DataError` where the first is not finite."""
        with scope.untouched(self.device):
            reader = Reader(batches_of(self.loss, self.data).on(self.device), self.device)
            found = losses_at(
                self._watched,
                self.point,
                reader,
                lambda i: self.moved(offsets[i - 1]) if i else self.point,
                1 + len(offsets),
            )
        if not math.isfinite(float(found[0])):
            raise DataError(f"the loss at the parameters is {float(found[0])}: nothing around it is above or below")
        return found

    def _watched(self, params: Tree, batch: Any) -> Tensor:
        value = self.loss(params, batch)
        if isinstance(value, Tensor) and value.is_floating_point():
            self.eps = max(self.eps, torch.finfo(value.dtype).eps)
        return value

    def moved(self, offset: Tensor) -> Tree:
        """θ + δ in the dtypes of θ."""
        step = tree.unravel(offset, self.point, narrow=False)
        return tree.tree_map(lambda x, d: (x + d).to(x.dtype), self.point, step)

    def gradient(self, offset: Tensor | None = None) -> Tensor:
        """The gradient (n,) at θ + δ, or at θ."""
        at = self.point if offset is None else self.moved(offset)
        return tree.ravel(gradient(self.loss, at, self.data), self.point)

    def displaced(self, offset: Tensor) -> Tensor:
        """By how much rounded parameters really move, (n,) float64."""
        pairs = zip(tree.leaves(self.moved(offset)), tree.leaves(self.point), strict=True)
        return torch.cat([(there.double() - here.double()).flatten() for there, here in pairs])

    def check(self, length: float, generator: Generator) -> None:
        """`InputError` where displacements of that length drown in the rounding of θ + δ."""
        offset = length * self.directions(1, generator)[0]
        lost = float(torch.linalg.vector_norm(self.displaced(offset) - offset.double())) / length
        if not lost < _LOST:
            narrow = ", ".join(sorted({str(leaf.dtype) for leaf in tree.leaves(self.point)}))
            raise InputError(
                f"displacements of length {length:g} lose {lost:.0%} of it to the rounding of the parameters "
                f"({narrow}): pass parameters in a wider dtype, or take a larger radius"
            )

    def directions(self, count: int, generator: Generator) -> Tensor:
        """Unit vectors (count, n), uniform on the sphere; drawn on the CPU, so that seeds carry over devices."""
        x = torch.randn(count, self.size, generator=generator, dtype=torch.float64)
        unit: Tensor = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return unit.to(self.device, self.dtype)

    def noise(self, length: float, generator: Generator) -> float:
        """The standard deviation of the rounding error of a rise, at displacements of up to that length.

        By eighth differences of 17 losses along a line, to which smooth functions add next to nothing (J. Moré and S.
        Wild, Estimating computational noise, SIAM J. Sci. Comput. 33, 2011); at least half a unit in the last place.
        """
        steps = torch.arange(17, dtype=self.dtype, device=self.device)[:, None] * (length / 16)
        losses = self.losses(steps * self.directions(1, generator))
        eighth = torch.diff(losses[1:], n=8)
        measured = float(torch.sqrt((eighth**2).mean() / math.comb(16, 8)))
        least = self.eps / 2 * float(losses[0].abs())
        return math.sqrt(2) * max(measured if math.isfinite(measured) else 0.0, least)


def average_sharpness(
    loss: Loss,
    params: Tree,
    data: Any,
    *,
    rho: float = 0.05,
    sigma: float | None = None,
    num_samples: int = 32,
    seed: int | None = None,
) -> Estimate[float]:
    """E L(θ + δ) − L(θ), the rise of the loss under random displacements, without bias, in units of the loss.

    loss, params, data  as for `hessian`; the mean (or sum) over all batches
    rho                 δ is uniform in the ball ‖δ‖ ≤ rho, in units of ‖params‖, or
    sigma               Gaussian, each entry with this standard deviation
    num_samples         pairs δ, −δ, whose mean is one sample: the slope drops out. Two evaluations each, in blocks of
                        8 for each pass over the data; memory for 8 vectors
    seed                of the displacements; default: a fresh one, told in the estimate

    To second order it is rho² tr H/(2n + 4), or sigma² tr H/2; negative where the curvature is on the whole. The error
    holds what the samples say and the measured rounding noise of the loss. Gaussian: the expected sharpness in
    PAC-Bayesian bounds (B. Neyshabur et al., Exploring generalization in deep learning, NeurIPS 2017).

    Nothing of the model, the data or the global random state changes. Raises `InputError` for arguments out of range
    and for displacements that drown in the rounding of the parameters, `DataError` where a loss is not finite.
    """
    length = positive(rho, "rho") if sigma is None else positive(sigma, "sigma")
    count = whole(num_samples, "num_samples", 2)
    rises = Rises(loss, params, data)
    generator, seed = seeded(seed)
    reach = length if sigma is None else length * math.sqrt(rises.size)
    rises.check(reach, generator)
    noise = rises.noise(reach, generator)
    found = []
    for start in range(0, count, _BLOCK // 2):
        size = min(_BLOCK // 2, count - start)
        if sigma is None:
            radii = length * torch.rand(size, 1, generator=generator, dtype=torch.float64) ** (1 / rises.size)
            offsets = radii.to(rises.device, rises.dtype) * rises.directions(size, generator)
        else:
            drawn = torch.randn(size, rises.size, generator=generator, dtype=torch.float64)
            offsets = length * drawn.to(rises.device, rises.dtype)
        both = rises(torch.cat([offsets, -offsets]))
        found.append((both[:size] + both[size:]) / 2)
    samples = torch.cat(found)
    if not bool(torch.isfinite(samples).all()):
        bad = int((~torch.isfinite(samples)).sum())
        raise DataError(f"the loss is not finite at {bad} of {count} displacements, so it has no average: go less far")
    stderr = math.hypot(math.sqrt(float(spread(samples))), noise)
    return Estimate(float(samples.mean()), stderr, count - 1.0, 0, seed)


class Ascent(NamedTuple):
    """Rises of the loss that were found inside a ball: each a lower bound of the largest one there.

    value     the largest one that was found
    one_step  that of one step along the gradient to the edge of the ball, SAM's; 0 where the gradient is zero, NaN
              where the loss is not finite there
    noise     both may be too large by this, four standard deviations of the rounding of the loss
    offset    (n,) the displacement of `value`, float64, on the CPU, in the order of `tree.ravel`
    """

    value: float
    one_step: float
    noise: float
    offset: Tensor


def worst_sharpness(
    loss: Loss,
    params: Tree,
    data: Any,
    *,
    rho: float = 0.05,
    num_steps: int = 10,
    starts: Sequence[Tensor] = (),
    seed: int | None = None,
) -> Ascent:
    """A lower bound of max L(θ + δ) − L(θ) over ‖δ‖ ≤ rho, in units of the loss.

    loss, params, data  as for `hessian`
    rho                 radius of the ball, in units of ‖params‖
    num_steps           gradients spent on the way up; each with a few evaluations
    starts              further displacements (n,) to begin at, beside SAM's step rho g/‖g‖ (P. Foret et al.,
                        Sharpness-aware minimization, ICLR 2021); they are shortened to the ball
    seed                of the directions along which noise is measured, and a start is drawn where there is no slope

    From the best start, projected gradient ascent with steps that are halved where the loss does not rise. No number
    of evaluations bounds the maximum from above. Raises as `average_sharpness` does.
    """
    rho = positive(rho, "rho")
    num_steps = whole(num_steps, "num_steps", 0)
    rises = Rises(loss, params, data)
    generator, _ = seeded(seed)
    rises.check(rho, generator)
    noise = rises.noise(rho, generator)
    slope = rises.gradient()
    begun = [_edge(slope, rho), *(start.to(rises.device, rises.dtype) for start in starts)]
    if float(tree.norm(slope)) == 0:
        begun.append(rho * rises.directions(1, generator)[0])
    points = torch.stack([_inside(rises, start, rho) for start in begun])
    heights = _heights(rises, points)
    one_step = float(heights[0]) if math.isfinite(float(heights[0])) else math.nan
    best = int(torch.argmax(heights))
    value, offset = _climbed(rises, points[best], float(heights[best]), rho, num_steps)
    if not value > 0:
        value, offset = 0.0, torch.zeros_like(offset)
    return Ascent(value, one_step, _SURE * noise, offset.double().cpu())


def _climbed(rises: Rises, offset: Tensor, value: float, rho: float, num_steps: int) -> tuple[float, Tensor]:
    """Projected gradient ascent: four step lengths a gradient, the best of them taken, all shortened if none rises."""
    pace = 8.0 * rho
    for _ in range(num_steps):
        slope = rises.gradient(offset)
        steps = [_inside(rises, offset + _edge(slope, pace / 4**i), rho) for i in range(4)]
        heights = _heights(rises, torch.stack(steps))
        best = int(torch.argmax(heights))
        if float(heights[best]) > value:
            value, offset = float(heights[best]), steps[best]
            pace *= 1.0 if best < 2 else 0.25
        else:
            pace /= 256
        if pace < 1e-9 * rho:
            break
    return value, offset


def _heights(rises: Rises, points: Tensor) -> Tensor:
    """Rises, with those that are not finite below all: there nothing is known of the loss."""
    found = rises(points)
    return torch.where(found.isfinite(), found, -math.inf)


def _edge(direction: Tensor, length: float) -> Tensor:
    size = float(tree.norm(direction))
    return direction * (length / size) if 0 < size < math.inf else torch.zeros_like(direction)


def _inside(rises: Rises, offset: Tensor, rho: float) -> Tensor:
    """The displacement, shortened where the rounded parameters would leave the ball."""
    for _ in range(4):
        length = float(torch.linalg.vector_norm(rises.displaced(offset)))
        if length <= rho:
            break
        offset = offset * (rho / length * (1 - 2 * torch.finfo(rises.dtype).eps))
    return offset
