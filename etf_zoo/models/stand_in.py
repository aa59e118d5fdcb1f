"""Models of very many classes are built with fewer: the learned layer that a frame replaces would take gigabytes."""

from __future__ import annotations

from torch import nn

__all__ = ["stand_in", "take_back_stand_in"]

MANY = 100_000
STAND_IN = 7919  # no width or number of classes that a model has for another reason


def stand_in(num_classes: int) -> int:
    """How many classes to build a model with whose classifier is replaced next."""
    return STAND_IN if num_classes > MANY else num_classes


def take_back_stand_in(model: nn.Module, num_classes: int) -> None:
    """Tell all parts of such a model how many classes it has."""
    if num_classes <= MANY:
        return
    for module in model.modules():
        if vars(module).get("num_classes") == STAND_IN:
            module.num_classes = num_classes  # type: ignore[assignment]  # no tensor
