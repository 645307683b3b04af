"""Vector-space algebra on pytrees of tensors; the one module that knows optree.

A *vector* is a pytree of tensors. A *stack* of vectors is the same tree with one more, leading, axis on
every leaf (the layout of `torch.func.vmap`). A bare tensor is the one-leaf tree. Sums over entries are
carried in float64, because a float32 norm over 10^6 entries is off in its fifth digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from eigenfunc import storage
from eigenfunc.errors import TreeError

Tree: TypeAlias = Any

Total = Callable[[Tensor], Tensor]
_TOTAL: ContextVar[Total | None] = ContextVar("total", default=None)

_SLICE = 4_096  # entries of a float32 dot product before the partial sums go to float64
_COLUMNS = 16_384  # entries of each vector that are held in float64 at a time: few enough for the cache


def _plain(tree: Tree) -> bool:
    """Whether the compiler traces and `tree` is a tensor or a list of tensors: it would step through optree's own code,
    which takes three times as long as all the rest."""
    if not torch.compiler.is_compiling():
        return False
    return isinstance(tree, Tensor) or (type(tree) is list and all(isinstance(leaf, Tensor) for leaf in tree))


def leaves(tree: Tree) -> list[Any]:
    if _plain(tree):
        return [tree] if isinstance(tree, Tensor) else list(tree)
    return optree.tree_leaves(tree)


def flatten(tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Tree]]:
    """The leaves, and the function that puts such leaves back into the same structure."""
    if _plain(tree):
        return leaves(tree), (lambda flat: flat[0]) if isinstance(tree, Tensor) else list
    flat, spec = optree.tree_flatten(tree)
    return flat, spec.unflatten


def tree_map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    if _plain(tree) and all(map(_plain, rest)):
        return f(tree, *rest) if isinstance(tree, Tensor) else [f(*row) for row in zip(tree, *rest, strict=True)]
    return optree.tree_map(f, tree, *rest)


def names(tree: Tree) -> list[str]:
    """A dotted name for each leaf, in the order of `leaves`; the keys themselves for a flat dict."""
    return [".".join(str(key) for key in path) for path in _paths(tree)]


def _paths(tree: Tree) -> list[tuple[Any, ...]]:
    if _plain(tree):
        return [()] if isinstance(tree, Tensor) else [(i,) for i in range(len(tree))]
    return optree.tree_paths(tree)


def filled_names(tree: Tree) -> list[str]:
    """The same names in the order in which dicts were filled: that of the layers, for the parameters of a module."""
    with optree.dict_insertion_ordered(True, namespace="eigenfunc"):
        paths = optree.tree_paths(tree, namespace="eigenfunc")
    return [".".join(str(key) for key in path) for path in paths]


def stack(trees: Sequence[Tree]) -> Tree:
    return tree_map(lambda *rows: torch.stack(rows), *trees)


def row(tree: Tree, i: int) -> Tree:
    return tree_map(lambda leaf: leaf[i], tree)


def rows(tree: Tree, start: int, stop: int) -> Tree:
    return tree_map(lambda leaf: leaf[start:stop], tree)


def lifted(x: Tree) -> Tree:
    """A single vector as a stack of one."""
    return tree_map(lambda leaf: leaf[None], x)


def add(x: Tree, y: Tree) -> Tree:
    return tree_map(torch.add, x, y)


def sub(x: Tree, y: Tree) -> Tree:
    return tree_map(torch.sub, x, y)


def scale(c: Any, x: Tree) -> Tree:
    """c·x in the dtypes of x; a tensor `c` never widens them."""
    return tree_map(lambda leaf: leaf * (c.to(leaf.dtype) if isinstance(c, Tensor) else c), x)


def zeros_like(x: Tree) -> Tree:
    return tree_map(torch.zeros_like, x)


def size(like: Tree) -> int:
    return sum(leaf.numel() for leaf in leaves(like))


def device(like: Tree) -> torch.device:
    first: Tensor = leaves(like)[0]
    return first.device


def work_dtype(like: Tree) -> torch.dtype:
    """The widest leaf dtype, at least float32: what solvers compute in."""
    dtype = torch.float32
    for leaf in leaves(like):
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def coarsest_eps(like: Tree) -> float:
    return max(torch.finfo(leaf.dtype).eps for leaf in leaves(like))


def randn(like: Tree, generator: torch.Generator) -> Tree:
    """Independent standard normal entries; drawn on the generator's device, so seeds carry over devices."""

    def draw(leaf: Tensor) -> Tensor:
        wide = torch.promote_types(leaf.dtype, torch.float32)
        sample = torch.randn(leaf.shape, generator=generator, dtype=wide, device=generator.device)
        return sample.to(leaf)

    return tree_map(draw, like)


def matrix(leaf: Tensor) -> Tensor:
    """A leaf of a stack, (p, *shape), as a matrix (p, entries)."""
    return leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:]))


@contextmanager
def summed(total: Total | None) -> Iterator[None]:
    """Within, vectors are parts, whose inner products and norms become those of whole vectors by `total`: a sum over
    those who hold the other parts. None for whole vectors."""
    token = _TOTAL.set(total)
    try:
        yield
    finally:
        _TOTAL.reset(token)


def _total() -> Total | None:
    return None if torch.compiler.is_compiling() else _TOTAL.get()


def _of_whole(part: Tensor | None) -> Tensor:
    assert part is not None
    total = _total()
    return part if total is None else total(part)


def gram(x: Tree, y: Tree) -> Tensor:
    """Inner products (p, q), in float64, between the stacks x (p, *leaf) and y (q, *leaf), where y is."""
    total: Tensor | None = None
    for a, b in zip(leaves(x), leaves(y), strict=True):
        part = _gram_leaf(matrix(a), matrix(b))
        total = part if total is None else total + part
    return _of_whole(total)


def wide(leaf: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The columns of a matrix (p, entries) in the given dtype, and on a device if one is given: at once, or in slices
    where that takes a conversion, or where there are many."""
    if device is not None and leaf.device != device:
        for piece in storage.pieces(leaf):
            near, start = storage.near(leaf[:, piece], device), piece.start
            for at, part in wide(near, dtype):
                yield slice(start + (at.start or 0), start + (at.stop or near.shape[1])), part
    elif leaf.dtype != dtype:
        yield from ((columns, leaf[:, columns].to(dtype)) for columns in _fine(leaf))
    elif leaf.shape[1] <= storage.PIECE:
        yield slice(None), leaf
    else:
        yield from ((columns, leaf[:, columns]) for columns in storage.pieces(leaf))


def _fine(*matrices: Tensor) -> Iterator[slice]:
    """The columns of matrices, `_COLUMNS` at a time."""
    length = matrices[0].shape[1]
    for piece in storage.pieces(*matrices):
        for start in range(piece.start, max(min(piece.stop, length), 1), _COLUMNS):
            yield slice(start, start + _COLUMNS)


def _gram_leaf(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype != b.dtype or a.device != b.device:
        parts = [_gram_leaf(part, b[:, columns]) for columns, part in wide(a, b.dtype, b.device)]
        return torch.stack(parts).sum(0)
    if a.shape[1] > storage.PIECE:
        pieces = [_gram_leaf(a[:, columns], b[:, columns]) for columns in storage.pieces(a, b)]
        return torch.stack(pieces).sum(0)
    length = a.shape[1]
    if a.dtype == torch.float64 or length <= _SLICE:
        return (a @ b.mT).double()
    count = length // _SLICE
    even = count * _SLICE
    left = torch.unflatten(a[:, :even], 1, (count, _SLICE)).transpose(0, 1)
    right = torch.unflatten(b[:, :even], 1, (count, _SLICE)).permute(1, 2, 0)
    return torch.bmm(left, right).double().sum(0) + (a[:, even:] @ b[:, even:].mT).double()


def exact_gram(x: Tree, y: Tree) -> Tensor:
    """As `gram`, but in float64 throughout: for the few inner products that end up in a result."""
    total: Tensor | None = None
    for a, b in zip(leaves(x), leaves(y), strict=True):
        for columns in _fine(matrix(a), matrix(b)):
            part = matrix(a)[:, columns].double() @ matrix(b)[:, columns].double().mT
            total = part if total is None else total + part
    return _of_whole(total)


def dots(x: Tree, y: Tree) -> Tensor:
    """⟨x_i, y_i⟩ (p,), in float64 throughout, for two stacks of p vectors."""
    parts = [
        (part * matrix(b)[:, columns].double()).sum(1)
        for a, b in zip(leaves(x), leaves(y), strict=True)
        for columns, part in wide(matrix(a), torch.float64)
    ]
    return torch.stack(parts).sum(0)


def combine(c: Tensor, x: Tree, dtype: torch.dtype | None = None) -> Tree:
    """The stack (q, *leaf) of linear combinations c (q, p) of the stack x (p, *leaf), in a dtype if one is given; on
    the device of c, and on disk where x is."""

    def one(leaf: Tensor) -> Tensor:
        flat = matrix(leaf)
        parts = (c.to(part.dtype) @ part for _, part in wide(flat, dtype or leaf.dtype, c.device))
        out = storage.joined(parts, flat.shape[1], flat)
        return out.reshape(out.shape[:1] + leaf.shape[1:])

    return tree_map(one, x)


def norms(x: Tree) -> Tensor:
    """Euclidean norms (p,), in float64, of a stack x (p, *leaf)."""
    parts = [
        torch.linalg.vector_norm(part, dim=1, dtype=torch.float64)
        for leaf in leaves(x)
        for _, part in wide(matrix(leaf), leaf.dtype)
    ]
    lengths: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return lengths if _total() is None else _of_whole(lengths * lengths).sqrt()


def dot(x: Tree, y: Tree) -> Tensor:
    """⟨x, y⟩ in float64, for two single vectors."""
    return gram(lifted(x), lifted(y))[0, 0]


def norm(x: Tree) -> Tensor:
    """Euclidean norm, in float64, of a single vector."""
    return norms(lifted(x))[0]


def length(x: Tree) -> Tensor:
    """`norm` where squares of the entries may leave the range of float64."""
    largest = torch.stack([leaf.abs().amax().double() for leaf in leaves(x) if leaf.numel()]).amax()
    if not 0 < float(largest) < float("inf"):
        return norm(x)
    return norm(tree_map(lambda leaf: leaf.double() / largest, x)) * largest


def is_finite(leaf: Tensor) -> bool:
    """No NaN and no infinity in a single tensor, with no memory beside it; reads the device."""
    return leaf.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(leaf.detach()))).all())


def all_finite(x: Tree) -> Tensor:
    """0-dim bool tensor: no NaN and no infinity in any leaf."""
    return torch.stack([torch.isfinite(leaf).all() for leaf in leaves(x)]).all()


def ravel(x: Tree, like: Tree) -> Tensor:
    """One flat vector (n,), or (p, n) for a stack, in the work dtype of `like`."""
    dtype = work_dtype(like)
    parts = [
        leaf.reshape(*leaf.shape[: leaf.ndim - ref.ndim], -1).to(dtype)
        for leaf, ref in zip(leaves(x), leaves(like), strict=True)
    ]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def unravel(flat: Tensor, like: Tree, *, narrow: bool = True) -> Tree:
    """Inverse of `ravel`. With `narrow=False` half-precision leaves stay in float32."""
    refs, rebuild = flatten(like)
    pieces = torch.split(flat, [ref.numel() for ref in refs], dim=-1)

    def dtype(ref: Tensor) -> torch.dtype:
        return ref.dtype if narrow else torch.promote_types(ref.dtype, torch.float32)

    return rebuild(
        [piece.reshape(piece.shape[:-1] + ref.shape).to(dtype(ref)) for piece, ref in zip(pieces, refs, strict=True)]
    )


def is_sharded(leaf: Tensor) -> bool:
    """Whether a tensor is a DTensor, asked without the import that only its users have paid for."""
    return any(kind.__name__ == "DTensor" for kind in type(leaf).__mro__)


def check_vector_space(like: Tree, what: str) -> None:
    """Refuse trees that cannot serve as vectors: no leaf, not tensors, not real floats, several devices."""
    flat = leaves(like)
    if not flat or sum(leaf.numel() for leaf in flat if isinstance(leaf, Tensor)) == 0:
        raise TreeError(f"{what} holds no tensor entries: there is nothing to differentiate by")
    for name, leaf in zip(names(like), flat, strict=True):
        where = f"{what}: leaf '{name}'" if name else what
        if not isinstance(leaf, Tensor):
            raise TreeError(
                f"{where} is a {type(leaf).__name__}, not a tensor. Pass a pytree whose leaves are all tensors; "
                "register your own containers with optree.register_pytree_node"
            )
        if is_sharded(leaf):
            raise TreeError(f"{where} is a DTensor, a part of a tensor on several processes; pass its .full_tensor()")
        if leaf.is_complex():
            raise TreeError(f"{where} is complex ({leaf.dtype}); split it with torch.view_as_real")
        if not leaf.is_floating_point():
            raise TreeError(f"{where} has dtype {leaf.dtype}, which has no derivative; leave it out of the selection")
    devices = {str(leaf.device) for leaf in flat}
    if len(devices) > 1:
        raise TreeError(f"{what} lies on several devices ({', '.join(sorted(devices))}); move it to one")


def check_like(x: Tree, like: Tree, what: str, *, stacked: bool = False, dtypes: bool = True) -> None:
    """Raise `TreeError` unless x matches `like` in structure, shapes, dtypes and devices.

    With `stacked` every leaf of x carries one more leading axis, of the same length everywhere. Without `dtypes` any
    real floating-point dtype will do.
    """
    if not _alike(x, like):
        raise TreeError(f"{what} has structure {optree.tree_structure(x)}, expected {optree.tree_structure(like)}")
    x_leaves, refs = leaves(x), leaves(like)
    lengths = set()
    for name, leaf, ref in zip(names(like), x_leaves, refs, strict=True):
        where = f"{what}: leaf '{name}'" if name else what
        if not isinstance(leaf, Tensor):
            raise TreeError(f"{where} is a {type(leaf).__name__}, expected a tensor of shape {tuple(ref.shape)}")
        shape = leaf.shape
        if stacked:
            if leaf.ndim == 0:
                raise TreeError(f"{where} lacks the leading axis that counts the vectors")
            lengths.add(leaf.shape[0])
            shape = leaf.shape[1:]
        if shape != ref.shape:
            wanted = ("p", *ref.shape) if stacked else tuple(ref.shape)
            raise TreeError(f"{where} has shape {tuple(leaf.shape)}, expected {wanted}")
        if leaf.dtype != ref.dtype and (dtypes or not leaf.is_floating_point()):
            raise TreeError(f"{where} has dtype {leaf.dtype}, expected {ref.dtype}; cast it yourself if that is meant")
        if leaf.device != ref.device:
            raise TreeError(f"{where} is on {leaf.device}, expected {ref.device}")
    if len(lengths) > 1:
        raise TreeError(f"{what}: leaves carry different numbers of vectors: {sorted(lengths)}")


def _alike(x: Tree, like: Tree) -> bool:
    """Whether the structures are the same, whatever the order in which dicts were filled: what the compiler has for a
    structure remembers that."""
    if torch.compiler.is_compiling():
        return _paths(x) == _paths(like)
    same: bool = optree.tree_structure(x) == optree.tree_structure(like)
    return same


def gibibytes(num_bytes: float) -> str:
    """A byte count for people: the largest unit that keeps it at or above one."""
    power = min(int(math.log2(max(num_bytes, 1)) // 10), 4)
    return f"{num_bytes / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
