"""The leading eigenvalues of all members of an ensemble in one call, by vmap over their stacked parameters."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from eigenfunc import top_eigenpairs


def main():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(5)]
        inputs, targets = torch.randn(100, 6).double(), torch.randint(0, 3, (100,))
        v0 = {name: torch.randn_like(p) for name, p in models[0].named_parameters()}
    params, _ = stack_module_state(models)

    def loss(params, batch):
        return F.cross_entropy(functional_call(models[0], params, (batch[0],)), batch[1])

    def spectrum(params):
        pairs = top_eigenpairs(loss, params, (inputs, targets), k=4, num_steps=50, v0=v0)
        return pairs.values, pairs.residuals

    values, residuals = vmap(spectrum)(params)  # (5, 4) each
    for i, row in enumerate(values.tolist()):
        print(f"member {i}: " + "  ".join(f"{x:.4f}" for x in row))
    return values, residuals


if __name__ == "__main__":
    main()
