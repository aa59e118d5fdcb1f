"""Multinomial logistic regression, fitted until its gradient is gone.

The optimum is scikit-learn's; the way there is shorter: each coefficient is scaled by the curvature that the loss has
along it. On features along their principal axes, where curvatures hardly mix, L-BFGS then needs tens of steps, not
hundreds or thousands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor
from torch.nn import functional as F

from etf_zoo.errors import EtfZooError

__all__ = ["LogisticFit", "fit_logistic", "principal_axes"]

TOLERANCE = 1e-6  # on the norm of the gradient of the mean loss
# What a fit may be from its optimum where only the best of several is sought, relative to the loss there: on separable
# features the loss itself is small, and a gap in nats would leave weak penalties unfitted.
ROUGH = 1e-4
FINE = 1e-8
STEPS = 5000


@dataclass(frozen=True)
class LogisticFit:
    """What was fitted.

    Attributes:
        weight: `(K, d)`, float64.
        bias: `(K,)`, float64, of mean 0.
        gradient_norm: Of the mean loss with its penalty.
        steps: L-BFGS steps.
    """

    weight: Tensor
    bias: Tensor
    gradient_norm: float
    steps: int


def principal_axes(x: Tensor) -> Tensor:
    """Orthonormal columns `(d, r)`, float64, along the principal axes of features `(N, d)`; r is at most N.

    The features are not centered here. What lies outside the axes meets no feature, so a penalty makes it 0.
    """
    x = x.double()
    if len(x) >= x.shape[1]:
        return torch.linalg.eigh(x.T @ x).eigenvectors
    values, vectors = torch.linalg.eigh(x @ x.T)
    kept = values > 1e-12 * values[-1]
    return torch.linalg.qr(x.T @ vectors[:, kept] / values[kept].sqrt()).Q


def fit_logistic(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    strength: float,
    *,
    start: LogisticFit | None = None,
    rough: bool = False,
) -> LogisticFit:
    """Minimize mean cross-entropy + ||weight||^2 / (2 strength N), the objective of scikit-learn's LogisticRegression.

    For two classes scikit-learn fits one row instead of two; its C is then twice this strength.

    Args:
        x: Features `(N, d)`, centered and along their principal axes: others give the same fit, more slowly.
        labels: `(N,)`; every class has one.
        num_classes: K.
        strength: scikit-learn's C.
        start: A fit to start from, such as that of the next smaller strength.
        rough: Stop where the loss is about 1e-4 of itself above its minimum, in single precision: enough to choose a
            strength by.

    Raises:
        EtfZooError: If the norm of the gradient is above 1e-6 in the end.

    Example:
        >>> x, labels = torch.randn(60, 5), torch.arange(60) % 3
        >>> fit_logistic(x, labels, 3, 1.0).gradient_norm <= 1e-6
        True
    """
    problem, steps = _Problem(x, labels, strength), 0
    if start is None:
        bias = torch.bincount(labels, minlength=num_classes).double().log()
        start = LogisticFit(torch.zeros(num_classes, x.shape[1], dtype=torch.float64), bias, float("inf"), 0)
    point = torch.cat([start.weight, start.bias[:, None]], 1)
    for dtype, gap in ((torch.float32, ROUGH if rough else FINE), (torch.float64, 0.0))[: 1 if rough else 2]:
        point, took = problem.descend(point, dtype, gap)
        steps += took
    norm = problem.loss_and_gradient(point, torch.float32 if rough else torch.float64)[1].norm().item()
    if not rough and not norm <= TOLERANCE:
        raise EtfZooError(
            f"Logistic regression did not converge: after {steps} steps at C = {strength:g} its gradient has norm "
            f"{norm:.1e}, not {TOLERANCE:g}. Take a smaller strength, which regularizes more."
        )
    return LogisticFit(point[:, :-1], point[:, -1] - point[:, -1].mean(), norm, steps)


class _Problem:
    """The objective; a point is weight and bias, `(K, d + 1)`."""

    def __init__(self, x: Tensor, labels: Tensor, strength: float):
        double = F.pad(x.double(), (0, 1), value=1.0)
        self.x = {torch.float64: double, torch.float32: double.float()}
        self.squares = double.square().mean(0)
        self.rows, self.labels = torch.arange(len(x)), labels
        self.penalty = F.pad(torch.full((x.shape[1],), 1 / (strength * len(x)), dtype=torch.float64), (0, 1))

    def probabilities(self, point: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Class probabilities `(N, K)` and losses `(N,)`."""
        logits = self.x[dtype] @ point.to(dtype).T
        logits -= logits.amax(1, keepdim=True)
        own = logits[self.rows, self.labels].double()
        sums = logits.exp_().sum(1, keepdim=True)
        return logits.div_(sums), sums[:, 0].double().log() - own

    def loss_and_gradient(self, point: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
        """Loss, and its gradient `(K, d + 1)` in float64."""
        residuals, losses = self.probabilities(point, dtype)
        residuals[self.rows, self.labels] -= 1
        gradient = (residuals.T @ self.x[dtype]).double() / len(self.labels)
        pulls = self.penalty * point
        return losses.mean().item() + (pulls * point).sum().item() / 2, gradient + pulls

    def descend(self, point: Tensor, dtype: torch.dtype, gap: float) -> tuple[Tensor, int]:
        """L-BFGS until the gradient is gone, or the loss a share `gap` above its minimum, as far as curvature tells."""
        shape, (probabilities, _) = point.shape, self.probabilities(point, dtype)
        spread = (probabilities * (1 - probabilities)).mean(0).double().clamp(min=1e-3 / len(point))
        scale = (spread[:, None] * self.squares + self.penalty).rsqrt()
        done = [False]

        def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
            loss, gradient = self.loss_and_gradient(torch.from_numpy(flat).view(shape) * scale, dtype)
            done[0] = gradient.norm().item() < TOLERANCE / 10  # a margin
            gradient = gradient * scale
            done[0] |= gradient.square().sum().item() / 2 < gap * loss
            return loss, gradient.flatten().numpy()

        def callback(intermediate_result: OptimizeResult) -> None:
            if done[0]:
                raise StopIteration

        options = {"maxiter": STEPS, "maxfun": 2 * STEPS, "maxcor": 10, "ftol": 0.0, "gtol": 0.0, "maxls": 50}
        start = (point / scale).flatten().numpy()
        found = minimize(evaluate, start, jac=True, method="L-BFGS-B", callback=callback, options=options)
        return torch.from_numpy(found.x).view(shape) * scale, int(found.nit)
