"""The cone loss beside arc cosines; features keep their spread inside the cone and lose it under cross-entropy."""

import math

import pytest
import torch
from torch.nn import functional as F

from etf_zoo.classifier import solve_logit_scale
from etf_zoo.frames import simplex_etf
from etf_zoo.losses import SeparatingConeLoss
from etf_zoo.losses.separating_cone import cone_cosine

FRAME = simplex_etf(5, 8, orientation="random", seed=3).double()


def features(rows, seed=1):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("radius", [0.0, 10.0, 30.0, 60.0])
def test_matches_a_plain_loop(radius):
    x, labels = features(12), torch.arange(12) % 5
    total = 0.0
    for row, label in zip(x, labels.tolist(), strict=True):
        cosines = [float(row @ w) / math.sqrt(float(row @ row)) for w in FRAME]
        logits = [16 * c for c in cosines]
        logits[label] = 16 * math.cos(max(0.0, math.acos(cosines[label]) - math.radians(radius)))
        total += math.log(sum(math.exp(v) for v in logits)) - logits[label]
    value = SeparatingConeLoss(radius, logit_scale=16.0)(x, labels, FRAME).item()
    assert math.isclose(value, total / 12, rel_tol=1e-6)


def test_radius_zero_is_cross_entropy():
    x, labels = features(12), torch.arange(12) % 5
    expected = F.cross_entropy(16 * F.normalize(x, dim=1) @ FRAME.T, labels)
    assert torch.allclose(SeparatingConeLoss(0.0, logit_scale=16.0)(x, labels, FRAME), expected)


def test_pull_is_zero_inside_and_continuous_across_the_surface():
    radius = math.radians(30)
    angles = torch.tensor([0.0, 10.0, 29.99, 30.01, 45.0, 180.0], dtype=torch.float64).deg2rad()
    cosine = torch.cos(angles).requires_grad_()
    value = cone_cosine(cosine, radius)
    (slope,) = torch.autograd.grad(value.sum(), cosine)
    assert torch.equal(slope[:3], torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(value[:3], torch.ones(3, dtype=torch.float64))
    assert 0 < slope[3] < 1e-3
    assert torch.allclose(value[4], torch.tensor(math.cos(math.radians(15)), dtype=torch.float64))
    assert torch.isfinite(slope).all()


def spread_after_training(radius):
    """Largest and mean angle to the axis, in degrees, of free features trained from far outside the cone."""
    labels = torch.arange(60) % 5
    x = (FRAME[labels] + 0.8 * F.normalize(features(60), dim=1)).requires_grad_()
    loss = SeparatingConeLoss(radius, logit_scale=solve_logit_scale(FRAME))
    optimiser = torch.optim.SGD([x], lr=5.0)
    for _ in range(600):
        optimiser.zero_grad()
        loss(x, labels, FRAME).backward()
        optimiser.step()
    cosines = F.cosine_similarity(x.detach(), FRAME[labels]).clamp(max=1)
    angles = torch.rad2deg(torch.acos(cosines))
    right = (x.detach() @ FRAME.T).argmax(dim=1) == labels
    return angles.max().item(), angles.mean().item(), bool(right.all())


def test_features_fill_the_cone_and_collapse_without_it():
    largest, mean, right = spread_after_training(30.0)
    collapsed_largest, collapsed_mean, _ = spread_after_training(0.0)
    assert right
    assert largest < 40
    assert mean > 20
    assert collapsed_mean < 0.6 * mean
    assert collapsed_largest < largest


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"radius": -1.0}, "degrees"), ({"radius": 90.0}, "degrees"), ({"logit_scale": 0}, "scale")]
)
def test_option_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SeparatingConeLoss(**kwargs)
