"""What an operator decided by timing or by the memory there was, for another process to decide likewise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Choices(NamedTuple):
    """Decisions on which products depend in their last digits.

    tell    what was decided so far, as plain values for JSON
    take    decide likewise; raises `CheckpointError` where that cannot be done
    shared  whether several processes form the products together, each with choices of its own
    """

    tell: Callable[[], Any]
    take: Callable[[Any], object]
    shared: bool = False


NO_CHOICES = Choices(lambda: None, lambda told: None)


def both(a: Choices, b: Choices) -> Choices:
    """Those of an operator made of two."""
    return Choices(lambda: [a.tell(), b.tell()], lambda told: (a.take(told[0]), b.take(told[1])), a.shared or b.shared)
