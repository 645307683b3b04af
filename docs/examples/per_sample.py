"""The sharpness of the loss of each sample, by vmap over the batch: hard samples bend the loss more than easy ones."""

import torch
import torch.nn.functional as F
from torch.func import vmap

from eigenfunc import sharpness

generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


inputs = normal(40, 5)
targets = (inputs[:, 0] > 0).long()
params = {"w": normal(8, 5), "out": normal(2, 8) / 2}
v0 = {name: normal(*p.shape) for name, p in params.items()}


def loss(params, sample):
    x, y = sample
    return F.cross_entropy(torch.tanh(x @ params["w"].mT) @ params["out"].mT, y)


def main():
    def one(x, y):
        return sharpness(loss, params, (x, y), num_steps=12, v0=v0), loss(params, (x, y))

    values, losses = vmap(one)(inputs, targets)
    order = values.argsort(descending=True)
    for i in order[:5].tolist():
        print(f"sample {i}: sharpness {values[i]:.3f}, loss {losses[i]:.3f}")
    return values, losses


if __name__ == "__main__":
    main()
