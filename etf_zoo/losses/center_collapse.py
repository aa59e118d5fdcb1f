"""Center collapse (2301.01100): in dense prediction, class centers are pulled to the frame, whatever their area."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import EtfZooError
from ..frames.numerics import at_least_float32, unit
from ._common import without_autocast

__all__ = ["CenterCollapseLoss", "class_centers"]


def class_centers(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature of each class that occurs.

    Args:
        features: `(N, C)`.
        labels: `(N,)` int64 in [0, K).
        num_classes: K.

    Returns:
        Centers `(P, C)` and their classes `(P,)`, ascending; P is 0 for no features.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    sums = features.new_zeros(num_classes, features.shape[1]).index_add(0, labels, features)
    present = counts.nonzero().squeeze(1)
    return sums[present] / counts[present, None], present


class CenterCollapseLoss(nn.Module):
    r"""Cross-entropy of the class centers against the frame (after the center collapse regularizer, 2301.01100).

    The center of a class is the mean of its pixels' features over the batch; the loss is the mean over the classes
    present, so a class of ten pixels counts as much as one of ten thousand and an absent class costs nothing. A term
    to add to the pixels' own loss. The paper's text was not at hand in full: cross-entropy on centers is its form as
    summarized there, the unit centers and the scale are this package's convention for fixed frames.

    Takes features and frame, not logits. Centers are those of this process's batch.

    Args:
        ignore_index: Label of pixels that belong to no class; 255, as most segmentation data sets have it.
        logit_scale: Scale of the cosines between centers and frame; 16 is a little above
            `FrameClassifier`'s "auto" (11 for a simplex of 100 classes, 14 for 1000).

    Shape:
        features `(B, C, H, W)`, labels `(B, H, W)` at the features' resolution, frame `(K, C)` to a scalar, float32 at
        least; zero, with zero gradient, when no pixel has a class.

    Raises:
        ValueError: On a scale that is not positive, or (in forward) shapes or labels that do not fit.
    """

    def __init__(self, *, ignore_index: int = 255, logit_scale: float = 16.0):
        super().__init__()
        if not (math.isfinite(logit_scale) and logit_scale > 0):
            raise EtfZooError(f"logit_scale must be positive and finite, got {logit_scale}.")
        self.ignore_index, self.logit_scale = ignore_index, logit_scale

    @without_autocast
    def forward(self, features: Tensor, labels: Tensor, frame: Tensor) -> Tensor:
        if features.ndim != 4 or frame.ndim != 2 or features.shape[1] != frame.shape[1]:
            raise EtfZooError(
                f"Expected features (B, C, H, W) and frame (K, C), got {tuple(features.shape)} and "
                f"{tuple(frame.shape)}."
            )
        expected = (features.shape[0], *features.shape[2:])
        if labels.shape != expected or labels.is_floating_point():
            raise EtfZooError(
                f"Expected a map of class numbers {expected}, got {labels.dtype} {tuple(labels.shape)}. "
                f"Resize it to the features with mode='nearest'."
            )
        x = at_least_float32(features).movedim(1, -1)
        valid = labels != self.ignore_index
        x, y = x[valid], labels[valid].long()
        if not len(y):
            return x.sum()  # zero, and still part of the graph
        if not 0 <= int(y.min()) <= int(y.max()) < len(frame):
            raise EtfZooError(
                f"Labels must lie in [0, {len(frame)}) or be ignore_index={self.ignore_index}, "
                f"got {y.min()} to {y.max()}."
            )
        centers, classes = class_centers(x, y, len(frame))
        logits = self.logit_scale * unit(centers, features) @ frame.to(centers.dtype).T
        return F.cross_entropy(logits, classes)

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, logit_scale={self.logit_scale}"
