"""What a run says of its data before it trains: what was found, how much of each class, and what is odd."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .duplicates import MOST, shared_images
from .layouts import Found, shown
from .sources import Chosen

__all__ = ["describe_found", "describe_shared", "describe_split", "is_imbalanced"]

LISTED = 20  # classes: of more, the largest and the smallest are named
IMBALANCED = 10  # times as many images in the largest class as in the smallest


def describe_found(split: Chosen) -> list[str]:
    """The source, how its files lie, and what was left out."""
    found: Found | None = getattr(split, "found", None)
    return found.lines() if found else [f"Data: {split.source}"]  # type: ignore[attr-defined]


def describe_split(what: str, split: Chosen) -> list[str]:
    """Images and classes of a part, the largest and the smallest class, and classes without an image.

    Args:
        what: What the part is for, such as `training`.
        split: Its images.

    Example:
        >>> from etf_zoo.trainer.data.batches import Split
        >>> split = Split(np.zeros((3, 1, 1, 3), np.uint8), np.array([0, 0, 1]), ["a", "b", "c"], "photos")
        >>> describe_split("test", split)
        ['  test: 3 images of 2 classes (a 2, b 1)', '  test: no image of c']
    """
    counts = dict(zip(split.label_names, split.class_counts(), strict=True))
    present = {name: n for name, n in counts.items() if n}
    by_size = sorted(present, key=lambda name: -present[name])
    if len(present) > LISTED:
        sizes = f"largest {by_size[0]} {present[by_size[0]]}, smallest {by_size[-1]} {present[by_size[-1]]}"
    else:
        sizes = ", ".join(f"{name} {present[name]}" for name in by_size)
    lines = [f"  {what}: {len(split):,} images of {len(present)} classes ({sizes})"]
    if missing := [name for name in counts if name not in present]:
        lines.append(f"  {what}: no image of {shown(missing)}")
    return lines


def describe_shared(train: Chosen, other: Chosen, what: str) -> list[str]:
    """Images of a part that are in training too: its figure is too good by as much.

    Args:
        train: Training images.
        other: The part's.
        what: What the part is for.
    """
    if max(len(train), len(other)) > MOST:
        return [f"  {what}: not searched for images that are in training too, as there are more than {MOST:,}"]
    lines = []
    for pairs, how in zip(shared_images(train, other), ("in training too", "much like one in training"), strict=True):
        rows = np.unique(pairs[:, 1])
        if len(rows):
            own, twin = int(pairs[0, 1]), int(pairs[0, 0])
            labels = other.labels[pairs[:, 1]] != train.labels[pairs[:, 0]]
            differ = f", {len(np.unique(pairs[labels, 1]))} of them with another label" if labels.any() else ""
            lines.append(
                f"  {what}: {'1 image is' if len(rows) == 1 else f'{len(rows)} images are'} {how}{differ}, such as "
                f"{_short(other.where(own), other)} (there {_short(train.where(twin), train)})"
            )
    return lines


def _short(where: str, split: Chosen) -> str:
    """A path from the data's folder on."""
    folder = Path(split.source)  # type: ignore[attr-defined]
    path = Path(where)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else where


def is_imbalanced(split: Chosen) -> bool:
    """Whether the largest class has ten times as many images as the smallest that has any."""
    counts = [n for n in split.class_counts() if n]
    return bool(counts) and max(counts) >= IMBALANCED * min(counts)
