"""What a fine-tuning leaves open: batch size and epochs, whether some images are held out, and the learning rate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from ..data.subsets import Images
from ..recipe.config import RATE
from ..recipe.fields import MAX_COUNT

__all__ = ["batch_for", "completed", "epochs_for", "once", "rate_for", "settle"]

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


def rate_for(method: str, head: str) -> float:
    """The learning rate by what is tuned; chosen on held-out photographs, see docs/results/photos.md.

    Example:
        >>> rate_for("full", "learned"), rate_for("full", "frame"), rate_for("head", "learned")
        (0.0005, 0.002, 0.002)
    """
    return 5e-4 if method == "full" and head in ("learned", "warm_learned") else RATE


def completed(settings: Any, images: int) -> Any:
    """A `Finetune` recipe with numbers for the batch size, the epochs and the learning rate.

    Args:
        settings: The recipe.
        images: That are trained on.
    """
    batch = min(settings.batch_size or batch_for(images, settings.epochs), images)
    epochs = settings.epochs or epochs_for(images, batch)
    rate = settings.optim.lr or rate_for(settings.method, settings.head)
    return dataclasses.replace(
        settings,
        batch_size=batch,
        epochs=epochs,
        eval_every=min(settings.eval_every, epochs),
        optim=dataclasses.replace(settings.optim, lr=rate),
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
