"""A second head on an earlier stage, which training alone has: classes are then to be told at two depths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from etf_zoo.errors import EtfZooError
from etf_zoo.layers.classifier import FrameClassifier
from etf_zoo.layers.cosine import learn_prototypes
from etf_zoo.layers.necks import build_neck
from etf_zoo.models.head_config import split_head_args

from ..recipe.config import Loss, Recipe

__all__ = ["STAGE_HEAD", "EarlierStage", "add_stage_head", "without_stage_head"]

STAGE_HEAD = "stage_head"  # name of the second head in the model that is trained
SHARED_ARGS = ("logit_scale", "feature_norm", "seed")  # arguments of the first head that the second has too


def add_stage_head(model: nn.Module, recipe: Recipe, num_classes: int) -> None:
    """Put a head of the recipe's kind, behind an MLP, on the stage that `recipe.loss` names, in place.

    Raises:
        EtfZooError: If there is no such stage, or timm does not know the width of its output.
    """
    width = _stage(model, recipe.loss)[1]
    if recipe.head in ("learned", "warm_learned"):
        neck, features = build_neck("mlp", width, num_classes)
        linear = nn.Linear(features, num_classes)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        head: nn.Module = nn.Sequential(neck, linear)
    else:
        args = {k: v for k, v in split_head_args(recipe.model_args)[0].items() if k in SHARED_ARGS}
        frame = "random" if recipe.head == "random" else "auto"
        head = FrameClassifier(width, num_classes, frame=frame, neck="mlp", **args)
        head = learn_prototypes(head) if recipe.head == "learned_cosine" else head
    setattr(model, STAGE_HEAD, head)


def without_stage_head(model: nn.Module) -> nn.Module:
    """The model as it is used: the same modules but for the second head; itself if it has none."""
    if not hasattr(model, STAGE_HEAD):
        return model
    bare = model.__class__.__new__(model.__class__)
    bare.__dict__ = {**model.__dict__, "_modules": {k: m for k, m in model._modules.items() if k != STAGE_HEAD}}
    return bare


class EarlierStage:
    """Looks at the output of a model's earlier stage, and classifies it.

    Args:
        model: With a second head, see `add_stage_head`.
        settings: Which stage, and the weight of its loss.

    Raises:
        EtfZooError: If the model has no second head, or no such stage.
    """

    def __init__(self, model: nn.Module, settings: Loss):
        if not hasattr(model, STAGE_HEAD):
            raise EtfZooError("loss.stage_weight is of a second head, which this model was made without.")
        name, self.width = _stage(model, settings)
        self.module, self.head = model.get_submodule(name), getattr(model, STAGE_HEAD)
        self.weight = settings.stage_weight
        self._logits: Tensor | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While the context lasts, a forward pass computes the second head's logits within it."""
        with self.module.register_forward_hook(self._classify):
            yield

    def logits(self) -> Tensor:
        """Logits `(B, K)` of the last forward pass, float32."""
        found, self._logits = self._logits, None
        if found is None:
            raise EtfZooError("The forward pass has not come by the stage that loss.stage names.")
        return found.float()

    def _classify(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._logits = self.head(_pooled(output, self.width))


def _stage(model: nn.Module, settings: Loss) -> tuple[str, int]:
    """Name and width of the stage that the settings mean."""
    info: Any = getattr(model, "feature_info", [])
    widths = {one["module"]: one["num_chs"] for one in getattr(info, "info", info)}
    name = settings.stage or (list(widths)[-2] if len(widths) > 1 else "")
    if name not in widths:
        raise EtfZooError(
            f"loss.stage {name!r} is none of {type(model).__name__}'s stages: {', '.join(widths) or 'it has none'}."
        )
    return name, widths[name]


def _pooled(output: Tensor, width: int) -> Tensor:
    """Mean over places of maps `(B, C, H, W)` or `(B, H, W, C)`, or of tokens `(B, N, C)`; of width C."""
    if not isinstance(output, Tensor) or width not in (output.shape[1], output.shape[-1]):
        raise EtfZooError(f"The stage that loss.stage names gives no maps or tokens of width {width}.")
    if output.ndim == 4 and output.shape[1] == width:
        return output.mean(dim=(2, 3))
    return torch.flatten(output, 1, -2).mean(dim=1)
