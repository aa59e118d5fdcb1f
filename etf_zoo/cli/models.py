"""`etf-zoo list` and `etf-zoo info`: which models there are, and what a model is."""

from __future__ import annotations

import argparse
import json
from typing import Any

import timm
from timm.models import get_pretrained_cfg

from ..errors import EtfZooError
from ..frames.describe import describe_frame
from ..layers.classifier import FrameClassifier
from ..layers.subspaces import SubspaceClassifier
from ..models.convert import EXACT
from ..models.find import find_model, load_model
from ..models.names import base_name, frame_heads
from ..models.tags import default_tag, is_converted
from ..text import printable
from ..weights.packages import PACKAGED, find_packaged, packaged_file

__all__ = ["list_models", "show_info"]


def list_models(args: argparse.Namespace) -> None:
    """Print names of twins; with `--pretrained` those with weights and where the weights lie, embedded ones first."""
    pattern = args.pattern or "*"
    if "_etf" not in pattern:
        pattern = f"{pattern}_etf*" if args.pretrained else f"{pattern}_etf"
    names = timm.list_pretrained(pattern) if args.pretrained else timm.list_models(pattern)
    if not names:
        raise EtfZooError(f"No model matches {pattern!r}.")
    if not args.pretrained:
        print("\n".join(names))
        return
    here = [name for name in names if getattr(get_pretrained_cfg(name), "file", None)]
    here += [name for name in names if _package(name)]
    elsewhere = [name for name in names if name not in set(here)]
    shown = here + elsewhere if args.pattern else here
    width = max(map(len, shown), default=0)
    for name in shown:
        print(f"{name:<{width}}  {_where(name)}")
    if len(shown) < len(names):
        print(f"and {len(elsewhere):,} more on the Hugging Face Hub: name a pattern, such as 'resnet50*', to see them")


def _where(name: str) -> str:
    """Where the weights of a tag come from, in words."""
    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        return "none yet"
    where = "embedded" if cfg.file else f"hf-hub:{cfg.hf_hub_id}" if cfg.hf_hub_id else str(cfg.url)
    if package := _package(name):
        where = f"the installed package {package}"
    return f"converted from {where}" if is_converted(cfg) else where


def _package(name: str) -> str:
    """The installed package that the weights of a tag are taken from; empty if from none."""
    theirs = f"{base_name(name)}.{name.partition('.')[2]}"
    if theirs not in PACKAGED or packaged_file(PACKAGED[theirs]) is None:  # before anything is asked of 1,400 names
        return ""
    entry = find_packaged(theirs)
    return entry.package if entry else ""


def show_info(args: argparse.Namespace) -> None:
    """Print what a model is."""
    info = _info(args.model)
    if args.json:
        print(json.dumps(info, indent=1))
        return
    for key, value in info.items():
        if isinstance(value, dict):
            print(key)
            for inner, entry in value.items():
                print(f"  {inner:<36}{printable(entry)}")
        else:
            print(f"{key:<38}{value:,}" if isinstance(value, int) else f"{key:<38}{printable(value)}")


def _info(name: str) -> dict[str, Any]:
    model, weights = _model_and_weights(name)
    cfg = model.pretrained_cfg
    info: dict[str, Any] = {
        "architecture": cfg["architecture"],
        "weights": f"{weights} ({cfg.get('license') or 'no license stated'})",
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": model.num_classes,
        "features": model.num_features,
        "input": " x ".join(str(n) for n in cfg["input_size"]),
    }
    info |= {f"head {head_name}": _head(head) for head_name, head in frame_heads(model).items()}
    if not frame_heads(model):
        info["head"] = "learned (not a fixed frame)"
    return info


def _model_and_weights(name: str) -> tuple[Any, str]:
    """The model, and where its weights come from, in words; what would take a download is built without weights."""
    source = find_model(name)
    if source.folder is not None or source.name.startswith("hf-hub:"):
        model = load_model(name)
        return model, str(model.pretrained_cfg.get("tag") or "in the folder")
    full = source.name
    if source.is_twin and "." not in full:  # without a tag, what an installed package brings counts
        tag = default_tag(full)
        full = f"{full}.{tag}" if _package(f"{full}.{tag}") else full
    tagged = get_pretrained_cfg(full)
    if source.is_twin and tagged is not None and is_converted(tagged):  # its head is known without a download
        kwargs = EXACT.saved()
        rewritten: Any = timm.create_model(name, **kwargs)
        rewritten.pretrained_cfg["license"] = tagged.license
        return rewritten, _where(f"{tagged.architecture}.{tagged.tag}")
    if source.is_twin:
        converted = timm.list_pretrained(f"{name}.*") if "." not in name else []
        words = f"{len(converted)} converted, such as {converted[0]}" if converted else "none yet"
        return load_model(name, pretrained=False), words
    return load_model(name, pretrained=False), _where(name).removeprefix("converted from ")  # it is timm's own


def _head(head: FrameClassifier) -> dict[str, Any]:
    report = head.frame_report()
    digits = 9 if head.implicit else 6
    kind = "subspaces" if isinstance(head, SubspaceClassifier) else head.frame
    frame = describe_frame(kind, head.num_classes + head.reserve, head.dim)
    return {
        "frame": f"{frame}, computed and not stored" if head.implicit else frame,
        "width": head.dim,
        "largest cosine": round(report.largest_cosine, digits),
        "coherence": round(report.coherence, digits),
        "Rankin bound on the largest cosine": round(report.rankin_bound, digits),
        "Welch bound on the coherence": round(report.welch_bound, digits),
        "equiangularity error": float(f"{report.equiangularity_error:.2g}"),
        "tightness error": float(f"{report.tightness_error:.2g}"),
        **({"room for more classes": head.reserve} if head.reserve else {}),
        **({"lengths": f"{head.lengths.min():.4g} to {head.lengths.max():.4g}"} if head.has_lengths else {}),
        "feature norm": head.feature_norm,
        "logit scale": round(head.logit_scale.item(), 4),
    }
