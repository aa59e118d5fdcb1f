"""Losses for fixed frames. Most take `(embeddings, labels, frame)`: `FrameClassifier.embed(features)` and `.weight`.

`FrameCrossEntropy(head)` takes `(features, labels)` instead, and needs no matrix of the frame.
"""

from torch import nn

from .center_collapse import CenterCollapseLoss
from .dot_regression import DotRegressionLoss
from .frame_cross_entropy import FrameCrossEntropy
from .hierarchical_subspaces import HierarchicalSubspaceLoss
from .hierarchy_cosine import HierarchyCosineLoss
from .logit_adjustment import logit_adjustment
from .nearest_neighbor_entropy import NearestNeighborEntropyLoss
from .prototype_contrast import PrototypeContrastLoss
from .separating_cone import SeparatingConeLoss
from .squared import SquaredLoss
from .variance_covariance import VarianceCovarianceLoss

__all__ = [
    "FrameCrossEntropy",
    "DotRegressionLoss",
    "HierarchyCosineLoss",
    "HierarchicalSubspaceLoss",
    "logit_adjustment",
    "SeparatingConeLoss",
    "SquaredLoss",
    "CenterCollapseLoss",
    "VarianceCovarianceLoss",
    "NearestNeighborEntropyLoss",
    "PrototypeContrastLoss",
    "LOSSES",
]

# Losses on (embeddings, labels, frame), by the name that recipes have for them.
LOSSES: dict[str, type[nn.Module]] = {
    "dot_regression": DotRegressionLoss,
    "hierarchy_cosine": HierarchyCosineLoss,
    "hierarchical_subspaces": HierarchicalSubspaceLoss,
    "prototype_contrast": PrototypeContrastLoss,
    "separating_cone": SeparatingConeLoss,
    "squared": SquaredLoss,
}
