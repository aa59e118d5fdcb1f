"""Logit adjustment (2007.07314): cross-entropy on logits plus the log of each class's share of the images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import EtfZooError

__all__ = ["logit_adjustment"]


def logit_adjustment(class_counts: Sequence[int] | Tensor, tau: float = 1.0) -> Tensor:
    r"""What is added to the logits in training, :math:`\tau \log(n_k / N)`; at test time the logits stand alone.

    Cross-entropy on the sum is consistent for the error averaged over classes (2007.07314), so a rare class is not
    passed over for being rare. In a recipe: `loss: {logit_adjustment: 1.0}`.

    Args:
        class_counts: Training images of each class, `(K,)`, positive.
        tau: Strength; 1 is what theory asks for.

    Returns:
        Float32 `(K,)`.

    Raises:
        EtfZooError: If a class has no image, or tau is negative.

    Example:
        >>> logit_adjustment([90, 10])
        tensor([-0.1054, -2.3026])
    """
    if not (isinstance(tau, int | float) and math.isfinite(tau) and tau >= 0):
        raise EtfZooError(f"tau is a strength, at least 0, got {tau!r}.")
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.ndim != 1 or not len(counts) or not bool((torch.isfinite(counts) & (counts > 0)).all()):
        raise EtfZooError("class_counts holds one positive count for each class: leave out classes without images.")
    return (tau * torch.log(counts / counts.sum())).float()
