"""The fixed-frame twins `<arch>_etf` in timm's registry: how they are built, with weights and without.

A tag is *native* (trained here with its frame) or *converted*: any of timm's tags that classifies. A converted tag has
timm's own sources, and timm's own loader reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any
from urllib.error import URLError

import timm
from timm.data.imagenet_info import infer_imagenet_subset
from timm.models import PretrainedCfg, model_entrypoint, register_model
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, hf_split
from timm.models._input import update_model_args
from timm.models._pretrained import DefaultCfg
from timm.models._registry import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import Tensor, nn

from ..errors import EtfZooError, LoadError
from ..frames.build import CUSTOM
from ..frames.orientation import resolve_orientation
from ..layers.moving import MOVING_ARGS
from ..layers.switches import read_switch
from ..layers.whitening import WHITENING_ARGS, whiten
from ..weights.download import check_cached, hub_errors
from .attach import attach_frame
from .convert import convert_classifier
from .heads import (
    HEAD_ARGS,
    SKIP_CONNECTION,
    SUFFIX,
    as_names,
    base_name,
    become_twin,
    frame_heads,
    head_defaults,
    is_conversion,
    narrowest,
    replace_leaves,
    split_head,
)

__all__ = ["classifies", "default_tag", "is_converted", "register_variants", "without_classifier"]

# Encoders of timm whose pretrained cfg names a classifier that the module does not have.
_NO_CLASSIFIER = ("gemma4_vit_167m_enc", "gemma4_vit_570m_enc", "mobilenetv5_300m_enc")

# Head arguments that say which tensors a head has.
_STRUCTURE = ("neck", "feature_norm", "moving")
_WHITENING = ".running_whitening_"  # what the state dict of a whitening layer has and no other layer's

default_cfgs: dict[str, DefaultCfg] = {}  # where timm's register_model looks for this module's cfgs

ReadWeights = Callable[[Mapping[str, Any], Any], dict[str, Tensor]]


def without_classifier() -> dict[str, str]:
    """timm architectures that get no twin: name -> why."""
    missing = {}
    for name in timm.list_models(exclude_filters=[f"*{SUFFIX}", SKIP_CONNECTION]):
        cfg = get_pretrained_cfg(name)
        if name in _NO_CLASSIFIER or cfg is None or not cfg.classifier:
            missing[name] = "an encoder for multimodal models, without a classifier or a place for one"
    return missing


def classifies(cfg: PretrainedCfg) -> bool:
    """Whether the weights of one of timm's cfgs end in a classifier: not headless, not an image-text projection.

    timm's cfgs tell the two by nothing but their width: its ImageNet subsets are known by their number of classes, and
    no projection is as wide as the other label sets (19,168 and 115,217 classes).
    """
    wide = (cfg.num_classes or 0) > 10_000
    named = infer_imagenet_subset({"num_classes": cfg.num_classes}) is not None
    return bool(cfg.classifier and cfg.has_weights and (wide or named))


def is_converted(cfg: PretrainedCfg) -> bool:
    """Whether a twin's cfg points at timm's own weights of the same architecture and tag."""
    if not cfg.tag or cfg.source or cfg.file or cfg.state_dict or not cfg.architecture:
        return False
    base = base_name(cfg.architecture)
    theirs = get_arch_pretrained_cfgs(base).get(f"{base}.{cfg.tag}")
    return theirs is not None and classifies(theirs) and (theirs.hf_hub_id, theirs.url) == (cfg.hf_hub_id, cfg.url)


def _check_backbone(model: nn.Module, backbone: Mapping[str, Tensor], names: Iterable[str], same_classes: bool) -> None:
    wanted = split_head(model.state_dict(), names)[0].keys()
    missing, unexpected = sorted(wanted - backbone.keys()), sorted(backbone.keys() - wanted)
    if missing or (unexpected and same_classes):
        raise LoadError(
            f"The weights do not belong to this architecture: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} are unknown ({', '.join(unexpected[:3])}). "
            f"Create the model with the arguments it was saved with."
        )


def _check_stored_head(
    name: str, own: Mapping[str, Any], saved: Mapping[str, Any], described: bool, rows: int, width: int
) -> None:
    """Raise ValueError if a call asks for another head than the one that the weights bring, `(rows, width)`.

    Args:
        name: The twin.
        own: What the call asks for.
        saved: What the weights were saved with.
        described: Whether `saved` belongs to these weights. If not, the call says how their head is built.
        rows: Classes of the stored frame.
        width: Width of the stored frame.
    """
    defaults = head_defaults()
    checked = [k for k in defaults if k in own and (described or k not in _STRUCTURE)]
    asked = [k for k in checked if not _same_argument(k, own[k], saved.get(k, defaults[k]))]
    if "orientation" in asked:
        theirs, ours = (resolve_orientation(a.get("orientation", "auto"), rows, width) for a in (saved, own))
        asked = [k for k in asked if k != "orientation" or theirs != ours]
    if own.get("logit_scale") == "learnable":  # trains the stored scale on
        asked = [k for k in asked if k != "logit_scale"]
    if asked:
        raise EtfZooError(_contradiction(name, asked))


def _same_argument(key: str, own: Any, saved: Any) -> bool:
    if key == "moving":  # how it moves on is no part of the weights
        own, saved = (bool(read_switch(key, value, MOVING_ARGS)) for value in (own, saved))
    if key == "neck":
        return _same(None if _same(own, "none") else own, None if _same(saved, "none") else saved)
    return _same(own, saved)


def _contradiction(name: str, asked: Iterable[str]) -> str:
    return (
        f"The weights of {name} hold their own frame and scale, which {', '.join(asked)} would contradict. "
        f"Drop the argument, ask for another number of classes (num_classes=K gives a fresh head), or change the "
        f"loaded model: etf_zoo.attach_frame(timm.create_model({name!r}, pretrained=True), ...) for another head, "
        f"etf_zoo.layers.whitening.whiten_last_norm(model) for whitening."
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
    replaced = not {"file", "state_dict"}.isdisjoint(pretrained_cfg_overlay or {})
    described = bool(merged or (tag_args and not replaced))
    saved_args = {**tag_args, **merged}
    own_args = {k: v for k, v in kwargs.items() if k not in merged or not _same(v, merged[k])}
    kwargs = {**saved_args, "num_classes": cfg.num_classes, **kwargs}  # the overlay's own where it has some
    head_args = {key: kwargs.pop(key) for key in HEAD_ARGS if key in kwargs}
    if "moving" in head_args:
        head_args["moving"] = read_switch("moving", head_args["moving"], MOVING_ARGS)
    whitening = read_switch("whitening", kwargs.pop("whitening", False), WHITENING_ARGS)
    if whitening and features_only:
        raise EtfZooError("features_only builds timm's feature extractor, which has no place for whitening.")
    building = {**kwargs, "cache_dir": cache_dir, **({"features_only": True} if features_only else {})}

    from_timm = pretrained and is_converted(cfg)
    state_dict = read_weights(cfg.to_dict(), cache_dir) if pretrained and not from_timm else None
    if from_timm or (state_dict is not None and not _has_frame(state_dict, as_names(cfg.classifier))):
        if whitening and kwargs["num_classes"] == cfg.num_classes:
            raise EtfZooError(_contradiction(name, ["whitening"]))
        model = _create_converted(name, cfg, state_dict, own_args, head_args, building)
        whiten(model, whitening)
        return model

    names = as_names(cfg.classifier)
    num_classes = kwargs["num_classes"]
    same_classes = num_classes == cfg.num_classes
    if state_dict is not None and same_classes and num_classes > 0:
        shape = next((state_dict[f"{n}.weight"].shape for n in names if f"{n}.weight" in state_dict), (0, 0))
        _check_stored_head(name, own_args, saved_args, described, *shape)
    held = {key.partition(_WHITENING)[0] for key in state_dict or () if _WHITENING in key}  # where the weights have one
    if state_dict is not None and "whitening" in own_args and (same_classes or held):
        stored = read_switch("whitening", saved_args.get("whitening", whitening), WHITENING_ARGS)
        if bool(whitening) != bool(held) or (held and described and not _same(whitening, stored)):
            raise EtfZooError(_contradiction(name, ["whitening"]))

    base = base_name(name)
    base_cfg = cfg.to_dict(remove_source=True)
    base_cfg["tag"] = getattr(get_pretrained_cfg(base), "tag", None)  # some of timm's builders look a width up by it
    if state_dict is not None:
        backbone, head = split_head(state_dict, names)
        # timm loads strictly unless the class counts differ, and then it pops only .weight and .bias: hand it a
        # count that always differs and no head at all, and check the keys ourselves. A whitening comes after it.
        plain, whitened = split_head(backbone, held)
        base_cfg.update(state_dict=plain, num_classes=-1)
    model = model_entrypoint(base)(pretrained=state_dict is not None, pretrained_cfg=base_cfg, **building)
    model.pretrained_cfg.pop("state_dict", None)
    model.pretrained_cfg["tag"] = cfg.tag
    if features_only:
        return model
    model.pretrained_cfg["num_classes"] = cfg.num_classes

    if held:
        whiten(model, whitening)
    if state_dict is not None:
        _check_backbone(model, backbone, names, same_classes)
    if held:
        model.load_state_dict(whitened, strict=False)
    else:
        whiten(model, whitening)
    if not same_classes and num_classes > 0:  # what the tag was trained with need not fit another number of classes
        if "frame" not in own_args and is_conversion(head_args):
            head_args = {key: value for key, value in head_args.items() if key in own_args}
        if "frame" not in own_args and _same(head_args.get("frame"), CUSTOM):
            head_args["frame"] = "auto"
        if "orientation" not in own_args and num_classes > narrowest(model, names):
            head_args.pop("orientation", None)
    if num_classes > 0:
        replace_leaves(model, num_classes, names, head_args, head if state_dict is not None and same_classes else None)
    if _same(head_args.get("frame"), CUSTOM):  # from here on the weights are where this frame can be found
        heads = frame_heads(model).values()
        head_args["frame"] = next(iter(heads)).weight.clone() if heads else "auto"
    update_model_args(model, **{key: value for key, value in saved_args.items() if key not in HEAD_ARGS})
    return become_twin(model, head_args, names)


def _has_frame(state_dict: Mapping[str, Tensor], names: Iterable[str]) -> bool:
    return any(f"{name}.logit_scale" in state_dict for name in names)


def _create_converted(
    name: str,
    cfg: PretrainedCfg,
    state_dict: dict[str, Tensor] | None,
    own_args: Mapping[str, Any],
    head_args: Mapping[str, Any],
    building: Mapping[str, Any],
) -> nn.Module:
    """The base with its own weights, from timm's sources or given; then its classifier converted or replaced."""
    base = base_name(name)
    same_classes = building["num_classes"] == cfg.num_classes
    if same_classes:
        asked = [key for key in HEAD_ARGS if key in own_args]
        if asked:
            raise EtfZooError(_contradiction(name, asked))
    base_cfg = cfg.to_dict(remove_source=state_dict is not None)
    base_cfg["architecture"] = base
    if state_dict is not None:
        base_cfg["state_dict"] = state_dict
    try:
        with hub_errors(cfg.hf_hub_id or name):
            model = model_entrypoint(base)(pretrained=True, pretrained_cfg=base_cfg, **building)
    except URLError as error:  # timm has 15 tags at addresses of their own
        raise LoadError(
            f"Cannot reach {cfg.url}: {error.reason}. Check the network, or pass a copy of the weights as safetensors: "
            f"pretrained_cfg_overlay=dict(file='model.safetensors')."
        ) from None
    if state_dict is None and cfg.hf_hub_id:
        repo_id, revision = hf_split(cfg.hf_hub_id)
        check_cached(repo_id, HF_SAFE_WEIGHTS_NAME, revision=revision, cache_dir=building["cache_dir"])
    model.pretrained_cfg.pop("state_dict", None)
    if "features_only" in building:
        return model
    if same_classes and building["num_classes"] > 0:
        convert_classifier(model)
    else:
        attach_frame(model, **head_args)
    model.pretrained_cfg["architecture"] = name
    return model


def default_tag(name: str) -> str:
    """Tag of the weights that a twin has when asked for none, native before converted; empty if it has none."""
    return next((tag for tag, cfg in default_cfgs.get(name, DefaultCfg()).cfgs.items() if tag and cfg.has_weights), "")


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
        tag = default_tag(name)
    cfg = get_pretrained_cfg(f"{name}.{tag}" if tag else name)
    if cfg is None:
        raise LoadError(f"{name} is not registered. Call etf_zoo.register() after adding models to timm.")
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
        for full, theirs in get_arch_pretrained_cfgs(base).items():
            tag = full.partition(".")[2]
            if tag and tag not in cfgs and classifies(theirs):
                cfgs[tag] = replace(theirs, architecture=name, description=_converted_text(theirs, full))
        default_cfgs[name] = DefaultCfg(cfgs=cfgs, is_pretrained=len(cfgs) > 1)
        default_cfgs[name].tags.extend(cfgs)
        register_model(_entrypoint(name, read_weights, saved_args))
        registered.append(name)
    # register_model lists every model as a public name of this module, which it is not
    __all__[:] = [name for name in __all__ if name in globals()]
    return registered


def _converted_text(cfg: PretrainedCfg, full: str) -> str:
    text = f"converted: timm's {full}, its classifier rewritten as a linear neck and a fixed frame of the same softmax"
    return f"{text}; {cfg.description}" if cfg.description else text


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
