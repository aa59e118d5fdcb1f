"""Loss of the hierarchy-aware frame (2303.05689): cross-entropy mixed with a regression of all cosines."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import EtfZooError
from ..frames.numerics import directed_lengths
from ._common import check_inputs, without_autocast

__all__ = ["HierarchyCosineLoss", "cosine_regression"]


def cosine_regression(cosines: Tensor, targets: Tensor) -> Tensor:
    """Squared difference of cosines, summed over classes, averaged over the batch.

    Args:
        cosines: `(B, K)`, of each feature with every prototype.
        targets: `(B, K)`, of the feature's own prototype with every prototype.

    Returns:
        Scalar.
    """
    return (cosines - targets).square().sum(dim=1).mean()


class HierarchyCosineLoss(nn.Module):
    r"""Mixed loss of HAFrame (2303.05689), cross-entropy and a regression of cosines.

    :math:`(1-\alpha)\,\mathrm{CE}(s\,x W^\top, y)
    + \alpha\,\mathrm{mean}_b \sum_c (\cos(x_b, w_c) - w_{y_b} \cdot w_c)^2`.

    The second term wants each feature to have its prototype's cosines to *all* prototypes. With a hierarchy frame it
    asks for related classes to stay close; with any other frame of unit rows it is a regression onto that frame.

    Takes embeddings, not logits. The paper's features are not normalized (`feature_norm="none"`, s = 1).

    Args:
        alpha: Share of the cosine term, in [0, 1]; 0.4 is what the published code uses for CIFAR-100.
        logit_scale: s, inside the cross-entropy alone. With unit embeddings give the head's own
            (`head.logit_scale.item()`): at 1 the cross-entropy of unit features cannot get low.

    Shape:
        embeddings `(B, dim)`, labels `(B,)`, frame `(K, dim)` to a scalar, float32 at least.

    Raises:
        ValueError: On alpha outside [0, 1], a scale that is not positive, or (in forward) shapes that do not fit.
    """

    def __init__(self, alpha: float = 0.4, *, logit_scale: float = 1.0):
        super().__init__()
        if not 0 <= alpha <= 1:
            raise EtfZooError(f"alpha is a share in [0, 1], got {alpha}.")
        if not (math.isfinite(logit_scale) and logit_scale > 0):
            raise EtfZooError(f"logit_scale must be positive and finite, got {logit_scale}.")
        self.alpha, self.logit_scale = alpha, logit_scale

    @without_autocast
    def forward(self, embeddings: Tensor, labels: Tensor, frame: Tensor) -> Tensor:
        x, w, labels = check_inputs(embeddings, labels, frame)
        products, targets = (torch.cat([x, w[labels]]) @ w.T).chunk(2)  # one matrix product for both
        cross_entropy = F.cross_entropy(self.logit_scale * products, labels)
        cosines = products / directed_lengths(x, embeddings)
        return (1 - self.alpha) * cross_entropy + self.alpha * cosine_regression(cosines, targets)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, logit_scale={self.logit_scale}"
