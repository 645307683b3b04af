"""How sharp a loss is depends on how its inputs are scaled: dλ₁/ds and d²λ₁/ds² through the batch."""

import torch
import torch.nn.functional as F
from torch.func import grad

from eigenfunc import sharpness

generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


inputs, targets = normal(64, 6), normal(64, 1)
params = {"w": normal(8, 6) / 6**0.5, "out": normal(1, 8) / 8**0.5}
v0 = {name: normal(*p.shape) for name, p in params.items()}


def loss(params, batch):  # whatever is differentiated by comes in by the batch
    hidden = torch.tanh(batch["scale"] * batch["inputs"] @ params["w"].mT)
    return F.mse_loss(hidden @ params["out"].mT, batch["targets"])


def largest(scale):
    batch = {"inputs": inputs, "targets": targets, "scale": scale}
    return sharpness(loss, params, batch, num_steps=40, v0=v0)


def main():
    scale, h = torch.tensor(1.0, dtype=torch.float64), 1e-4
    first, second = grad(largest)(scale), grad(grad(largest))(scale)
    difference = (largest(scale + h) - largest(scale - h)) / (2 * h)
    print(f"λ₁ {largest(scale):.6f}, dλ₁/ds {first:.6f} (differences: {difference:.6f}), d²λ₁/ds² {second:.6f}")
    return first, difference, second


if __name__ == "__main__":
    main()
