"""The recipe's model and optimiser."""

from __future__ import annotations

from typing import Any

import timm
import torch
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from etf_zoo import attach_frame, frame_heads
from etf_zoo.necks import build_neck
from etf_zoo.variants import HEAD_ARGS, base_name, split_head
from etf_zoo.whitening import whiten_last_norm

from .config import Optim, Recipe

__all__ = ["make_model", "make_optimizer"]


def make_model(recipe: Recipe, num_classes: int, hierarchy: Tensor | None = None) -> nn.Module:
    """The recipe's model and head; the seed gives a twin and its controls the same backbone.

    Args:
        recipe: The recipe.
        num_classes: Number of classes K.
        hierarchy: Distances between the classes `(K, K)`, for `frame: hierarchy`.
    """
    set_seed(recipe.seed)
    is_twin = recipe.model.split(".")[0].endswith("_etf")
    args: dict[str, Any] = {"pretrained": recipe.pretrained, "num_classes": num_classes, **recipe.model_args}
    if args.get("frame") == "hierarchy":
        args["hierarchy"] = hierarchy
    if recipe.head == "random":
        args = {**{k: v for k, v in args.items() if k not in ("orientation", "hierarchy", "gamma")}, "frame": "random"}
    if recipe.head != "learned":
        if is_twin:
            return timm.create_model(recipe.model, **args)
        head_args = {key: args.pop(key) for key in HEAD_ARGS if key in args}
        return attach_frame(timm.create_model(recipe.model, **args), **head_args)
    neck, whitening = args.get("neck"), args.pop("whitening", False)
    args = {key: value for key, value in args.items() if key not in HEAD_ARGS}
    plain = _plain_model(recipe, args, is_twin)
    if whitening:
        whiten_last_norm(plain, **(whitening if isinstance(whitening, dict) else {}))
    if neck:
        _put_neck(plain, neck)
    return plain


def _plain_model(recipe: Recipe, args: dict[str, Any], is_twin: bool) -> nn.Module:
    """The backbone with timm's own learned classifier."""
    if not is_twin:
        return timm.create_model(recipe.model, **args)
    plain: Any = timm.create_model(base_name(recipe.model), **{**args, "pretrained": False})
    if recipe.pretrained:
        twin: Any = timm.create_model(recipe.model, **args)
        names = list(frame_heads(twin))
        missing, unexpected = plain.load_state_dict(split_head(twin.state_dict(), names)[0], strict=False)
        if unexpected or any(not key.startswith(tuple(f"{name}." for name in names)) for key in missing):
            raise RuntimeError(f"{recipe.model} and {base_name(recipe.model)} differ in more than the head: {missing}.")
        plain.pretrained_cfg = {**twin.pretrained_cfg, "architecture": base_name(recipe.model)}
    return plain


def make_optimizer(settings: Optim, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser, by timm's factory; weight decay and layer decay by timm's groups."""
    extra: dict[str, Any] = {"betas": tuple(settings.betas)} if settings.betas else {}
    return create_optimizer_v2(
        model,
        opt=settings.name,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        layer_decay=settings.layer_decay if settings.layer_decay < 1 else None,
        **extra,
    )


def _put_neck(model: nn.Module, neck: str) -> None:
    """Put a neck in front of a learned linear classifier, in place: the control of a frame behind the same neck."""
    name = model.pretrained_cfg.get("classifier")  # type: ignore[union-attr]
    leaf = model.get_submodule(name) if isinstance(name, str) else None
    if not isinstance(leaf, nn.Linear):
        raise ValueError(f"A learned head behind a neck needs a model with one linear classifier, not {name}.")
    module, width = build_neck(neck, leaf.in_features, leaf.out_features)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Sequential(module, nn.Linear(width, leaf.out_features)))
