"""Frames that imbalanced training ends at: their rows have the lengths that the class counts ask for, not length one.

Sources: 2401.02058 for ReLU features under cross-entropy with weight decay on classifier and features; 2208.05512 for
SELI (simplex-encoded-label interpolation), where features may have any sign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import EtfZooError
from .orientation import block_indicators
from .simplex import check_room, haar_columns

__all__ = ["imbalanced_frame", "seli_frame"]


def imbalanced_frame(
    class_counts: Sequence[int] | Tensor, dim: int, *, weight_decay: float, feature_decay: float
) -> tuple[Tensor, Tensor]:
    r"""Minimizer of cross-entropy over classifier and nonnegative features, in closed form (2401.02058).

    With N images in all, :math:`n_k` of class k, the objective is

    .. math:: \frac1N \sum_i \mathrm{CE}(W h_i, y_i) + \frac{\lambda_W}{2} \|W\|^2 + \frac{\lambda_h}{2} \sum_i
        \|h_i\|^2, \qquad h_i \ge 0.

    Features of a class coincide, those of different classes are orthogonal, and each other class gets probability
    :math:`q_k = N \sqrt{\lambda_W \lambda_h} / \sqrt{K (K-1) n_k}`. A class with :math:`q_k \ge 1/K` is too small:
    its features collapse to zero. With equal counts the rows of W are a simplex.

    Args:
        class_counts: Images of each class, `(K,)`.
        dim: Width of the features, at least K: each class owns some of the coordinates.
        weight_decay: :math:`\lambda_W`, of the classifier.
        feature_decay: :math:`\lambda_h`, of each feature.

    Returns:
        W `(K, dim)`, the classifier, and H `(K, dim)`, the features of the classes; float32. Rows of W are not unit:
        `torch.nn.functional.normalize(W, dim=1)` is the frame, their lengths are what imbalance changes.

    Raises:
        EtfZooError: On counts that are not positive, decays that are not, too few dimensions, or if every class
            collapses.

    Example:
        >>> classifier, features = imbalanced_frame([100, 10, 1], 6, weight_decay=1e-3, feature_decay=1e-4)
        >>> features.norm(dim=1)
        tensor([1.3000, 2.0974, 3.2995])
    """
    counts = _check_counts(class_counts)
    for name, value in (("weight_decay", weight_decay), ("feature_decay", feature_decay)):
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise EtfZooError(f"{name} must be positive and finite, got {value!r}.")
    k = len(counts)
    directions = block_indicators(k, dim)
    q = counts.sum() * math.sqrt(weight_decay * feature_decay) / torch.sqrt(k * (k - 1) * counts)
    if bool((q >= 1 / k).all()):
        raise EtfZooError(
            f"With these decays the features of all {k} classes collapse to zero. Lower weight_decay * feature_decay "
            f"below {(counts.max() * (k - 1) / (k * counts.sum() ** 2)).item():.3g}."
        )
    margin = torch.log((1 / q - (k - 1)).clamp_min(1))  # zero for a class that collapses
    lengths = torch.sqrt(math.sqrt(weight_decay / feature_decay) * torch.sqrt((k - 1) / (k * counts)) * margin)
    features = lengths[:, None] * directions
    weighted = torch.sqrt(counts)[:, None] * features
    classifier = math.sqrt(feature_decay * k / (weight_decay * (k - 1))) * (weighted - weighted.mean(0))
    return classifier.float(), features.float()


def seli_frame(class_counts: Sequence[int] | Tensor, dim: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""Geometry of the minimum-norm interpolation of simplex-encoded labels (SELI, 2208.05512): free features.

    The simplex-encoded labels are :math:`Z`, `(K, N)`, with columns :math:`e_{y_i} - 1/K`. From
    :math:`Z = V \Lambda U^\top` the classifier is :math:`V \Lambda^{1/2}` and the features are
    :math:`\Lambda^{1/2} U^\top`, so that logits are Z. V and :math:`\Lambda^2` are those of the K x K matrix
    :math:`Z Z^\top = P \,\mathrm{diag}(n)\, P` with :math:`P = I - J/K`, so no N enters.

    Args:
        class_counts: Images of each class, `(K,)`.
        dim: Width of the features, at least K - 1.
        seed: Seed of the random orientation.

    Returns:
        W `(K, dim)` and the class features H `(K, dim)`, float32, with :math:`W H^\top = I - J/K`. Only their shape is
        given by the theory; training scales them as the loss asks. Rows are not unit.

    Raises:
        EtfZooError: On counts that are not positive, or fewer than K - 1 dimensions.

    Example:
        >>> classifier, features = seli_frame([100, 10, 1], 8)
        >>> classifier @ features.T  # the simplex-encoded label of each class
        tensor([[ 0.6667, -0.3333, -0.3333],
                [-0.3333,  0.6667, -0.3333],
                [-0.3333, -0.3333,  0.6667]])
    """
    counts = _check_counts(class_counts)
    k = len(counts)
    check_room("SELI frame", k, dim, f"Widen the features to {k - 1}, such as with neck='mlp' or neck='residual'.")
    center = torch.eye(k, dtype=torch.float64) - 1 / k
    squared, vectors = torch.linalg.eigh(center @ torch.diag(counts) @ center)
    values, vectors = squared[1:].sqrt(), vectors[:, 1:]  # ascending; the first belongs to the all-ones vector
    turn = haar_columns(dim, k - 1, seed)
    classifier = vectors * values.sqrt() @ turn.T
    features = vectors / values.sqrt() @ turn.T
    return classifier.float(), features.float()


def _check_counts(class_counts: Sequence[int] | Tensor) -> Tensor:
    try:
        counts = torch.as_tensor(class_counts, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise EtfZooError(f"class_counts is a list of numbers, one for each class; got {class_counts!r}.") from None
    if counts.ndim != 1 or len(counts) < 2:
        raise EtfZooError(f"class_counts has one number for each of at least 2 classes, got {tuple(counts.shape)}.")
    if not bool((torch.isfinite(counts) & (counts > 0)).all()):
        raise EtfZooError("Every class count must be positive and finite: leave out classes without images.")
    return counts
