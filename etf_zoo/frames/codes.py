"""Frames for more classes than dim + 1, where no simplex fits, and the random control."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import EtfZooError
from .numerics import derived_seed, seeded
from .orientation import resolve_orientation
from .simplex import check_sizes, haar_columns, helmert_basis, simplex_etf

__all__ = ["orthogonal_simplices", "random_frame", "quick_code", "best_frame"]

# Multiply-adds the quick code may spend on polishing: about a second on two cores.
_POLISH_BUDGET = 3e10
_POLISH_STEPS = 60


def orthogonal_simplices(num_classes: int, dim: int, *, seed: int = 0) -> Tensor:
    """K - dim mutually orthogonal simplices of as equal sizes as can be: largest cosine 0, Rankin's optimum.

    The two ends are the simplex (K = dim + 1) and the orthoplex (K = 2 dim). The arrangement is rotated by a Haar
    random rotation, never axis-aligned, and which classes share a simplex is drawn too: labels are often ordered by
    meaning, and neighbors would else be as far apart as can be (antipodes at K = 2 dim), for no reason of theirs.

    Args:
        num_classes: K, with dim < K <= 2 dim.
        dim: Feature dimension.
        seed: Seed of the rotation and of the order of classes.

    Returns:
        Float32 `(num_classes, dim)`, unit rows.

    Raises:
        ValueError: If K <= dim or K > 2 dim.
    """
    check_sizes(num_classes, dim)
    if not dim < num_classes <= 2 * dim:
        raise EtfZooError(
            f"Orthogonal simplices need dim < num_classes <= 2 * dim, got {num_classes} classes in {dim} dimensions. "
            f"Use frame='auto', which picks the right arrangement."
        )
    count = num_classes - dim
    small, larger = divmod(num_classes, count)
    frame = torch.zeros(num_classes, dim, dtype=torch.float64, device="cpu")
    row = column = 0
    for i in range(count):
        size = small + (i < larger)
        frame[row : row + size, column : column + size - 1] = math.sqrt(size / (size - 1)) * helmert_basis(size)
        row, column = row + size, column + size - 1
    order = torch.randperm(num_classes, generator=seeded(derived_seed(seed, 1)), device="cpu")
    return (frame[order] @ haar_columns(dim, dim, seed).T).float()


def random_frame(num_classes: int, dim: int, *, seed: int = 0) -> Tensor:
    """Independent unit vectors, uniform on the sphere: the control that separates *fixed* from *well arranged*.

    Args:
        num_classes: K, at least 2.
        dim: Feature dimension, at least 1.
        seed: Seed of the generator.

    Returns:
        Float32 `(num_classes, dim)`, unit rows.

    Raises:
        ValueError: On fewer than 2 classes or 1 dimension.
    """
    check_sizes(num_classes, dim)
    generator = seeded(seed)
    gaussian = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64, device="cpu")
    return F.normalize(gaussian, dim=1).float()


def quick_code(num_classes: int, dim: int, *, seed: int = 0) -> Tensor:
    """Spherical code good enough to start from, in about a second: K unit vectors with a low largest cosine.

    Haar random orthonormal bases stacked, then a fixed number of annealed log-sum-exp gradient steps on all pairs
    where they are affordable (K^2 dim up to about 5e8, so K = 1000, dim = 512; beyond, fewer steps or none).
    It is not an optimum.

    Args:
        num_classes: K, at least 2.
        dim: Feature dimension, at least 1.
        seed: Seed of the bases.

    Returns:
        Float32 `(num_classes, dim)`, unit rows.

    Raises:
        ValueError: On fewer than 2 classes or 1 dimension.
    """
    check_sizes(num_classes, dim)
    bases = [haar_columns(dim, dim, derived_seed(seed, i)).T for i in range(math.ceil(num_classes / dim))]
    frame = torch.cat(bases)[:num_classes].float()
    steps = min(_POLISH_STEPS, int(_POLISH_BUDGET / (2 * num_classes**2 * dim)))
    if dim == 1 or steps < 10:
        return frame
    target = random_frame(min(num_classes, 256), dim, seed=seed).std().item()  # typical cosine, 1/sqrt(dim)
    best, best_cosine = frame, math.inf
    for step in range(steps + 1):
        gram = frame @ frame.T
        gram.fill_diagonal_(-1)
        largest = gram.max().item()
        if largest < best_cosine:
            best, best_cosine = frame, largest
        sharpness = (4 + 16 * step / steps) / target
        push = torch.softmax(sharpness * gram, dim=1)
        push = (push + push.T) @ frame
        push = push - (push * frame).sum(1, keepdim=True) * frame
        length = 0.5 * target * (1 - step / (steps + 1))
        frame = F.normalize(frame - length * push, dim=1)
    return best


def best_frame(num_classes: int, dim: int, *, orientation: str = "auto", seed: int = 0) -> Tensor:
    """Best frame that can be had at once for `num_classes` directions in `dim` dimensions; `frame="auto"`.

    K <= dim + 1: the simplex ETF. dim + 1 < K <= 2 dim: orthogonal simplices (largest cosine 0, optimal).
    K > 2 dim: a quick spherical code.

    Args:
        num_classes: K, at least 2.
        dim: Feature dimension, at least 1.
        orientation: See `simplex_etf`; `"blocks"` needs K <= dim, where the frame is a simplex.
        seed: Seed of the arrangement.

    Returns:
        Float32 `(num_classes, dim)`, unit rows.

    Raises:
        ValueError: On sizes that make no sense or an orientation that does not fit.
    """
    check_sizes(num_classes, dim)
    resolve_orientation(orientation, num_classes, dim)
    if num_classes <= dim + 1:
        return simplex_etf(num_classes, dim, orientation=orientation, seed=seed)
    if num_classes <= 2 * dim:
        return orthogonal_simplices(num_classes, dim, seed=seed)
    return quick_code(num_classes, dim, seed=seed)
