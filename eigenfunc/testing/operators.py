"""The contract of a symmetric operator: what every solver takes for granted of its products."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from eigenfunc import tree
from eigenfunc.errors import TreeError
from eigenfunc.operator import LinearOperator, aslinearoperator
from eigenfunc.tree import Tree

_LEAVES = 16  # leaves between which symmetry is tested one by one


class OperatorFault(AssertionError):
    """An operator lacks a property: `property` by name, `error` where `allowed` is the most that rounding explains."""

    def __init__(self, property: str, error: float, allowed: float, detail: str) -> None:
        super().__init__(f"the operator is not {property}: {detail}")
        self.property = property
        self.error = error
        self.allowed = allowed


def check_operator(A: Any, *, seed: int = 0, tol: float | None = None) -> None:
    """Hold an operator to what solvers rely on, with random vectors; about 25 products, and two for each leaf.

    A     `LinearOperator`, or what `aslinearoperator` takes
    seed  of the vectors
    tol   relative error that rounding explains; default 1000 eps of the coarsest leaf, the float32 default being 1e-4

    Checked: products have the structure, shapes and dtypes of `A.like` and are finite; they change neither their
    argument, nor the global random state (of Python, NumPy and torch), grad mode or default dtype; the same vector
    gives the same product, with another one in between; A(a u + b v) = a A u + b A v over six orders of magnitude,
    and A 0 = 0; ⟨u, A v⟩ = ⟨v, A u⟩, also with vectors that live on one leaf each; a stack's products are those of
    its members. What `A.noise()` declares is allowed.

    Raises `OperatorFault`, an AssertionError, naming the property and by how much it fails. A pass is probabilistic.
    """
    _Check(aslinearoperator(A), seed, tol).run()


class _Check:
    def __init__(self, A: LinearOperator, seed: int, tol: float | None) -> None:
        tree.check_vector_space(A.like, "the operator's `like`")
        self.A = A
        self.generator = torch.Generator(tree.device(A.like)).manual_seed(seed)
        self.tol = 1_000 * tree.coarsest_eps(A.like) if tol is None else tol
        self.unit = 1.0  # of all images below, so that none of their squares leaves the range of float64
        self.norm = 0.0

    def run(self) -> None:
        u, v = self.draw(), self.draw()
        first = self.pure(u)
        largest = max(float(leaf.abs().max()) for leaf in tree.leaves(first) if leaf.numel())
        self.unit = 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0
        image_u, image_v = self.in_units(first), self.pure(v)
        self.norm = max(_size(image_u), _size(image_v))
        self.close("deterministic", self.product(u), image_u, 1.0, "the same product, formed again, differs")
        self.linear(u, v, image_u, image_v)
        self.symmetric([(u, image_u), (v, image_v)], "two random vectors")
        self.symmetric([(e, self.product(e)) for e in self.on_single_leaves()], "vectors on one leaf each")
        self.blocks()

    def draw(self) -> Tree:
        v = tree.randn(self.A.like, self.generator)
        return tree.scale(1 / tree.norm(v), v)

    def pure(self, v: Tree) -> Tree:
        """A v, with all that may not change compared before and after."""
        kept, state = tree.tree_map(torch.clone, v), _global_state()
        image = self.product(v)
        for what, before, after in zip(_STATE, state, _global_state(), strict=True):
            if before != after:
                raise OperatorFault("pure", float("inf"), 0.0, f"a product changes the global {what}")
        moved = _size(tree.sub(v, kept))
        if moved != 0:
            raise OperatorFault("pure", moved, 0.0, f"a product changes its argument by {moved:.2g}, relative")
        return image

    def product(self, v: Tree) -> Tree:
        """A v / unit, as a copy of its own."""
        image = self.A.matvec(v)
        self.shaped(image, "product", stacked=False)
        return self.in_units(image)

    def in_units(self, image: Tree) -> Tree:
        return tree.tree_map(lambda leaf: torch.div(leaf, self.unit), image)

    @property
    def noise(self) -> float:
        return self.A.noise() / self.unit

    def shaped(self, image: Tree, what: str, *, stacked: bool) -> None:
        try:
            tree.check_like(image, self.A.like, f"the {what}", stacked=stacked)
        except TreeError as error:
            raise OperatorFault("shaped like its vectors", float("inf"), 0.0, str(error)) from None
        if not bool(tree.all_finite(image)):
            raise OperatorFault("finite", float("inf"), 0.0, f"the {what} of a unit vector holds NaN or infinity")

    def linear(self, u: Tree, v: Tree, image_u: Tree, image_v: Tree) -> None:
        for a, b in ((1.0, 1.0), (-0.3, 2.5), (1e3, 0.0), (0.0, 1e-3)):
            mixed = self.product(tree.add(tree.scale(a, u), tree.scale(b, v)))
            expected = tree.add(tree.scale(a, image_u), tree.scale(b, image_v))
            self.close(
                "linear", mixed, expected, abs(a) + abs(b), f"A({a:g} u + {b:g} v) differs from {a:g} A u + {b:g} A v"
            )
        zero = self.product(tree.zeros_like(u))
        self.close("linear", zero, tree.zeros_like(zero), 1.0, "A 0 is not 0: it differs")

    def on_single_leaves(self) -> list[Tree]:
        flat, rebuild = tree.flatten(self.A.like)
        drawn = []
        for place in [i for i, leaf in enumerate(flat) if leaf.numel()][:_LEAVES]:
            parts = [torch.zeros_like(leaf) for leaf in flat]
            parts[place] = tree.leaves(self.draw())[place]
            v = rebuild(parts)
            drawn.append(tree.scale(1 / tree.norm(v), v))
        return drawn

    def symmetric(self, pairs: list[tuple[Tree, Tree]], which: str) -> None:
        units, images = tree.stack([u for u, _ in pairs]), tree.stack([image for _, image in pairs])
        gram, sizes = tree.exact_gram(units, images).cpu(), tree.norms(images).cpu()
        allowed = self.tol * (sizes[:, None] + sizes[None, :]) + 2 * self.noise
        skew = (gram - gram.mT).abs()
        i, j = divmod(int((skew - allowed).argmax()), len(skew))
        told = f"for {which}, numbers {i + 1} and {j + 1}, ⟨u, A v⟩ and ⟨v, A u⟩ differ"
        self.hold("symmetric", float(skew[i, j]), float(allowed[i, j]), told)

    def blocks(self) -> None:
        for count in (1, 3):
            vs = tree.stack([self.draw() for _ in range(count)])
            kept = tree.tree_map(torch.clone, vs)
            images = self.A.matmat(vs)
            self.shaped(images, "product with a stack", stacked=True)
            if tree.leaves(images)[0].shape[0] != count or _size(tree.sub(vs, kept)) != 0:
                raise OperatorFault("the same on stacks", float("inf"), 0.0, "a stack changes, or products are missing")
            images = self.in_units(images)
            for i in range(count):
                single = self.product(tree.row(vs, i))
                told = f"product {i + 1} of a stack of {count} differs from the single one"
                self.close("the same on stacks", tree.row(images, i), single, 1.0, told)

    def close(self, property: str, found: Tree, expected: Tree, size: float, told: str) -> None:
        """Raise unless the two agree to rounding in products of vectors of length `size`."""
        norm = max(self.norm * size, _size(expected))
        self.hold(property, _size(tree.sub(found, expected)), self.tol * norm + 2 * self.noise * size, told)

    def hold(self, property: str, error: float, allowed: float, told: str) -> None:
        if not error <= allowed:
            error, allowed = error * self.unit, allowed * self.unit
            raise OperatorFault(
                property, error, allowed, f"{told} by {error:.2g}, where rounding explains {allowed:.2g}"
            )


def _size(x: Tree) -> float:
    return float(tree.norm(x))


_STATE: tuple[str, ...] = (
    "random state of torch",
    "random state of NumPy",
    "random state of Python",
    "grad mode",
    "default dtype",
)
_READERS: tuple[Callable[[], object], ...] = (
    lambda: torch.get_rng_state().numpy().tobytes(),
    lambda: pickle.dumps(np.random.get_state()),
    random.getstate,
    torch.is_grad_enabled,
    torch.get_default_dtype,
)


def _global_state() -> list[object]:
    return [read() for read in _READERS]
