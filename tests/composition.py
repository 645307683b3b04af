"""What composes with what: the pure functions of the package × the transforms of torch.func and torch.compile.

`python -m tests.composition` writes the table into docs/composition.md; tests/test_composition.py holds every cell.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, stack_module_state, vmap

from eigenfunc import (
    fishervp,
    functional_loss,
    ggnvp,
    hvp,
    lanczos,
    power,
    quadrature,
    sharpness,
    top_eigenpairs,
    trace_probes,
    tree,
)
from tests import helpers
from tests.helpers import Params, dense_hessian, random_like

PAGE = Path(__file__).parent.parent / "docs" / "composition.md"
Figures = Callable[[Params, Tensor, Params], Tensor]  # (params, inputs, vector) -> (m,)


class Net(nn.Module):
    """28 parameters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        drawn = random_like({"w": torch.empty(4, 4), "a": torch.empty(3, 4)}, seed)
        self.w, self.a = nn.Parameter(drawn["w"].double()), nn.Parameter(drawn["a"].double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w.mT) @ self.a.mT


MODELS = [Net(seed) for seed in range(3)]
LOSS, _ = functional_loss(MODELS[0], nn.CrossEntropyLoss())
P, *_ = ALL = [{name: p.detach() for name, p in model.named_parameters()} for model in MODELS]
X = random_like({"x": torch.empty(6, 4).double()}, 3)["x"]
Y = torch.tensor([0, 1, 2, 0, 1, 0])
V, *_ = STARTS = [random_like(P, seed) for seed in (4, 5, 6)]
POINT = (P, X, V)
WAY = (random_like(P, 7), random_like({"x": X}, 8)["x"], random_like(P, 9))
PROBE = tree.ravel(random_like(P, 10), P)


class Function(NamedTuple):
    call: str
    run: Callable[..., Tensor]  # (steps, params, inputs, vector) -> (m,): what is computed, blind to signs
    truth: Callable[..., Tensor]  # the same, from dense matrices
    steps: int


class Transform(NamedTuple):
    name: str
    pair: Callable[[Function], tuple[Any, Any]]  # what comes out, what should
    tolerance: float
    meaning: str


FUNCTIONS: dict[str, Function] = {}
TRANSFORMS: dict[str, Transform] = {}
_TWICE_FORWARD = "torch drops the outer of two forward derivatives of a custom function; jvp∘grad is the same number"
REFUSED = {
    ("top_eigenpairs", "jvp∘jvp"): _TWICE_FORWARD,
    ("sharpness", "jvp∘jvp"): _TWICE_FORWARD,
    (
        "top_eigenpairs",
        "compile∘grad",
    ): "the compiler takes no custom function with a forward derivative, which that of "
    "a vector needs; `sharpness`, a value alone, has its gradient there",
}


def function(call: str, truth: Callable[..., Tensor], steps: int = 1) -> Callable[[Any], Any]:
    def register(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = call.partition("(")[0]
        FUNCTIONS[name if name not in FUNCTIONS else call] = Function(call, run, truth, steps)
        return run

    return register


def transform(name: str, tolerance: float) -> Callable[[Any], Any]:
    def register(pair: Callable[[Function], tuple[Any, Any]]) -> Callable[[Function], tuple[Any, Any]]:
        TRANSFORMS[name] = Transform(name, pair, tolerance, " ".join((pair.__doc__ or "").split()))
        return pair

    return register


def hessian(params: Params, x: Tensor) -> Tensor:
    return dense_hessian(lambda p: LOSS(p, (x, Y)), params)


def gauss_newton(params: Params, x: Tensor) -> Tensor:
    """Jᵀ H J with the Hessian of the mean cross-entropy in closed form."""
    of = jacrev(lambda p: LOSS.predict(p, x))(params)
    J = torch.cat([of[name].flatten(2) for name in sorted(of)], dim=2)
    p = torch.softmax(LOSS.predict(params, x), 1)
    H = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(x)
    return torch.einsum("bip,bij,bjq->pq", J, H, J)


def empirical_fisher(params: Params, x: Tensor) -> Tensor:
    rows = [grad(lambda p, i=i: LOSS(p, (x[i : i + 1], Y[i : i + 1])))(params) for i in range(len(x))]
    slopes = torch.stack([flat(row) for row in rows])
    return slopes.mT @ slopes / len(x)


def curved(params: Params, x: Tensor) -> Callable[[Params], Params]:
    return lambda v: hvp(LOSS, params, (x, Y), v)


def flat(v: Params) -> Tensor:
    return tree.ravel(v, P)


@function("hvp(loss, params, batch, v)", lambda steps, p, x, v: hessian(p, x) @ flat(v))
def _(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    return flat(hvp(LOSS, p, (x, Y), v))


@function("ggnvp(objective, params, batch, v)", lambda steps, p, x, v: gauss_newton(p, x) @ flat(v))
def _(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    return flat(ggnvp(LOSS, p, (x, Y), v))


@function("fishervp(objective, params, batch, v)", lambda steps, p, x, v: gauss_newton(p, x) @ flat(v))
def _(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    return flat(fishervp(LOSS, p, (x, Y), v))


@function('fishervp(…, "empirical")', lambda steps, p, x, v: empirical_fisher(p, x) @ flat(v))
def _(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    return flat(fishervp(LOSS, p, (x, Y), v, "empirical"))


def dense_lanczos(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    A, rows = hessian(p, x), [flat(v) / flat(v).norm()]
    alphas, betas = [], []
    for _ in range(steps):
        w = A @ rows[-1]
        alphas.append(rows[-1] @ w)
        for row in rows * 2:
            w = w - (row @ w) * row
        betas.append(w.norm())
        rows.append(w / w.norm())
    return torch.cat([torch.stack(alphas), torch.stack(betas), torch.stack(rows[:-1]) @ PROBE])


@function("lanczos(matvec, v0, num_steps)", dense_lanczos, steps=4)
def _(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    found = lanczos(curved(p, x), v, steps)
    return torch.cat([found.alphas, found.betas, flat(found.basis) @ PROBE.to(flat(v))])


def dense_power(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    A, u = hessian(p, x), flat(v)
    for _ in range(steps):
        u = u / u.norm()
        image = A @ u
        value, residual = u @ image, (image - (u @ image) * u).norm()
        u = image
    return torch.stack([value, residual, u @ PROBE / u.norm()])


@function("power(matvec, v0, num_steps)", dense_power, steps=3)
def _(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    found = power(curved(p, x), v, steps)
    return torch.stack([found.value, found.residual, (flat(found.vector) @ PROBE.to(flat(v))).double()])


def dense_pairs(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    values, columns = torch.linalg.eigh(hessian(p, x))
    return torch.cat([values.flip(0)[:2], (PROBE @ columns).flip(0)[:2] ** 2])


@function("top_eigenpairs(loss, params, batch, k=2, …)", dense_pairs, steps=20)
def _(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    found = top_eigenpairs(LOSS, p, (x, Y), k=2, num_steps=steps, v0=v)
    return torch.cat([found.values, (flat(found.vectors) @ PROBE.to(flat(v))) ** 2])


@function("sharpness(loss, params, batch, …)", lambda *args: dense_pairs(*args)[:1], steps=20)
def _(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    return sharpness(LOSS, p, (x, Y), num_steps=steps, v0=v)[None]


def dense_powers(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    A, u = 2 * hessian(p, x), flat(v)
    return torch.stack([u @ torch.linalg.matrix_power(A, i) @ u for i in range(2 * steps)])


@function("quadrature(matvec, v0, num_steps)", dense_powers, steps=4)
def _(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    rule = quadrature(curved(p, x), v, steps)
    return torch.stack([(rule.weights * (2 * rule.nodes) ** i).sum() for i in range(2 * steps)])


def dense_forms(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    A, u = hessian(p, x), flat(v)
    return torch.stack([u @ A @ u, u.sin() @ A @ u.sin()])


@function("trace_probes(matvec, probes)", dense_forms)
def _(steps: int, p: Params, x: Tensor, v: Params) -> Tensor:
    return trace_probes(curved(p, x), tree.stack([v, tree.tree_map(torch.sin, v)]))


def figures(f: Function, steps: int | None = None) -> Figures:
    return partial(f.run, f.steps if steps is None else steps)


def number(f: Function, steps: int | None = None) -> Callable[[Params, Tensor, Params], Tensor]:
    """One number out of all figures, each with a weight of its own."""

    def weighed(p: Params, x: Tensor, v: Params) -> Tensor:
        out = figures(f, steps)(p, x, v)
        return (out * torch.linspace(1, 2, len(out), dtype=torch.float64).to(out)).sum()

    return weighed


def looped(f: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> Any:
    return tree.stack([f(*each) for each in arguments])


def difference(f: Callable[..., Tensor]) -> Tensor:
    """The derivative along WAY."""
    return helpers.difference(lambda t: f(*tree.add(POINT, tree.scale(t, WAY))))


def along(f: Callable[..., Any], *point: Any) -> Tensor:
    """The gradient f(*point), times WAY."""
    return tree.dot(f(*point), WAY)


@transform("eager", 1e-10)
def _(f: Function) -> tuple[Any, Any]:
    """The figures, against those of a dense matrix formed by double backward and of eigh."""
    return figures(f)(*POINT), f.truth(f.steps, *POINT)


@transform("vmap over starts", 1e-12)
def _(f: Function) -> tuple[Any, Any]:
    """All of three vectors (probes, start vectors) in one call, against a loop over them."""
    together = vmap(figures(f), (None, None, 0))(P, X, tree.stack(STARTS))
    return together, looped(figures(f), [(P, X, v) for v in STARTS])


@transform("vmap over models", 1e-12)
def _(f: Function) -> tuple[Any, Any]:
    """All of three models, their parameters stacked by `stack_module_state`, against a loop over them."""
    together = vmap(figures(f), (0, None, None))(stack_module_state(MODELS)[0], X, V)  # type: ignore[arg-type]
    return together.detach(), looped(figures(f), [(p, X, V) for p in ALL])


@transform("grad", 1e-7)
def _(f: Function) -> tuple[Any, Any]:
    """Gradient of a weighted sum of the figures by parameters (which the matvec closes over), inputs and vector at
    once, against central differences."""
    return along(grad(number(f), (0, 1, 2)), *POINT), difference(number(f))


@transform("jvp", 1e-7)
def _(f: Function) -> tuple[Any, Any]:
    """Derivative of all figures along a change of parameters, inputs and vector, against central differences."""
    return jvp(figures(f), POINT, WAY)[1], difference(figures(f))


@transform("jacrev", 1e-7)
def _(f: Function) -> tuple[Any, Any]:
    """Jacobian of all figures by parameters, inputs and vector, times such a change, against central differences."""
    rows = jacrev(figures(f), (0, 1, 2))(*POINT)
    return tree.gram(rows, tree.lifted(WAY))[:, 0], difference(figures(f))


def pushed(f: Callable[..., Any]) -> Callable[..., Any]:
    """The derivative of f along WAY, as a function of the point."""
    return lambda *point: jvp(f, point, WAY)[1]


@transform("jvp∘grad", 1e-6)
def _(f: Function) -> tuple[Any, Any]:
    """Second derivative of a weighted sum of the figures, once along a change of all arguments, against central
    differences of the gradient."""
    slope = partial(along, grad(number(f), (0, 1, 2)))
    return pushed(slope)(*POINT), difference(slope)


@transform("jvp∘jvp", 1e-6)
def _(f: Function) -> tuple[Any, Any]:
    """Second derivative along a change of all arguments, forward over forward, against central differences."""
    return pushed(pushed(figures(f)))(*POINT), difference(pushed(figures(f)))


@transform("vmap∘grad", 1e-12)
def _(f: Function) -> tuple[Any, Any]:
    """The gradients of all three models in one call, against a loop over them."""
    together = vmap(grad(number(f)), (0, None, None))(tree.stack(ALL), X, V)
    return together, looped(grad(number(f)), [(p, X, V) for p in ALL])


@transform("grad∘vmap", 1e-12)
def _(f: Function) -> tuple[Any, Any]:
    """The gradient of a sum over all three vectors, against the sum of their gradients."""
    together = grad(lambda p: vmap(number(f), (None, None, 0))(p, X, tree.stack(STARTS)).sum())(P)
    return together, tree.tree_map(lambda leaf: leaf.sum(0), looped(grad(number(f)), [(P, X, v) for v in STARTS]))


def compiled(f: Callable[..., Any], backend: str) -> Any:
    torch.compiler.reset()
    return torch.compile(f, fullgraph=True, backend=backend)(*POINT)


@transform("compile", 1e-10)
def _(f: Function, backend: str = "aot_eager") -> tuple[Any, Any]:
    """`torch.compile(fullgraph=True)`, two steps where there are steps, against eager mode."""
    steps = min(f.steps, 2)
    return compiled(figures(f, steps), backend), figures(f, steps)(*POINT)


@transform("compile∘grad", 1e-10)
def _(f: Function, backend: str = "eager") -> tuple[Any, Any]:
    """The gradient of a weighted sum of the figures by parameters and inputs, compiled, against eager mode."""
    steps = min(f.steps, 2)
    slope = grad(number(f, steps), (0, 1))
    return compiled(slope, backend), slope(*POINT)


@transform("float32", 1e-5)
def _(f: Function) -> tuple[Any, Any]:
    """The figures in single precision against those in double."""
    return figures(f)(*tree.tree_map(Tensor.float, POINT)).double(), figures(f)(*POINT)


def table() -> str:
    reasons = list(dict.fromkeys(REFUSED.values()))
    lines = ["| | " + " | ".join(TRANSFORMS) + " |", "|---" * (len(TRANSFORMS) + 1) + "|"]
    for name, f in FUNCTIONS.items():
        cells = []
        for t in TRANSFORMS.values():
            reason = REFUSED.get((name, t.name))
            allowed = f"{t.tolerance:.0e}".replace("e-0", "e-")
            cells.append(allowed if reason is None else f"refused ({reasons.index(reason) + 1})")
        lines.append(f"| `{f.call}` | " + " | ".join(cells) + " |")
    lines += ["", *(f"({i}) `TransformError`: {reason}." for i, reason in enumerate(reasons, 1)), ""]
    return "\n".join(lines + [f"- **{t.name}**: {t.meaning}" for t in TRANSFORMS.values()])


def renewed(page: str) -> str:
    """The page with what lies between its marks written anew."""
    begin, end = "<!-- by python -m tests.composition -->\n", "\n<!-- end -->"
    return page.partition(begin)[0] + begin + table() + end + page.partition(end)[2]


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
