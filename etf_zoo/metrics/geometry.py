"""The figures of neural collapse as pure functions of class means, covariances and a head. All in float64.

Throughout, M is the matrix (K, d) of centered class means, p the weights (K,) of the classes (1/K, or their share of
the samples), and Sigma_B = sum_k p_k m_k m_k^T.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    "Gram",
    "between_directions",
    "bias_error",
    "cdnv",
    "cosine_figures",
    "effective_rank",
    "etf_distance",
    "mean_cosine",
    "nearest_distances",
    "self_duality",
    "total_figures",
]

EPS = torch.finfo(torch.float64).eps
# Up to so many classes a Gram matrix is kept whole; 21,000 classes need no matrix of 3.5 GB.
_WHOLE = 2048
# Rows or columns worked on at once: what else a sweep needs stays small beside the matrices themselves.
_BLOCK = 128


class Gram:
    """A B^T by blocks of rows, for as many sweeps as one likes; kept whole where it is small.

    Args:
        a: `(K, d)`.
        b: `(K, d)`.
    """

    def __init__(self, a: Tensor, b: Tensor):
        self.a, self.b = a, b
        self.whole = a @ b.mT if len(a) <= _WHOLE else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the numbers of the rows `(r,)` and a block `(r, K)` not to be written to."""
        for rows in torch.arange(len(self.a), device=self.a.device).split(_BLOCK):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            yield rows, self.a[part] @ self.b.mT if self.whole is None else self.whole[part]


def between_directions(centered: Tensor, weights: Tensor, gram: Gram) -> Iterator[tuple[Tensor, Tensor]]:
    """Eigenpairs of Sigma_B above the cut-off, from the smaller of its two Gram matrices, by blocks.

    An eigenvalue counts as zero if it is at most max(K, d) eps times the largest: the usual cut-off of a
    pseudo-inverse. It drops the direction lost to centering and those that only rounding keeps alive.

    Args:
        centered: M, `(K, d)`.
        weights: p, `(K,)`.
        gram: M M^T.

    Yields:
        Eigenvalues `(b,)` and orthonormal eigenvectors `(d, b)`.
    """
    k, dim = centered.shape
    roots = weights.sqrt()[:, None]
    if k <= dim:
        whole = gram.whole if gram.whole is not None else centered @ centered.mT
        values, vectors = torch.linalg.eigh(roots * whole * roots.mT)
    else:
        values, vectors = torch.linalg.eigh(centered.mT @ (weights[:, None] * centered))
    first = int((values <= values[-1] * (max(k, dim) * EPS)).sum())  # ascending order
    for start in range(first, len(values), _BLOCK):
        part = slice(start, start + _BLOCK)
        if k <= dim:
            yield values[part], (centered.mT @ (roots * vectors[:, part])) / values[part].sqrt()
        else:
            yield values[part], vectors[:, part]


def total_figures(within: Tensor, centered: Tensor, weights: Tensor, rank: int) -> tuple[float, float]:
    """Variability collapse index and effective rank, from the spectrum of Sigma_T = Sigma_W + Sigma_B.

    The index is 1 - tr(pinv(Sigma_T) Sigma_B) / rank(Sigma_B) (2306.03440): 0 when collapsed, 1 when class means say
    nothing. Eigenvalues at most d eps times the largest count as zero. Near 0 the index is exact to about 1e-15
    absolutely, not relatively; the rank loses digits as singular values spread (nine are left at a ratio of 1e5).

    Args:
        within: Sigma_W, `(d, d)`; overwritten.
        centered: M, `(K, d)`.
        weights: p, `(K,)`.
        rank: Of Sigma_B.

    Returns:
        Index and effective rank.
    """
    root = weights.sqrt()[:, None] * centered
    spectrum, vectors = torch.linalg.eigh(within.addmm_(root.mT, root))
    keep = spectrum > spectrum[-1] * (len(spectrum) * EPS)
    shares = (root @ vectors[:, keep]).square().sum(0) / spectrum[keep]
    return 1 - shares.sum().item() / max(1, rank), effective_rank(spectrum[keep])


def effective_rank(spectrum: Tensor) -> float:
    """Exponential of the entropy of the normalized singular values (Roy & Vetterli 2007; RankMe, 2210.02885).

    Args:
        spectrum: Eigenvalues of a covariance, the squares of the singular values; negative ones count as zero.

    Returns:
        From 1 to the number of nonzero eigenvalues; 0 if there is none.
    """
    singular = spectrum.clamp_min(0).sqrt()
    singular = singular[singular > 0]
    if not len(singular):
        return 0.0
    share = singular / singular.sum()
    return torch.exp(-(share * share.log()).sum()).item()


def _squared_distances(rows: Tensor, block: Tensor, squares: Tensor) -> Tensor:
    """Squared distances of class means `(r, K)` from a block of M M^T; rounding gives 0, a class to itself infinity."""
    sums = squares[rows, None] + squares
    distances = sums - 2 * block
    distances = torch.where(distances > 8 * EPS * sums, distances, torch.zeros_like(distances))
    distances[torch.arange(len(rows), device=rows.device), rows] = math.inf
    return distances


def cdnv(gram: Gram, variances: Tensor, counted: Tensor) -> float:
    """Class-distance normalized variance (2112.15121): mean over pairs of (v_i + v_j) / (2 |m_i - m_j|^2).

    Args:
        gram: M M^T.
        variances: v, `(K,)`: mean squared distance of a class's samples from their mean.
        counted: `(K,)` bool, classes whose variance is known; pairs with others are left out.

    Returns:
        Infinity if two of the classes share their mean, NaN if fewer than two classes count.
    """
    pairs = int(counted.sum()) * (int(counted.sum()) - 1)
    if not pairs:
        return math.nan
    squares = gram.a.norm(dim=1).square()
    total = 0.0
    for rows, block in gram:
        quotients = (variances[rows, None] + variances) / 2 / _squared_distances(rows, block, squares)
        quotients = torch.nan_to_num(quotients, nan=math.inf, posinf=math.inf)  # 0/0: two points on one another
        total += quotients[counted[rows]][:, counted].sum().item()
    return total / pairs


def nearest_distances(gram: Gram) -> Tensor:
    """Squared distance of each class mean to the nearest other, `(K,)`."""
    squares = gram.a.norm(dim=1).square()
    return torch.cat([_squared_distances(rows, block, squares).amin(1) for rows, block in gram])


def cosine_figures(gram: Gram) -> tuple[float, float]:
    """Equiangularity of the centered class means (2008.08186, figures 3 and 4).

    Args:
        gram: M M^T.

    Returns:
        Standard deviation of the cosines over all pairs, and the mean of |cosine + 1/(K-1)|. A class mean that lies
        on the global mean has cosine 0 with all.
    """
    norms = gram.a.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    k = len(norms)
    pairs = k * (k - 1)
    unit_sum = (gram.a / norms[:, None]).sum(0).square().sum()
    on_sphere = (gram.a != 0).any(1).sum()
    mean = ((unit_sum - on_sphere) / pairs).item()  # known before the sweep, so that no squares are subtracted
    squares = deviations = 0.0
    for rows, block in gram:
        cosines = block / norms[rows, None] / norms
        own = torch.arange(len(rows), device=rows.device)
        cosines[own, rows] = mean
        squares += (cosines - mean).square().sum().item()
        cosines[own, rows] = -1 / (k - 1)
        deviations += (cosines + 1 / (k - 1)).abs().sum().item()
    return math.sqrt(squares / pairs), deviations / pairs


def etf_distance(gram: Gram) -> float:
    """Frobenius distance of A B^T, scaled to norm 1, from the simplex ETF's Gram matrix (2105.02375).

    The ETF's is (I - J/K) / sqrt(K-1), of norm 1 too. With A = B = M this is NC2, with A the head and B = M it is NC3.

    Args:
        gram: A B^T.

    Returns:
        0 for an ETF, at most 2; NaN if A B^T is zero.
    """
    k = len(gram.a)
    norm = math.sqrt(sum(block.norm().item() ** 2 for _, block in gram))
    if norm == 0:
        return math.nan
    total = 0.0
    for rows, block in gram:
        difference = block / norm + 1 / (k * math.sqrt(k - 1))
        difference[torch.arange(len(rows), device=rows.device), rows] -= 1 / math.sqrt(k - 1)
        total += difference.square().sum().item()
    return math.sqrt(total)


def self_duality(weight: Tensor, centered: Tensor) -> float:
    """Squared Frobenius distance of the head from the centered class means, both scaled to norm 1 (2008.08186).

    Args:
        weight: W, `(K, d)`.
        centered: M, `(K, d)`.

    Returns:
        0 if one is a multiple of the other, at most 4.
    """
    a, b = weight.norm(), centered.norm()
    rows = zip(weight.split(_BLOCK), centered.split(_BLOCK), strict=True)
    return sum((w / a - m / b).norm().item() ** 2 for w, m in rows)


def mean_cosine(weight: Tensor, centered: Tensor) -> float:
    """Mean over classes of the cosine between the centered class mean and the head's row (the prototype)."""
    tiny = torch.finfo(torch.float64).tiny
    rows = zip(weight.split(_BLOCK), centered.split(_BLOCK), strict=True)
    return sum(torch.cosine_similarity(w, m, dim=1, eps=tiny).sum().item() for w, m in rows) / len(weight)


def bias_error(weight: Tensor, bias: Tensor, center: Tensor) -> float:
    """Euclidean norm of W m_G + b (2105.02375): a collapsed head's bias cancels the global mean."""
    return (weight @ center + bias).norm().item()
