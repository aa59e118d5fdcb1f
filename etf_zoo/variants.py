"""Fixed-frame twins of timm models: `attach_frame` for a model in hand, `register_variants` for timm's registry."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.models import PretrainedCfg, model_entrypoint, register_model
from timm.models._input import update_model_args
from timm.models._pretrained import DefaultCfg
from timm.models._registry import get_pretrained_cfg
from torch import Tensor, nn

from .classifier import CUSTOM, FrameClassifier
from .moving import MovingFrameClassifier
from .whitening import whiten_last_norm

__all__ = [
    "HEAD_ARGS",
    "attach_frame",
    "frame_heads",
    "base_name",
    "register_variants",
    "split_head",
    "without_classifier",
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
# Encoders of timm whose pretrained cfg names a classifier that the module does not have.
_NO_CLASSIFIER = ("gemma4_vit_167m_enc", "gemma4_vit_570m_enc", "mobilenetv5_300m_enc")

default_cfgs: dict[str, DefaultCfg] = {}  # where timm's register_model looks for this module's cfgs

ReadWeights = Callable[[Mapping[str, Any], Any], dict[str, Tensor]]


# ---------------------------------------------------------------------------------------------- classes of the twins


class _FrameModel(nn.Module):
    """Mixed into the class of a model whose head is a frame, so that a reset classifier is a frame again."""

    if TYPE_CHECKING:  # annotations that exist would hide the base's (`Final` ones among them) from TorchScript
        _frame_args: dict[str, Any]
        _classifier_names: tuple[str, ...]

    def reset_classifier(self, num_classes: int, *args, **kwargs):
        super().reset_classifier(num_classes, *args, **kwargs)  # type: ignore[misc]
        if num_classes > 0:
            _replace_leaves(self, num_classes, self._classifier_names, _args_for(self._frame_args, num_classes))


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


def _become(module: nn.Module, mixin: type) -> None:
    if not isinstance(module, mixin):
        module.__class__ = _subclass(mixin, type(module))


# ---------------------------------------------------------------------------------------------------- heads in place


def frame_heads(model: nn.Module) -> dict[str, FrameClassifier]:
    """The fixed-frame heads of a model: module name -> head. Distilled models and VOLO have several."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrameClassifier)}


def _leaf(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # VOLO's aux_head is None, features_only drops the head
        return None


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
            raise ValueError(f"Only 1x1 convolutions can be replaced by a frame, this classifier is {leaf}.")
        in_features, channels_first = leaf.in_channels, True
    elif isinstance(leaf, nn.Linear):
        in_features, channels_first = leaf.in_features, False
    elif isinstance(leaf, FrameClassifier):
        in_features, channels_first = leaf.in_features, leaf.channels_first
    else:
        raise ValueError(
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
        head.to_empty(device=device)
        head.load_state_dict(weights)
    return head.to(dtype).train(leaf.training)


def _replace_leaves(
    model: nn.Module,
    num_classes: int,
    names: Iterable[str],
    args: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    shared: dict[int, FrameClassifier] = {}  # heads of one width have one frame: compute it once
    replaced = 0
    for name in names:
        leaf = _leaf(model, name)
        if leaf is None or isinstance(leaf, nn.Identity):
            continue
        own = None if weights is None else split_head(weights, [name], strip=True)[1]
        width = _width(leaf)
        if own is None and width in shared and shared[width].neck is None:
            own = shared[width].state_dict()
        head = shared[width] = _head_for(leaf, num_classes, args, dtype, own)
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, head)
        while parent_name:
            parent = model.get_submodule(parent_name)
            if hasattr(parent, "fuse"):
                _become(parent, _KeptHead)
            parent_name = parent_name.rpartition(".")[0]
        replaced += 1
    if not replaced:
        raise ValueError(
            f"{type(model).__name__} has no classifier named {', '.join(names) or '(none)'}. Name its linear layer "
            f"with classifier='...'; it has: {', '.join(_linear_names(model)) or 'none'}."
        )


def _width(leaf: nn.Module | None) -> int:
    return getattr(leaf, "in_features", getattr(leaf, "in_channels", 0))


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-5:]


def _names(classifier: str | Iterable[str] | None) -> tuple[str, ...]:
    return (classifier,) if isinstance(classifier, str) else tuple(classifier or ())


def attach_frame(
    model: nn.Module,
    num_classes: int | None = None,
    *,
    frame: str | Tensor = "auto",
    neck: str | nn.Module | None = None,
    feature_norm: str = "l2",
    logit_scale: float | str = "auto",
    orientation: str = "random",
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
        moving: Whether the frame follows the class means (2411.01248), or the arguments of `MovingFrameClassifier`.
        classifier: Name(s) of the linear layer(s) to replace; for timm models known.

    Returns:
        The same model.

    Raises:
        ValueError: If the classifier cannot be found or is not linear, or the frame does not fit.
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
        "moving": moving,
    }
    is_timm = classifier is None and isinstance(getattr(model, "pretrained_cfg", None), dict)
    names = _names(model.pretrained_cfg.get("classifier") if is_timm else classifier)  # type: ignore[union-attr]
    if not names:
        raise ValueError(
            f"Cannot tell which layer of {type(model).__name__} classifies. Name it with classifier='...'; "
            f"its last linear layers: {', '.join(_linear_names(model)) or 'none'}."
        )
    if not is_timm:
        if num_classes is None:
            leaf = _leaf(model, names[0])
            num_classes = getattr(leaf, "out_features", getattr(leaf, "out_channels", None))
            if num_classes is None:
                raise ValueError(f"Cannot tell the number of classes of {names[0]!r}: pass num_classes.")
        _replace_leaves(model, num_classes, names, args)
        return model
    if num_classes is None:
        num_classes = int(model.num_classes)  # type: ignore[arg-type]
    if num_classes != model.num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
    if num_classes > 0:
        _replace_leaves(model, num_classes, names, args)
    _become(model, _FrameModel)
    model._frame_args, model._classifier_names = args, names  # type: ignore[assignment]
    # what timm saves beside the weights must build the twin, not the base
    update_model_args(model, **{**args, "frame": CUSTOM if isinstance(frame, Tensor) else frame})
    twin = base_name(model.pretrained_cfg.get("architecture") or "") + SUFFIX  # type: ignore[union-attr]
    if timm.is_model(twin):
        model.pretrained_cfg["architecture"] = twin  # type: ignore[index]
    return model


# --------------------------------------------------------------------------------------------------- timm's registry


def base_name(name: str) -> str:
    """Name of the timm architecture behind a twin: `resnet50_etf.tag` -> `resnet50`."""
    return name.split(".")[0].removesuffix(SUFFIX)


def without_classifier() -> dict[str, str]:
    """timm architectures that get no twin: name -> why."""
    missing = {}
    for name in timm.list_models(exclude_filters=[f"*{SUFFIX}", SKIP_CONNECTION]):
        cfg = get_pretrained_cfg(name)
        if name in _NO_CLASSIFIER or cfg is None or not cfg.classifier:
            missing[name] = "an encoder for multimodal models, without a classifier or a place for one"
    return missing


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


def _check_backbone(model: nn.Module, backbone: Mapping[str, Tensor], names: Iterable[str], same_classes: bool) -> None:
    wanted = split_head(model.state_dict(), names)[0].keys()
    missing, unexpected = sorted(wanted - backbone.keys()), sorted(backbone.keys() - wanted)
    if missing or (unexpected and same_classes):
        raise RuntimeError(
            f"The weights do not belong to this architecture: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} are unknown ({', '.join(unexpected[:3])}). "
            f"Create the model with the arguments it was saved with."
        )


def _check_stored_head(name: str, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise ValueError if a call asks for another head than the one that the weights bring."""
    defaults = {"frame": "auto", "orientation": "random", "frame_seed": 0, "logit_scale": "auto"}
    asked = [k for k in defaults if k in own and not _same(own[k], saved.get(k, defaults[k]))]
    if own.get("logit_scale") == "learnable":  # trains the stored scale on
        asked = [k for k in asked if k != "logit_scale"]
    if asked:
        raise ValueError(
            f"The weights of {name} hold their own frame and scale, which {', '.join(asked)} would contradict. "
            f"Drop the argument, or put another head on the loaded model: "
            f"etf_zoo.attach_frame(timm.create_model({name!r}, pretrained=True), ...)."
        )


def _same(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b


def _create_twin(
    name: str,
    read_weights: ReadWeights,
    tags: Mapping[str, Mapping[str, Any]],
    *,
    pretrained: bool,
    pretrained_cfg: str | dict | PretrainedCfg | None,
    pretrained_cfg_overlay: dict | None,
    cache_dir: Any = None,
    pretrained_model_args: dict | None = None,
    features_only: bool = False,
    **kwargs,
) -> nn.Module:
    """Build the base without its weights, load the backbone through timm's own loader, put the frame on top."""
    cfg, tag_args = _resolve_cfg(name, pretrained, pretrained_cfg, tags)
    cfg = replace(cfg, **{"architecture": name, **(pretrained_cfg_overlay or {})})
    merged = pretrained_model_args or {}  # of a folder or Hub model; timm has put them among the kwargs too
    saved_args = {**tag_args, **merged}
    own_args = {k: v for k, v in kwargs.items() if k not in merged or not _same(v, merged[k])}
    kwargs = {**saved_args, **kwargs}

    state_dict = read_weights(cfg.to_dict(), cache_dir) if pretrained else None
    names = _names(cfg.classifier)
    kwargs.setdefault("num_classes", cfg.num_classes)
    num_classes = kwargs["num_classes"]
    same_classes = num_classes == cfg.num_classes
    head_args = {key: kwargs.pop(key) for key in HEAD_ARGS if key in kwargs}
    whitening = kwargs.pop("whitening", False)
    if state_dict is not None and same_classes and num_classes > 0:
        _check_stored_head(name, own_args, saved_args)

    base = base_name(name)
    base_cfg = cfg.to_dict(remove_source=True)
    base_cfg["tag"] = getattr(get_pretrained_cfg(base), "tag", None)  # some of timm's builders look a width up by it
    if state_dict is not None:
        backbone, head = split_head(state_dict, names)
        # timm loads strictly unless the class counts differ, and then it pops only .weight and .bias: hand it a
        # count that always differs and no head at all, and check the keys ourselves.
        base_cfg.update(state_dict=backbone, num_classes=-1)
    model = model_entrypoint(base)(
        pretrained=state_dict is not None and not whitening,
        pretrained_cfg=base_cfg,
        cache_dir=cache_dir,
        **({"features_only": True} if features_only else {}),
        **kwargs,
    )
    model.pretrained_cfg.pop("state_dict", None)
    model.pretrained_cfg["tag"] = cfg.tag
    if features_only:
        return model
    model.pretrained_cfg["num_classes"] = cfg.num_classes

    if whitening:
        whiten_last_norm(model, **(whitening if isinstance(whitening, Mapping) else {}))
    if state_dict is not None:
        _check_backbone(model, backbone, names, same_classes)
        if whitening:  # timm's loader ran before there was such a layer
            model.load_state_dict(backbone, strict=False)
    if not same_classes and num_classes > 0:  # what the tag was trained with need not fit another number of classes
        if "frame" not in own_args and _same(head_args.get("frame"), CUSTOM):
            head_args["frame"] = "auto"
        if "orientation" not in own_args and num_classes > _narrowest(model, names):
            head_args.pop("orientation", None)
    if num_classes > 0:
        weights = head if state_dict is not None and same_classes else None
        _replace_leaves(model, num_classes, names, head_args, weights)
    update_model_args(model, **{**saved_args, **head_args})
    if _same(head_args.get("frame"), CUSTOM):  # from here on the weights are where this frame can be found
        heads = frame_heads(model).values()
        head_args["frame"] = next(iter(heads)).weight.clone() if heads else "auto"
    _become(model, _FrameModel)
    model._frame_args = {**head_args, "whitening": whitening} if whitening else head_args
    model._classifier_names = names
    return model


def _narrowest(model: nn.Module, names: Iterable[str]) -> int:
    return min(filter(None, (_width(_leaf(model, name)) for name in names)), default=0)


def _resolve_cfg(
    name: str, pretrained: bool, given: str | dict | PretrainedCfg | None, tags: Mapping[str, Mapping[str, Any]]
) -> tuple[PretrainedCfg, Mapping[str, Any]]:
    """Pretrained cfg and saved model arguments: a given cfg, a tag's, the default tag's, or the base's defaults."""
    if isinstance(given, Mapping):
        given = PretrainedCfg(**given)
    if isinstance(given, PretrainedCfg) and (given.has_weights or given.state_dict or not pretrained):
        return given, tags.get(f"{name}.{given.tag}", {}) if given.tag else {}
    tag = given if isinstance(given, str) else ""
    if not tag and pretrained:
        tag = next((full.partition(".")[2] for full in tags if full.partition(".")[0] == name), "")
    cfg = get_pretrained_cfg(f"{name}.{tag}" if tag else name)
    if cfg is None:
        raise RuntimeError(f"{name} is not registered. Call etf_zoo.register() after adding models to timm.")
    return cfg, tags.get(f"{name}.{tag}", {})


def register_variants(
    native: Mapping[str, tuple[PretrainedCfg, Mapping[str, Any]]], read_weights: ReadWeights
) -> list[str]:
    """Register `<arch>_etf` for every timm architecture with a classifier that has no twin yet.

    Builds no model and no frame.

    Args:
        native: `"<arch>_etf.<tag>"` -> (pretrained cfg, saved model arguments), the default tag of an arch first.
        read_weights: Turns a pretrained cfg (as a dict) and a cache folder into a state dict.

    Returns:
        Names registered now.
    """
    skipped = without_classifier()
    saved_args = {full: args for full, (_, args) in native.items()}
    registered = []
    for base in timm.list_models(exclude_filters=[f"*{SUFFIX}", SKIP_CONNECTION]):
        name = base + SUFFIX
        if base in skipped or timm.is_model(name):
            continue
        base_cfg = get_pretrained_cfg(base)
        if base_cfg is None:
            continue
        plain = PretrainedCfg(**{**base_cfg.to_dict(remove_source=True), "tag": None, "architecture": name})
        plain = replace(plain, custom_load=False, license=None, description=None, label_offset=None)
        cfgs = {"": plain}
        cfgs.update({full.partition(".")[2]: cfg for full, (cfg, _) in native.items() if full.startswith(name + ".")})
        default_cfgs[name] = DefaultCfg(cfgs=cfgs, is_pretrained=len(cfgs) > 1)
        default_cfgs[name].tags.extend(cfgs)
        register_model(_entrypoint(name, read_weights, saved_args))
        registered.append(name)
    # register_model lists every model as a public name of this module, which it is not
    __all__[:] = [name for name in __all__ if name in globals()]
    return registered


def _entrypoint(name: str, read_weights: ReadWeights, tags: Mapping[str, Mapping[str, Any]]) -> Callable:
    def create(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs):
        return _create_twin(
            name,
            read_weights,
            tags,
            pretrained=pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            **kwargs,
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"timm's `{base_name(name)}` with a fixed frame as its classifier; see `etf_zoo.attach_frame`."
    return create
