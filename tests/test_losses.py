"""Hessians of losses in output space: closed forms against double backward, in every layout, dtype and transform."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from eigenfunc import tree
from eigenfunc.curvature import losses
from eigenfunc.curvature.likelihoods import likelihood
from eigenfunc.curvature.losses import output_hessian
from eigenfunc.errors import ObjectiveError

Problem = tuple[Any, Tensor, Tensor, Tensor]  # criterion, outputs, targets, u


def double_backward(criterion: Any, outputs: Any, targets: Any, u: Any) -> Any:
    """H u by torch.autograd alone."""
    leaves = [z.detach().clone().requires_grad_() for z in tree.leaves(outputs)]
    rebuild = tree.flatten(outputs)[1]
    slopes = torch.autograd.grad(criterion(rebuild(leaves), targets), leaves, create_graph=True)
    along = sum(((s * v).sum() for s, v in zip(slopes, tree.leaves(u), strict=True)), torch.zeros(()))
    if not along.requires_grad:
        return tree.zeros_like(outputs)
    return rebuild(list(torch.autograd.grad(along, leaves, materialize_grads=True)))


def assert_right(problem: Problem) -> None:
    criterion, outputs, targets, u = problem
    assert likelihood(criterion, outputs, targets) is not None
    found, truth = output_hessian(criterion, outputs, targets)(u), double_backward(criterion, outputs, targets, u)
    assert found.shape == u.shape
    assert found.isfinite().all()
    assert (found - truth).norm() <= 1e-10 * truth.norm() + 1e-15 * u.norm()


class Source:
    """Random tensors and choices from one seed."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g, dtype=torch.float64)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.g, dtype=torch.float64) + 0.1

    def coin(self) -> bool:
        return bool(self.draw(st.booleans()))

    def one(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))


@st.composite
def cross_entropies(draw: Callable[[Any], Any]) -> Problem:
    s = Source(draw)
    classes = draw(st.integers(1, 5))
    lead = draw(st.lists(st.integers(1, 4), max_size=3))
    shape = [*lead[:1], classes, *lead[1:]]
    outputs = s.one(1.0, 30.0, 1e3) * s.normal(*shape)
    options: dict[str, Any] = {"reduction": s.one("mean", "sum"), "label_smoothing": s.one(0.0, 0.1, 1.0)}
    if s.coin():
        options["weight"] = s.positive(classes)
    if s.coin():
        targets = s.normal(*shape).softmax(min(len(shape) - 1, 1)) * s.one(1.0, 2.0)
    else:
        options["ignore_index"] = s.one(-100, 0, classes)
        targets = torch.randint(classes, lead, generator=s.g)
        ignored = torch.rand(lead, generator=s.g) < s.one(0.0, 0.3, 1.0)
        if lead and s.coin():
            ignored[0] = True  # a row without a single observation
        targets = torch.where(ignored, options["ignore_index"], targets)
    criterion = s.one(nn.CrossEntropyLoss(**options), partial(F.cross_entropy, **options))
    return criterion, outputs, targets, s.normal(*shape)


@st.composite
def regressions(draw: Callable[[Any], Any]) -> Problem:
    """Losses that treat output entries apart."""
    s = Source(draw)
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    kind = s.one("mse", "weighted mse", "bce", "poisson", "rates", "gaussian", "gaussian, one variance")
    options: dict[str, Any] = {"reduction": s.one("mean", "sum")}
    outputs, targets = s.one(1.0, 1e3) * s.normal(*shape), s.normal(*shape)
    if kind == "mse":
        criterion = s.one(nn.MSELoss(**options), partial(F.mse_loss, **options))
    elif kind == "weighted mse":
        criterion = partial(F.mse_loss, weight=s.positive(*shape), **options)
    elif kind == "bce":
        targets = s.one(targets.sigmoid(), (targets > 0).double())
        for name in ("weight", "pos_weight"):
            if s.coin():
                options[name] = s.positive(*(n if s.coin() else 1 for n in shape[s.one(0, 1) :]))
        criterion = s.one(nn.BCEWithLogitsLoss(**options), partial(F.binary_cross_entropy_with_logits, **options))
    elif kind in ("poisson", "rates"):
        outputs, targets = s.normal(*shape), targets.abs()
        options.update(full=s.coin(), eps=s.one(1e-8, 0.3), log_input=kind == "poisson")
        outputs = outputs if kind == "poisson" else outputs.abs() + 0.1
        criterion = s.one(nn.PoissonNLLLoss(**options), partial(F.poisson_nll_loss, **options))
    else:
        options.update(full=s.coin(), eps=s.one(1e-6, 0.5))
        if kind == "gaussian":
            sizes = s.one(shape, shape[:-1], [*shape[:-1], 1] if shape else shape)
            variance: Any = s.positive(*sizes)
        else:
            variance = 0.7
        criterion = s.one(
            partial(nn.GaussianNLLLoss(**options), var=variance), partial(F.gaussian_nll_loss, var=variance, **options)
        )
    return criterion, outputs, targets, s.normal(*shape)


@settings(max_examples=150, deadline=None)
@given(problem=cross_entropies())
def test_cross_entropies(problem: Problem) -> None:
    assert_right(problem)


@settings(max_examples=150, deadline=None)
@given(problem=regressions())
def test_losses_of_single_entries(problem: Problem) -> None:
    assert_right(problem)


@settings(max_examples=40, deadline=None)
@given(problem=st.one_of(cross_entropies(), regressions()), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_precision_is_that_of_the_outputs(problem: Problem, dtype: torch.dtype) -> None:
    criterion, outputs, targets, u = problem
    outputs, u = (outputs / outputs.abs().amax().clamp(min=1)).abs().to(dtype), u.to(dtype)
    found = output_hessian(criterion, outputs, targets)(u)
    truth = output_hessian(criterion, outputs.double(), targets)(u.double())
    assert found.dtype == dtype
    assert (found.double() - truth).norm() <= 4 * torch.finfo(dtype).eps * truth.norm() + 1e-6 * torch.finfo(dtype).eps


CE = nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1, weight=torch.tensor([1.0, 2, 3, 4]).double())
G = torch.Generator().manual_seed(3)
Z, U = (torch.randn(6, 4, 3, generator=G, dtype=torch.float64) for _ in range(2))
LABELS, SHARES = torch.randint(4, (6, 3), generator=G), Z.flip(0).sigmoid()
EXAMPLES: list[tuple[Any, Tensor, Tensor]] = [
    (CE, Z, LABELS),
    (nn.CrossEntropyLoss(), Z, SHARES / SHARES.sum(1, keepdim=True)),
    (nn.MSELoss(), Z, SHARES),
    (nn.BCEWithLogitsLoss(pos_weight=SHARES[0]), Z, SHARES),
    (nn.PoissonNLLLoss(), Z, SHARES),
    (nn.PoissonNLLLoss(log_input=False), Z.abs() + 0.5, SHARES),
    (partial(nn.GaussianNLLLoss(), var=SHARES), Z, SHARES),
]


@pytest.mark.parametrize(("criterion", "outputs", "targets"), EXAMPLES)
def test_composes_with_transforms(criterion: Any, outputs: Tensor, targets: Tensor) -> None:
    def along(z: Tensor, v: Tensor) -> Tensor:
        return output_hessian(criterion, z, targets)(v)

    truth = along(outputs, U)
    assert torch.allclose(vmap(partial(along, outputs))(torch.stack([U, -2 * U])), torch.stack([truth, -2 * truth]))
    models = torch.stack([outputs, outputs.flip(1)])
    assert torch.allclose(vmap(along, in_dims=(0, None))(models, U)[1], along(outputs.flip(1), U))

    def third(z: Tensor) -> Tensor:  # what ⟨U, H U⟩ is differentiated to
        return double_backward_scalar(criterion, z, targets)

    step = 1e-5 * U.flip(0)
    slope = (third(outputs + step) - third(outputs - step)) / 2e-5
    assert torch.allclose((grad(lambda z: (U * along(z, U)).sum())(outputs) * U.flip(0)).sum(), slope, atol=1e-7)
    moved = jvp(lambda z: along(z, U), (outputs,), (U.flip(0),))[1]
    assert torch.allclose((U * moved).sum(), slope, atol=1e-7)


def double_backward_scalar(criterion: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    product: Tensor = (double_backward(criterion, outputs, targets, U) * U).sum()
    return product


@pytest.mark.parametrize(("criterion", "outputs", "targets"), EXAMPLES)
def test_compiles_without_graph_breaks(criterion: Any, outputs: Tensor, targets: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, v: output_hessian(criterion, z, targets)(v), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(outputs, U), output_hessian(criterion, outputs, targets)(U), rtol=1e-12)


class Doubled(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target) + (input**2).sum()


def hooked() -> nn.Module:
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda module, args, out: out**2)
    return loss


def focal(z: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        share = 1 - z.softmax(1).gather(1, y[:, None])[:, 0]
    return (share**2 * F.cross_entropy(z, y, reduction="none")).mean()


class Quartic(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**4

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 4 * ctx.saved_tensors[0] ** 3 * slope


OTHERS: dict[str, tuple[Any, Any, Any]] = {
    "subclass": (Doubled(), Z, LABELS),
    "hooks": (hooked(), Z, SHARES),
    "own function": (lambda z, y: F.cross_entropy(z, y) ** 2, Z, LABELS),
    "weights without gradient": (focal, Z, LABELS),
    "no forward formula": (lambda z, y: Quartic.apply(z - y).sum(), Z, SHARES),
    "huber": (nn.HuberLoss(), Z, SHARES),
    "positional options": (partial(lambda w, z, y: w * F.mse_loss(z, y), 3.0), Z, SHARES),
    "mean and variance": (
        lambda out, y: F.gaussian_nll_loss(out["mean"], y, out["log"].exp()), {"mean": Z, "log": U}, SHARES
    ),
    "old flags": (partial(F.cross_entropy, size_average=None, reduction="sum", label_smoothing=0.0), Z, LABELS),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_are_differentiated(name: str) -> None:
    criterion, outputs, targets = OTHERS[name]
    assert (likelihood(criterion, outputs, targets) is None) == (name != "old flags")
    u = tree.tree_map(lambda z: U.flip(1) + z, outputs)
    found = output_hessian(criterion, outputs, targets)(u)
    truth = double_backward(criterion, outputs, targets, u)
    for a, b in zip(tree.leaves(found), tree.leaves(truth), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    stacked = tree.tree_map(lambda x: torch.stack([x, 3 * x]), u)
    again = vmap(output_hessian(criterion, outputs, targets))(stacked)
    assert torch.allclose(tree.leaves(again)[0][1], 3 * tree.leaves(found)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_what_is_not_understood_is_never_guessed() -> None:
    criteria: list[tuple[Any, Tensor, Tensor]] = [
        (partial(F.cross_entropy, reduce=True), Z, LABELS),
        (partial(F.mse_loss, size_average=False), Z, SHARES),
        (nn.CrossEntropyLoss(ignore_index=2), Z, SHARES),  # torch refuses ignored classes for soft targets
        (nn.MSELoss(), Z, SHARES[:, :1]),  # broadcast
        (nn.BCEWithLogitsLoss(weight=SHARES[None]), Z, SHARES),
        (partial(F.mse_loss, target=SHARES), Z, SHARES),
        (nn.GaussianNLLLoss(), Z, SHARES),
        (nn.CrossEntropyLoss(), Z, LABELS.double()),
    ]
    for criterion, outputs, targets in criteria:
        assert likelihood(criterion, outputs, targets) is None, criterion


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(reduction="none"), partial(F.cross_entropy, reduction="none")])
def test_losses_that_are_not_reduced_are_refused(loss: Any) -> None:
    with pytest.raises(ObjectiveError, match="not \\(\\)"):
        output_hessian(loss, Z, LABELS)(U)


@settings(max_examples=60, deadline=None)
@given(problem=cross_entropies(), chunk=st.integers(1, 12), strided=st.booleans())
def test_a_few_rows_at_a_time_are_all_rows_at_once(problem: Problem, chunk: int, strided: bool) -> None:
    criterion, outputs, targets, u = problem
    if strided:
        outputs, u = (x.transpose(0, -1).contiguous().transpose(0, -1) for x in (outputs, u))
    truth = output_hessian(criterion, outputs, targets)(u)
    before = u.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK", chunk)
        found = output_hessian(criterion, outputs, targets)(u)
        assert torch.equal(u, before)
        over = output_hessian(criterion, outputs, targets, overwrite=True)(u)
        if outputs.numel() > chunk:
            assert over is u
        pair = torch.stack([before, before])
        traced = vmap(output_hessian(criterion, outputs, targets, overwrite=True))(pair)[0]
        assert torch.equal(pair[0], before)
        models = vmap(lambda z: output_hessian(criterion, z, targets, overwrite=True)(before))(torch.stack([outputs]))
        if len(before) > 1:
            shared = before[:1].expand_as(before)  # one memory for all rows
            own = output_hessian(criterion, outputs, targets, overwrite=True)(shared)
            assert torch.equal(own, output_hessian(criterion, outputs, targets)(shared.clone()))
            assert torch.equal(shared[-1:], before[:1])
    for image in (found, over, traced, models[0]):
        assert (image - truth).norm() <= 1e-13 * truth.norm() + 1e-300


def peak_bytes(f: Callable[[], Any]) -> int:
    """Largest number of bytes that the call holds at one time, by the allocator's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        out = f()
    del out
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = top = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return top


def test_a_large_vocabulary_takes_little_memory_and_keeps_its_digits() -> None:
    g = torch.Generator().manual_seed(0)
    z, u = (torch.randn(256, 50_000, generator=g) for _ in range(2))
    y = torch.randint(50_000, (256,), generator=g)
    z = 3 * z
    z[:128] += 30 * F.one_hot(y[:128], 50_000)  # learnt so well that float32 has 1 − p = 0
    truth = output_hessian(nn.CrossEntropyLoss(), z.double(), y)(u.double())
    found = output_hessian(nn.CrossEntropyLoss(), z, y)(u).double()
    for rows in (slice(128), slice(128, None)):
        assert (found[rows] - truth[rows]).norm() <= 5e-7 * truth[rows].norm()
    temporaries = 6 * losses.CHUNK * 4
    assert peak_bytes(lambda: output_hessian(nn.CrossEntropyLoss(), z, y)(u)) <= z.nbytes + temporaries
    assert temporaries < z.nbytes + 2**20
    assert peak_bytes(lambda: output_hessian(nn.CrossEntropyLoss(), z, y, overwrite=True)(u)) <= temporaries


@pytest.mark.parametrize(
    ("criterion", "arrays"),
    [(nn.MSELoss(), 0), (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), 6), (nn.PoissonNLLLoss(), 4)],
)
def test_losses_of_single_numbers_take_no_array_of_the_size_of_the_outputs(
    criterion: Any, arrays: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    z, u = (torch.randn(64, 3, 500, generator=g) for _ in range(2))
    y = torch.randint(2, (64, 3, 500), generator=g).float()
    truth = output_hessian(criterion, z.double(), y.double())(u.double())
    monkeypatch.setattr(losses, "CHUNK", 1000)  # less than one row of axis 0
    assert peak_bytes(lambda: output_hessian(criterion, z, y, overwrite=True)(u.clone())) <= (
        u.nbytes + (arrays + 2) * 1000 * 4
    )
    found = output_hessian(criterion, z, y)(u)
    assert (found - truth).norm() <= 1e-6 * truth.norm()
