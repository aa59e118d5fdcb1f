"""Losses for fixed frames. Most take `(embeddings, labels, frame)`: `FrameClassifier.embed(features)` and `.weight`."""

from .center_collapse import CenterCollapseLoss
from .dot_regression import DotRegressionLoss
from .hierarchy_cosine import HierarchyCosineLoss
from .separating_cone import SeparatingConeLoss
from .squared import SquaredLoss
from .variance_covariance import VarianceCovarianceLoss

__all__ = [
    "DotRegressionLoss",
    "HierarchyCosineLoss",
    "SeparatingConeLoss",
    "SquaredLoss",
    "CenterCollapseLoss",
    "VarianceCovarianceLoss",
]
