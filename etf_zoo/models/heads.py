"""Fixed-frame heads in the place of a model's classifiers; `attach_frame` is in attach.py."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.models._input import update_model_args
from torch import Tensor, nn

from ..errors import EtfZooError, LoadError
from ..frames.build import CUSTOM, HELMERT
from ..layers.classifier import FrameClassifier
from ..layers.moving import MovingFrameClassifier

__all__ = [
    "HEAD_ARGS",
    "SKIP_CONNECTION",
    "as_names",
    "base_name",
    "become",
    "become_twin",
    "frame_heads",
    "head_defaults",
    "is_conversion",
    "leaf_of",
    "narrowest",
    "no_classifier",
    "replace_leaves",
    "split_head",
    "timm_classifier_names",
    "unchanged_on_error",
    "without_frames",
]

SUFFIX = "_etf"
SKIP_CONNECTION = "skip_connection"  # a model around another one, see skip.py: no architecture of its own
# Keyword arguments a twin takes beside its base's: name there -> name in FrameClassifier.
HEAD_ARGS = {
    "frame": "frame",
    "neck": "neck",
    "feature_norm": "feature_norm",
    "logit_scale": "logit_scale",
    "orientation": "orientation",
    "frame_seed": "seed",
    "hierarchy": "hierarchy",
    "gamma": "gamma",
    "moving": "moving",  # picks the class, see _head_for
}
# Layers that a conversion leaves learned. VOLO adds the largest logit over all tokens: a frame's logits sum to zero in
# each token, which would change which token is the largest.
KEPT_LEARNED = ("aux_head",)


def base_name(name: str) -> str:
    """Name of the timm architecture behind a twin: `resnet50_etf.tag` -> `resnet50`."""
    return name.split(".")[0].removesuffix(SUFFIX)


def split_head(
    state_dict: Mapping[str, Tensor], classifier: Iterable[str], *, strip: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into (backbone, head): the head is every key below a classifier's prefix.

    Args:
        state_dict: Name -> tensor.
        classifier: Names of the classifier leaves.
        strip: Whether to drop the prefix from the head's keys.
    """
    prefixes = tuple(name + "." for name in classifier)
    backbone, head = {}, {}
    for key, value in state_dict.items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        if prefix is None:
            backbone[key] = value
        else:
            head[key.removeprefix(prefix) if strip else key] = value
    return backbone, head


# ---------------------------------------------------------------------------------------------- classes of the twins


class _FrameModel(nn.Module):
    """Mixed into the class of a model whose head is a frame, so that a reset classifier is a frame again."""

    if TYPE_CHECKING:  # annotations that exist would hide the base's (`Final` ones among them) from TorchScript
        _frame_args: dict[str, Any]
        _classifier_names: tuple[str, ...]

    def reset_classifier(self, num_classes: int, *args, **kwargs):
        with unchanged_on_error(self):
            super().reset_classifier(num_classes, *args, **kwargs)  # type: ignore[misc]
            if is_conversion(self._frame_args):
                self._frame_args = {}  # a conversion belongs to the classifier it converted: start afresh
                self._model_args = {k: v for k, v in self._model_args.items() if k not in HEAD_ARGS}  # type: ignore
            if num_classes > 0:
                replace_leaves(self, num_classes, self._classifier_names, _args_for(self._frame_args, num_classes))


class _KeptHead(nn.Module):
    """Mixed into heads that fold their norm into a linear layer for inference: a frame has unit rows, so none folds."""

    def fuse(self):
        return self


@functools.cache
def _subclass(mixin: type, base: type) -> type:
    def reduce(self):  # pickle and deepcopy find the class again by its parts, as it stands in no module
        return _instance, (mixin, base), self.__dict__

    name = f"{base.__name__}ETF" if mixin is _FrameModel else base.__name__
    return type(name, (mixin, base), {"__module__": base.__module__, "__doc__": base.__doc__, "__reduce__": reduce})


def _instance(mixin: type, base: type) -> nn.Module:
    cls = _subclass(mixin, base)
    return cls.__new__(cls)  # type: ignore[call-overload]


def become(module: nn.Module, mixin: type) -> None:
    """Mix a class into a module's own, in place, in a way that pickle and deepcopy can follow."""
    if not isinstance(module, mixin):
        module.__class__ = _subclass(mixin, type(module))


# ---------------------------------------------------------------------------------------------------- heads in place


def frame_heads(model: nn.Module) -> dict[str, FrameClassifier]:
    """The fixed-frame heads of a model: module name -> head. Distilled models and VOLO have several."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrameClassifier)}


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
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


def leaf_of(model: nn.Module, name: str) -> nn.Module | None:
    """A module by its name; None where the model has none of that name."""
    try:
        return model.get_submodule(name)
    except AttributeError:  # VOLO's aux_head is None, features_only drops the head
        return None


def head_defaults() -> dict[str, Any]:
    """What each of `HEAD_ARGS` is where it is not given."""
    parameters = inspect.signature(FrameClassifier).parameters
    return {key: parameters[name].default for key, name in HEAD_ARGS.items() if name in parameters} | {"moving": False}


def is_conversion(args: Mapping[str, Any]) -> bool:
    """Whether head arguments are those of a softmax-preserving conversion, which serves one classifier only."""
    frame = args.get("frame")
    return isinstance(frame, str) and frame == HELMERT


def _args_for(args: Mapping[str, Any], num_classes: int) -> Mapping[str, Any]:
    """Head arguments at another number of classes: a frame of given classes serves its own, the others get `auto`."""
    given = [value for key in ("frame", "hierarchy") if isinstance(value := args.get(key), Tensor)]
    if any(len(matrix) != num_classes for matrix in given):
        return {key: value for key, value in args.items() if key != "hierarchy"} | {"frame": "auto"}
    return args


def _head_for(
    leaf: nn.Module,
    num_classes: int,
    args: Mapping[str, Any],
    dtype: torch.dtype,
    weights: Mapping[str, Tensor] | None = None,
) -> FrameClassifier:
    """FrameClassifier in the place of a Linear or 1x1 Conv2d, on its device, in its mode; with weights, filled."""
    if isinstance(leaf, nn.Conv2d):
        if leaf.kernel_size != (1, 1) or leaf.groups != 1:
            raise EtfZooError(f"Only 1x1 convolutions can be replaced by a frame, this classifier is {leaf}.")
        in_features, channels_first = leaf.in_channels, True
    elif isinstance(leaf, nn.Linear):
        in_features, channels_first = leaf.in_features, False
    elif isinstance(leaf, FrameClassifier):
        in_features, channels_first = leaf.in_features, leaf.channels_first
    else:
        raise EtfZooError(
            f"A frame replaces an nn.Linear or a 1x1 nn.Conv2d, this classifier is {type(leaf).__name__}. "
            f"Name the linear layer itself with classifier='...'."
        )
    device = leaf.weight.device
    kwargs = {HEAD_ARGS[key]: value for key, value in args.items() if key in HEAD_ARGS}
    if kwargs.get("neck") == "none":
        kwargs["neck"] = None
    if isinstance(kwargs.get("neck"), nn.Module):
        kwargs["neck"] = copy.deepcopy(kwargs["neck"])
    moving = kwargs.pop("moving", None)
    head = (MovingFrameClassifier if moving else FrameClassifier)(
        in_features,
        num_classes,
        channels_first=channels_first,
        device=device if weights is None else "meta",  # with weights, compute no frame only to overwrite it
        **(moving if isinstance(moving, Mapping) else {}),
        **kwargs,  # type: ignore[arg-type]
    )
    if weights is not None:
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


def replace_leaves(
    model: nn.Module,
    num_classes: int,
    names: Iterable[str],
    args: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Put frames in the place of the named layers, in place.

    Args:
        model: Any module.
        num_classes: Classes of the frames.
        names: The layers; those that are missing or identities are passed over.
        args: Head arguments, by the keys of `HEAD_ARGS`.
        weights: State dict that fills the frames, by the names in the model; computed if None.

    Raises:
        ValueError: If none of the layers is there, one is not linear, or the frame does not fit.
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
        width = _width(leaf)
        if own is None and width in shared and shared[width].neck is None:
            own = shared[width].state_dict()
        head = shared[width] = _head_for(leaf, num_classes, args, dtype, own)
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
            f"with classifier='...'; it has: {', '.join(_linear_names(model)) or 'none'}."
        )


def _width(leaf: nn.Module | None) -> int:
    return getattr(leaf, "in_features", getattr(leaf, "in_channels", 0))


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-5:]


def narrowest(model: nn.Module, names: Iterable[str]) -> int:
    """Least number of features that meets one of the named classifiers, 0 without any."""
    return min(filter(None, (_width(leaf_of(model, name)) for name in names)), default=0)


def as_names(classifier: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names of classifiers as timm's cfgs give them: none, one or several."""
    return (classifier,) if isinstance(classifier, str) else tuple(classifier or ())


def timm_classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that classify in a timm model.

    Raises:
        ValueError: If its pretrained cfg names none.
    """
    names = as_names(getattr(model, "pretrained_cfg", {}).get("classifier"))
    if not names:
        raise EtfZooError(no_classifier(model))
    return names


def without_frames(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Put learned layers in the place of a twin's frames and make it its base again, in place.

    Args:
        model: A twin.
        layers: A layer for each of `frame_heads`, by its name.

    Returns:
        The same model.
    """
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    for module in model.modules():
        if isinstance(module, _FrameModel | _KeptHead):
            module.__class__ = type(module).__bases__[1]
    for attribute in ("_frame_args", "_classifier_names"):
        model.__dict__.pop(attribute, None)
    model._model_args = {k: v for k, v in model._model_args.items() if k not in HEAD_ARGS}  # type: ignore
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    cfg["architecture"] = base_name(cfg.get("architecture") or "")
    return model


def no_classifier(model: nn.Module) -> str:
    """What an error says of a model whose classifier is not known."""
    return (
        f"Cannot tell which layer of {type(model).__name__} classifies. Name it with classifier='...'; "
        f"its last linear layers: {', '.join(_linear_names(model)) or 'none'}."
    )


def become_twin(model: nn.Module, args: Mapping[str, Any], names: tuple[str, ...]) -> nn.Module:
    """Make a timm model whose heads are frames remember them: for `reset_classifier` and for what timm saves.

    Args:
        model: The model; changed in place.
        args: The arguments of its heads, by the keys of `HEAD_ARGS`.
        names: The layers that classify.

    Returns:
        The same model.
    """
    become(model, _FrameModel)
    model._frame_args, model._classifier_names = dict(args), names  # type: ignore[assignment]
    # what timm saves beside the weights must build the twin, not the base
    saved = {"frame": CUSTOM} if isinstance(args.get("frame"), Tensor) else {}
    update_model_args(model, **{**args, **saved})
    twin = base_name(model.pretrained_cfg.get("architecture") or "") + SUFFIX  # type: ignore[union-attr]
    if timm.is_model(twin):
        model.pretrained_cfg["architecture"] = twin  # type: ignore[index]
    return model
