"""Entropy of features by their nearest neighbors: a term that keeps an encoder from collapsing (2502.10691)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import EtfZooError
from ..frames.numerics import at_least_float32, unit
from ._common import without_autocast

__all__ = ["NearestNeighborEntropyLoss"]


class NearestNeighborEntropyLoss(nn.Module):
    r"""Negative entropy of unit features, by the Kozachenko-Leonenko estimator up to constants (2502.10691).

    -1/B sum_i log ||z_i - z_nn(i)||, where z_nn(i) is the nearest other feature of the batch. A term to add to the
    classification loss, with weight 0.05 in the paper, on the *encoder's* features, while what collapses stands behind
    a projector. The gradient flows through both ends of a pair; which feature is nearest has none.

    Args:
        eps: Distances below it count as it, so that equal features have a finite loss. Their gradient is 0: they have
            no direction to part in.

    Shape:
        features `(B, d)` with B at least 2, to a scalar, float32 at least. Neighbors are those of this process's batch.

    Raises:
        EtfZooError: On an eps that is not positive, or (in forward) features that are no matrix or of one row.

    Example:
        >>> loss = NearestNeighborEntropyLoss()
        >>> round(loss(torch.eye(4)).item(), 4)  # each sqrt(2) from the others
        -0.3466
    """

    def __init__(self, *, eps: float = 1e-6):
        super().__init__()
        if not eps > 0:
            raise EtfZooError(f"eps is the smallest distance that counts, a positive number; got {eps}.")
        self.eps = eps

    @without_autocast
    def forward(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or len(features) < 2:
            raise EtfZooError(
                f"Expected features (B, d) with at least two rows, got {tuple(features.shape)}. Pool maps first."
            )
        z = unit(at_least_float32(features))
        with torch.no_grad():
            cosines = z @ z.T
            nearest = cosines.fill_diagonal_(-torch.inf).argmax(dim=1)
        # from the difference, not from the cosine, whose rounding would hide distances below 1e-3
        squares = (z - z[nearest]).square().sum(dim=1)
        return -squares.clamp_min(self.eps**2).log().mean() / 2

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
