"""Simplex equiangular tight frames: K unit vectors with every pairwise cosine equal to -1/(K-1).

Sources: Papyan, Han & Donoho (2008.08186) for the geometry of neural collapse; Pernici et al. and Yang et al.
(2203.09081) for using it as a fixed classifier.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from ..errors import EtfZooError
from .numerics import check_finite_matrix, seeded
from .orientation import block_indicators, resolve_orientation
from .polar import polar_factor

MAX_SIZE = 20_000_000  # classes or dimensions: more than the 16.8 million of the largest Kerdock frame fit no memory

__all__ = ["simplex_etf", "nearest_simplex_etf", "helmert_basis", "helmert_coordinates", "haar_columns"]


def helmert_basis(num_classes: int) -> Tensor:
    """Orthonormal basis of the hyperplane orthogonal to the all-ones vector.

    Args:
        num_classes: K, at least 2.

    Returns:
        Float64 `(K, K-1)` with orthonormal columns, each summing to zero.
    """
    k = num_classes
    # column j: j entries 1/sqrt(j(j+1)), then -j/sqrt(j(j+1))
    j = torch.arange(1, k, dtype=torch.float64, device="cpu")
    basis = torch.triu(torch.ones(k, k - 1, dtype=torch.float64, device="cpu")) / torch.sqrt(j * (j + 1))
    rows = torch.arange(1, k, device="cpu")
    basis[rows, rows - 1] = -torch.sqrt(j / (j + 1))
    return basis


def helmert_coordinates(matrix: Tensor) -> Tensor:
    r"""Coordinates :math:`H^\top A` of a matrix's columns in the Helmert basis, in O(K d) and without the matrix H.

    Args:
        matrix: A, `(K, ...)`.

    Returns:
        Float64 `(K-1, ...)`, on the CPU: not every device has float64.
    """
    a = matrix.detach().cpu().double()
    a = a - a.mean(dim=0)  # H does not see the mean, but the sums below would round it
    j = torch.arange(1, len(a), dtype=torch.float64, device="cpu").view(-1, *[1] * (a.ndim - 1))
    return (a.cumsum(dim=0)[:-1] - j * a[1:]) / torch.sqrt(j * (j + 1))


def haar_columns(dim: int, columns: int, seed: int) -> Tensor:
    """Orthonormal columns drawn uniformly (Haar measure), from a generator of its own.

    QR of a Gaussian matrix is Haar only after the signs of R's diagonal are moved into Q; QR of a uniform [0, 1)
    matrix, as in some published code, is not Haar at all (its first column points along the all-ones vector).

    Args:
        dim: Length d of a column.
        columns: How many, at most `dim`.
        seed: Seed of the generator.

    Returns:
        Float64 `(dim, columns)`.
    """
    generator = seeded(seed)
    gaussian = torch.randn(dim, columns, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    signs = torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(torch.float64)
    return q * signs


def check_sizes(num_classes: int, dim: int) -> None:
    """Raise ValueError unless a frame of `num_classes` vectors in `dim` dimensions makes sense at all."""
    for name, value in (("num_classes", num_classes), ("dim", dim)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise EtfZooError(f"{name} is a whole number, got {value!r}.")
        if value > MAX_SIZE:
            raise EtfZooError(f"{name} is at most {MAX_SIZE:,}, got {value}.")
    if num_classes < 2:
        raise EtfZooError(f"A frame needs at least 2 classes, got num_classes={num_classes}.")
    if dim < 1:
        raise EtfZooError(f"A frame needs at least 1 dimension, got dim={dim}.")


def check_simplex_fits(num_classes: int, dim: int) -> None:
    """Raise ValueError, naming the ways out, unless a simplex of `num_classes` vectors fits `dim` dimensions."""
    check_sizes(num_classes, dim)
    check_room(
        "simplex ETF",
        num_classes,
        dim,
        f"Use frame='auto' (the best known frame for {dim} dimensions), or neck='mlp' or neck='residual', which widen "
        f"the features to {num_classes - 1}.",
    )


def check_room(what: str, num_classes: int, dim: int, way_out: str) -> None:
    """Raise ValueError, naming the way out, unless there are the K - 1 dimensions that a frame needs."""
    check_sizes(num_classes, dim)
    if dim < num_classes - 1:
        raise EtfZooError(
            f"A {what} of {num_classes} classes needs at least {num_classes - 1} dimensions, got {dim}. {way_out}"
        )


def simplex_etf(num_classes: int, dim: int, *, orientation: str = "auto", seed: int = 0) -> Tensor:
    r"""Simplex equiangular tight frame, the most separated arrangement of K <= dim + 1 directions.

    :math:`W = \sqrt{K/(K-1)}\, H R^\top` with H the Helmert basis `(K, K-1)` and R `(dim, K-1)` orthonormal.

    Args:
        num_classes: Number of classes K, at least 2.
        dim: Feature dimension, at least K - 1.
        orientation: `"random"` draws R from the Haar measure. `"blocks"` (needs dim >= K) gives each class its own
            dim / K coordinates, so that nonnegative (ReLU) features can reach cosine sqrt((K-1)/K) with their
            prototype; with a random orientation they stay near 0.7 at K = 100, dim = 512. `"auto"` is blocks where
            they fit: in short trainings they were ahead in source accuracy (`training/results/cifar100_heads`).
        seed: Seed of the random orientation; `"blocks"` ignores it.

    Returns:
        Float32 `(num_classes, dim)`, unit rows, every pairwise cosine -1/(K-1).

    Raises:
        ValueError: If dim < K - 1, if dim < K with `"blocks"`, or on an unknown orientation.
    """
    check_simplex_fits(num_classes, dim)
    k = num_classes
    scale = math.sqrt(k / (k - 1))
    if resolve_orientation(orientation, k, dim) == "random":
        frame = scale * helmert_basis(k) @ haar_columns(dim, k - 1, seed).T
    else:
        blocks = block_indicators(k, dim)
        frame = scale * (blocks - blocks.mean(dim=0))
    return frame.float()


def nearest_simplex_etf(weight: Tensor, *, previous: Tensor | None = None, delta: float = 1e-3) -> Tensor:
    r"""Simplex ETF nearest to a matrix: minimizes :math:`\|A - cW\|_F` over ETFs W and scales c > 0.

    Closed form: with H the Helmert basis and :math:`H^\top A = U S V^\top`, the minimizer is
    :math:`W = \sqrt{K/(K-1)}\, H U V^\top`. (2411.01248 reaches it by a Riemannian trust region.)

    Args:
        weight: A, `(K, dim)`: a trained classifier or class means. Its row mean and scale do not matter.
        previous: An earlier solution `(K, dim)`. Where H^T A loses rank the minimizer jumps; adding
            `delta * ||A|| / ||previous||` times this before the decomposition keeps it near the earlier one.
        delta: Strength of that proximal term, relative to the norm of A.

    Returns:
        Float32 `(K, dim)` on the device of `weight`, unit rows.

    Raises:
        ValueError: If `weight` is not a finite matrix with dim >= K - 1, or `previous` has another shape.

    Warns:
        UserWarning: If `weight` has rank below K - 1 (the minimizer is then not unique) and `previous` is not given.
    """
    check_finite_matrix(weight, "The matrix")
    k, dim = weight.shape
    check_simplex_fits(k, dim)
    a = weight.detach().cpu().double()
    a = a - a.mean(dim=0)  # before the product, which would round a large mean instead of removing it
    basis = helmert_basis(k)
    m = basis.T @ a
    if not isinstance(delta, int | float) or not (math.isfinite(delta) and delta >= 0):
        raise EtfZooError(f"delta is a finite number, not negative; got {delta!r}.")
    if previous is not None:
        check_finite_matrix(previous, "previous")
        if previous.shape != weight.shape:
            raise EtfZooError(f"previous has shape {tuple(previous.shape)}, weight {tuple(weight.shape)}.")
        p = basis.T @ previous.detach().cpu().double()
        p = p / p.norm().clamp_min(torch.finfo(torch.float64).tiny)
        m = m + delta * m.norm() * p if m.any() else p  # to a matrix that is all zero the earlier solution is nearest
    # a singular value of rounding size is none: what counts is the precision the matrix came in
    factor, rank = polar_factor(
        m, eps=torch.finfo(torch.float64 if weight.dtype == torch.float64 else torch.float32).eps
    )
    if previous is None and rank < k - 1:
        warnings.warn(
            f"The centered matrix has rank {rank}, below num_classes - 1 = {k - 1}: the nearest simplex ETF is not "
            f"unique. Pass previous= to choose the one nearest to an earlier solution.",
            stacklevel=2,
        )
    return (math.sqrt(k / (k - 1)) * basis @ factor).float().to(weight.device)
