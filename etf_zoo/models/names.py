"""Which layers of a model classify, by their names; and the names of twins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from ..errors import EtfZooError
from ..layers.classifier import FrameClassifier

__all__ = [
    "SKIP_CONNECTION",
    "SUFFIX",
    "as_names",
    "base_name",
    "class_names",
    "features_of_leaf",
    "frame_heads",
    "leaf_of",
    "linear_names",
    "narrowest",
    "no_classifier",
    "split_head",
    "timm_classifier_names",
]

SUFFIX = "_etf"
_IMAGENET_TAG = re.compile(r"in(1k|12k|21k|22k)($|_)")
SKIP_CONNECTION = "skip_connection"  # a model around another one, see skip.py: no architecture of its own


def base_name(name: str) -> str:
    """Name of the timm architecture behind a twin.

    Example:
        >>> base_name("resnet50_etf.e60_tiny")
        'resnet50'
    """
    return name.split(".")[0].removesuffix(SUFFIX)


def as_names(classifier: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names of classifiers as timm's cfgs give them: none, one or several.

    Example:
        >>> as_names("fc"), as_names(None), as_names(["head", "head_dist"])
        (('fc',), (), ('head', 'head_dist'))
    """
    return (classifier,) if isinstance(classifier, str) else tuple(classifier or ())


def timm_classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that classify in a timm model.

    Raises:
        EtfZooError: If its pretrained cfg names none.

    Example:
        >>> timm_classifier_names(timm.create_model("resnet18"))
        ('fc',)
    """
    names = as_names(getattr(model, "pretrained_cfg", {}).get("classifier"))
    if not names:
        raise EtfZooError(no_classifier(model))
    return names


def frame_heads(model: nn.Module) -> dict[str, FrameClassifier]:
    """The fixed-frame heads of a model: module name -> head. Distilled models and VOLO have several.

    Example:
        >>> frame_heads(timm.create_model("resnet18_etf", num_classes=10))["fc"].weight.shape
        torch.Size([10, 512])
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, FrameClassifier)}


def leaf_of(model: nn.Module, name: str) -> nn.Module | None:
    """A module by its name; None where the model has none of that name.

    Example:
        >>> leaf_of(nn.Sequential(nn.Linear(2, 3)), "1") is None
        True
    """
    try:
        return model.get_submodule(name)
    except AttributeError:  # VOLO's aux_head is None, features_only drops the head
        return None


def features_of_leaf(leaf: nn.Module | None) -> int:
    """Number of features that a linear layer, a convolution or a frame takes; 0 for other modules."""
    return getattr(leaf, "in_features", getattr(leaf, "in_channels", 0))


def narrowest(model: nn.Module, names: Iterable[str]) -> int:
    """Least number of features that meets one of the named classifiers, 0 without any.

    Example:
        >>> narrowest(timm.create_model("resnet18"), ["fc"])
        512
    """
    return min(filter(None, (features_of_leaf(leaf_of(model, name)) for name in names)), default=0)


def linear_names(model: nn.Module) -> list[str]:
    """Names of the last linear layers, for errors."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-5:]


def no_classifier(model: nn.Module) -> str:
    """What an error says of a model whose classifier is not known."""
    return (
        f"Cannot tell which layer of {type(model).__name__} classifies. Name it with classifier='...'; "
        f"its last linear layers: {', '.join(linear_names(model)) or 'none'}."
    )


def class_names(model: nn.Module) -> list[str]:
    """What a timm model's classes are called, in their order: for people, not for matching.

    Returns:
        The descriptions that its config has, else its label names, else ImageNet's where its weights are of that, else
        numbers.

    Example:
        >>> class_names(timm.create_model("tf_efficientnet_lite0_etf", pretrained=True))[985]
        'daisy'
    """
    cfg: Any = getattr(model, "pretrained_cfg", {})
    num_classes = int(getattr(model, "num_classes", 0))
    names, described = cfg.get("label_names"), cfg.get("label_descriptions") or {}
    if not names and _IMAGENET_TAG.search(cfg.get("tag") or "") and cfg.get("num_classes") == num_classes:
        subset = infer_imagenet_subset({"num_classes": num_classes})
        if subset is not None:
            info = ImageNetInfo(subset)
            names, described = [info.index_to_description(number) for number in range(num_classes)], {}
    if not names or len(names) != num_classes:
        return [str(number) for number in range(num_classes)]
    return [str(described.get(name, name)) for name in names]


def split_head(
    state_dict: Mapping[str, Tensor], classifier: Iterable[str], *, strip: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into (backbone, head): the head is every key below a classifier's prefix.

    Args:
        state_dict: Name -> tensor.
        classifier: Names of the classifier leaves.
        strip: Whether to drop the prefix from the head's keys.

    Example:
        >>> backbone, head = split_head(model.state_dict(), ["fc"], strip=True)
        >>> sorted(head)
        ['logit_scale', 'weight']
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
