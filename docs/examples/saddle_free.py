"""A Newton step that flees saddles, as a pure optimiser: Lanczos from the gradient, |eigenvalues| for eigenvalues.

Y. Dauphin et al., Identifying and attacking the saddle point problem in high-dimensional non-convex optimization (2014).
"""

from typing import Any, NamedTuple

import torch
from torch.func import grad, vmap

from eigenfunc import hvp, lanczos, tree


class Optimizer(NamedTuple):
    init: Any  # params -> state
    update: Any  # (params, state) -> (params, state)
    cost: int  # gradients that a step is worth


def descent(loss, rate=0.5):
    return Optimizer(torch.zeros_like, lambda p, state: (p - rate * grad(loss)(p), state), 1)


def saddle_free(loss, num_steps=8):
    def update(p, damping):
        slope = grad(loss)(p)
        run = lanczos(lambda v: hvp(lambda p, _: loss(p), p, None, v), slope, num_steps)
        off = run.betas[:-1].diag_embed(1)
        values, s = torch.linalg.eigh(run.alphas.diag_embed() + off + off.mT)
        along = s @ (s[0] / (values.abs() + damping)) * tree.norm(slope)  # the slope is its norm times the first row
        moved = p - along @ run.basis
        better = loss(moved) < loss(p)
        return torch.where(better, moved, p), damping * torch.where(better, 0.5, 4.0)

    return Optimizer(lambda p: p.new_ones(()), update, 4 * num_steps + 2)  # a product costs no more than four gradients


generator = torch.Generator().manual_seed(0)
left, right, starts = (torch.randn(*n, generator=generator).double() for n in ((12, 5), (8, 5), (3, 120)))
target = torch.linalg.qr(left)[0] * torch.tensor([1, 0.1, 0.03, 0.01, 0.003]).double() @ torch.linalg.qr(right)[0].mT


def loss(p):  # of a linear network of two layers: a saddle at zero, and another after each mode that is learnt
    return ((p[:72].reshape(12, 6) @ p[72:].reshape(6, 8) - target) ** 2).sum() / 2


def main(gradients=1700):
    results = {}
    for make in (descent, saddle_free):
        optimizer, params = make(loss), 1e-3 * starts  # three starts at once, close to the saddle at zero
        state = vmap(optimizer.init)(params)
        for _ in range(gradients // optimizer.cost):
            params, state = vmap(optimizer.update)(params, state)
        results[make.__name__] = vmap(loss)(params)
        print(f"{make.__name__}: " + "  ".join(f"{x:.1e}" for x in results[make.__name__]))
    return results


if __name__ == "__main__":
    main()
