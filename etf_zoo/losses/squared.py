"""Squared loss: the regularized mean squared error of the unconstrained-features papers (2106.02073, 2202.08087)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import EtfZooError
from ._common import check_inputs, without_autocast

__all__ = ["SquaredLoss", "squared_loss"]


def squared_loss(products: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error, summed over classes, averaged over the batch.

    Args:
        products: `(B, K)`.
        targets: `(B, K)`.

    Returns:
        Scalar.
    """
    return 0.5 * (products - targets).square().sum(dim=1).mean()


class SquaredLoss(nn.Module):
    r"""Regularized squared loss :math:`\mathrm{mean}_b\,[\tfrac12 \|W x_b - e_{y_b}\|^2 + \tfrac\lambda2 \|x_b\|^2]`.

    The loss for which the unconstrained-features papers (2106.02073, 2202.08087) prove neural collapse; the frame is
    fixed here, so the term on W falls away. For a simplex ETF the minimizer is in closed form: every feature of class
    y equals :math:`w_y / (K/(K-1) + \lambda)`.

    Takes embeddings with `feature_norm="none"`, as their length is what the loss finds; unit embeddings work, the
    penalty is then a constant. Products are not scaled.

    Args:
        feature_decay: lambda, the papers' penalty on features. Small by default: it sets the length of the features
            and leaves their directions alone.
        centered: Take 1/K off the targets, what an unpenalized bias would do. It changes nothing for a simplex ETF's
            minimizer, whose products sum to zero, but does for other frames.

    Shape:
        embeddings `(B, dim)`, labels `(B,)`, frame `(K, dim)` to a scalar, float32 at least.

    Raises:
        ValueError: On a negative decay, or (in forward) shapes that do not fit.
    """

    def __init__(self, feature_decay: float = 5e-4, *, centered: bool = False):
        super().__init__()
        if not feature_decay >= 0:
            raise EtfZooError(f"feature_decay must not be negative, got {feature_decay}.")
        self.feature_decay, self.centered = feature_decay, centered

    @without_autocast
    def forward(self, embeddings: Tensor, labels: Tensor, frame: Tensor) -> Tensor:
        x, w, labels = check_inputs(embeddings, labels, frame)
        targets = torch.zeros(len(x), len(w), dtype=x.dtype, device=x.device).scatter_(1, labels[:, None], 1.0)
        if self.centered:
            targets = targets - 1 / len(w)
        return squared_loss(x @ w.T, targets) + 0.5 * self.feature_decay * x.square().sum(dim=1).mean()

    def extra_repr(self) -> str:
        return f"feature_decay={self.feature_decay}, centered={self.centered}"
