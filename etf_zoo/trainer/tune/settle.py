"""What a fine-tuning leaves open until its images are known: batch size, epochs, and whether some are held out."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from ..data.subsets import Images
from ..recipe.fields import MAX_COUNT

__all__ = ["batch_for", "epochs_for", "once", "settle", "with_length"]

HOLDOUT = 0.1  # of each class, where that is two images of it
FEWEST = 2
EPOCHS = 20
STEPS = 100  # that a training takes at least, by smaller batches and more epochs where images are few
BATCHES = (64, 32, 16)


def batch_for(images: int, epochs: int = 0) -> int:
    """The largest batch size of 64, 32 and 16 that gives 100 steps or more; else 16, or all images.

    Args:
        images: That are trained on.
        epochs: Passes over them; 0 for 20.

    Example:
        >>> batch_for(1020, 20), batch_for(170, 20), batch_for(10, 20)
        (64, 32, 10)
    """
    enough = [size for size in BATCHES if (epochs or EPOCHS) * (images // size) >= STEPS]
    return min(max(enough, default=BATCHES[-1]), images)


def epochs_for(images: int, batch_size: int) -> int:
    """20, or as many as give 100 steps.

    Example:
        >>> epochs_for(1020, 64), epochs_for(17, 16)
        (20, 100)
    """
    return max(EPOCHS, math.ceil(STEPS / max(images // batch_size, 1)))


def with_length(settings: Any, images: int) -> Any:
    """A `Finetune` recipe with numbers for the batch size and the epochs.

    Args:
        settings: The recipe.
        images: That are trained on.
    """
    batch = min(settings.batch_size or batch_for(images, settings.epochs), images)
    epochs = settings.epochs or epochs_for(images, batch)
    return dataclasses.replace(
        settings, batch_size=batch, epochs=epochs, eval_every=min(settings.eval_every, max(epochs, 1))
    )


def once(settings: Any) -> int:
    """`eval_every` or `save_every` that leaves the last epoch alone, whose number may not be known yet."""
    return settings.epochs or MAX_COUNT


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
    if chooses or watched is not None or HOLDOUT * per_class >= FEWEST:
        return dataclasses.replace(settings, holdout=HOLDOUT)
    return dataclasses.replace(settings, holdout=0.0, eval_every=once(settings))
