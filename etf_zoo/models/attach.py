"""A fixed frame in the place of a model's classifiers: `attach_frame`, and what a model becomes by it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn

from ..errors import EtfZooError, LoadError
from ..layers.classifier import FrameClassifier
from .head_config import HeadConfig, split_head_args
from .mixing import become
from .names import (
    SUFFIX,
    as_names,
    base_name,
    features_of_leaf,
    leaf_of,
    linear_names,
    no_classifier,
    split_head,
    timm_classifier_names,
)
from .stand_in import stand_in, take_back_stand_in

__all__ = ["KEPT_LEARNED", "FrameModel", "attach_frame", "become_twin", "replace_leaves"]

# Layers that a conversion leaves learned. VOLO adds the largest logit over all tokens: a frame's logits sum to zero in
# each token, which would change which token is the largest.
KEPT_LEARNED = ("aux_head",)


def attach_frame(
    model: nn.Module,
    num_classes: int | None = None,
    *,
    frame: str | Tensor = "auto",
    neck: str | nn.Module | None = None,
    neck_features: int | None = None,
    feature_norm: str = "l2",
    logit_scale: float | str = "auto",
    orientation: str = "auto",
    seed: int = 0,
    hierarchy: Tensor | None = None,
    gamma: float = 2.0,
    reserve: int = 0,
    moving: bool | Mapping[str, Any] = False,
    subspaces: bool = False,
    lengths: Tensor | bool | None = None,
    classifier: str | Iterable[str] | None = None,
) -> nn.Module:
    """Put a fixed frame in the place of a model's classifier, in place.

    A timm model becomes what its `_etf` twin is: `reset_classifier` gives a frame again. Any other module works too,
    if `classifier` names its linear layer.

    Args:
        model: A timm model, or any module.
        num_classes: Number of classes; the model's own by default.
        frame: See `FrameClassifier`, as the next eight. A tensor serves its own number of classes: after
            `reset_classifier` to another one the frame is `"auto"`, and back at the first it is the tensor again.
        neck: See `FrameClassifier`.
        neck_features: See `FrameClassifier`.
        feature_norm: See `FrameClassifier`.
        logit_scale: See `FrameClassifier`.
        orientation: See `FrameClassifier`.
        seed: See `FrameClassifier`. Several heads (distilled models) share it, so their frames agree.
        hierarchy: See `FrameClassifier`; like a frame given as a tensor, it serves its own number of classes.
        gamma: See `FrameClassifier`.
        reserve: See `FrameClassifier`.
        moving: Whether the frame follows the class means (2411.01248), or the `momentum`, `update_every` and `delta` of
            `MovingFrameClassifier`; the others, `{}` all of them, have their defaults.
        subspaces: Whether a class is scored as `SubspaceClassifier` does; `frame="subspaces"` implies it.
        lengths: See `FrameClassifier`; they serve their own number of classes, as a frame given as a tensor does.
        classifier: Name(s) of the linear layer(s) to replace; for timm models known.

    Returns:
        The same model.

    Raises:
        EtfZooError: If the classifier cannot be found or is not linear, the frame does not fit, or `moving` is neither
            a bool nor a mapping of those arguments. The model is then as it was.

    Example:
        >>> model = timm.create_model("resnet18")  # pretrained=True for timm's weights
        >>> model = etf_zoo.attach_frame(model, num_classes=37)
        >>> model(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 37])
    """
    config = HeadConfig(
        frame=frame,
        neck=neck,
        neck_features=neck_features,
        feature_norm=feature_norm,
        logit_scale=logit_scale,
        orientation=orientation,
        seed=seed,
        hierarchy=hierarchy,
        gamma=gamma,
        reserve=reserve,
        moving=moving,
        subspaces=subspaces,
        lengths=lengths,
    )
    if classifier is None and isinstance(getattr(model, "pretrained_cfg", None), dict):
        return _attach_to_timm_model(model, num_classes, config)
    names = as_names(classifier)
    if not names:
        raise EtfZooError(no_classifier(model))
    if num_classes is None:
        leaf = leaf_of(model, names[0])
        num_classes = getattr(leaf, "out_features", getattr(leaf, "out_channels", None))
        if num_classes is None:
            raise EtfZooError(f"Cannot tell the number of classes of {names[0]!r}: pass num_classes.")
    with _unchanged_on_error(model):
        replace_leaves(model, num_classes, names, config)
    return model


def _attach_to_timm_model(model: Any, num_classes: int | None, config: HeadConfig) -> nn.Module:
    names = timm_classifier_names(model)
    num_classes = int(model.num_classes) if num_classes is None else num_classes
    with _unchanged_on_error(model):
        if num_classes != model.num_classes:
            model.reset_classifier(stand_in(num_classes))
        if num_classes > 0:
            replace_leaves(model, num_classes, names, config)
        take_back_stand_in(model, num_classes)
    return become_twin(model, config, names)


# ------------------------------------------------------------------------------------------- what a model becomes by it


class FrameModel(nn.Module):
    """Mixed into the class of a timm model whose heads are frames: a reset classifier is a frame again.

    Attributes:
        head_config: What its heads are built from.
    """

    name_suffix = "ETF"
    __jit_unused_properties__ = ("_model_args",)
    if TYPE_CHECKING:  # annotations that exist would hide the base's (`Final` ones among them) from TorchScript
        head_config: HeadConfig
        _classifier_names: tuple[str, ...]

    def reset_classifier(self, num_classes: int, *args, **kwargs):
        with _unchanged_on_error(self):
            super().reset_classifier(stand_in(num_classes), *args, **kwargs)  # type: ignore[misc]  # the timm model's
            if self.head_config.is_conversion:  # belongs to the classifier that it converted: start afresh
                self.head_config = HeadConfig()
            self.head_config = self.head_config.without_projector()  # which belongs to the pretraining
            if num_classes > 0:
                replace_leaves(self, num_classes, self._classifier_names, self.head_config.for_classes(num_classes))
            take_back_stand_in(self, num_classes)

    @property
    def _model_args(self) -> dict[str, Any]:
        """timm's record of what builds the model again, for all that timm saves: the head's part is the head's own."""
        return {**split_head_args(self.__dict__.get("_model_args", {}))[1], **self.head_config.saved()}

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self.__dict__["_model_args"] = args


class _KeptHead(nn.Module):
    """Mixed into heads that fold their norm into a linear layer for inference: a frame has unit rows, so none folds."""

    def fuse(self):
        return self


def become_twin(model: Any, config: HeadConfig, names: tuple[str, ...]) -> nn.Module:
    """Make a timm model whose heads are frames remember them: for `reset_classifier` and for what timm saves.

    Args:
        model: The model; changed in place.
        config: What its heads are built from.
        names: The layers that classify.

    Returns:
        The same model.
    """
    become(model, FrameModel)
    model.head_config, model._classifier_names = config, names
    cfg: Any = model.pretrained_cfg
    twin = base_name(cfg.get("architecture") or "") + SUFFIX
    if timm.is_model(twin):  # what timm saves beside the weights must build the twin, not the base
        cfg["architecture"] = twin
    return model


@contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put every module of a model back as it was if the block raises; for changes of structure, not of tensors."""
    tables = ("_modules", "_parameters", "_buffers")
    before = [
        (module, type(module), {k: copy.copy(v) if k in tables else v for k, v in module.__dict__.items()})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, cls, attributes in before:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
        raise


# ---------------------------------------------------------------------------------------------------- heads in place


def replace_leaves(
    model: nn.Module,
    num_classes: int,
    names: Iterable[str],
    config: HeadConfig,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Put frames in the place of the named layers, in place.

    Args:
        model: Any module.
        num_classes: Classes of the frames.
        names: The layers; those that are missing or identities are passed over.
        config: What the heads are built from.
        weights: State dict that fills the frames, by the names in the model; computed if None.

    Raises:
        EtfZooError: If none of the layers is there, one is not linear, or the frame does not fit.
        LoadError: If the weights hold another head.
    """
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    shared: dict[int, FrameClassifier] = {}  # heads of one width have one frame: compute it once
    replaced = 0
    for name in names:
        leaf = leaf_of(model, name)
        if leaf is None or isinstance(leaf, nn.Identity):
            continue
        own = None if weights is None else split_head(weights, [name], strip=True)[1]
        if own is not None and name in KEPT_LEARNED and "logit_scale" not in own:
            leaf.load_state_dict(own)
            continue
        width = features_of_leaf(leaf)
        if own is None and width in shared and shared[width].neck is None:
            own = shared[width].state_dict()
        head = shared[width] = _head_for(leaf, num_classes, config, dtype, own)
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, head)
        while parent_name:
            parent = model.get_submodule(parent_name)
            if hasattr(parent, "fuse"):
                become(parent, _KeptHead)
            parent_name = parent_name.rpartition(".")[0]
        replaced += 1
    if not replaced:
        raise EtfZooError(
            f"{type(model).__name__} has no classifier named {', '.join(names) or '(none)'}. Name its linear layer "
            f"with classifier='...'; it has: {', '.join(linear_names(model)) or 'none'}."
        )


def _head_for(
    leaf: nn.Module,
    num_classes: int,
    config: HeadConfig,
    dtype: torch.dtype,
    weights: Mapping[str, Tensor] | None = None,
) -> FrameClassifier:
    """FrameClassifier in the place of a Linear or 1x1 Conv2d, on its device, in its mode; with weights, filled."""
    if isinstance(leaf, nn.Conv2d):
        if leaf.kernel_size != (1, 1) or leaf.groups != 1:
            raise EtfZooError(f"Only 1x1 convolutions can be replaced by a frame, this classifier is {leaf}.")
        channels_first = True
    elif isinstance(leaf, nn.Linear):
        channels_first = False
    elif isinstance(leaf, FrameClassifier):
        channels_first = leaf.channels_first
    else:
        raise EtfZooError(
            f"A frame replaces an nn.Linear or a 1x1 nn.Conv2d, this classifier is {type(leaf).__name__}. "
            f"Name the linear layer itself with classifier='...'."
        )
    device = leaf.weight.device
    head = config.build(
        features_of_leaf(leaf),
        num_classes,
        channels_first=channels_first,
        device=device if weights is None else "meta",  # with weights, compute no frame only to overwrite it
    )
    if weights is not None:
        if head.auto and head.implicit and "signs" not in weights:
            head.store_frame()  # what was saved with its matrix keeps it
        wanted = head.state_dict().keys()
        missing, unknown = sorted(wanted - weights.keys()), sorted(weights.keys() - wanted)
        if missing or unknown:
            raise LoadError(
                f"The weights hold another head than asked for: {', '.join(missing[:3]) or 'nothing'} missing, "
                f"{', '.join(unknown[:3]) or 'nothing'} unknown. Create the model with the neck, feature_norm and "
                f"moving that it was saved with, or with num_classes=K for a fresh head."
            )
        head.to_empty(device=device)
        head.load_state_dict(weights)
    return head.to(dtype).train(leaf.training)
