"""`attach_frame`: a fixed frame in the place of the classifier of a model in hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import EtfZooError
from ..layers.moving import MOVING_ARGS
from ..layers.switches import read_switch
from .heads import (
    as_names,
    become_twin,
    leaf_of,
    no_classifier,
    replace_leaves,
    timm_classifier_names,
    unchanged_on_error,
)

__all__ = ["attach_frame"]


def attach_frame(
    model: nn.Module,
    num_classes: int | None = None,
    *,
    frame: str | Tensor = "auto",
    neck: str | nn.Module | None = None,
    feature_norm: str = "l2",
    logit_scale: float | str = "auto",
    orientation: str = "auto",
    frame_seed: int = 0,
    hierarchy: Tensor | None = None,
    gamma: float = 2.0,
    moving: bool | Mapping[str, Any] = False,
    classifier: str | Iterable[str] | None = None,
) -> nn.Module:
    """Put a fixed frame in the place of a model's classifier, in place.

    A timm model becomes what its `_etf` twin is: `reset_classifier` gives a frame again. Any other module works too,
    if `classifier` names its linear layer.

    Args:
        model: A timm model, or any module.
        num_classes: Number of classes; the model's own by default.
        frame: See `FrameClassifier`, as the next five. A tensor serves its own number of classes: after
            `reset_classifier` to another one the frame is `"auto"`, and back at the first it is the tensor again.
        neck: See `FrameClassifier`.
        feature_norm: See `FrameClassifier`.
        logit_scale: See `FrameClassifier`.
        orientation: See `FrameClassifier`.
        frame_seed: `seed` of `FrameClassifier`. Several heads (distilled models) share it, so their frames agree.
        hierarchy: See `FrameClassifier`; like a frame given as a tensor, it serves its own number of classes.
        gamma: See `FrameClassifier`.
        moving: Whether the frame follows the class means (2411.01248), or the `momentum`, `update_every` and `delta` of
            `MovingFrameClassifier`; the others, `{}` all of them, have their defaults.
        classifier: Name(s) of the linear layer(s) to replace; for timm models known.

    Returns:
        The same model.

    Raises:
        ValueError: If the classifier cannot be found or is not linear, the frame does not fit, or `moving` is neither
            a bool nor a mapping of those arguments.
    """
    args = {
        "frame": frame,
        "neck": neck,
        "feature_norm": feature_norm,
        "logit_scale": logit_scale,
        "orientation": orientation,
        "frame_seed": frame_seed,
        "hierarchy": hierarchy,
        "gamma": gamma,
        "moving": read_switch("moving", moving, MOVING_ARGS),
    }
    if classifier is not None or not isinstance(getattr(model, "pretrained_cfg", None), dict):
        names = as_names(classifier)
        if not names:
            raise EtfZooError(no_classifier(model))
        if num_classes is None:
            leaf = leaf_of(model, names[0])
            num_classes = getattr(leaf, "out_features", getattr(leaf, "out_channels", None))
            if num_classes is None:
                raise EtfZooError(f"Cannot tell the number of classes of {names[0]!r}: pass num_classes.")
        with unchanged_on_error(model):
            replace_leaves(model, num_classes, names, args)
        return model
    names = timm_classifier_names(model)
    num_classes = int(model.num_classes) if num_classes is None else num_classes  # type: ignore[arg-type]
    with unchanged_on_error(model):
        if num_classes != model.num_classes:
            model.reset_classifier(num_classes)  # type: ignore[operator]
        if num_classes > 0:
            replace_leaves(model, num_classes, names, args)
    return become_twin(model, args, names)
