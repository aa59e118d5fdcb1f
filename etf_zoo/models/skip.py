"""Skip-connection models: the pooled output of one intermediate layer is added to the penultimate feature (2212.12206).

**The paper's**: fine-tune one intermediate layer and the classifier, all else frozen, with a skip connection from that
layer to the last one: its output, average-pooled (of a transformer the class token) and zero-padded to the width of the
penultimate feature, is added to it, and the classifier works on the sum. **Our reading**, as the paper's code was not
used: pooling over all positions to one vector; transformers without a class token are averaged over their tokens; a
layer that is wider than the penultimate feature is cut to its width; no scale and no norm on either summand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import timm
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import EtfZooError
from ..layers.classifier import FrameClassifier
from ..timm_compat import update_model_args
from .mixing import become
from .names import SKIP_CONNECTION

__all__ = ["add_skip", "pooled_to_width", "skip_connection"]


class _SkipModel(nn.Module):
    """Mixed into a timm model's class: `forward_features` gives the layer's output too, `forward_head` adds it."""

    _skip_layer: str
    if TYPE_CHECKING:
        get_classifier: Callable[[], nn.Module]

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        taken: list[Any] = []
        handle = self.get_submodule(self._skip_layer).register_forward_hook(lambda *call: taken.append(call[2]))
        try:
            hidden = super().forward_features(x)  # type: ignore[misc]  # the timm model's
        finally:
            handle.remove()
        if not taken or not isinstance(taken[-1], Tensor):
            raise EtfZooError(
                f"The layer {self._skip_layer!r} gives no tensor on the way through forward_features. "
                f"Name another one, such as a block of the backbone."
            )
        return hidden, taken[-1]

    def forward_head(self, x: tuple[Tensor, Tensor], pre_logits: bool = False) -> Tensor:
        hidden, skip = x
        feature = super().forward_head(hidden, pre_logits=True)  # type: ignore[misc]  # the timm model's
        feature = feature + pooled_to_width(skip, feature.shape[1], self)
        return feature if pre_logits else self.get_classifier()(feature)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def pooled_to_width(hidden: Tensor, width: int, model: nn.Module) -> Tensor:
    """A layer's output as one vector: pooled over positions, zero-padded or cut to a width.

    Args:
        hidden: `(B, C, H, W)`, `(B, H, W, C)` where the model says so (`output_fmt`), tokens `(B, N, C)`, or `(B, C)`.
        width: Wanted number of channels.
        model: The timm model it comes from, which knows the meaning of the axes and of prefix tokens.

    Returns:
        `(B, width)`.

    Example:
        >>> model = timm.create_model("test_resnet")
        >>> pooled_to_width(torch.ones(2, 3, 4, 4), 5, model)[0]
        tensor([1., 1., 1., 0., 0.])
    """
    if hidden.ndim == 4:
        pooled = hidden.mean((1, 2) if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC") else (2, 3))
    elif hidden.ndim == 3:
        prefix = getattr(model, "num_prefix_tokens", 0)
        token = prefix and getattr(model, "global_pool", "") == "token"
        pooled = hidden[:, 0] if token else hidden[:, prefix:].mean(1)
    else:
        pooled = hidden
    return F.pad(pooled, (0, width - pooled.shape[1]))  # a negative padding cuts


def add_skip(model: Any, layer: str) -> nn.Module:
    """Add the skip connection of 2212.12206 (see this module) to a timm model, in place; weights and their names stay.

    A model folder written by `etf_zoo.sharing.folder.save_folder` loads with it again.

    Args:
        model: A timm model, twin or not, with one linear or fixed-frame classifier.
        layer: Name of the layer to take, such as `layer3.5` or `blocks.10`.

    Returns:
        The same model.

    Raises:
        EtfZooError: If there is no such layer, or the classifier is of another kind.

    Example:
        >>> model = add_skip(timm.create_model("resnet50_etf", num_classes=10), "layer3.5")
        >>> model.pretrained_cfg["architecture"]
        'skip_connection'
    """
    if isinstance(model, _SkipModel):
        raise EtfZooError(f"The model has a skip connection from {model._skip_layer!r} already.")
    if not layer or layer not in dict(model.named_modules()):
        raise EtfZooError(f"{type(model).__name__} has no layer {layer!r}. Name one of model.named_modules().")
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    single = isinstance(classifier, nn.Linear) or (
        isinstance(classifier, FrameClassifier) and not classifier.channels_first
    )
    if not single:
        raise EtfZooError(
            f"A skip connection needs one linear or fixed-frame classifier, that of {type(model).__name__} is "
            f"{type(classifier).__name__}. Use another architecture, or another method."
        )
    base = model.pretrained_cfg["architecture"]
    become(model, _SkipModel)
    model._skip_layer = layer
    # what timm saves beside the weights must build this model, not the base
    update_model_args(model, base=base, layer=layer)
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": SKIP_CONNECTION}
    return model


@register_model
def skip_connection(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs):
    """timm entrypoint: a model `base` (a timm name) with a skip connection from `layer`; see `add_skip`."""
    missing = [key for key in ("base", "layer") if key not in kwargs]
    if missing:
        raise EtfZooError(f"{SKIP_CONNECTION} needs {' and '.join(missing)}: base='resnet50_etf', layer='layer3.5'.")
    saved = kwargs.pop("pretrained_model_args", None)
    if saved:  # the base sees its own arguments only
        kwargs["pretrained_model_args"] = {k: v for k, v in saved.items() if k not in ("base", "layer")}
    base, layer = kwargs.pop("base"), kwargs.pop("layer")
    if not (isinstance(base, str) and isinstance(layer, str)) or ":" in base:  # which would be another repository
        raise EtfZooError(f"The base of a skip connection is an architecture such as 'resnet50_etf', not {base!r}.")
    if isinstance(pretrained_cfg, dict):
        pretrained_cfg = {**pretrained_cfg, "architecture": base}
    model = timm.create_model(
        base,
        pretrained=pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        **kwargs,
    )
    return add_skip(model, layer)
