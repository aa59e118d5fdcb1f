"""Multinomial logistic regression, fitted until its gradient is gone.

The optimum is scikit-learn's; the way there is shorter: each coefficient is scaled by the curvature that the loss has
along it. On features along their principal axes, where curvatures hardly mix, L-BFGS then needs tens of steps, not
hundreds or thousands.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor
from torch.nn import functional as F

from etf_zoo.errors import EtfZooError

__all__ = ["LogisticFit", "fit_logistic", "principal_axes", "rough_path"]

TOLERANCE = 1e-6  # on the norm of the gradient of the mean loss
# What a fit may be from its optimum where only the best of several is sought, relative to the loss there: on separable
# features the loss itself is small, and a gap in nats would leave weak penalties unfitted.
ROUGH = 1e-4
FINE = 1e-8
STEPS = 5000
MEMORY = 20  # of L-BFGS: a step more to remember costs less than a look at all features


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
    start: Tensor | None = None,
) -> LogisticFit:
    """Minimize mean cross-entropy + ||weight||^2 / (2 strength N), the objective of scikit-learn's LogisticRegression.

    For two classes scikit-learn fits one row instead of two; its C is then twice this strength.

    Args:
        x: Features `(N, d)`, centered and along their principal axes: others give the same fit, more slowly.
        labels: `(N,)`; every class has one.
        num_classes: K.
        strength: scikit-learn's C.
        start: Weight and bias to start from, `(K, d + 1)`; they change the way and not the end.

    Raises:
        EtfZooError: If the norm of the gradient is above 1e-6 in the end.

    Example:
        >>> x, labels = torch.randn(60, 5), torch.arange(60) % 3
        >>> fit_logistic(x, labels, 3, 1.0).gradient_norm <= 1e-6
        True
    """
    problem, steps = _Problem(x, labels), 0
    problem.set_strength(strength)
    point = problem.beginning(num_classes) if start is None else start
    for dtype, gap in ((torch.float32, FINE), (torch.float64, 0.0)):
        point, took = problem.descend(point, dtype, gap)
        steps += took
    norm = problem.loss_and_gradient(point, torch.float64)[1].norm().item()
    if not norm <= TOLERANCE:
        raise EtfZooError(
            f"Logistic regression did not converge: after {steps} steps at C = {strength:g} its gradient has norm "
            f"{norm:.1e}, not {TOLERANCE:g}. Take a smaller strength, which regularizes more."
        )
    return LogisticFit(point[:, :-1], point[:, -1] - point[:, -1].mean(), norm, steps)


def rough_path(x: Tensor, labels: Tensor, num_classes: int, strengths: Iterable[float]) -> Iterator[Tensor]:
    """Weight and bias `(K, d + 1)` for one strength after the other, each from where the last one ended.

    A fit stops where the loss is about 1e-4 of itself above its minimum, in single precision: enough to choose a
    strength by. The next one is begun when it is asked for.

    Args:
        x: As in `fit_logistic`.
        labels: Likewise.
        num_classes: K.
        strengths: scikit-learn's C, from small to large.
    """
    problem = _Problem(x, labels)
    point = problem.beginning(num_classes)
    for strength in strengths:
        problem.set_strength(strength)
        point, _ = problem.descend(point, torch.float32, ROUGH)
        yield point


class _Problem:
    """The objective; a point is weight and bias, `(K, d + 1)`."""

    def __init__(self, x: Tensor, labels: Tensor):
        self.given, self.padded = x, {}
        self.squares = F.pad(x.double().square().mean(0), (0, 1), value=1.0)
        self.rows, self.labels = torch.arange(len(x)), labels

    def set_strength(self, strength: float) -> None:
        """Of the penalty, scikit-learn's C."""
        wide = torch.full((self.given.shape[1],), 1 / (strength * len(self.given)), dtype=torch.float64)
        self.penalty = F.pad(wide, (0, 1))
        # weights are off their optimum by at most the gradient over the penalty
        self.enough = TOLERANCE * min(0.5, max(0.1, 100 * wide[0].item()))

    def beginning(self, num_classes: int) -> Tensor:
        """No weights, and biases for the classes' shares."""
        bias = torch.bincount(self.labels, minlength=num_classes).double().log()
        return F.pad(bias[:, None], (self.given.shape[1], 0))

    def x(self, dtype: torch.dtype) -> Tensor:
        """Features with a last column of ones, kept in each precision that is asked for."""
        if dtype not in self.padded:
            self.padded[dtype] = F.pad(self.given.to(dtype), (0, 1), value=1.0)
        return self.padded[dtype]

    def probabilities(self, point: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Class probabilities `(N, K)` and losses `(N,)`."""
        logits = self.x(dtype) @ point.to(dtype).T
        logits -= logits.amax(1, keepdim=True)
        own = logits[self.rows, self.labels].double()
        sums = logits.exp_().sum(1, keepdim=True)
        return logits.div_(sums), sums[:, 0].double().log() - own

    def loss_and_gradient(self, point: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
        """Loss, and its gradient `(K, d + 1)` in float64."""
        residuals, losses = self.probabilities(point, dtype)
        residuals[self.rows, self.labels] -= 1
        gradient = (residuals.T @ self.x(dtype)).double() / len(self.labels)
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
            done[0] = gradient.norm().item() < self.enough
            gradient = gradient * scale
            done[0] |= gradient.square().sum().item() / 2 < gap * loss
            return loss, gradient.flatten().numpy()

        def callback(intermediate_result: OptimizeResult) -> None:
            if done[0]:
                raise StopIteration

        options = {"maxiter": STEPS, "maxfun": 2 * STEPS, "maxcor": MEMORY, "ftol": 0.0, "gtol": 0.0, "maxls": 50}
        start = (point / scale).flatten().numpy()
        found = minimize(evaluate, start, jac=True, method="L-BFGS-B", callback=callback, options=options)
        return torch.from_numpy(found.x).view(shape) * scale, int(found.nit)
