"""What features are, whatever they score: how much of them all images share, how many directions they spread over."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import EtfZooError

__all__ = ["mean_energy_share", "participation_ratio"]


def mean_energy_share(features: Tensor) -> float:
    r"""Share of the features' energy in what all have in common: :math:`\|\bar x\|^2 / \overline{\|x\|^2}`.

    Args:
        features: `(N, d)`.

    Returns:
        From 0 (centered) to 1 (all the same).

    Raises:
        EtfZooError: If there is no feature, one that is not finite, or all are zero.

    Example:
        >>> mean_energy_share(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        0.5
    """
    x = _checked(features)
    energy = x.square().sum(1).mean()
    if not energy > 0:
        raise EtfZooError("All features are zero: there is no energy to share.")
    return (x.mean(0).square().sum() / energy).item()


def participation_ratio(features: Tensor) -> float:
    r"""Number of directions that centered features spread over: :math:`(\sum_i \lambda_i)^2 / \sum_i \lambda_i^2`.

    With :math:`\lambda_i` the eigenvalues of their covariance: d if all are equal, 1 if all but one are 0; of K classes
    that have collapsed onto a simplex it is K - 1.

    Args:
        features: `(N, d)`.

    Raises:
        EtfZooError: If there are fewer than two features, one that is not finite, or all are the same.

    Example:
        >>> participation_ratio(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        2.0
    """
    x = _checked(features)
    x = x - x.mean(0)
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T  # the same eigenvalues, but for zeros
    trace = gram.diagonal().sum()
    if not trace > 0:
        raise EtfZooError("All features are the same: they spread over no direction.")
    gram = gram / trace
    return (1 / gram.square().sum()).item()


def _checked(features: Tensor) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.numel():
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise EtfZooError(f"Features are a tensor (N, d) of at least one row, got {shape}.")
    x = features.detach().double()
    if not bool(torch.isfinite(x).all()):
        raise EtfZooError("Features are not finite.")
    return x
