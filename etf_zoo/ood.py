"""Is an image of a class that the model knows? One score each; higher is more familiar.

All take what a model with a frame gives: features `(N, in_features)`, `embeddings = head.embed(features)` and logits.
Two are fitted to training features first. `familiarity` is what `etf-zoo predict --reject` uses. Measured in
`docs/later_classes.md`.

Example:
    >>> head = FrameClassifier(8, 3)
    >>> features = head.weight + 0.01 * torch.randn(3, 8)
    >>> bool((largest_cosine(head.embed(features), head.weight) > 0.9).all())
    True
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import EtfZooError
from .frames.numerics import at_least_float32, unit

__all__ = [
    "FAMILIARITY_NAME",
    "energy",
    "familiarity",
    "feature_length",
    "fit_means",
    "largest_cosine",
    "mean_cosine",
    "neighbor_cosine",
    "read_threshold",
    "span_share",
    "threshold",
    "write_familiarity",
]

FAMILIARITY_NAME = "familiarity.json"  # beside a model: scores of held-out training images
_MOST = 1001  # scores that are kept of more: enough for thresholds in steps of a thousandth


def largest_cosine(embeddings: Tensor, frame: Tensor) -> Tensor:
    """Cosine of each embedding with its nearest prototype.

    Args:
        embeddings: `(N, dim)`, of any length; a zero embedding has cosine 0 with all.
        frame: `(K, dim)`, unit rows.

    Returns:
        `(N,)`, in [-1, 1].

    Raises:
        EtfZooError: If the widths differ.
    """
    _check_width(embeddings, frame, "The frame")
    return (unit(embeddings) @ frame.to(at_least_float32(embeddings).dtype).T).amax(dim=1)


def feature_length(features: Tensor) -> Tensor:
    """Euclidean length of each feature `(N, d)`: networks tend to give unfamiliar images short features (1811.04110).

    Returns:
        `(N,)`.
    """
    return at_least_float32(features).norm(dim=1)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Negative free energy :math:`T \log\sum_k \exp(z_k / T)` (2010.03759).

    Args:
        logits: `(N, K)`.
        temperature: T.

    Returns:
        `(N,)`.

    Raises:
        EtfZooError: On a temperature that is not positive.
    """
    if not temperature > 0:
        raise EtfZooError(f"A temperature is positive, got {temperature}.")
    return temperature * torch.logsumexp(at_least_float32(logits) / temperature, dim=1)


def span_share(embeddings: Tensor, frame: Tensor) -> Tensor:
    """Share of each embedding's squared length that lies in the span of the prototypes.

    Collapse moves the features of known classes into that span (as 2203.10807's residual reads a learned classifier).
    It says nothing where the span is the whole space: K > dim.

    Args:
        embeddings: `(N, dim)`.
        frame: `(K, dim)`, of any rank.

    Returns:
        `(N,)`, in [0, 1]; 0 for a zero embedding.

    Raises:
        EtfZooError: If the widths differ.
    """
    _check_width(embeddings, frame, "The frame")
    _, values, axes = torch.linalg.svd(frame.double(), full_matrices=False)
    axes = axes[values > values.max() * 1e-5]  # the float32 rows of a simplex sum to zero up to rounding
    return (unit(embeddings) @ axes.T.to(at_least_float32(embeddings).dtype)).square().sum(dim=1).clamp(max=1.0)


def fit_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean direction of each class, for `mean_cosine`.

    Args:
        features: `(N, d)`, of training images.
        labels: `(N,)` class numbers.
        num_classes: K.

    Returns:
        Unit rows `(K, d)`.

    Raises:
        EtfZooError: If a class has no image, or labels do not fit.
    """
    if labels.shape != features.shape[:1] or not len(labels):
        raise EtfZooError(
            f"Expected features (N, d) and labels (N,), got {tuple(features.shape)}, {tuple(labels.shape)}."
        )
    counts = torch.bincount(labels, minlength=num_classes)
    if len(counts) > num_classes or not bool(counts.all()):
        raise EtfZooError(f"Each of {num_classes} classes needs training images, got counts {counts.tolist()}.")
    directions = unit(features)
    return unit(torch.zeros(num_classes, features.shape[1], dtype=directions.dtype).index_add_(0, labels, directions))


def mean_cosine(features: Tensor, means: Tensor) -> Tensor:
    """Cosine of each feature with the nearest class mean.

    Args:
        features: `(N, d)`.
        means: From `fit_means`.

    Returns:
        `(N,)`.
    """
    _check_width(features, means, "The matrix of means")
    return (unit(features) @ means.T).amax(dim=1)


def neighbor_cosine(features: Tensor, gallery: Tensor, k: int = 10) -> Tensor:
    """Cosine of each feature with its k-th nearest training feature (2204.06507).

    Args:
        features: `(N, d)`.
        gallery: Training features `(M, d)`; there is nothing else to fit.
        k: Which neighbor, at most M.

    Returns:
        `(N,)`.

    Raises:
        EtfZooError: On a k out of range or other widths.
    """
    _check_width(features, gallery, "The gallery")
    if not 1 <= k <= len(gallery):
        raise EtfZooError(f"k lies between 1 and {len(gallery)}, the number of training features, got {k}.")
    references = unit(gallery)
    parts = [(unit(rows) @ references.T).topk(k, dim=1).values[:, -1] for rows in features.split(1024)]
    return torch.cat(parts) if parts else features.new_zeros(0)


def familiarity(logits: Tensor) -> Tensor:
    """Largest logit: of a frame the largest cosine times the scale; of a learned classifier a usual score (1911.11132).

    Args:
        logits: `(N, K)`.

    Returns:
        `(N,)`, float32 at least.
    """
    return at_least_float32(logits).amax(dim=1)


def threshold(scores: Tensor | Sequence[float], reject: float) -> float:
    """Score below which an image counts as unfamiliar.

    Args:
        scores: Of familiar images that were not trained on, `(N,)`.
        reject: Largest share of such images that one is willing to lose, in [0, 1).

    Returns:
        A score: at most `reject * N` of the N scores lie below it.

    Raises:
        EtfZooError: On a share out of range, too few scores for it, or some that are not finite.

    Example:
        >>> threshold([3.0, 1.0, 2.0, 4.0], 0.25)
        2.0
    """
    ordered = torch.as_tensor(scores, dtype=torch.float64).sort().values
    if not 0 <= reject < 1:
        raise EtfZooError(f"The share of familiar images to lose lies in [0, 1), got {reject}.")
    if not len(ordered) or not bool(ordered.isfinite().all()):
        raise EtfZooError("A threshold needs scores of familiar images, all of them finite.")
    if 0 < reject * len(ordered) < 1:
        share = math.ceil(1000 / len(ordered)) / 1000  # rounded up, else it would be refused too
        raise EtfZooError(
            f"{len(ordered)} held-out images cannot tell a share of {reject:g}: take at least {share:g}, "
            f"or hold out more images in training."
        )
    return ordered[math.floor(reject * len(ordered) + 1e-9)].item()


def write_familiarity(folder: str | Path, scores: Tensor) -> Path:
    """Write scores of held-out training images beside a model, for `read_threshold`.

    Args:
        folder: Model folder.
        scores: `(N,)`, of `familiarity`. Of more than 1,001 so many are kept, evenly over the sorted ones.
    """
    ordered = scores.double().cpu().sort().values
    if len(ordered) > _MOST:
        ordered = ordered[torch.linspace(0, len(ordered) - 1, _MOST, dtype=torch.float64).floor().long()]
    file = Path(folder) / FAMILIARITY_NAME
    entry = {"score": "largest logit", "images": len(scores), "scores": [round(x, 6) for x in ordered.tolist()]}
    file.write_text(json.dumps(entry) + "\n", encoding="utf-8")
    return file


def read_threshold(folder: str | Path | None, reject: float) -> float:
    """Threshold of a model for a share of familiar images that one is willing to lose.

    Args:
        folder: Model folder; None for a model that is none.
        reject: See `threshold`.

    Raises:
        EtfZooError: If nothing was stored with the model, or it cannot be read.
    """
    file = None if folder is None else Path(folder) / FAMILIARITY_NAME
    if file is None or not file.is_file():
        raise EtfZooError(
            f"--reject needs {FAMILIARITY_NAME} beside the model: etf-zoo finetune writes it from held-out training "
            f"images (--holdout 0.1). Fine-tune the model on your classes first."
        )
    try:
        scores = [float(score) for score in json.loads(file.read_text(encoding="utf-8"))["scores"]]
    except (ValueError, KeyError, TypeError) as error:
        raise EtfZooError(f"{file} cannot be read ({error}). Fine-tune the model again, or remove it.") from None
    return threshold(scores, reject)


def _check_width(rows: Tensor, matrix: Tensor, what: str) -> None:
    if rows.ndim != 2 or matrix.ndim != 2 or rows.shape[1] != matrix.shape[1]:
        raise EtfZooError(f"{what} has shape {tuple(matrix.shape)}, the features {tuple(rows.shape)}: widths differ.")
