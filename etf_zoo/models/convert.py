"""Trained classifiers turned into fixed frames: exactly, behind a linear neck, or to the nearest simplex ETF."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EtfZooError
from ..frames.build import CUSTOM, HELMERT, build_frame
from ..frames.simplex import helmert_coordinates, nearest_simplex_etf
from ..layers.classifier import HELMERT_MATRIX_CLASSES
from .attach import KEPT_LEARNED, become_twin, replace_leaves
from .head_config import HeadConfig
from .names import frame_heads, timm_classifier_names

__all__ = ["EXACT", "MODES", "convert_classifier", "learned_classifiers"]

MODES = ("exact", "nearest")
EXACT = HeadConfig(frame=HELMERT, neck="linear", feature_norm="none")  # of an exact conversion


def learned_classifiers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The learned linear layers, or 1x1 convolutions, that a timm model classifies with: name -> layer.

    Layers that a conversion leaves as they are (VOLO's `aux_head`) are left out.

    Raises:
        EtfZooError: If there are none, or they are frames already.

    Example:
        >>> learned_classifiers(timm.create_model("resnet18", num_classes=10))
        {'fc': Linear(in_features=512, out_features=10, bias=True)}
    """
    names = timm_classifier_names(model)
    if frame_heads(model):
        raise EtfZooError(
            f"{type(model).__name__} has a fixed frame already; only a learned classifier can be converted."
        )
    modules = dict(model.named_modules())
    kept = {name: modules.get(name) for name in names if name not in KEPT_LEARNED}
    leaves = {name: leaf for name, leaf in kept.items() if isinstance(leaf, nn.Linear | nn.Conv2d)}
    if not leaves:
        raise EtfZooError(f"{type(model).__name__} has no classifier, so there is nothing to convert.")
    return leaves


@torch.no_grad()
def convert_classifier(
    model: Any, mode: str = "exact", *, feature_means: Mapping[str, Tensor] | None = None
) -> nn.Module:
    r"""Put a fixed frame in the place of a timm model's trained classifier (A, b), in place.

    `mode="exact"` keeps the softmax: with H the Helmert basis and K classes, the frame is the simplex ETF
    :math:`F = \sqrt{K/(K-1)}\, H`, and a linear neck :math:`x \mapsto \sqrt{(K-1)/K}\, H^\top (A x + b)` stands before
    it. Their product is the trained logits minus their mean, for any width and K. Softmax, predictions and everything
    else that does not see a common shift of the logits stay the same; a **sigmoid of each logit does not**, so models
    trained with binary cross-entropy keep their ranking but not their scores. Neck and frame together are the learned
    classifier by another name: a start for training with a fixed frame, no evidence for one. Above 4,096 classes no
    matrix of the frame is formed or stored. VOLO's `aux_head` stays learned, as it adds the largest logit over tokens.

    `mode="nearest"` has no neck: W is the simplex ETF nearest to A, and the logits are :math:`c\, W (x - \mu)` with the
    c > 0 that minimizes :math:`\|A - cW\|_F`, which is :math:`\langle A, W\rangle / K`. The bias is dropped. This
    changes the predictions; measure what it costs.

    Args:
        model: A timm model with a learned classifier. Becomes its `_etf` twin; `reset_classifier` gives a fresh frame
            without the neck.
        mode: `"exact"` or `"nearest"`.
        feature_means: For `"nearest"`, the mean input :math:`\mu` `(d,)` of each classifier by its name, see
            `learned_classifiers`; zero by default.

    Returns:
        The same model.

    Raises:
        EtfZooError: If there is no learned classifier, or for `"nearest"` it has fewer than K - 1 features.

    Example:
        >>> model = convert_classifier(timm.create_model("resnet18"))  # pretrained=True for timm's weights
        >>> frame_heads(model)["fc"].frame
        'helmert'
    """
    if mode not in MODES:
        raise EtfZooError(f"Unknown mode {mode!r}. Choose one of {', '.join(MODES)}.")
    if feature_means is not None and mode == "exact":
        raise EtfZooError("An exact conversion has no use for feature means; they are for mode='nearest'.")
    leaves = learned_classifiers(model)
    config = EXACT
    if mode == "nearest":
        config = HeadConfig(frame=CUSTOM, neck=None if feature_means is None else "center", feature_norm="none")
    weights = {}
    for name, leaf in leaves.items():
        if mode == "exact":
            head = _exact(leaf)
        else:
            head = _nearest(leaf, None if feature_means is None else feature_means[name])
        weights |= {f"{name}.{key}": value for key, value in head.items()}
    num_classes = model.num_classes
    replace_leaves(model, num_classes, leaves, config, weights)
    if mode == "nearest":  # what reset_classifier returns to at this number of classes
        config = replace(config, frame=next(iter(frame_heads(model).values())).weight.clone())
    return become_twin(model, config, timm_classifier_names(model))


def _exact(leaf: nn.Linear | nn.Conv2d) -> dict[str, Tensor]:
    """State dict of the FrameClassifier whose logits are the leaf's minus their mean."""
    k = len(leaf.weight)
    bias = leaf.weight.new_zeros(k) if leaf.bias is None else leaf.bias
    factor = math.sqrt((k - 1) / k)
    implicit = k > HELMERT_MATRIX_CLASSES
    frame = torch.empty(k, 0) if implicit else build_frame(HELMERT, k, k - 1)
    return {
        "weight": frame.to(leaf.weight.device),
        "logit_scale": torch.ones((), device=leaf.weight.device),
        "neck.weight": factor * helmert_coordinates(leaf.weight.flatten(1)),
        "neck.bias": factor * helmert_coordinates(bias),
    }


def _nearest(leaf: nn.Linear | nn.Conv2d, mean: Tensor | None) -> dict[str, Tensor]:
    """State dict of the FrameClassifier with the simplex ETF nearest to the leaf's weight."""
    weight = leaf.weight.flatten(1).float().cpu()
    k, dim = weight.shape
    if dim < k - 1:
        raise EtfZooError(
            f"There is no simplex ETF of {k} classes in {dim} dimensions to be the nearest: use mode='exact', "
            f"which widens the features to {k - 1}."
        )
    frame = nearest_simplex_etf(weight)
    head = {"weight": frame, "logit_scale": (weight.double() * frame.double()).sum().div(k).float()}
    if mean is not None:
        if mean.shape != (dim,):
            raise EtfZooError(f"The feature mean has shape {tuple(mean.shape)}, the classifier needs ({dim},).")
        head["neck.running_mean"] = mean.float().cpu()
    return head
