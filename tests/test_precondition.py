"""D^-½ A D^-½ against the dense matrix, and diagonals of optimisers against the steps that they take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from eigenfunc import LinearOperator, aslinearoperator, demo, eigsh, functional_loss, hessian, tree
from eigenfunc.errors import InputError, TreeError
from eigenfunc.preconditioners import adam_preconditioner
from tests.helpers import mlp, normal, rotated, seeded

LIKE = {"b": torch.zeros(3).double(), "a": [torch.zeros(2, 2).double(), torch.zeros(()).double()]}


def positive(like: Any, seed: int, spread: float = 3.0) -> Any:
    g = torch.Generator().manual_seed(seed)
    return tree.tree_map(lambda leaf: 10 ** (spread * torch.rand(leaf.shape, generator=g, dtype=torch.float64)), like)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_it_is_the_dense_matrix_and_has_the_eigenvalues_of_the_inverse_times_it(seed: int) -> None:
    M, d = rotated(torch.arange(8.0) - 3, seed), positive(LIKE, seed)
    A = aslinearoperator(M, like=LIKE).precondition(d)
    flat = tree.ravel(d, LIKE)
    assert (A.to_dense() - M / (flat[:, None] * flat).sqrt()).abs().max() < 1e-13
    unsymmetric = torch.linalg.eigvals(M / flat[:, None]).real
    top = eigsh(A, 1, which="LA", seed=0, tol=1e-10)
    assert (top.values[0] - unsymmetric.max()).abs() < 1e-10
    y = tree.ravel(tree.row(top.vectors, 0), LIKE)
    x = y / flat.sqrt()  # an eigenvector of the pencil
    assert (M @ x - top.values[0] * flat * x).abs().max() < 1e-7


def test_what_goes_along_with_the_matrix() -> None:
    M = rotated(torch.arange(8.0), 1)
    plain = aslinearoperator(M, like=LIKE)
    halves = [lambda v: tree.scale(2.0, plain(v)), lambda v: tree.scale(0.0, v)]
    A = LinearOperator(
        plain.matvec, LIKE, plain.block, lambda: iter(halves * 3), noise=lambda: 1e-3, block_ratio=lambda: 0.25
    )
    d = positive(LIKE, 2)
    P = A.precondition(d)
    smallest = float(tree.ravel(d, LIKE).min())
    assert P.noise() == pytest.approx(1e-3 / smallest)
    assert P.block_ratio is not None
    assert P.block_ratio() == 0.25
    v = tree.randn(LIKE, torch.Generator().manual_seed(0))
    assert P.minibatches is not None
    stream = P.minibatches()
    mean = tree.scale(0.5, tree.add(next(stream)(v), next(stream)(v)))
    assert (tree.ravel(mean, LIKE) - tree.ravel(P(v), LIKE)).abs().max() < 1e-13
    assert "D^-½" in P.describe()
    error = torch.diag(torch.linspace(-1e-3, 1e-3, 8).double())  # any error of A of the norm it declares
    s = tree.ravel(d, LIKE).rsqrt()
    assert torch.linalg.matrix_norm(s[:, None] * error * s, 2) <= P.noise()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_leaves_keep_their_dtype_and_the_diagonal_its_own(dtype: torch.dtype) -> None:
    like = torch.zeros(6, dtype=dtype)
    M = torch.eye(6) * torch.arange(1.0, 7)
    d = torch.arange(1.0, 7).double() * 1e-9  # below what float16 holds
    P = aslinearoperator(M, like=like).precondition(d * 1e9)
    assert P(torch.ones(6, dtype=dtype)).dtype == dtype
    assert (P.to_dense().double() - torch.eye(6)).abs().max() < 4 * torch.finfo(dtype).eps
    assert P.precondition(d * 1e9).noise() == 0


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_entries_that_are_not_positive_are_refused_by_name(bad: float) -> None:
    A = aslinearoperator(torch.eye(8).double(), like=LIKE)
    d = positive(LIKE, 0)
    d["a"][0][1, 0] = bad
    with pytest.raises(InputError, match=rf"leaf 'a\.0' holds {bad:g} \(1 of its 4 entries"):
        A.precondition(d)
    with pytest.raises(InputError, match=r"d holds 0 \(3 of its 3"):
        aslinearoperator(torch.eye(3)).precondition(torch.zeros(3))


def test_diagonals_of_another_shape_are_refused() -> None:
    A = aslinearoperator(torch.eye(8).double(), like=LIKE)
    with pytest.raises(TreeError, match="structure"):
        A.precondition({"b": LIKE["b"]})
    with pytest.raises(TreeError, match="shape"):
        A.precondition({"b": torch.ones(4), "a": [torch.ones(2, 2), torch.ones(())]})
    with pytest.raises(TreeError, match="int64"):
        A.precondition(tree.tree_map(lambda leaf: torch.ones(leaf.shape, dtype=torch.long), LIKE))


X = normal(12, 4)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """(parameters before the last step, gradients of the last step), in the order of the parameters."""
    for step in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(X * (1 + 0.1 * step)), X[:, :2]).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
    return before, [p.grad.clone() for p in model.parameters() if p.grad is not None]


RATE = 0.01
# With momentum switched off, each steps by  -rate · g / d:  the step itself tells d.
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, RATE, betas=(0.0, 0.9), eps=1e-3),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, RATE, betas=(0.0, 0.5), eps=1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, RATE, betas=(0.0, 0.99), weight_decay=0.0),
    "NAdam": lambda p: torch.optim.NAdam(p, RATE, betas=(0.0, 0.9), eps=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, RATE, betas=(0.0, 0.9), eps=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, RATE, alpha=0.8, eps=1e-3),
    "RMSprop, centred": lambda p: torch.optim.RMSprop(p, RATE, alpha=0.8, eps=1e-3, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, RATE, eps=1e-3, initial_accumulator_value=0.1),
}


@pytest.mark.parametrize("steps", [1, 2, 12])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_diagonal_is_what_the_step_was_divided_by(kind: str, steps: int) -> None:
    model = mlp(sizes=(4, 3, 2))
    optimizer = OPTIMIZERS[kind](model.parameters())
    before, gradients = trained(model, optimizer, steps)
    d = adam_preconditioner(optimizer, functional_loss(model, F.mse_loss)[1])
    for name, p, old, g in zip(d, model.parameters(), before, gradients, strict=True):
        moved = RATE * g / (old - p.detach())
        assert ((d[name] - moved).abs() <= 1e-9 * moved.abs()).all(), name


def test_two_steps_of_adam_by_hand() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]).double())
    optimizer = torch.optim.Adam([p], 0.1, betas=(0.9, 0.99), eps=1e-4)
    for g in ([3.0, 0.0], [1.0, 2.0]):
        p.grad = torch.tensor(g).double()
        optimizer.step()
    d = adam_preconditioner(optimizer, p)
    v = torch.tensor([0.01 * 0.99 * 9 + 0.01 * 1, 0.01 * 4], dtype=torch.float64)
    assert (d - ((v / (1 - 0.99**2)).sqrt() + 1e-4)).abs().max() < 1e-15


def test_parameters_are_found_by_memory_or_by_name_in_any_group() -> None:
    model = mlp(sizes=(4, 3, 2))
    groups = [{"params": list(model[2].parameters()), "betas": (0.9, 0.5)}, {"params": list(model[0].parameters())}]
    optimizer = torch.optim.Adam(groups, RATE)
    trained(model, optimizer, 3)
    d = adam_preconditioner(optimizer, functional_loss(model, F.mse_loss)[1])
    for name, p in model.named_parameters():
        beta = 0.5 if name.startswith("2") else 0.999
        expected = (optimizer.state[p]["exp_avg_sq"] / (1 - beta**3)).sqrt() + 1e-8
        assert (d[name] - expected).abs().max() <= 1e-15
        assert torch.equal(adam_preconditioner(optimizer, {"x": [p]})["x"][0], d[name])
    doubled = functional_loss(copy.deepcopy(model), F.mse_loss)[1]
    with pytest.raises(InputError, match=r"'0\.bias' is not one of the optimiser's.*dict\(model\.named_parameters"):
        adam_preconditioner(optimizer, doubled)
    named = torch.optim.Adam(model.named_parameters(), RATE)
    trained(model, named, 1)
    found = adam_preconditioner(named, tree.tree_map(lambda leaf: leaf.half(), doubled))
    assert found["0.weight"].dtype == torch.float32
    assert (found["0.weight"] - (model[0].weight.grad.abs() + 1e-8)).abs().max() < 1e-7
    with pytest.raises(InputError, match=r"'0\.bias' is not one"):
        adam_preconditioner(named, {"0.bias": torch.zeros(5)})


def test_what_has_no_second_moment_is_refused() -> None:
    model = mlp(sizes=(4, 3, 2))
    params = functional_loss(model, F.mse_loss)[1]
    for optimizer in (torch.optim.Adam(model.parameters()), torch.optim.Adagrad(model.parameters())):
        with pytest.raises(InputError, match=r"no second moment of parameter '0\.bias' yet: take a step"):
            adam_preconditioner(optimizer, params)
    with pytest.raises(InputError, match="not of SGD; make d"):
        adam_preconditioner(torch.optim.SGD(model.parameters(), 0.1), params)


def test_the_state_of_the_optimizer_stays_as_it_is() -> None:
    model = mlp(sizes=(4, 3, 2))
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    d = adam_preconditioner(optimizer, functional_loss(model, F.mse_loss)[1])
    for leaf in d.values():
        leaf.zero_()
    after = optimizer.state_dict()
    for index, state in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items())


def test_full_batch_adam_trains_at_the_edge_of_its_stability() -> None:
    """J. Cohen et al. 2022: with momentum 0.9 the preconditioned sharpness hovers at 38/η, and the loss falls."""
    rate = 1e-3
    images, labels = demo.digits()
    x, y = images[:500].flatten(1), F.one_hot(labels[:500], 10).float()
    with seeded():
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        model.append(nn.Linear(32, 10))
        for layer in model[::2]:
            nn.init.uniform_(layer.weight, -(layer.in_features**-0.5), layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * ((outputs - targets) ** 2).sum(1).mean()

    loss, params = functional_loss(model, half_square)
    optimizer = torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.99))
    ratios, losses, v0 = {}, {}, None
    for step in range(1, 1001):
        optimizer.zero_grad()
        value = half_square(model(x), y)
        value.backward()
        optimizer.step()
        if step == 20 or (step >= 500 and step % 100 == 0):
            H = hessian(loss, params, (x, y), check=False)
            P = H.precondition(adam_preconditioner(optimizer, params))
            top = eigsh(P, 1, which="LA", tol=1e-3, seed=0, v0=v0)
            ratios[step], losses[step], v0 = float(top.values[0]) * rate / 38, float(value.detach()), top.vectors
    late = [ratio for step, ratio in ratios.items() if step >= 500]
    assert ratios[20] < 0.2
    assert all(0.85 < ratio < 1.1 for ratio in late), ratios
    assert losses[1000] < 0.5 * losses[500]
