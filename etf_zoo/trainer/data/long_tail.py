"""Exponential long tails of balanced data, as in the imbalanced-learning literature (2203.09081 and before)."""

from __future__ import annotations

import numpy as np

from etf_zoo.errors import EtfZooError

__all__ = ["long_tail_counts", "long_tail_indices"]


def long_tail_counts(num_classes: int, max_count: int, imbalance: float) -> list[int]:
    """Class sizes that fall exponentially: max_count * imbalance^(k / (K-1)), rounded down, at least 1.

    Args:
        num_classes: K, at least 2.
        max_count: Size of the first class.
        imbalance: Size of the last class over that of the first, in (0, 1].

    Returns:
        K counts, falling.

    Raises:
        ValueError: On numbers outside these ranges.
    """
    if num_classes < 2 or max_count < 1:
        raise EtfZooError(f"A long tail needs at least 2 classes and 1 sample, got {num_classes} and {max_count}.")
    if not 0 < imbalance <= 1:
        raise EtfZooError(f"imbalance is the smallest class over the largest, in (0, 1], got {imbalance}.")
    # 1e-9: 500 * 0.01 must stay 5 whatever the power's last bit
    return [max(1, int(max_count * imbalance ** (k / (num_classes - 1)) + 1e-9)) for k in range(num_classes)]


def long_tail_indices(labels, imbalance: float, seed: int) -> np.ndarray:
    """Which samples to keep for an exponential long tail; class 0 stays the largest, as is the custom.

    Args:
        labels: `(N,)` class numbers, every class of 0..K-1 present.
        imbalance: See `long_tail_counts`, whose `max_count` is the size of the smallest class, so that every class has
            enough: the tail is then exact for classes of unequal size too.
        seed: Seed of the choice within classes; a smaller imbalance with the same seed keeps a subset.

    Returns:
        Indices, int64, ascending.

    Raises:
        ValueError: If labels are no such vector, or on an imbalance outside (0, 1].
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not len(labels) or labels.min() < 0:
        raise EtfZooError(f"Expected class numbers (N,), got {labels.dtype} {labels.shape}.")
    sizes = np.bincount(labels)
    if not sizes.all():
        raise EtfZooError(f"Classes without a sample: {np.flatnonzero(sizes == 0)[:5].tolist()}.")
    counts = long_tail_counts(len(sizes), int(sizes.min()), imbalance)
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(np.flatnonzero(labels == k))[:count] for k, count in enumerate(counts)]
    return np.sort(np.concatenate(kept)).astype(np.int64)
