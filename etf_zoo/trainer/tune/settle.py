"""What a fine-tuning leaves open: batch size and epochs, whether some images are held out, and the learning rate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import timm
import torch

from etf_zoo import frame_heads
from etf_zoo.models.head_config import split_head_args

from ..data.subsets import Images
from ..recipe.config import RATE, Loss
from ..recipe.fields import MAX_COUNT
from ..run.model import find_model
from .methods import has_neck
from .probes import PROBES

__all__ = ["MANY", "batch_for", "completed", "epochs_for", "head_for", "once", "rate_for", "settle", "strip_head"]

# images of a class: with fewer of most classes
MANY = 100  # a frame lies by the class means
FEW = 20  # none are held out
FEWEST = 3  # batch statistics of the backbone stay as they were
HOLDOUT = 0.1  # of each class, where there are more
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


def rate_for(method: str, head: str, freeze_bn: bool = False) -> float:
    """The learning rate by what is tuned; chosen on held-out photographs, see docs/results/photos.md.

    Example:
        >>> rate_for("full", "learned"), rate_for("full", "frame"), rate_for("head", "learned")
        (0.0005, 0.002, 0.002)
    """
    return 5e-4 if method == "full" and (freeze_bn or head in ("learned", "warm_learned")) else RATE


def completed(settings: Any, images: int) -> Any:
    """A `Finetune` recipe with numbers for the batch size, the epochs and the learning rate.

    Args:
        settings: The recipe.
        images: That are trained on.
    """
    batch = min(settings.batch_size or batch_for(images, settings.epochs), images)
    epochs = settings.epochs or epochs_for(images, batch)
    rate = settings.optim.lr or rate_for(settings.method, settings.head, settings.freeze_bn is True)
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


def strip_head(settings: Any) -> Any:
    """The recipe of the same backbone under its own classifier, which frozen features do not depend on."""
    _, args = split_head_args(settings.model_args)
    return dataclasses.replace(settings, head="learned", model_args=args, reserve=0, loss=Loss(), target_cosine=[])


def head_for(settings: Any, train: Images) -> str:
    """The head of a twin of which nothing is said: `warm` with fewer than 100 images of most classes, else `frame`.

    It is `frame` too where `warm` cannot be, or would put away what is known: from random weights, with arguments for
    the head, with classes that have no image or are more than the features, with room for later classes, and with
    weights that bring a frame for as many classes, or a neck for any.

    Args:
        settings: A `Finetune` recipe.
        train: All its training images.
    """
    counts, each = np.asarray(train.class_counts()), _images_of_most(settings, train)
    said = split_head_args(settings.model_args)[0] or settings.reserve or settings.data.limit
    if each >= MANY or not settings.pretrained or said or settings.method in PROBES or not counts.all():
        return "frame"
    source = find_model(settings.model)
    with torch.device("meta"):
        twin = timm.create_model(source.name, num_classes=len(counts), **settings.model_args)
    width = next(iter(frame_heads(twin).values())).in_features
    brought = source.num_classes == len(counts) or has_neck(twin)
    return "frame" if brought or len(counts) > width else "warm"


def _images_of_most(settings: Any, train: Images) -> float:
    """The median over classes of the images that are trained on."""
    counts = np.asarray(train.class_counts())
    return float(np.median(np.minimum(counts, settings.shots) if settings.shots else counts))


def settle(settings: Any, train: Images, watched: Images | None = None) -> Any:
    """A `Finetune` recipe with a head, and its `holdout` a number and `freeze_bn` a truth value.

    Without a holdout the test is looked at once, after the last epoch.

    Args:
        settings: The recipe.
        train: All its training images.
        watched: Images to choose by, where the data have a split for it.
    """
    if getattr(settings, "head", "") == "auto":
        settings = dataclasses.replace(settings, head=head_for(settings, train))
    if getattr(settings, "freeze_bn", None) == "auto":
        few = _images_of_most(settings, train) < FEWEST and not settings.data.limit
        settings = dataclasses.replace(settings, freeze_bn=few and settings.pretrained and settings.method == "full")
    if getattr(settings, "holdout", None) != "auto":
        return settings
    chooses = settings.patience or settings.lr == "auto"
    if chooses or watched is not None or float(np.median(train.class_counts())) >= FEW:
        return dataclasses.replace(settings, holdout=HOLDOUT)
    return dataclasses.replace(settings, holdout=0.0, eval_every=once(settings))
