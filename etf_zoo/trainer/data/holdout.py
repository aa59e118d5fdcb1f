"""Images that are held out of training: a share of each class, near-duplicates on one side."""

from __future__ import annotations

from collections import Counter

import numpy as np

from etf_zoo.errors import EtfZooError

__all__ = ["holdout_indices"]


def holdout_indices(labels, share: float, seed: int, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Split off a share of each class, at least one image, at most all but one: a class of one image stays whole.

    Args:
        labels: `(N,)` class numbers.
        share: Share to hold out, in (0, 1).
        seed: Seed of the choice.
        groups: `(N,)` numbers of groups that stay on one side, such as near-duplicates (`duplicates.group_rows`); by
            default each image is its own. A group as large as its class stays whole in training.

    Returns:
        Indices that stay and indices held out, both ascending.

    Raises:
        ValueError: If the share lies outside (0, 1) or no class has two images.
    """
    labels = np.asarray(labels)
    if not 0 < share < 1:
        raise EtfZooError(f"holdout is a share of the training images in (0, 1), 0 for none; got {share}.")
    rng = np.random.default_rng([seed, 3])
    members: dict[int, list[int]] = {}
    for row, group in enumerate(range(len(labels)) if groups is None else groups.tolist()):
        members.setdefault(group, []).append(row)
    of_row = np.arange(len(labels)) if groups is None else groups
    left = Counter(labels.tolist())
    is_held = np.zeros(len(labels), dtype=bool)
    for k in sorted(left):
        rows = rng.permutation(np.flatnonzero(labels == k))
        wanted = min(max(1, round(share * len(rows))), len(rows) - 1)
        around = [members[group] for group in dict.fromkeys(of_row[rows].tolist())]
        # those that fit in a random order; if none does, the smallest
        for most, group in [(wanted, group) for group in around] + [(0, group) for group in sorted(around, key=len)]:
            held = len(rows) - left[k]
            lost = Counter(labels[group].tolist())
            fits = lost[k] <= wanted - held if most else held == 0 < wanted
            if fits and not is_held[group[0]] and all(left[c] > n for c, n in lost.items()):
                is_held[group] = True
                left.subtract(lost)
    if not is_held.any():
        raise EtfZooError("No class has two images that differ, so none can be held out. Set holdout to 0.")
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)
