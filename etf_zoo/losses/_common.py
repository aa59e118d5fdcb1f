"""What the losses share: checks of their inputs, and precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import EtfZooError
from ..frames.numerics import at_least_float32


def without_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A loss's forward, run outside autocast: a cosine near 1 has three digits in bfloat16."""

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Tensor, **kwargs: Tensor) -> Any:
        tensors = [*args, *kwargs.values()]  # by position or by name; without any, let forward say what it takes
        with torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
            return forward(self, *args, **kwargs)

    return wrapped


def check_inputs(embeddings: Tensor, labels: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings `(B, dim)` and frame `(K, dim)` in the embeddings' precision, float32 at least; labels int64.

    Raises:
        ValueError: If the shapes do not belong together, the batch is empty, or labels are soft or out of range (on the
            CPU: elsewhere looking would wait for the device).
    """
    if embeddings.ndim != 2 or frame.ndim != 2 or embeddings.shape[1] != frame.shape[1]:
        raise EtfZooError(
            f"Expected embeddings (B, dim) and frame (K, dim), got {tuple(embeddings.shape)} and "
            f"{tuple(frame.shape)}. Embeddings are what FrameClassifier.embed returns, not the backbone's features."
        )
    labels = check_labels(labels, len(embeddings), len(frame))
    embeddings = at_least_float32(embeddings)
    return embeddings, frame.to(embeddings.dtype), labels


def check_labels(labels: Tensor, batch: int, num_classes: int) -> Tensor:
    """Labels as int64.

    Raises:
        ValueError: If there are none or not `(batch,)` of them, they are soft, or out of range (on the CPU: elsewhere
            looking would wait for the device).
    """
    if labels.shape != (batch,) or labels.is_floating_point():
        raise EtfZooError(
            f"Expected class numbers ({batch},), got {labels.dtype} {tuple(labels.shape)}. "
            f"This loss does not take soft labels (mixup, cutmix)."
        )
    if not batch:
        raise EtfZooError("The batch is empty.")
    looks = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and not 0 <= labels.min() <= labels.max() < num_classes:
        raise EtfZooError(
            f"Labels are rows of the frame, 0 to {num_classes - 1}; got {labels.min().item()} to {labels.max().item()}."
        )
    return labels.long()
