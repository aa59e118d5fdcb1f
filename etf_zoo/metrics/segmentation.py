"""Figures of a segmentation: intersection over union of each class, from one confusion matrix over all pixels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import EtfZooError
from .distributed import sum_over_processes

__all__ = ["SegmentationScores"]


class SegmentationScores:
    """Counts pixels by true and predicted class, batch by batch; exact over processes, as counts add up.

    Args:
        num_classes: K.
        ignore_index: Label of pixels that belong to no class.
        device: Where the counts live.

    Example:
        >>> scores = SegmentationScores(2)
        >>> scores.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]]))
        >>> scores.compute()["accuracy"], scores.iou().tolist()
        (50.0, [0.5, 0.0])
    """

    def __init__(self, num_classes: int, *, ignore_index: int = 255, device: torch.device | str = "cpu"):
        if num_classes < 2:
            raise EtfZooError(f"A segmentation has at least 2 classes, got {num_classes}.")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)  # [true, predicted]

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            predictions: Class numbers, of any shape.
            labels: True class numbers or `ignore_index`, of the same shape.

        Raises:
            EtfZooError: On shapes that differ or class numbers out of range.
        """
        if predictions.shape != labels.shape or predictions.is_floating_point():
            raise EtfZooError(
                f"Expected class numbers of one shape, got {predictions.dtype} {tuple(predictions.shape)} and "
                f"{tuple(labels.shape)}."
            )
        valid = labels != self.ignore_index
        found, true = predictions[valid].long().to(self.counts.device), labels[valid].long().to(self.counts.device)
        both = torch.cat([found, true])
        if len(both) and not 0 <= int(both.min()) <= int(both.max()) < self.num_classes:
            raise EtfZooError(
                f"Class numbers must lie in [0, {self.num_classes}) or be {self.ignore_index} in the labels, got "
                f"{both.min()} to {both.max()}."
            )
        k = self.num_classes
        self.counts += torch.bincount(true * k + found, minlength=k * k).view(k, k)

    def reduce(self, processes: Any = None) -> None:
        """Sum over processes; call it once, on every process, after the last `update`."""
        # float64 holds pixel counts exactly up to 2^53
        self.counts = sum_over_processes(self.counts.double(), processes).round().long()

    def iou(self) -> Tensor:
        """Intersection over union of each class, `(K,)` float64 in [0, 1]; NaN for one neither there nor predicted."""
        hits = self.counts.diagonal().double()
        return hits / (self.counts.sum(0) + self.counts.sum(1) - hits)

    def compute(self) -> dict[str, float]:
        """`miou`: mean over the classes that occur; `accuracy`: share of right pixels; `class_accuracy`: the mean over
        classes of that. All in percent.

        Raises:
            EtfZooError: Before any pixel with a class.
        """
        total = int(self.counts.sum())
        if not total:
            raise EtfZooError("No pixel with a class was taken in: call update(predictions, labels) first.")
        hits, true = self.counts.diagonal().double(), self.counts.sum(1)
        iou = self.iou()
        known = ~iou.isnan()
        recall = (hits / true)[true > 0]
        figures = {
            "miou": iou[known].mean().item(),
            "accuracy": hits.sum().item() / total,
            "class_accuracy": recall.mean().item() if len(recall) else math.nan,
        }
        return {name: 100 * value for name, value in figures.items()}
