"""Parts of a training split: a stratified holdout, k images a class, rows of one's own."""

from __future__ import annotations

import dataclasses

import numpy as np

from .data import Split

__all__ = ["take", "holdout_indices", "few_shot_indices", "check_classes"]


class _Rows:
    """Some rows of an array `(N, H, W, 3)` without a copy: a large split is a memory map, and stays one."""

    def __init__(self, images, rows: np.ndarray):
        self.images, self.rows = images, rows
        self.shape = (len(rows), *images.shape[1:])

    def __getitem__(self, index):
        return self.images[self.rows[index]]

    def __len__(self) -> int:
        return len(self.rows)


def take(split: Split, rows: np.ndarray) -> Split:
    """Some images of a split, in the order of `rows`; the names of the classes stay."""
    rows = np.asarray(rows, dtype=np.int64)
    images: np.ndarray = _Rows(split.images, rows)  # type: ignore[assignment]
    return dataclasses.replace(split, images=images, labels=split.labels[rows])


def holdout_indices(labels, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off a share of each class, at least one image, at most all but one: a class of one image stays whole.

    Args:
        labels: `(N,)` class numbers.
        share: Share to hold out, in (0, 1).
        seed: Seed of the choice.

    Returns:
        Indices that stay and indices held out, both ascending.

    Raises:
        ValueError: If the share lies outside (0, 1) or no class has two images.
    """
    labels = np.asarray(labels)
    if not 0 < share < 1:
        raise ValueError(f"holdout is a share of the training images in (0, 1), 0 for none; got {share}.")
    rng = np.random.default_rng([seed, 3])
    held = []
    for k in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == k))
        held.append(rows[: min(max(1, round(share * len(rows))), len(rows) - 1)])
    chosen = np.sort(np.concatenate(held))
    if not len(chosen):
        raise ValueError("No class has two images, so none can be held out. Set holdout to 0.")
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


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
        raise ValueError(f"shots must be positive, got {shots}.")
    counts = np.bincount(labels, minlength=len(names))
    short = np.flatnonzero(counts < shots)
    if len(short):
        worst = short[counts[short].argmin()]
        raise ValueError(
            f"{len(short)} of {len(names)} classes have fewer than {shots} images for training, such as "
            f"{names[worst]!r} with {counts[worst]}. Ask for at most {counts.min()} shots, or hold out less."
        )
    rng = np.random.default_rng([seed, 4])
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == k))[:shots] for k in range(len(names))]))


def check_classes(train: Split, test: Split) -> None:
    """Raise ValueError on one class only, different names, or classes in the test that training lacks."""
    present = np.unique(train.labels)
    if len(present) < 2:
        names = ", ".join(train.label_names[k] for k in present) or "none"
        raise ValueError(
            f"The training images of {train.source} are all of one class ({names}); a classifier needs at least 2."
        )
    if train.label_names != test.label_names and set(test.label_names) - set(train.label_names):
        unknown = [name for name in test.label_names if name not in set(train.label_names)]
    else:
        unknown = [
            test.label_names[k]
            for k in np.unique(test.labels)
            if test.label_names[k] not in {train.label_names[j] for j in present}
        ]
    if unknown:
        raise ValueError(
            f"The test images of {test.source} have {len(unknown)} classes without a training image, such as "
            f"{unknown[0]!r}. Add training images of these, or take them out of the test."
        )
    if train.label_names != test.label_names:
        raise ValueError(f"Training and test images of {train.source} number their classes differently.")
