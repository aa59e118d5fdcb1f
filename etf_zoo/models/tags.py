"""Pretrained tags of the twins: native (trained here with a frame), or converted (any of timm's that classifies)."""

from __future__ import annotations

from timm.data.imagenet_info import infer_imagenet_subset
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs

from .names import base_name

__all__ = ["classifies", "default_tag", "is_converted"]


def classifies(cfg: PretrainedCfg) -> bool:
    """Whether the weights of one of timm's cfgs end in a classifier: not headless, not an image-text projection.

    timm's cfgs tell the two by nothing but their width: its ImageNet subsets are known by their number of classes, and
    no projection is as wide as the other label sets (19,168 and 115,217 classes).

    Example:
        >>> classifies(timm.models.get_pretrained_cfg("resnet50.a1_in1k"))
        True
        >>> classifies(timm.models.get_pretrained_cfg("vit_base_patch16_clip_224.openai"))
        False
    """
    wide = (cfg.num_classes or 0) > 10_000
    named = infer_imagenet_subset({"num_classes": cfg.num_classes}) is not None
    return bool(cfg.classifier and cfg.has_weights and (wide or named))


def is_converted(cfg: PretrainedCfg) -> bool:
    """Whether a twin's cfg points at timm's own weights of the same architecture and tag.

    Example:
        >>> is_converted(timm.models.get_pretrained_cfg("resnet50_etf.a1_in1k"))
        True
    """
    if not cfg.tag or cfg.source or cfg.file or cfg.state_dict or not cfg.architecture:
        return False
    base = base_name(cfg.architecture)
    theirs = get_arch_pretrained_cfgs(base).get(f"{base}.{cfg.tag}")
    return theirs is not None and classifies(theirs) and (theirs.hf_hub_id, theirs.url) == (cfg.hf_hub_id, cfg.url)


def default_tag(name: str) -> str:
    """Tag of the weights that a twin has when asked for none, native before converted; empty if it has none.

    Example:
        >>> default_tag("mobilenetv3_small_100_etf")
        'e27_tiny'
    """
    tags = ((full.partition(".")[2], cfg) for full, cfg in get_arch_pretrained_cfgs(name).items())
    return next((tag for tag, cfg in tags if tag and cfg.has_weights), "")
