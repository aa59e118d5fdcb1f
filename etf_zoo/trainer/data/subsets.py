"""Parts of a training split: a stratified holdout, k images a class, a long tail, the first so many."""

from __future__ import annotations

from typing import Any

import numpy as np

from etf_zoo.errors import EtfZooError

from ..recipe.config import Data
from .batches import Rows, Split, Stream, limited_rows, load_split
from .holdout import holdout_indices
from .long_tail import long_tail_indices

__all__ = [
    "Images",
    "check_classes",
    "few_shot_indices",
    "holdout_indices",
    "load_images",
    "split_training",
    "training_rows",
]

Images = Split | Rows  # a split with a length and labels at hand, resident or not


def load_images(data: Data, split: str) -> Images:
    """A split that is no stream.

    Raises:
        ValueError: See `load_split`; on a stream.
    """
    found = load_split(data, split)
    if isinstance(found, Stream):
        raise EtfZooError("Choosing among images needs all of them at hand: set data.streaming to false.")
    return found


def few_shot_indices(labels, shots: int, seed: int, names: list[str]) -> np.ndarray:
    """`shots` images of each class; fewer shots with the same seed are a subset.

    Args:
        labels: `(N,)` class numbers.
        shots: Images a class, at least 1.
        seed: Seed of the choice.
        names: Of the classes.

    Returns:
        Indices, ascending.

    Raises:
        ValueError: If a class has fewer images.
    """
    labels = np.asarray(labels)
    if shots < 1:
        raise EtfZooError(f"shots must be positive, got {shots}.")
    counts = np.bincount(labels, minlength=len(names))
    short = np.flatnonzero(counts < shots)
    if len(short):
        worst = short[counts[short].argmin()]
        raise EtfZooError(
            f"{len(short)} of {len(names)} classes have fewer than {shots} images for training, such as "
            f"{names[worst]!r} with {counts[worst]}. Ask for at most {counts.min()} shots, or hold out less."
        )
    rng = np.random.default_rng([seed, 4])
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == k))[:shots] for k in range(len(names))]))


def training_rows(
    labels,
    names: list[str],
    *,
    holdout: float = 0.0,
    shots: int = 0,
    long_tail: float = 0.0,
    limit: int = 0,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Which training images to fit on, and which to watch.

    Args:
        labels: `(N,)` class numbers of all training images.
        names: Of the classes.
        holdout: Share of each class to watch; 0 for none. Taken first: few-shot training sees `shots` others.
        shots: Then so many images of each class; 0 for all.
        long_tail: Or an exponential long tail, see `long_tail_indices`; 0 for none.
        limit: Of these the first so many of a fixed shuffle, see `limited_rows`; 0 for all.
        seed: Seed of all choices.
        groups: `(N,)` numbers of groups that stay on one side of the holdout.

    Returns:
        Indices to fit on and to watch, both ascending.

    Raises:
        ValueError: See the other functions here; on both shots and long_tail.
    """
    if shots and long_tail:
        raise EtfZooError("shots and data.long_tail are two ways to choose training images: set one.")
    labels = np.asarray(labels)
    rows, watched = np.arange(len(labels)), np.arange(0)
    if holdout:
        rows, watched = holdout_indices(labels, holdout, seed, groups)
    if shots:
        rows = rows[few_shot_indices(labels[rows], shots, seed, names)]
    if long_tail:
        rows = rows[long_tail_indices(labels[rows], long_tail, seed)]
    return np.sort(rows[limited_rows(len(rows), limit, seed)]), watched


def split_training(split: Images, **choice: Any) -> tuple[Images, Images | None]:
    """The training images by `training_rows`, to fit on and to watch; None for the latter if nothing is held out."""
    rows, watched = training_rows(split.labels, split.label_names, **choice)
    return split.subset(rows), split.subset(watched) if len(watched) else None


def check_classes(train: Images, test: Images) -> None:
    """Raise ValueError on one class only, different names, or classes in the test that training lacks."""
    present = np.unique(train.labels)
    if len(present) < 2:
        names = ", ".join(train.label_names[k] for k in present) or "none"
        raise EtfZooError(
            f"The training images of {train.source} are all of one class ({names}); a classifier needs at least 2."
        )
    known = {train.label_names[k] for k in present}
    unknown = [test.label_names[k] for k in np.unique(test.labels) if test.label_names[k] not in known]
    if unknown:
        raise EtfZooError(
            f"The test images of {test.source} have {len(unknown)} classes without a training image, such as "
            f"{unknown[0]!r}. Add training images of these, or take them out of the test."
        )
    if train.label_names[: len(test.label_names)] != test.label_names:
        raise EtfZooError(f"Training and test images of {train.source} number their classes differently.")
