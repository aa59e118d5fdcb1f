"""The fixed-frame twins `<arch>_etf` in timm's registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import timm
from timm.models import DefaultCfg, PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg, register_model

from .create import ReadWeights, SavedArgs, create_twin
from .names import SKIP_CONNECTION, SUFFIX, base_name
from .tags import classifies

__all__ = ["register_twins", "without_classifier"]

# Encoders of timm whose pretrained cfg names a classifier that the module does not have.
_NO_CLASSIFIER = ("gemma4_vit_167m_enc", "gemma4_vit_570m_enc", "mobilenetv5_300m_enc")

default_cfgs: dict[str, DefaultCfg] = {}  # where timm's register_model looks for this module's cfgs


def without_classifier() -> dict[str, str]:
    """timm architectures that get no twin: name -> why.

    Example:
        >>> len(without_classifier()) < 10
        True
    """
    missing = {}
    for name in timm.list_models(exclude_filters=[f"*{SUFFIX}", SKIP_CONNECTION]):
        cfg = get_pretrained_cfg(name)
        if name in _NO_CLASSIFIER or cfg is None or not cfg.classifier:
            missing[name] = "an encoder for multimodal models, without a classifier or a place for one"
    return missing


def register_twins(
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
        cfgs = _cfgs(base, base_cfg, native)
        default_cfgs[name] = DefaultCfg(cfgs=cfgs, is_pretrained=len(cfgs) > 1)
        default_cfgs[name].tags.extend(cfgs)
        register_model(_entrypoint(name, read_weights, saved_args))
        registered.append(name)
    # register_model lists every model as a public name of this module, which it is not
    __all__[:] = [name for name in __all__ if name in globals()]
    return registered


def _cfgs(
    base: str, base_cfg: PretrainedCfg, native: Mapping[str, tuple[PretrainedCfg, Mapping[str, Any]]]
) -> dict[str, PretrainedCfg]:
    """A twin's tags: none, its native ones, then timm's own that classify."""
    name = base + SUFFIX
    plain = PretrainedCfg(**{**base_cfg.to_dict(remove_source=True), "tag": None, "architecture": name})
    plain = replace(plain, custom_load=False, license=None, description=None, label_offset=None)
    cfgs = {"": plain}
    cfgs.update({full.partition(".")[2]: cfg for full, (cfg, _) in native.items() if full.startswith(name + ".")})
    for full, theirs in get_arch_pretrained_cfgs(base).items():
        tag = full.partition(".")[2]
        if tag and tag not in cfgs and classifies(theirs):
            cfgs[tag] = replace(theirs, architecture=name, description=_converted_text(theirs, full))
    return cfgs


def _converted_text(cfg: PretrainedCfg, full: str) -> str:
    text = f"converted: timm's {full}, its classifier rewritten as a linear neck and a fixed frame of the same softmax"
    return f"{text}; {cfg.description}" if cfg.description else text


def _entrypoint(name: str, read_weights: ReadWeights, tags: SavedArgs) -> Callable:
    def create(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs):
        return create_twin(
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
