"""Independent truths, and a witness that nothing of the user's has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eigenfunc import Solution, tree

Params = dict[str, Tensor]


def dense_hessian(loss: Callable[[Params], Tensor], params: Params) -> Tensor:
    """Hessian by plain double backward, one row at a time, in the order of the sorted names."""
    order = sorted(params)
    leaves = {name: params[name].detach().clone().requires_grad_() for name in order}
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        slopes = torch.autograd.grad(
            loss(leaves), list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        flat = torch.cat([slope.reshape(-1) for slope in slopes])
        rows = []
        for entry in flat:
            row = torch.autograd.grad(
                entry, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([block.reshape(-1) for block in row]))
    return torch.stack(rows)


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


def rotated(values: Tensor, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64))
    A = (q * values.double()) @ q.mT
    return (A + A.mT) / 2


def wanted(values: Tensor, k: int, which: str) -> Tensor:
    rising = values.double().sort().values
    if which == "LM":
        return rising[torch.argsort(rising.abs(), descending=True, stable=True)][:k]
    if which == "SA":
        return rising[:k]
    falling = rising.flip(0)
    if which == "LA":
        return falling[:k]
    return torch.cat([falling[: (k + 1) // 2], falling[len(falling) - k // 2 :]])


def assert_certified(solution: Solution, A: Tensor, k: int, which: str) -> None:
    """All converged, within the bounds and with the residuals they claim, against the dense A in the leaves' order."""
    truth = wanted(torch.linalg.eigvalsh(A.double()), k, which)
    found = solution.values
    if which == "LM":  # the order within ± pairs of equal size is arbitrary
        truth, found = truth.abs(), found.abs()
    assert solution.converged.all()
    assert ((found - truth).abs() <= solution.bounds).all()
    X = torch.cat([leaf.flatten(1) for leaf in tree.leaves(solution.vectors)], dim=1).double()
    fresh = torch.linalg.vector_norm(X @ A.double() - solution.values[:, None] * X, dim=1)
    assert (fresh <= solution.residuals + solution.noise).all()
    assert (X @ X.mT - torch.eye(k)).abs().max() < 100 * torch.finfo(tree.leaves(solution.vectors)[0].dtype).eps
