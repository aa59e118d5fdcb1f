"""Variance-covariance penalty on features (VICReg's second and third term, 2105.04906; supervised: 2306.13292)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import EtfZooError
from ..frames.numerics import at_least_float32
from ._common import without_autocast

__all__ = ["VarianceCovarianceLoss", "covariance_penalty", "variance_penalty"]


def variance_penalty(features: Tensor, target: float = 1.0, eps: float = 1e-4) -> Tensor:
    """Mean over features of max(0, target - standard deviation); `(B, d)` to a scalar."""
    deviation = torch.sqrt(features.var(dim=0) + eps)
    return torch.relu(target - deviation).mean()


def covariance_penalty(features: Tensor) -> Tensor:
    """Sum of the squared off-diagonal entries of the covariance matrix over d; `(B, d)` to a scalar."""
    batch, dim = features.shape
    centered = features - features.mean(dim=0)
    covariance = centered.T @ centered / (batch - 1)
    return (covariance - covariance.diagonal().diag()).square().sum() / dim


class VarianceCovarianceLoss(nn.Module):
    """Penalty that keeps every feature's variance up and decorrelates features; a control for fixed frames.

    A term to add to the classification loss. Takes the *backbone's* features, before any norm, neither embeddings nor
    logits, and no labels: unit features cannot have standard deviation 1.

    Args:
        variance: Weight of the variance term.
        covariance: Weight of the covariance term; 1/25 of the variance's, VICReg's ratio.
        target: Standard deviation below which a feature is penalized, 1 in both papers.

    Shape:
        features `(B, d)` with B at least 2, to a scalar, float32 at least. Statistics are those of this process's
        batch.

    Raises:
        ValueError: On negative weights, or (in forward) features that are no matrix or of one row.
    """

    def __init__(self, variance: float = 1.0, covariance: float = 0.04, *, target: float = 1.0):
        super().__init__()
        if min(variance, covariance, target) < 0:
            raise EtfZooError(f"Weights and target must not be negative, got {variance}, {covariance}, {target}.")
        self.variance, self.covariance, self.target = variance, covariance, target

    @without_autocast
    def forward(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or len(features) < 2:
            raise EtfZooError(
                f"Expected features (B, d) with at least two rows, got {tuple(features.shape)}. Pool maps first."
            )
        x = at_least_float32(features)
        return self.variance * variance_penalty(x, self.target) + self.covariance * covariance_penalty(x)

    def extra_repr(self) -> str:
        return f"variance={self.variance}, covariance={self.covariance}, target={self.target}"
