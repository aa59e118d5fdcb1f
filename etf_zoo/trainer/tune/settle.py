"""What a fine-tuning leaves open until its images are known: batch size, and whether some are held out."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..data.subsets import Images

__all__ = ["batch_for", "settle"]

HOLDOUT = 0.1  # of each class, where that is an image of it
STEPS = 100  # that a training takes at least, by smaller batches where images are few
BATCHES = (64, 32, 16)


def batch_for(images: int, epochs: int) -> int:
    """The largest batch size of 64, 32 and 16 that gives 100 steps or more; else 16, or all images.

    Example:
        >>> batch_for(1020, 20), batch_for(170, 20), batch_for(10, 20)
        (64, 32, 10)
    """
    enough = [size for size in BATCHES if epochs * (images // size) >= STEPS]
    return min(max(enough, default=BATCHES[-1]), images)


def settle(settings: Any, train: Images, watched: Images | None = None) -> Any:
    """A `Finetune` recipe with its `holdout` a number; without one the test is looked at once, after the last epoch.

    Args:
        settings: The recipe.
        train: All its training images.
        watched: Images to choose by, where the data have a split for it.
    """
    if getattr(settings, "holdout", None) != "auto":
        return settings
    chooses = settings.patience or settings.lr == "auto"
    per_class = float(np.median(train.class_counts()))
    if chooses or watched is not None or HOLDOUT * per_class >= 1:
        return dataclasses.replace(settings, holdout=HOLDOUT)
    return dataclasses.replace(settings, holdout=0.0, eval_every=settings.epochs)
