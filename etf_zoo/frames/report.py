"""How good a frame is: its cosines beside the bounds no frame can beat.

The bounds: L. R. Welch, Lower bounds on the maximum cross correlation of signals, IEEE Transactions on Information
Theory 20 (1974), pages 397 to 399; R. A. Rankin, The closest packing of spherical caps in n dimensions, Proceedings of
the Glasgow Mathematical Association 2 (1955), pages 139 to 144.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EtfZooError
from .kerdock import check_kerdock_fits, kerdock_core
from .numerics import check_finite_matrix
from .simplex import check_simplex_fits

__all__ = ["FrameReport", "frame_report", "kerdock_report", "simplex_report"]


@dataclass(frozen=True)
class FrameReport:
    """What `frame_report` measures.

    Attributes:
        num_classes: K.
        dim: d.
        largest_cosine: Largest cosine between two different rows; what a classifier's margin depends on.
        coherence: Largest absolute cosine.
        welch_bound: No frame of K > d vectors has a smaller coherence than sqrt((K-d) / (d (K-1))) (Welch 1974); 0 for
            K <= d.
        rankin_bound: No K vectors in d dimensions have a smaller largest cosine: -1/(K-1) for K <= d + 1, else 0
            (Rankin 1955), which is reached up to K = 2 d.
        equiangularity_error: Largest deviation of a cosine from -1/(K-1), 0 for a simplex ETF.
        tightness_error: Relative spread of the nonzero eigenvalues of W^T W, 0 for a tight frame (in its span).
    """

    num_classes: int
    dim: int
    largest_cosine: float
    coherence: float
    welch_bound: float
    rankin_bound: float
    equiangularity_error: float
    tightness_error: float


def frame_report(weight: Tensor) -> FrameReport:
    """Measure a frame.

    Args:
        weight: `(K, dim)`; rows are normalized first.

    Returns:
        A `FrameReport`. Computed in float64 by blocks of rows, so 20,000 classes need no 20,000^2 matrix.

    Raises:
        ValueError: If `weight` is not a matrix of at least two rows, all finite and nonzero.
    """
    check_finite_matrix(weight, "The frame")
    if weight.shape[0] < 2:
        raise EtfZooError(f"Expected a matrix (num_classes, dim) of at least two rows, got {tuple(weight.shape)}.")
    w = weight.detach().cpu().double()
    norms = w.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise EtfZooError("A row of the frame is zero or not finite and has no direction.")
    w = w / norms
    k, dim = w.shape
    ideal = -1 / (k - 1)
    largest, smallest = -math.inf, math.inf
    for start in range(0, k, 1024):
        cosines = w[start : start + 1024] @ w.T
        own = torch.arange(len(cosines), device="cpu")
        cosines[own, start + own] = -math.inf
        largest = max(largest, cosines.max().item())
        cosines[own, start + own] = math.inf
        smallest = min(smallest, cosines.min().item())
    spectrum = torch.linalg.svdvals(w).square()
    spectrum = spectrum[spectrum > spectrum[0] * 1e-6]  # float32 rows leave eigenvalues of about 1e-14, not zeros
    return FrameReport(
        num_classes=k,
        dim=dim,
        largest_cosine=largest,
        coherence=max(abs(largest), abs(smallest)),
        welch_bound=_welch(k, dim),
        rankin_bound=ideal if k <= dim + 1 else 0.0,
        equiangularity_error=max(abs(largest - ideal), abs(smallest - ideal)),
        tightness_error=((spectrum.max() - spectrum.min()) / spectrum.mean()).item(),
    )


def simplex_report(num_classes: int, dim: int) -> FrameReport:
    """What `frame_report` finds of a simplex ETF, in closed form and without the matrix.

    Args:
        num_classes: K.
        dim: d, at least K - 1.

    Raises:
        ValueError: If the simplex does not fit.
    """
    check_simplex_fits(num_classes, dim)
    ideal = -1 / (num_classes - 1)
    return FrameReport(
        num_classes=num_classes,
        dim=dim,
        largest_cosine=ideal,
        coherence=-ideal,
        welch_bound=_welch(num_classes, dim),
        rankin_bound=ideal,
        equiangularity_error=0.0,
        tightness_error=0.0,
    )


def kerdock_report(num_classes: int, dim: int) -> FrameReport:
    """What `frame_report` finds of a Kerdock frame, in closed form and without the matrix.

    Args:
        num_classes: K.
        dim: d.

    Raises:
        ValueError: If the frame does not fit.
    """
    check_kerdock_fits(num_classes, dim)
    core = kerdock_core(dim)
    whole, rest = divmod(num_classes, 2 * core)
    step = 1 / math.sqrt(core) if num_classes > 2 * core else 0.0
    smallest = -1.0 if num_classes > core else -step
    ideal = -1 / (num_classes - 1)
    # a basis and its negatives add 2 to all eigenvalues, the rest of the last basis 1 for each vector
    twice = max(rest - core, 0)
    once = rest - 2 * twice
    counts = {2 * whole + 2: twice, 2 * whole + 1: once, 2 * whole: core - twice - once}
    spectrum = {value: count for value, count in counts.items() if value and count}
    mean = sum(value * count for value, count in spectrum.items()) / sum(spectrum.values())
    return FrameReport(
        num_classes=num_classes,
        dim=dim,
        largest_cosine=step,
        coherence=max(step, -smallest),
        welch_bound=_welch(num_classes, dim),
        rankin_bound=ideal if num_classes <= dim + 1 else 0.0,
        equiangularity_error=max(step - ideal, ideal - smallest),
        tightness_error=(max(spectrum) - min(spectrum)) / mean,
    )


def _welch(k: int, dim: int) -> float:
    return math.sqrt((k - dim) / (dim * (k - 1))) if k > dim else 0.0
