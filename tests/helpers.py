"""Independent truths, small problems, and a witness that nothing of the user's has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from eigenfunc import Estimate, LinearOperator, Solution, tree

Params = dict[str, Tensor]
ZERO = torch.zeros(()).double()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal entries, drawn in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def vector(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(n, seed=seed, dtype=dtype)


def symmetric(n: int, seed: int) -> Tensor:
    g = normal(n, n, seed=seed)
    return (g + g.mT) / 2


def labelled(count: int, inputs: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    """A batch of normal inputs (count, inputs), float64, and labels (count,)."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, inputs, generator=g).double(), torch.randint(0, classes, (count,), generator=g)


def cut(batch: tuple[Tensor, Tensor], sizes: int | Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True))  # type: ignore[arg-type]


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Modules made inside are the same for the same seed, and the global random state is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def mlp(*between: nn.Module, sizes: tuple[int, int, int] = (5, 4, 3), seed: int = 0) -> nn.Sequential:
    """Two linear layers in float64, with `between` and a tanh between them."""
    with seeded(seed):
        return nn.Sequential(nn.Linear(*sizes[:2]), *between, nn.Tanh(), nn.Linear(*sizes[1:])).double()


def nested(n: int, dtype: torch.dtype = torch.float64) -> Any:
    """A tree of n ≥ 8 entries whose leaves are sorted otherwise than they are filled in."""
    return {"z": torch.zeros(2, 3, dtype=dtype), "a": [torch.zeros(n - 7, dtype=dtype), torch.zeros((), dtype=dtype)]}


def on_tree(A: Tensor, like: Any) -> LinearOperator:
    """Products with A, one at a time, on any tree."""
    return LinearOperator(lambda v: tree.unravel(tree.ravel(v, like) @ A, like), like)


class Counted:
    """A function that counts its calls."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f, self.calls = f, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.f(*args)


def never(*args: Any) -> Tensor:
    """A product or a loss that is not to be called."""
    raise AssertionError("called")


def difference(f: Callable[[Tensor], Tensor], h: float = 2e-4) -> Tensor:
    """f'(0) by central differences of fourth order."""

    def central(h: float) -> Tensor:
        return (f(ZERO + h) - f(ZERO - h)) / (2 * h)

    return (4 * central(h) - central(2 * h)) / 3


def slope(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: jvp(f, (t,), (torch.ones_like(t),))[1]


def second_derivatives(value: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """The dense Hessian of a value by its leaves, by plain double backward, one row at a time."""
    options: Any = {"allow_unused": True, "materialize_grads": True}
    slopes = torch.autograd.grad(value, leaves, create_graph=True, **options)
    rows = []
    for entry in torch.cat([slope.reshape(-1) for slope in slopes]):
        row = torch.autograd.grad(entry, leaves, retain_graph=True, **options)
        rows.append(torch.cat([block.reshape(-1) for block in row]))
    return torch.stack(rows)


def dense_hessian(loss: Callable[[Params], Tensor], params: Params) -> Tensor:
    """In the order of the sorted names."""
    leaves = {name: params[name].detach().clone().requires_grad_() for name in sorted(params)}
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        return second_derivatives(loss(leaves), list(leaves.values()))


def dense_ggn(
    predict: Callable[[Params], Any], criterion: Callable[[Any, Any], Tensor], params: Params, targets: Any
) -> Tensor:
    """Jᵀ H J from rows of J by plain backward passes and H by plain double backward, in the order of sorted names."""
    order = sorted(params)
    leaves = {name: params[name].detach().clone().requires_grad_() for name in order}
    outputs, rebuild = tree.flatten(predict(leaves))
    places = [i for i, z in enumerate(outputs) if z.is_floating_point()]
    rows = [
        torch.autograd.grad(entry, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        if entry.requires_grad
        else [torch.zeros_like(leaf) for leaf in leaves.values()]
        for i in places
        for entry in outputs[i].flatten()
    ]
    J = torch.stack([torch.cat([block.flatten() for block in row]) for row in rows])

    def loss(zs: Params) -> Tensor:
        given = [zs[f"{i:03d}"] if i in places else z.detach() for i, z in enumerate(outputs)]
        return criterion(rebuild(given), targets)

    H = dense_hessian(loss, {f"{i:03d}": outputs[i].detach() for i in places})
    return J.mT @ H @ J


def plain(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[Params], Tensor]:
    """A loss of named parameters by setting them one by one on a copy of the module: no functional_call involved."""
    import copy

    def value(params: Params) -> Tensor:
        clone = copy.deepcopy(model)
        for name, tensor in params.items():
            path, _, attribute = name.rpartition(".")
            owner = clone.get_submodule(path)
            del owner._parameters[attribute]
            setattr(owner, attribute, tensor)
        return loss(clone)

    return value


def flat(vector: Params) -> Tensor:
    return torch.cat([vector[name].reshape(-1) for name in sorted(vector)])


def random_like(params: Params, seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for name, x in params.items()
    }


def assert_blocks_close(found: Params, truth: Tensor, tolerance: float) -> None:
    """Each parameter's block against the flat truth, relative to the block (or, if that is zero, to the whole)."""
    start = 0
    for name in sorted(found):
        block = found[name].reshape(-1).double()
        expected = truth[start : start + len(block)].double()
        start += len(block)
        size = max(float(expected.norm()), 1e-3 * float(truth.norm()))
        assert float((block - expected).norm()) <= tolerance * max(size, 1e-300), name


def _state(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "ids": {name: id(tensor) for name, tensor in tensors.items()},
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "kinds": {name: type(tensor) for name, tensor in tensors.items()},
        "grads": {name: None if t.grad is None else t.grad.clone() for name, t in model.named_parameters()},
        "requires": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "training": [part.training for part in model.modules()],
        "dtype": torch.get_default_dtype(),
        "random": torch.get_rng_state(),
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
    }


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Asserts that the model and all global state are bitwise the same afterwards, an exception included."""
    before = _state(model)
    try:
        yield
    finally:
        after = _state(model)
        for what in before:
            assert _equal(before[what], after[what]), f"{what} changed"


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


def rotated(values: Tensor, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with these eigenvalues, but for rounding to the dtype."""
    q = orthogonal(len(values), seed)
    A = ((q * values.double()) @ q.mT).to(dtype)
    return (A + A.mT) / 2


def wanted(values: Tensor, k: int, which: str) -> Tensor:
    from eigenfunc.testing.problems import select  # which takes hypothesis along

    rising = values.double().sort().values
    return rising[select(rising, k, which)]


def assert_certified(solution: Solution, A: Tensor, k: int, which: str) -> None:
    """All converged, within the bounds and with the residuals they claim, against the dense A in the leaves' order."""
    truth = wanted(torch.linalg.eigvalsh(A.double()), k, which)
    found = solution.values
    if which == "LM":  # the order within ± pairs of equal size is arbitrary
        truth, found = truth.abs(), found.abs()
    assert solution.converged.all()
    assert ((found - truth).abs() <= solution.bounds).all()
    X = torch.cat([tree.matrix(leaf) for leaf in tree.leaves(solution.vectors)], dim=1).double()
    fresh = torch.linalg.vector_norm(X @ A.double() - solution.values[:, None] * X, dim=1)
    assert (fresh <= solution.residuals + solution.noise).all()
    assert (X @ X.mT - torch.eye(k)).abs().max() < 100 * torch.finfo(tree.leaves(solution.vectors)[0].dtype).eps


def example_spectra(n: int) -> dict[str, Tensor]:
    """What estimators are tried on."""
    return {
        "flat": torch.linspace(1, 3, n).double(),
        "power law": torch.arange(1, n + 1).double() ** -1.5,
        "outliers": torch.cat([torch.tensor([10.0, 5.0, 2.0, 1.0]), 0.01 * torch.linspace(0, 1, n - 4)]).double(),
        "indefinite": torch.linspace(-1, 1.2, n).double(),
    }


def covered(estimates: Sequence[Estimate[float]], truth: float) -> float:
    """The share of the 95% intervals that hold the truth."""
    ends = [estimate.interval() for estimate in estimates]
    return sum(low <= truth <= high for low, high in ends) / len(ends)
