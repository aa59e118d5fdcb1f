"""Separating cone: classes fill cones about their axes instead of collapsing onto them.

*Inspired by* the ICLR 2023 submission "Do we need neural collapse? Learning diverse features for fine-grained and
long-tail classification" (OpenReview 5gri-cs4RVq). The paper's formulas were not available; this is not its loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import EtfZooError
from ..frames.numerics import unit
from ._common import check_inputs, without_autocast

__all__ = ["SeparatingConeLoss", "cone_cosine"]


def cone_cosine(cosine: Tensor, radius: float) -> Tensor:
    """Cosine with a cone's axis relative to that on the cone's surface: min(cos(angle) / cos(radius), 1).

    One inside the cone, with zero gradient there.

    Args:
        cosine: Cosines with the cone's axis, any shape.
        radius: Half the opening angle, in radians, in [0, pi / 2).

    Returns:
        Same shape.
    """
    return (cosine / math.cos(radius)).clamp(max=1)


class SeparatingConeLoss(nn.Module):
    r"""Cross-entropy of cosines whose pull toward the own prototype ends at the surface of a cone about it.

    :math:`\mathrm{CE}` of logits :math:`s \min(\cos\theta_y / \cos r, 1)` for the own class and
    :math:`s \cos\theta_c / \cos r` for the others: on the surface the own logit is what it is on the axis in plain
    cross-entropy. The pull is exactly zero inside the cone; the push from the other prototypes stays, but its weight
    there is only their probability.

    *Inspired by* the maximal separating cone of "Do we need neural collapse?" (ICLR 2023 submission), whose formulas
    were not available. Radius 0 is plain cross-entropy of scaled cosines.

    Takes unit embeddings, not logits. The head's plain logits still classify.

    Args:
        radius: r in degrees, in [0, 90): how far from its axis a feature may lie at no cost. Above half the angle
            between two prototypes (45 for many classes) cones overlap; 30, a choice and not tuned, leaves as much as a
            cone's radius between two of them. Nonnegative features stay some 45 degrees from
            a randomly turned prototype: use `orientation="blocks"`.
        logit_scale: s; better the head's own, `head.logit_scale.item()`. 16 is a little above `FrameClassifier`'s
            "auto" (11 for a simplex of 100 classes, 14 for 1000).

    Shape:
        embeddings `(B, dim)`, labels `(B,)`, frame `(K, dim)` to a scalar, float32 at least.

    Raises:
        ValueError: On a radius outside [0, 90), a scale that is not positive, or (in forward) shapes that do not fit.
    """

    def __init__(self, radius: float = 30.0, *, logit_scale: float = 16.0):
        super().__init__()
        if not 0 <= radius < 90:
            raise EtfZooError(f"radius is in degrees, in [0, 90), got {radius}.")
        if not (math.isfinite(logit_scale) and logit_scale > 0):
            raise EtfZooError(f"logit_scale must be positive and finite, got {logit_scale}.")
        self.radius, self.logit_scale = radius, logit_scale

    @without_autocast
    def forward(self, embeddings: Tensor, labels: Tensor, frame: Tensor) -> Tensor:
        x, w, labels = check_inputs(embeddings, labels, frame)
        radius = math.radians(self.radius)
        cosines = unit(x, embeddings) @ w.T
        own = labels[:, None]
        inside = cone_cosine(cosines.gather(1, own), radius)
        return F.cross_entropy(self.logit_scale * torch.scatter(cosines / math.cos(radius), 1, own, inside), labels)

    def extra_repr(self) -> str:
        return f"radius={self.radius}, logit_scale={self.logit_scale}"
