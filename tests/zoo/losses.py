"""Losses, each over the same small network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.cases import Problem, case

LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
SIGNS = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
Loss = Callable[[Tensor, dict[str, Tensor]], Tensor]


def over_outputs(loss: Loss) -> Callable[[], Problem]:
    """The loss of six outputs of three entries, `out`, and of whatever it takes from the batch."""

    def make() -> Problem:
        model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
        batch = {"x": torch.randn(6, 4), "y": torch.randn(6, 3), "signs": SIGNS.clone(), "labels": LABELS.clone()}

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            return loss(model(batch["x"]), batch)

        return model, loss_fn, batch

    return make


LOSSES: dict[str, Loss] = {
    "cross entropy": lambda out, b: F.cross_entropy(out, b["labels"]),
    "cross entropy, weights": lambda out, b: F.cross_entropy(out, b["labels"], b["y"][0].abs()),
    "cross entropy, ignore_index": lambda out, b: F.cross_entropy(out, b["labels"], ignore_index=1),
    "cross entropy, label smoothing": lambda out, b: F.cross_entropy(out, b["labels"], label_smoothing=0.1),
    "cross entropy, soft labels": lambda out, b: F.cross_entropy(out, b["y"].softmax(-1)),
    "cross entropy, summed": lambda out, b: F.cross_entropy(out, b["labels"], reduction="sum"),
    "cross entropy (N, C, d)": lambda out, b: F.cross_entropy(out.view(2, 3, 3), b["labels"].view(2, 3)),
    "NLL, weights": lambda out, b: F.nll_loss(out.log_softmax(-1), b["labels"], b["y"][0].abs()),
    "NLL (N, C, d, e)": lambda out, b: F.nll_loss(
        out.view(1, 3, 3, 2).log_softmax(1), b["labels"].view(1, 3, 2)
    ),
    "MSE": lambda out, b: nn.MSELoss()(out, b["y"]),
    "MSE, broadcast": lambda out, b: F.mse_loss(out, b["y"].mean().expand_as(out)),
    "MSE, weights": lambda out, b: F.mse_loss(out, b["y"], weight=b["y"].abs()),
    "MSE of the outputs as target": lambda out, b: F.mse_loss(b["y"], out, reduction="sum"),
    "L1": lambda out, b: F.l1_loss(out.square(), b["y"]),
    "Huber": lambda out, b: F.huber_loss(out, b["y"], delta=0.5),
    "SmoothL1": lambda out, b: F.smooth_l1_loss(out, b["y"], beta=0.5),
    "BCE with logits": lambda out, b: F.binary_cross_entropy_with_logits(
        out, b["y"].sigmoid(), pos_weight=b["y"][1].abs()
    ),
    "BCE": lambda out, b: F.binary_cross_entropy(out.sigmoid(), b["y"].sigmoid(), b["y"].abs()),
    "KL": lambda out, b: F.kl_div(out.log_softmax(-1), b["y"].softmax(-1), reduction="batchmean"),
    "KL, log target": lambda out, b: F.kl_div(
        out.log_softmax(-1), b["y"].log_softmax(-1), reduction="sum", log_target=True
    ),
    "Poisson NLL": lambda out, b: F.poisson_nll_loss(out, b["y"].exp(), full=True),
    "Gaussian NLL": lambda out, b: F.gaussian_nll_loss(out, b["y"], out.roll(1, -1).exp()),
    "cosine similarity": lambda out, b: 1 - F.cosine_similarity(out, b["y"]).mean(),
    "cosine embedding": lambda out, b: F.cosine_embedding_loss(out, b["y"], b["signs"], margin=0.1),
    "triplet margin": lambda out, b: F.triplet_margin_loss(out, b["y"], out.roll(1, 0), margin=4.0),
    "multi margin": lambda out, b: F.multi_margin_loss(out.square(), b["labels"]),
    "multi margin, p=2": lambda out, b: F.multi_margin_loss(out, b["labels"], p=2),
    "multilabel margin": lambda out, b: F.multilabel_margin_loss(
        out.exp(), F.pad(b["labels"][:, None], (0, 2), value=-1)
    ),
    "multilabel soft margin": lambda out, b: F.multilabel_soft_margin_loss(out, (b["y"] > 0).to(out.dtype)),
    "margin ranking": lambda out, b: F.margin_ranking_loss(
        out.square().sum(-1), b["y"].sum(-1), b["signs"], margin=5.0
    ),
    "hinge embedding": lambda out, b: F.hinge_embedding_loss(out.square().sum(-1), b["signs"], margin=3.0),
    "soft margin": lambda out, b: F.soft_margin_loss(out, b["y"].sign()),
    "loss of shape (1,)": lambda out, b: F.cross_entropy(out, b["labels"]).reshape(1),
    "pairwise distance": lambda out, b: F.pairwise_distance(out, b["y"]).square().mean(),
    "cdist": lambda out, b: torch.cdist(out, b["y"]).square().mean() + torch.cdist(out, b["y"]).mean(),
    "logsumexp, variance": lambda out, b: out.logsumexp(0).sum() + out.var(0).sum() + out.std(),
    "sorted": lambda out, b: (out.sort(0).values - b["y"].sort(0).values).square().mean(),
    "topk, gather": lambda out, b: (
        out.topk(2).values.square().sum() - out.gather(1, b["labels"][:, None]).exp().sum()
    ),
}  # fmt: skip

for _name, _loss in LOSSES.items():
    case(f"loss {_name}", over_outputs(_loss))


@case("loss contrastive")
def contrastive() -> Problem:
    """InfoNCE: every sample's term depends on all the others."""

    def loss(out: Tensor, batch: dict[str, Tensor]) -> Tensor:
        z = F.normalize(out, dim=-1)
        scores = z @ z.roll(1, 0).T / 0.5
        return F.cross_entropy(scores, torch.arange(len(z)))

    return over_outputs(loss)()


@case("loss CTC")
def ctc() -> Problem:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        x, targets, lengths = batch
        return F.ctc_loss(model(x).log_softmax(-1), targets, torch.tensor([9, 8]), lengths)

    return model, loss_fn, (torch.randn(9, 2, 4), torch.tensor([[1, 2, 2], [3, 4, 0]]), torch.tensor([3, 2]))


@case("loss adaptive softmax")
def adaptive_softmax() -> Problem:
    model = nn.ModuleList([nn.Linear(4, 8), nn.AdaptiveLogSoftmaxWithLoss(8, 20, [4, 10])])

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        body, head = model.children()
        return head(body(batch[0]).tanh(), batch[1]).loss

    return model, loss_fn, (torch.randn(10, 4), torch.arange(0, 20, 2))
