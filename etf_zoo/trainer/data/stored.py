"""A split whose images have gone through a frozen backbone: what its first tuned layer gets, stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["StoredInputs"]


class StoredInputs:
    """Stored inputs of a layer in the place of images; all else is the split's own.

    Args:
        images: The split.
        inputs: `(views, N, ...)`: the evaluation view of each image, then augmented ones.
        rows: `(len(images),)`, which of the N the images of the split are; None for all.
    """

    def __init__(self, images: Any, inputs: np.ndarray, rows: np.ndarray | None = None):
        self.images, self.inputs, self.rows = images, inputs, rows

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: np.ndarray) -> StoredInputs:
        """Some of the images, by their numbers; what is stored of them is read when it is needed."""
        at = rows if self.rows is None else self.rows[rows]
        return StoredInputs(self.images.subset(rows), self.inputs, at)

    def __getattr__(self, name: str) -> Any:  # labels, names of classes, digest, class counts
        return getattr(self.images, name)

    def batches(self, parts: Iterable[np.ndarray], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The evaluation view of some images at a time: `(B, ...)` float32, and labels `(B,)`."""
        for part in parts:
            yield self._take(part, np.zeros_like(part), device)

    def train_batches(
        self, parts: Iterable[np.ndarray], *, seed: int, epoch: int, start: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same with a view drawn for each image, by (seed, epoch, step) alone."""
        for step, part in enumerate(parts, start):
            views = np.random.default_rng([seed, 6, epoch, step]).integers(len(self.inputs), size=len(part))
            yield self._take(part, views, device)

    def _take(self, rows: np.ndarray, views: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        at = rows if self.rows is None else self.rows[rows]
        inputs = torch.from_numpy(self.inputs[views, at]).to(device, non_blocking=True).float()
        return inputs, torch.from_numpy(self.images.labels[rows]).to(device, non_blocking=True)
