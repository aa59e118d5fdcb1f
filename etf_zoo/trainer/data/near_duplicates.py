"""Images that show nearly the same stay together: in one fold, or on one side of a holdout.

Photographs often come in series of one object. Held out from a series that is trained on, they measure memory: on such
data the nearest neighbor looks the best classifier to cross-validation, and is not on a test of other objects. What
features say goes further than `duplicates`, which finds the same picture, by its pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor
from torch.nn import functional as F

from .duplicates import connected

__all__ = ["NEAR", "grouped_folds", "near_duplicates"]

# Cosine of centered features. In a set of series (GroceryStore) half of the images have a neighbor so near, in sets of
# single photographs (birds) 2 to 4 %, by ResNet-18s with a learned and with a fixed head.
NEAR = 0.85
LARGEST = 0.2  # of the images may be in one group: more leave too few for the other folds
ROWS = 2048  # compared at a time


def near_duplicates(features: Tensor, near: float = NEAR) -> np.ndarray:
    """Group images whose features point the same way, seen from the mean, directly or through others between them.

    Chains may join a large part of the images, above all where features have collapsed onto few directions. A group of
    more than a fifth of them is split at ever larger cosines.

    Args:
        features: `(N, d)` of a frozen backbone.
        near: Cosine from which on two images are near-duplicates.

    Returns:
        `(N,)` group numbers, 0 to the number of groups less one.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [-1.0, 0.0], [0.0, 1.0]])
        >>> near_duplicates(features).tolist()
        [0, 0, 1, 2]
    """
    unit = F.normalize(features.float() - features.double().mean(0).float(), dim=1)
    return _split(unit, near, max(2, int(LARGEST * len(unit))))


def _split(unit: Tensor, near: float, largest: int) -> np.ndarray:
    groups = _linked(unit, near)
    if near < 0.999:
        for group in np.flatnonzero(np.bincount(groups) > largest):
            rows = np.flatnonzero(groups == group)
            parts = _split(unit[torch.from_numpy(rows)], near + (1 - near) / 4, largest)
            groups[rows] = np.where(parts == 0, group, groups.max() + parts)
    return groups


def _linked(unit: Tensor, near: float) -> np.ndarray:
    """Connected components of the graph of images that are near."""
    pairs = []
    for first in range(0, len(unit), ROWS):
        links = (unit[first : first + ROWS] @ unit[first:].T > near).nonzero()
        pairs.append((links + first).numpy())
    return connected(np.concatenate(pairs), len(unit)).astype(np.int64)


def grouped_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Folds of nearly equal classes that break no group: rows to fit on, and rows to judge by.

    A class all of whose images are in one group is never on both sides.

    Args:
        labels: `(N,)`.
        groups: `(N,)`, see `near_duplicates`.
        folds: Number of folds.
        seed: Of their choice.
    """
    with warnings.catch_warnings():  # of a class with fewer groups than folds
        warnings.simplefilter("ignore", UserWarning)
        splits = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, groups))
    yield from ((fit, judged) for fit, judged in splits if len(fit) and len(judged))
