"""Accuracy by how many training images a class has: many, medium, few, as long-tailed papers report it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import EtfZooError

__all__ = ["SHOTS", "accuracy_by_shots"]

SHOTS = {"many": (101, float("inf")), "medium": (20, 100), "few": (0, 19)}  # training images of a class


def accuracy_by_shots(predictions: Tensor, labels: Tensor, class_counts: Sequence[int]) -> dict[str, float]:
    """Top-1 accuracy (%) over the images of classes with many (over 100), medium (20 to 100), few training images.

    Args:
        predictions: `(N,)` class numbers.
        labels: `(N,)` the true ones.
        class_counts: Training images of each class.

    Returns:
        `many`, `medium` and `few`; a group without images is left out.

    Raises:
        EtfZooError: On predictions and labels that do not belong together, or classes without a count.

    Example:
        >>> accuracy_by_shots(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), [500, 5])
        {'many': 100.0, 'few': 50.0}
    """
    counts = torch.as_tensor(class_counts)
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise EtfZooError(f"Expected two vectors, got {tuple(predictions.shape)} and {tuple(labels.shape)}.")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(counts):
        raise EtfZooError(f"Labels from {labels.min()} to {labels.max()} for {len(counts)} class counts.")
    of_image, right = counts[labels.long().cpu()], (predictions == labels).cpu()
    groups = {name: (of_image >= low) & (of_image <= high) for name, (low, high) in SHOTS.items()}
    return {name: 100 * right[group].double().mean().item() for name, group in groups.items() if group.any()}
