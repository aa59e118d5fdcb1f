"""Frames from the class counts of the training images: a recipe's `frame: imbalanced` and `frame: seli`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn import functional as F

from etf_zoo import attach_frame, frame_heads
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import imbalanced_frame, seli_frame
from etf_zoo.models.head_config import split_head_args

__all__ = ["COUNTED", "DECAYS", "attach_counted_frame", "default_feature_decay"]

COUNTED = ("imbalanced", "seli")  # names that only a recipe has
DECAYS = ("weight_decay", "feature_decay")  # arguments of the first alone


def default_feature_decay(class_counts: Sequence[int], weight_decay: float) -> float:
    """A quarter of the feature decay at which the smallest class collapses to zero, see `imbalanced_frame`.

    Args:
        class_counts: Training images of each class.
        weight_decay: Of the classifier, positive.

    Example:
        >>> decay = default_feature_decay([100, 10], 1e-3)
        >>> bool((imbalanced_frame([100, 10], 4, weight_decay=1e-3, feature_decay=decay)[1].norm(dim=1) > 0).all())
        True
    """
    count, total, k = min(class_counts), sum(class_counts), len(class_counts)
    return count * (k - 1) / (4 * k * total**2 * weight_decay)


def attach_counted_frame(
    model: nn.Module, name: str, class_counts: Sequence[int], args: Mapping[str, Any], weight_decay: float
) -> nn.Module:
    """Put a frame that class counts ask for in the place of a model's, in place: unit rows, and their lengths.

    Args:
        model: A model with frames of one width.
        name: `imbalanced` or `seli`. The rows of the latter are scaled to a mean square length of one, as theory leaves
            their scale open.
        class_counts: Training images of each class.
        args: The recipe's `model_args`: those of the head, and for `imbalanced` `weight_decay` and `feature_decay`.
        weight_decay: What the first of them is by default; the second is `default_feature_decay`.

    Returns:
        The same model.

    Raises:
        EtfZooError: Without counts, or if the frame does not fit.
    """
    if not class_counts:
        raise EtfZooError(f"frame: {name} is made from the class counts, which a stream does not have.")
    widths = {head.dim for head in frame_heads(model).values()}
    if len(widths) > 1:
        raise EtfZooError(f"frame: {name} is for heads of one width; this model has several.")
    head_args = {k: v for k, v in split_head_args(args)[0].items() if k != "orientation"}
    dim = widths.pop()
    if name == "imbalanced":
        first = args.get("weight_decay") or weight_decay
        second = args.get("feature_decay") or (default_feature_decay(class_counts, first) if first else 0)
        rows, _ = imbalanced_frame(class_counts, dim, weight_decay=first, feature_decay=second)
    else:
        rows, _ = seli_frame(class_counts, dim, seed=head_args.get("seed", 0))
        rows = rows / rows.square().sum(1).mean().sqrt()
    return attach_frame(model, **{**head_args, "frame": F.normalize(rows, dim=1), "lengths": rows.norm(dim=1)})
