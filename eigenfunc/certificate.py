"""What makes an eigenpair trustworthy: counted fresh products, the noise in them, true residuals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eigenfunc import scope, storage, tree
from eigenfunc.distributed.columns import Columns
from eigenfunc.distributed.team import Group
from eigenfunc.errors import InputError, NonFiniteError, TransformError
from eigenfunc.krylov import basis
from eigenfunc.operator import LinearOperator, MatVec, aslinearoperator
from eigenfunc.tree import Tree

T = TypeVar("T")
_AGAIN = 3  # times that vectors are made orthonormal once more, at most
_EPS = torch.finfo(torch.float64).eps  # of the small projected problem
SHORTER = 0.7  # of a vector is multiplied once more: by a power of two the rounding would be the same


class Products:
    """A / scale as products with flat stacks (p, n), counted.

    `scale`, a power of two, is 1 unless products of unit vectors are so large or small that their squares leave
    the range of the dtype. `noise` is the relative error of a product, measured by forming one in two ways.

    With a group the stacks are one process's part of them, (p, width): then products are to be formed, and whatever is
    done with them, inside of `summed`.
    """

    def __init__(self, A: Any, group: Group = None) -> None:
        if scope.inside_transform():
            raise TransformError(
                "solvers and estimators read values, which no torch.func transform allows; inside vmap, grad or jvp "
                "use eigenfunc.lanczos, eigenfunc.power or eigenfunc.trace_probes, of a fixed number of products"
            )
        A = aslinearoperator(A)
        tree.check_vector_space(A.like, "the operator's `like`")
        self.A: LinearOperator = A
        self.size = A.size
        self.columns = None if group is None else Columns(A.size, group)
        self.width = A.size if self.columns is None else self.columns.width  # of a stack
        self.dtype = tree.work_dtype(A.like)
        self.eps = torch.finfo(self.dtype).eps
        self.device = tree.device(A.like)
        self.scale = 1.0
        self.noise = 0.0
        self.matvecs = 0
        self.passes = 0

    def __call__(self, block: Tensor) -> Tensor:
        flat = self.cut(tree.ravel(self._images(block), self.A.like))
        return flat if self.scale == 1.0 else torch.div(flat, self.scale)

    def _images(self, block: Tensor) -> Tree:
        self.matvecs += block.shape[0]
        self.passes += 1
        vs = tree.unravel(self.whole(block.to(self.device)), self.A.like)
        with tree.summed(None):
            return tree.lifted(self.A.matvec(tree.row(vs, 0))) if block.shape[0] == 1 else self.A.matmat(vs)

    @contextmanager
    def at_work(self, what: str = "", progress: bool = False) -> Iterator[Any]:
        """Within, nothing is differentiated and no autocast from outside counts; yields a progress bar of products."""
        bar = tqdm(disable=not progress, desc=what, unit=" products", leave=False)
        with scope.full_precision(self.device), torch.no_grad(), bar:
            yield bar

    def summed(self) -> AbstractContextManager[None]:
        """Within, inner products of parts are those of whole vectors."""
        return tree.summed(None if self.columns is None else self.columns.total)

    def agreed(self, seed: int | None) -> int | None:
        """The seed, that of the first process where there are several."""
        return seed if self.columns is None else self.columns.agreed(seeded(seed)[1])

    def attempt(self, f: Callable[[], T]) -> T:
        """f(), once it has gone well on every process."""
        return f() if self.columns is None else self.columns.team.attempt(f)

    def every(self, own: bool) -> bool:
        """Whether it is so on every process."""
        return own if self.columns is None else all(self.columns.team.gather(own))

    def again(self) -> Products:
        """For the same operator, from the beginning."""
        return Products(self.A, None if self.columns is None else self.columns.team.group)

    def whole(self, part: Tensor) -> Tensor:
        """A stack (p, n) of what is held as (p, width)."""
        return part if self.columns is None else self.columns.whole(part)

    def cut(self, whole: Tensor) -> Tensor:
        return whole if self.columns is None else self.columns.cut(whole)

    def minibatch(self, matvec: MatVec, v: Tensor) -> Tensor:
        """The flat product (n,) with a stand-in for A, one of its mini-batches."""
        self.matvecs += 1
        flat = tree.ravel(matvec(tree.unravel(v, self.A.like)), self.A.like)
        return torch.div(flat, self.scale)

    def random(self, generator: torch.Generator) -> Tensor:
        """A unit vector (1, width), uniform on the sphere."""
        x = torch.randn(1, self.size, generator=generator, dtype=torch.float64)
        x /= torch.linalg.vector_norm(x)  # in place: as float64 this is two vectors already
        return self.cut(x.to(self.dtype).to(self.device))

    def calibrate(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two products with one random unit vector: checks their shape, sets `scale`, measures `noise`.

        Returns the vector (1, width) and its image.
        """
        u = self.random(generator)
        image = self.first(u)
        self.compare(image, self(SHORTER * u))
        return u, image

    def compare(self, image: Tensor, shorter: Tensor) -> None:
        """Set `noise`, from the image of a vector and that of `SHORTER` times it."""
        length = float(tree.norm(image))
        self.noise = float(tree.norm(image - shorter / SHORTER)) / length if length > 0 else 0.0

    def first(self, block: Tensor) -> Tensor:
        """The first products of a run, with a stack (p, width): checks their shape, sets `scale`."""
        image = self._images(block)
        tree.check_like(image, self.A.like, "the operator's product", stacked=True)
        flat = tree.ravel(image, self.A.like)
        largest = float(flat.abs().max())
        if not math.isfinite(largest):
            raise NonFiniteError(_non_finite(0))
        comfortable = torch.finfo(self.dtype).tiny ** 0.25
        if largest > 0 and not comfortable < largest < 1 / comfortable:
            self.scale = 2.0 ** math.floor(math.log2(largest))
        return self.cut(flat / self.scale)

    def check_finite(self, finite: bool, where: str = "") -> None:
        """`NonFiniteError`, which counts the products, unless what came of the last of them is finite."""
        if not finite:
            raise NonFiniteError(where + _non_finite(self.matvecs))

    @property
    def roundoff(self) -> float:
        """The largest `noise` that rounding in the operator's dtypes explains; more means products that differ."""
        return max(1000 * self.eps, 8 * tree.coarsest_eps(self.A.like))

    @property
    def declared(self) -> float:
        """The error of products with unit vectors that the operator itself knows of."""
        return self.A.noise() / self.scale

    def rounding(self, anorm: float) -> float:
        """The length of the error of a product with a unit vector, for an operator of norm `anorm`."""
        return 2 * max(max(self.eps, self.noise) * anorm, self.declared)

    def explained(self, anorm: float) -> float:
        """The departure from symmetry, relative to ‖A‖ = `anorm`, that rounding explains."""
        explained = max(100 * self.eps, 20 * self.noise)
        return explained + 20 * self.declared / anorm if anorm > 0 else explained

    def floor(self, anorm: float) -> float:
        """Residuals are not told apart below this, for an operator of norm `anorm`."""
        return max(self.aim(anorm), 8 * self.eps * anorm)

    def aim(self, anorm: float) -> float:
        """What residuals can come down to, if all goes well."""
        noise = 4 * min(self.noise, self.roundoff)
        return max(max(2 * self.eps, 64 * _EPS, noise) * anorm, 2 * self.declared)


def _non_finite(index: int) -> str:
    return (
        f"product {index} with the matrix holds NaN or infinity. Look for operations without a second derivative at "
        "this point (sqrt or norm at 0, x ** p), or for overflow: try float64, or a smaller batch to find the sample"
    )


def not_symmetric(skew: float, explained: float) -> str:
    """What to say of a departure from symmetry, relative to ‖A‖."""
    return (
        f"⟨u, A v⟩ and ⟨v, A u⟩ differ by {skew:.1e} of ‖A‖, where rounding explains {explained:.1e}; what is returned "
        "belongs to no such A. Use (A + Aᵀ)/2, or find what makes the products inconsistent"
    )


def where_due(large: Tensor) -> bool:
    """A second Gram–Schmidt pass where it is due; always on accelerators, where asking would stall them."""
    return large.device.type != "cpu" or bool(large)


class Certified(NamedTuple):
    """Rayleigh–Ritz pairs of fresh products, in rising order."""

    values: Tensor  # (k,) float64, CPU
    vectors: Tensor  # (k, n), orthonormal
    images: Tensor  # (k, n), A x / scale
    residuals: Tensor  # (k,) float64, CPU: true norms ‖A x − θ x‖
    asymmetry: float  # max |⟨x_i, A x_j⟩ − ⟨x_j, A x_i⟩|
    orthogonality: float


def certify(products: Products, x: Tensor) -> Certified:
    """Rayleigh–Ritz in the span of x (k, n) with k fresh products; on disk where x is. Parlett, section 11.3."""
    x = basis.orthonormalise(x)
    for _ in range(_AGAIN):
        if _skew(x) <= 32 * products.eps:
            break
        x = basis.orthonormalise(x)  # rows of a coarse basis may have been all but dependent
    return rayleigh_ritz(products, x, _images(products, x))


def _skew(x: Tensor) -> float:
    """max |⟨x_i, x_j⟩ − δ_ij|."""
    off = tree.exact_gram(x, x) - torch.eye(len(x), dtype=torch.float64, device=x.device)
    return float(off.abs().max())


def rayleigh_ritz(products: Products, x: Tensor, image: Tensor) -> Certified:
    """The same with products at hand, of an orthonormal x."""
    g = tree.exact_gram(x, image)
    products.check_finite(bool(torch.isfinite(g).all()))
    values, u = torch.linalg.eigh(((g + g.mT) / 2).cpu())
    turn = u.mT.to(x.device)
    x, image = tree.combine(turn, x), tree.combine(turn, image)
    shift = values.to(x)[:, None]
    parts = [tree.norms(image[:, piece] - shift * x[:, piece]) for piece in storage.pieces(image, x)]
    residuals = torch.linalg.vector_norm(torch.stack(parts), dim=0).cpu()
    products.check_finite(bool(torch.isfinite(residuals).all()))
    return Certified(values, x, image, residuals, float((g - g.mT).abs().max()), _skew(x))


class Riders:
    """Products that take vectors (p, width) along: they are multiplied with the next block, in its pass over the data.

    images  of the vectors, (p, width), once that has happened
    """

    def __init__(self, products: Products, vectors: Tensor) -> None:
        self.products = products
        self.vectors = vectors
        self.images: Tensor | None = None

    def __call__(self, block: Tensor) -> Tensor:
        if self.images is not None:
            return self.products(block)
        both = self.products(torch.cat([block.to(self.vectors.device), self.vectors]))
        self.images = both[len(block) :].clone()
        return both[: len(block)]

    def arrived(self) -> Tensor:
        """The images, of a pass of their own where no block has come."""
        if self.images is None:
            self.images = self.products(self.vectors)
        return self.images

    def certified(self) -> Certified:
        return rayleigh_ritz(self.products, self.vectors, self.arrived())


def _images(products: Products, x: Tensor) -> Tensor:
    """The products with a stack (k, n): at once, or one by one for vectors on disk, which are there to save memory."""
    if not storage.folder_of(x):
        return products(x)
    images: Tensor = basis.allocate(x, len(x))
    for i in range(len(x)):
        basis.write(images, i, products(x[i : i + 1]))
        storage.drop(x[i : i + 1])
    return images


def whole(value: Any, what: str, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise InputError(f"{what} must be an integer of at least {least}, got {value!r}")
    return int(value.__index__())


def positive(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{what} must be a positive number, got {value!r}")
    return float(value)


def check_tolerance(tol: Any, base: str) -> None:
    if not (isinstance(tol, (int, float)) and 0 < tol < 1):
        raise InputError(f"tol must lie between 0 and 1 (it is relative to {base}), got {tol!r}")


def seeded(seed: int | None) -> tuple[torch.Generator, int]:
    """A CPU generator of its own, and the seed it starts from."""
    generator = torch.Generator()
    if seed is None:
        seed = generator.seed() % 2**31
    return generator.manual_seed(whole(seed, "seed", 0)), seed


def binary_vector(products: Products, b: Tree, what: str) -> tuple[Tensor, float]:
    """b over a power of two, flat (1, n), without rounding, its largest entry in [1, 2); the power, 0 for b = 0."""
    tree.check_like(b, products.A.like, what)
    flat = tree.ravel(tree.tree_map(lambda leaf: leaf.detach()[None], b), products.A.like)
    largest = float(flat.abs().max())
    if not math.isfinite(largest):
        raise InputError(f"{what} holds NaN or infinity")
    if largest == 0:
        return flat, 0.0
    power = 2.0 ** (math.frexp(largest)[1] - 1)
    return (flat.double() / power).to(flat.dtype), power


def unit_vector(products: Products, b: Tree, what: str) -> tuple[Tensor, float]:
    """b as a flat unit vector (1, n), and its length; zero where that is zero."""
    flat, power = binary_vector(products, b, what)
    if power == 0:
        return flat, 0.0
    length = float(tree.norm(flat))
    return flat / length, length * power


def start_block(v0: Tree | None, block_size: int, products: Products, generator: torch.Generator) -> Tensor:
    """Orthonormal start vectors (block_size, width): sums of those given, random ones where there are too few.

    The i-th given vector joins row i modulo the block size.
    """
    if v0 is None:
        given = torch.empty(0, products.width, dtype=products.dtype, device=products.device)
    else:
        given = products.cut(_given(v0, products))
    rows = []
    for i in range(block_size):
        total = given[i::block_size].sum(0, keepdim=True)
        useful = len(given[i::block_size]) > 0 and float(tree.norm(total)) > 1e3 * products.eps
        rows.append(total if useful else products.random(generator))
    floors = torch.full((block_size,), 1e3 * products.eps, dtype=torch.float64, device=products.device)
    q, _, alive = basis.independent(torch.cat(rows), floors)
    for i in torch.nonzero(alive == 0).flatten().tolist():
        q[i : i + 1] = basis.orthogonal_to(products.random(generator), q)
    block: Tensor = q
    return block


def _given(v0: Tree, products: Products) -> Tensor:
    """The user's start vectors, flat (p, n), of norm one."""
    like = products.A.like
    leaves = tree.leaves(v0)
    refs = tree.leaves(like)
    stacked = len(leaves) == len(refs) and all(
        isinstance(x, Tensor) and x.ndim == ref.ndim + 1 for x, ref in zip(leaves, refs, strict=True)
    )
    full = tree.tree_map(lambda leaf: leaf.to(torch.promote_types(leaf.dtype, torch.float32)), like)
    solved = [getattr(x, "dtype", None) for x in leaves] == [x.dtype for x in tree.leaves(full)]
    tree.check_like(v0, full if solved else like, "v0", stacked=stacked)  # solutions widen half precision
    if stacked and len(leaves[0]) == 0:
        raise InputError("v0 is a stack of no vectors")
    flat = tree.ravel(tree.tree_map(lambda leaf: leaf.detach(), v0), like)
    flat = flat if stacked else flat[None]
    largest = flat.abs().amax(1)
    bad = ~torch.isfinite(largest) | (largest == 0)
    if bool(bad.any()):
        which = f" (vector {int(torch.argmax(bad.int()))})" if stacked else ""
        raise InputError(f"v0{which} is zero" if bool((largest == 0).any()) else f"v0{which} holds NaN or infinity")
    flat = flat / largest[:, None]
    unit: Tensor = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True, dtype=torch.float64)
    return unit.to(flat.dtype)
