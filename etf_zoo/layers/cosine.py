"""Learned prototypes under a frame's norm and scale: the control that tells what it is worth that a frame is fixed."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EtfZooError
from ..frames.build import build_frame
from ..frames.numerics import unit
from .classifier import FrameClassifier
from .moving import MovingFrameClassifier
from .subspaces import SubspaceClassifier

__all__ = ["LearnedCosineClassifier", "fix_prototypes", "learn_prototypes"]


class LearnedCosineClassifier(FrameClassifier):
    """A `FrameClassifier` whose unit rows are trained: only in that it differs from the frame it starts as.

    `learn_prototypes` makes one of a head, `fix_prototypes` a frame of it again.

    Attributes:
        prototypes: Parameter `(K, dim)` of any length.
    """

    prototypes: nn.Parameter

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a buffer there
        """Unit rows `(K, dim)`, through which gradients flow."""
        return unit(self.prototypes)

    def build_again(self) -> None:
        with torch.no_grad():
            self.prototypes.copy_(build_frame(self.frame, len(self.prototypes), self.dim, **self.built_from))

    def check_intact(self, x: Tensor) -> None:
        """Rows that train are meant to change."""

    def _load_from_state_dict(self, *args):
        nn.Module._load_from_state_dict(self, *args)  # none of the checks that a fixed frame needs


def learn_prototypes(model: nn.Module) -> nn.Module:
    """Let the rows of a model's frames train, in place.

    Args:
        model: A twin, or anything with `FrameClassifier`s.

    Returns:
        The same model.

    Raises:
        EtfZooError: If there is no frame, or one that moves or is not stored as a matrix.

    Example:
        >>> head = learn_prototypes(FrameClassifier(8, 3))
        >>> [name for name, _ in head.named_parameters()]
        ['prototypes']
    """
    heads = _heads(model, FrameClassifier)
    if not heads:
        raise EtfZooError(f"{type(model).__name__} has no frame whose rows could be learned: attach one first.")
    for head in heads:
        kinds = {MovingFrameClassifier: "moves", SubspaceClassifier: "holds the axes of a tree"}
        kind = next((words for other, words in kinds.items() if isinstance(head, other)), "")
        if kind := kind or ("is computed, not stored" if head.implicit else ""):
            raise EtfZooError(f"Learned prototypes start from a frame that is a fixed matrix; this one {kind}.")
        if isinstance(head, LearnedCosineClassifier):
            continue
        start = head._buffers.pop("weight")
        head.__class__ = LearnedCosineClassifier
        head.register_parameter("prototypes", nn.Parameter(start.clone()))  # type: ignore[union-attr]  # no None here
    _remember(model, heads[0])
    return model


def fix_prototypes(model: nn.Module) -> nn.Module:
    """A model whose learned prototypes are fixed frames, as they can be stored; logits are the same.

    Returns:
        A copy; the model itself if it has no learned prototypes.
    """
    if not _heads(model, LearnedCosineClassifier):
        return model
    model = copy.deepcopy(model)
    heads = _heads(model, LearnedCosineClassifier)
    for head in heads:
        rows = head.weight.detach()
        del head.prototypes
        head.__class__ = FrameClassifier
        head.register_buffer("weight", rows)
        head.frame = "custom"
    _remember(model, heads[0])
    return model


def _heads(model: nn.Module, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def _remember(model: nn.Module, head: FrameClassifier) -> None:
    """Let the model know that only its weights hold the rows, see `HeadConfig`."""
    if (config := getattr(model, "head_config", None)) is not None:
        rows = head.weight.detach().cpu().clone()
        model.head_config = dataclasses.replace(config, frame=rows, hierarchy=None)  # type: ignore[arg-type]
