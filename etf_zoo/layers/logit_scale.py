"""The scale of a frame's logits: cosines alone cannot make cross-entropy small."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from ..errors import EtfZooError
from ..frames.kerdock import kerdock_core

__all__ = [
    "MAX_LOGIT_SCALE",
    "kerdock_logit_scale",
    "smoothed_probability",
    "solve_logit_scale",
    "target_cosine_scale",
]

MAX_LOGIT_SCALE = 100.0
# Rows of the Gram matrix that solve_logit_scale looks at, so that 100,000 classes need no 100,000^2 matrix.
_SCALE_ROWS = 1024


def solve_logit_scale(frame: Tensor, *, probability: float = 0.999) -> float:
    """Smallest scale at which every feature lying on its prototype gets `probability` for its class.

    For a simplex this is (K-1)/K ln((K-1) p/(1-p)). Above 1,024 classes a sample of rows stands for all.

    Args:
        frame: `(K, dim)`, unit rows.
        probability: Wanted softmax probability p.

    Returns:
        The scale, at most `MAX_LOGIT_SCALE`.

    Warns:
        UserWarning: If the frame cannot reach the probability below the cap (two prototypes nearly coincide).

    Example:
        >>> round(solve_logit_scale(simplex_etf(10, 16)), 2)  # 9/10 ln(9 * 999)
        8.19
    """
    frame = frame.detach().float().cpu()
    num_classes = frame.shape[0]
    stride = max(1, math.ceil(num_classes / _SCALE_ROWS))
    rows = torch.arange(0, num_classes, stride, device="cpu")
    gaps = 1 - frame[rows] @ frame.T  # (rows, K): how far each other prototype's cosine is below 1
    gaps[torch.arange(len(rows), device="cpu"), rows] = math.inf
    wanted = math.log((1 - probability) / probability)

    def worst(scale: float) -> Tensor:  # (rows,): log of the summed odds of all other classes
        return torch.logsumexp(-scale * gaps, dim=1)

    low, high = 0.0, MAX_LOGIT_SCALE
    if worst(high).max().item() > wanted:
        warnings.warn(
            f"No logit scale up to {MAX_LOGIT_SCALE:g} gives a feature on its prototype probability {probability}: "
            f"two of the frame's rows have cosine {1 - gaps.min().item():.4f}. Using {MAX_LOGIT_SCALE:g}; "
            f"a frame with more dimensions or neck='mlp' would help.",
            stacklevel=3,
        )
        return MAX_LOGIT_SCALE
    guess = math.log(max(num_classes - 1, 1) * probability / (1 - probability))
    gaps = gaps[torch.topk(worst(min(guess, high)), min(64, len(rows))).indices]  # bisect on the hardest rows only
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if worst(middle).max().item() > wanted else (low, middle)
    return high


def smoothed_probability(num_classes: int, label_smoothing: float) -> float:
    """What label smoothing asks a feature on its prototype to reach, 0.999 at most: for `solve_logit_scale`.

    Smoothed labels give the class 1 - e + e/K. At a scale that goes beyond, the loss is least for features that have
    left their prototype: smoothing and collapse contradict one another.

    Args:
        num_classes: K.
        label_smoothing: e, in [0, 1).

    Example:
        >>> smoothed_probability(10, 0.1)
        0.91
    """
    return min(0.999, 1 - label_smoothing + label_smoothing / num_classes)


def target_cosine_scale(scale: float, cosine: float) -> float:
    """The scale at which features want a given cosine with their prototype, instead of 1.

    With smoothing e and a simplex of K prototypes, the cross-entropy of a feature of cosine c with its own prototype,
    and equal ones with the others, is least at scale (K-1)/K ln((1-e+e/K) / (e/K)) / c. So the same c means the same
    for any K and e, where a number for the scale does not: at K = 200 and e = 0.1, scales of 12.1, 30 and 60 are
    cosines of 0.62, 0.25 and 0.12.

    Args:
        scale: That for cosine 1: `solve_logit_scale` at the `smoothed_probability`.
        cosine: c, in (0, 1].

    Returns:
        The scale, at most `MAX_LOGIT_SCALE`.

    Raises:
        EtfZooError: If the cosine lies outside (0, 1].

    Example:
        >>> scale = solve_logit_scale(simplex_etf(200, 512), probability=smoothed_probability(200, 0.1))
        >>> round(target_cosine_scale(scale, 0.25), 1)
        29.8
    """
    if not 0 < cosine <= 1:
        raise EtfZooError(f"A target cosine lies in (0, 1], got {cosine}.")
    return min(scale / cosine, MAX_LOGIT_SCALE)


def kerdock_logit_scale(num_classes: int, dim: int, *, probability: float = 0.999) -> float:
    """What `solve_logit_scale` finds of a Kerdock frame, in closed form and without the matrix.

    Args:
        num_classes: K.
        dim: Width of the features, see `kerdock_frame`.
        probability: Wanted softmax probability of a feature on its prototype.

    Returns:
        The scale, at most `MAX_LOGIT_SCALE`; where not all vectors of a basis are classes an upper bound of it.

    Example:
        >>> 0 < kerdock_logit_scale(256, 16) <= MAX_LOGIT_SCALE
        True
    """
    core = kerdock_core(dim)
    whole, rest = divmod(num_classes, 2 * core)
    # how many others have cosine 0 and, at most, 1 / sqrt(d) with a vector of a whole basis, and with one of the rest
    rows = []
    if whole:
        rows.append((2 * core - 2, (whole - 1) * core + min(rest, core)))
    if rest:
        rows.append((min(rest - 1, 2 * core - 2), whole * core))
    wanted = (1 - probability) / probability

    def odds(scale: float) -> float:
        near, far = math.exp(scale / math.sqrt(core) - scale), math.exp(-scale / math.sqrt(core) - scale)
        return max(
            side * math.exp(-scale) + count * near + max(num_classes - 1 - side - count, 0) * far
            for side, count in rows
        )

    low, high = 0.0, MAX_LOGIT_SCALE
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if odds(middle) > wanted else (low, middle)
    return high
