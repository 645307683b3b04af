"""How models of transformers are made small, with random weights, and given something to learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.cases import Make, Problem, case

WORDS = 37
Batch = Callable[[], dict[str, Any]]


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(**batch).loss


def made(architecture: str, config: str, batch: Batch, train: bool = False, **settings: Any) -> Make:
    """`architecture(config(**settings))`, away from its starting point, where whole blocks of the Hessian vanish."""

    def make() -> Problem:
        import transformers

        transformers.logging.set_verbosity_error()
        model = getattr(transformers, architecture)(getattr(transformers, config)(**settings))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        return model.train(train), loss_of, batch()

    return make


def both(name: str, architecture: str, config: str, batch: Batch, **settings: Any) -> None:
    """A case for fused attention and one for the elementary form that the model writes out itself."""
    for attention in ("sdpa", "eager"):
        alone(f"{name} {attention}", architecture, config, batch, attn_implementation=attention, **settings)


def alone(name: str, architecture: str, config: str, batch: Batch, train: bool = False, **settings: Any) -> None:
    case(name, made(architecture, config, batch, train, **settings), needs=("transformers",))


def tokens(length: int = 7) -> Tensor:
    return torch.randint(3, WORDS, (2, length))


def causal() -> dict[str, Any]:
    """Sentences of two lengths; the padding is no part of the loss."""
    ids = tokens()
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[1, 5:], mask[1, 5:] = -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def unmasked() -> dict[str, Any]:
    ids = tokens()
    return {"input_ids": ids, "labels": ids.clone()}


def masked() -> dict[str, Any]:
    """Every third word is to be guessed."""
    batch = causal()
    batch["labels"][:, ::3] = -100
    return batch


def classified() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": torch.tensor([0, 1])}


def translated() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": tokens(5)}


def seen(size: int, channels: int = 3) -> Batch:
    return lambda: {"pixel_values": torch.randn(2, channels, size, size), "labels": torch.tensor([0, 1])}
