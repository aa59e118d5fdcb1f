"""The squared loss beside a plain loop and its minimizer in closed form."""

import math

import pytest
import torch

from etf_zoo.frames import random_frame, simplex_etf
from etf_zoo.losses import SquaredLoss

FRAME = simplex_etf(4, 6, orientation="random", seed=2).double()
LABELS = torch.tensor([0, 0, 1, 3, 2])


def features():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_matches_a_plain_loop(decay, centered):
    total = 0.0
    for row, label in zip(features(), LABELS.tolist(), strict=True):
        for c in range(4):
            target = float(c == label) - (0.25 if centered else 0.0)
            total += 0.5 * (float(row @ FRAME[c]) - target) ** 2
        total += 0.5 * decay * float(row @ row)
    value = SquaredLoss(decay, centered=centered)(features(), LABELS, FRAME).item()
    assert math.isclose(value, total / 5, rel_tol=1e-12)


@pytest.mark.parametrize("centered", [False, True])
def test_minimizer_is_the_scaled_prototype(centered):
    x = features().requires_grad_()
    loss = SquaredLoss(0.1, centered=centered)
    optimizer = torch.optim.LBFGS([x], max_iter=100, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(x, LABELS, FRAME)
        value.backward()
        return value

    optimizer.step(closure)
    assert torch.allclose(x.detach(), FRAME[LABELS] / (4 / 3 + 0.1), atol=1e-6)


def test_centering_matters_for_other_frames():
    frame = random_frame(4, 6).double()
    x = features()
    gradients = []
    for centered in (False, True):
        y = x.clone().requires_grad_()
        SquaredLoss(centered=centered)(y, LABELS, frame).backward()
        gradients.append(y.grad)
    assert not torch.allclose(*gradients, atol=1e-3)


def test_option_errors():
    with pytest.raises(ValueError, match="feature_decay"):
        SquaredLoss(-1.0)
