"""The proof that a way of forming products is right on a loss: one of another kind agrees, block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eigenfunc import scope, tree
from eigenfunc.curvature import products
from eigenfunc.curvature.mends import Seen, mended
from eigenfunc.curvature.products import FORWARD, F, Function, Way, Ways
from eigenfunc.errors import EigenfuncError, ProductError

_COMFORTABLE = torch.finfo(torch.float64).tiny ** 0.25


class Proof(NamedTuple):
    ways: tuple[str, ...]  # those that agree, in the order in which they were given
    error: float  # what they differ by, relative to each block
    trouble: dict[str, str]  # what went wrong with others
    witness: str  # what bears witness where all are of one kind

    def words(self, way: str) -> str:
        """What confirms `way`: one of the other kind, or else central differences."""
        others = [other for other in self.ways if (other in FORWARD) != (way in FORWARD)]
        witness = f"'{others[0]}'" if others else self.witness
        failures = "".join(f"; {name}: {why}" for name, why in self.trouble.items())
        return f"confirmed by {witness} to {self.error:.0e} in every block{failures}"


def prove(
    f: F, ways: Ways[F], point: Sequence[Tensor], labels: Sequence[str], seen: Seen, wanted: str | None = None
) -> Proof:
    """The ways that agree block by block on a random vector, once two of different kinds do, `wanted` among them.

    Kinds are those that push tangents forward and those that only pull back, for a wrong formula for a derivative can
    mislead all ways of one kind. Where only one kind can be had, it is held against central differences. The first way
    must be symmetric on a random pair of vectors too.

    Raises `ProductError` with the figures where no two agree.
    """
    images: dict[str, list[Tensor]] = {}
    trouble: dict[str, str] = {}
    largest = 0.0
    for name in sorted(ways.each, key=lambda way: way != wanted):
        try:
            image, flaw = _tried(ways.each[name], f, point, None if images else tolerance_of(point, seen.eps))
        except EigenfuncError:
            raise
        except Exception as error:  # user code and torch raise whatever they like
            trouble[name] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            continue
        largest = max(largest, _largest(image))
        if flaw:
            trouble[name] = flaw
            continue
        images[name] = image
        agreeing = {name, *_agreeing(images, name, labels, seen.eps, trouble)}
        if len({way in FORWARD for way in agreeing}) == 2 and (wanted is None or wanted in agreeing):
            worst = max(disagreement(images[way], image, labels, seen.eps)[0] for way in agreeing)
            return Proof(tuple(way for way in ways.each if way in agreeing), worst, trouble, ways.witness_name)
    for name in images if wanted is None else [wanted] if wanted in images else []:
        tolerance = min(20 * tolerance_of(point, seen.eps), 0.05)
        found = _against_differences(*ways.witness(f, point, _drawn(point, 0)), images[name], labels, tolerance)
        if isinstance(found, float):
            return Proof((name,), found, trouble, ways.witness_name)
        trouble[f"{name} against central differences"] = found
    figures = "\n".join(f"  {name}: {why}" for name, why in trouble.items())
    raise ProductError(
        f"no two ways of forming the {ways.matrix}-vector product agree on this loss:\n{figures}\n"
        f"{_few_digits(largest, point)}Look for operations without second derivatives, custom autograd functions, or "
        f"randomness in the forward pass; {ways.remedy}"
    )


def _drawn(point: Sequence[Tensor], seed: int) -> list[Tensor]:
    """A random vector, drawn anew wherever it is needed: next to logits it would fill the memory to be kept."""
    generator = torch.Generator().manual_seed(seed)
    return [tree.randn(x, generator) for x in point]


def _tried(way: Way[F], f: F, point: Sequence[Tensor], tolerance: float | None) -> tuple[list[Tensor], str | None]:
    """A v by the way, and what rules it out by itself: entries that are not finite or, given how far rounding may part
    them, ⟨u, Av⟩ ≠ ⟨v, Au⟩."""
    product = way(f, point)
    image = product.single(_drawn(point, 0))
    if not all(map(tree.is_finite, image)):
        return image, "the product holds NaN or infinity"
    if tolerance is None:
        return image, None
    u = _drawn(point, 1)
    other = product.single(u)
    own = image
    if (unit := _unit(image, other)) != 1:
        own, other = _over(image, unit), _over(other, unit)
    forth, size = float(tree.dot(u, own)), float(tree.norm(u) * tree.norm(own))
    del u, own
    v = _drawn(point, 0)
    skew = abs(forth - float(tree.dot(v, other)))
    size += float(tree.norm(v) * tree.norm(other))
    if not skew <= tolerance * size:
        return image, f"not symmetric: ⟨u, Av⟩ and ⟨v, Au⟩ differ by {skew / (size or 1.0):.1e} of ‖u‖‖Av‖ + ‖v‖‖Au‖"
    return image, None


def _largest(v: Sequence[Tensor]) -> float:
    return max((float(x.abs().max()) for x in v if x.numel()), default=0.0)


def _few_digits(largest: float, point: Sequence[Tensor]) -> str:
    smallest = max(torch.finfo(x.dtype).tiny for x in point)
    if not 0 < largest < 1e3 * smallest:
        return ""
    return (
        f"Their entries are at most {largest:.1e}, and their dtype has no number of full precision below "
        f"{smallest:.1e}: multiply the loss by a large number. Else: "
    )


def _unit(*vectors: Sequence[Tensor]) -> float:
    """The power of two next below the largest entry where squares would leave the range of float64, else 1."""
    largest = max(map(_largest, vectors))
    if not 0 < largest < math.inf or _COMFORTABLE < largest < 1 / _COMFORTABLE:
        return 1.0
    return 2.0 ** max(math.floor(math.log2(largest)), -1022)


def _over(v: Sequence[Tensor], unit: float) -> list[Tensor]:
    return [x.double() / unit for x in v]


def _agreeing(
    images: dict[str, list[Tensor]], name: str, labels: Sequence[str], eps: float, trouble: dict[str, str]
) -> list[str]:
    """The earlier ways that `name` agrees with; notes where it does not."""
    found = []
    for other, known in images.items():
        if other == name:
            continue
        worst, label = disagreement(known, images[name], labels, eps)
        if worst <= tolerance_of(known, eps):
            found.append(other)
        else:
            trouble[f"{other} against {name}"] = f"block '{label}' differs by {worst:.1e}"
    return found


def tolerance_of(point: Sequence[Tensor], eps: float) -> float:
    """What rounding may make two ways differ by, in the coarsest precision that the loss or its parameters use."""
    eps = max(eps, tree.coarsest_eps(list(point)))
    return 1e-8 if eps < 1e-12 else 1e-3 if eps < 1e-6 else 16 * eps


def disagreement(a: Sequence[Tensor], b: Sequence[Tensor], labels: Sequence[str], eps: float) -> tuple[float, str]:
    """Largest relative difference over the blocks; in small blocks, ten rounding errors of the whole are forgiven."""
    a, b = list(a), list(b)
    if (unit := _unit(a, b)) != 1:
        a, b = _over(a, unit), _over(b, unit)
    floor = 10 * max(eps, tree.coarsest_eps(a)) / tolerance_of(a, eps) * float(tree.norm(a))
    worst, where = 0.0, labels[0]
    for label, x, y in zip(labels, a, b, strict=True):
        size = max(float(tree.norm(x)), floor)
        difference = float(tree.norm(tree.sub(x, y)))
        relative = difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))
        if relative > worst:
            worst, where = relative, label
    return worst, where


def check_mends(f: Function, point: Sequence[Tensor], labels: Sequence[str], seen: Seen, seed: int) -> None:
    """The gradient without the mends is the one with them: called outside of `mended`, where they were met.

    Says nothing where random numbers are drawn, whose masks may differ, or where there is no plain gradient.
    Raises `ProductError`.
    """
    leaves = [leaf.detach().requires_grad_() for leaf in point]

    def gradient() -> list[Tensor]:
        found = products.slopes(f(leaves), leaves)
        return [
            torch.zeros_like(x) if slope is None else slope.to_dense() if slope.is_sparse else slope
            for x, slope in zip(leaves, found, strict=True)
        ]

    try:
        plain = gradient()
    except Exception:
        return
    if scope.drawn_since_reseed(seed, leaves[0].device):
        return
    with mended():
        ours = gradient()
    worst, label = disagreement(plain, ours, labels, seen.eps)
    if worst > max(tolerance_of(point, seen.eps), 1e-6):  # torch's own kernels hold constants in float32 at places
        raise ProductError(
            f"replacing {', '.join(sorted(seen.names))} by what can be differentiated twice changes the gradient of "
            f"'{label}' by {worst:.1e}: please report this model; elementary operations in their place would do"
        )


def _against_differences(
    found: list[Tensor], errors: list[Tensor], image: list[Tensor], labels: Sequence[str], tolerance: float
) -> float | str:
    """The largest relative difference over the blocks, or why central differences do not confirm the product."""
    if (unit := _unit(found, image)) != 1:
        found, errors, image = _over(found, unit), _over(errors, unit), _over(image, unit)
    whole = float(tree.norm(found))
    worst = 0.0
    for label, x, y, error in zip(labels, image, found, errors, strict=True):
        size = max(float(tree.norm(y)), 1e-2 * whole)
        difference, noise = float(tree.norm(tree.sub(x, y))), float(error)
        if size == 0 and difference == 0:
            continue
        if not noise <= 0.1 * size:
            return f"block '{label}' is too noisy to tell, {noise:.1e} of {size:.1e}"
        if not difference <= tolerance * size + 2 * noise:
            return f"block '{label}' differs by {difference / size:.1e}"
        worst = max(worst, difference / size)
    return worst
