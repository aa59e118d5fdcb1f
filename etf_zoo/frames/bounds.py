r"""How far apart K directions can be at best: Levenshtein's bound on the largest cosine.

Source: V. I. Levenshtein, Universal bounds for codes and designs, in Handbook of Coding Theory (1998), chapter 6; for
K <= 2 dim it is Rankin's, see `frame_report`.
"""

from __future__ import annotations

import math

from .simplex import check_sizes

__all__ = ["levenshtein_bound"]


def levenshtein_bound(num_classes: int, dim: int) -> float:
    r"""No `num_classes` unit vectors in `dim` dimensions have a smaller largest cosine than this.

    It is reached by the simplex, the orthoplex, and a few codes beyond, such as the 240 vectors of E8. A full Kerdock
    frame, :math:`1/\sqrt d`, is above it by a factor of about 1 + 1/d.

    Args:
        num_classes: K, at least 2.
        dim: d, at least 1; in one dimension there are two directions only, and the bound is 1 for more.

    Returns:
        The bound.

    Raises:
        EtfZooError: On sizes that make no sense.

    Example:
        >>> round(levenshtein_bound(240, 8), 6)
        0.5
    """
    check_sizes(num_classes, dim)
    if num_classes <= dim + 1:
        return -1 / (num_classes - 1)
    if num_classes <= 2 * dim:
        return 0.0
    if dim == 1:
        return 1.0
    degree, low = 3, 0.0  # the bound of degree 3 starts at 2 d vectors and cosine 0
    while num_classes > (end := _design_size(dim, degree + 1)):
        low = _solve(dim, degree, low, end)
        degree += 1
    return _solve(dim, degree, low, num_classes)


def _design_size(n: int, degree: int) -> int:
    """Least size of a spherical design of a degree in n dimensions, where the bounds of two degrees meet."""
    half = degree // 2
    if degree % 2:
        return 2 * math.comb(n + half - 1, half)
    return math.comb(n + half - 1, half) + math.comb(n + half - 2, half - 1)


def _solve(n: int, degree: int, low: float, size: float) -> float:
    """The cosine from `low` on at which the bound of a degree on the number of vectors reaches a size."""
    start = _design_size(n, degree) * (1 - 1e-6)

    def beyond(s: float) -> bool:
        found = _largest_code(n, degree, s)
        return not start <= found < size  # past its pole the bound is small or negative

    step = 1e-6
    while low + step < 1 and not beyond(low + step):
        step *= 1.2
    high = min(low + step, 1.0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high


def _largest_code(n: int, degree: int, s: float) -> float:
    """Levenshtein's L of a degree: a bound on the number of vectors in n dimensions with cosines up to s."""
    k = (degree + 1) // 2
    p = [1.0, s]  # Gegenbauer polynomials at s, 1 at 1
    for i in range(1, k + 1):
        p.append(((2 * i + n - 2) * s * p[i] - i * p[i - 1]) / (i + n - 2))
    try:
        if degree % 2:
            return math.comb(k + n - 3, k - 1) * ((2 * k + n - 3) / (n - 1) - (p[k - 1] - p[k]) / ((1 - s) * p[k]))
        ratio = (1 + s) * (p[k] - p[k + 1]) / ((1 - s) * (p[k] + p[k + 1]))
        return math.comb(k + n - 2, k) * ((2 * k + n - 1) / (n - 1) - ratio)
    except ZeroDivisionError:
        return math.inf
