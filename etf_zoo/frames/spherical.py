"""Spherical codes: K directions whose largest pairwise cosine is as small as can be (the Tammes problem)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import EtfZooError
from .codes import best_frame, quick_code, random_frame
from .numerics import derived_seed, seeded
from .simplex import check_sizes

__all__ = ["spherical_code"]

# Log-sum-exp lies above the largest of n terms by at most ln(n) / sharpness: the last stage is within about 1e-5.
_LAST_SHARPNESS = 1e6
# Starts take turns: at the first all of ten points in space run into one local optimum, at the second hardly any.
_FIRST_SHARPNESS = (4.0, 16.0)
# Pairs of classes up to which local optima are many and a solve is cheap enough to try several starts.
_RESTART_PAIRS = 20_000


def spherical_code(
    num_classes: int,
    dim: int,
    *,
    seed: int = 0,
    restarts: int | None = None,
    steps: int = 60,
    stages: int = 12,
) -> Tensor:
    r"""Unit vectors that minimize their largest pairwise cosine, for more classes than fit a simplex.

    Minimizes :math:`\frac1\beta \log \sum_{i<j} \exp(\beta\, w_i \cdot w_j)` over all pairs by L-BFGS in float64 while
    beta grows from stage to stage. Close to the softmax code of 2310.05351, which minimizes the largest distance to
    the convex hull of the others instead. Up to K = 2 dim the optimum is known and returned at once, see `best_frame`.

    Memory is three K x K float64 matrices, time grows with K^2 dim. The result is a local optimum: it is reproducible
    for one build of the linear algebra, not across builds.

    Args:
        num_classes: K, at least 2.
        dim: Feature dimension, at least 1.
        seed: Seed of the starts; no two seeds share one.
        restarts: How many starts to choose the best of; by default 8 for small codes, where local optima abound, and 1
            (from `quick_code`) otherwise.
        steps: L-BFGS steps a stage. 60, with 12 stages, is twice what the known optima of 12 points in 3 to 120 points
            in 4 dimensions need; at a quarter of it, or at a third of the stages, some are missed.
        stages: Values of beta, from about 4 sqrt(dim) to 1e6; of 12 each is about three times the one before.

    Returns:
        Float32 `(num_classes, dim)`, unit rows.

    Raises:
        ValueError: On fewer than 2 classes, fewer than 2 dimensions with K > 2, or nonpositive counts.
    """
    check_sizes(num_classes, dim)
    seeded(seed)
    if num_classes <= 2 * dim:
        return best_frame(num_classes, dim, orientation="random", seed=seed)
    if dim == 1:
        raise EtfZooError(f"One dimension has two directions, not {num_classes}; give dim at least 2.")
    small = num_classes * (num_classes - 1) // 2 <= _RESTART_PAIRS
    restarts = restarts if restarts is not None else (8 if small else 1)
    if min(restarts, steps, stages) < 1:
        raise EtfZooError(f"restarts, steps and stages must be positive, got {restarts}, {steps}, {stages}.")
    start = random_frame if small else quick_code
    starts = (start(num_classes, dim, seed=derived_seed(seed, i)).double() for i in range(restarts))
    found = (_optimize(frame, steps, stages, _FIRST_SHARPNESS[i % 2]) for i, frame in enumerate(starts))
    return min(found, key=_largest_cosine).float()


def _largest_cosine(frame: Tensor) -> float:
    return (frame @ frame.T).fill_diagonal_(-math.inf).max().item()


def _optimize(frame: Tensor, steps: int, stages: int, factor: float) -> Tensor:
    """Anneal from `factor` over the spread of a start's cosines to the last sharpness; `(K, d)` to `(K, d)`."""
    first = factor * math.sqrt(frame.shape[1])
    x = frame.clone().requires_grad_()
    for stage in range(stages):
        sharpness = first * (_LAST_SHARPNESS / first) ** (stage / max(1, stages - 1))
        optimizer = torch.optim.LBFGS(
            [x], max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=0
        )

        def closure(sharpness: float = sharpness) -> Tensor:
            loss, x.grad = _soft_largest_cosine(x.detach(), sharpness)
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            x.div_(x.norm(dim=1, keepdim=True))
    return x.detach()


def _soft_largest_cosine(x: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the pairwise cosines of the rows of `(K, dim)`, and its gradient, in two matrix products."""
    norms = x.norm(dim=1, keepdim=True)
    w = x / norms
    p = (w @ w.T).fill_diagonal_(-math.inf)
    largest = p.max()
    p.sub_(largest).mul_(sharpness).exp_()
    total = p.sum()  # every pair counts twice, which shifts the value by a constant
    gradient = (2 / total) * (p @ w)
    gradient = (gradient - (gradient * w).sum(dim=1, keepdim=True) * w) / norms
    return largest + total.log() / sharpness, gradient
