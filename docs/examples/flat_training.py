"""Training that also pays for sharpness: the gradient of loss + alpha · λ₁, beside that of the loss alone."""

import torch
import torch.nn.functional as F
from torch.func import grad

from eigenfunc import sharpness, top_eigenpairs, tree

generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


inputs = normal(128, 8)
targets = (inputs @ normal(8, 3)).argmax(1)
start = {"w": normal(16, 8) / 8**0.5, "b": torch.zeros(16).double(), "out": normal(3, 16) / 4}
v0 = {name: normal(*p.shape) for name, p in start.items()}


def loss(params, batch):
    inputs, targets = batch
    return F.cross_entropy(torch.tanh(inputs @ params["w"].mT + params["b"]) @ params["out"].mT, targets)


def train(alpha, steps=60, rate=0.5):
    def objective(params, v0):
        pairs = top_eigenpairs(loss, params, (inputs, targets), k=1, num_steps=6, v0=v0)
        return loss(params, (inputs, targets)) + alpha * pairs.values[0], tree.row(pairs.vectors, 0)

    params, v = start, v0
    for _ in range(steps):
        slope, v = grad(objective, has_aux=True)(params, v)  # the eigenvector starts the next run
        params = {name: p - rate * slope[name] for name, p in params.items()}
    return loss(params, (inputs, targets)), sharpness(loss, params, (inputs, targets), num_steps=40, v0=v0)


def main():
    results = {alpha: train(alpha) for alpha in (0.0, 0.3)}
    for alpha, (value, largest) in results.items():
        print(f"alpha {alpha}: loss {value:.3f}, sharpness {largest:.3f}")
    return results


if __name__ == "__main__":
    main()
