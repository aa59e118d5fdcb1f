"""The cone loss beside a plain loop; features keep their spread inside the cone and lose it under cross-entropy."""

import math

import pytest
import torch
from torch.nn import functional as F

from etf_zoo.frames import simplex_etf
from etf_zoo.layers.logit_scale import solve_logit_scale
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
        surface = math.cos(math.radians(radius))
        logits = [16 * c / surface for c in cosines]
        if math.degrees(math.acos(cosines[label])) < radius:
            logits[label] = 16
        total += math.log(sum(math.exp(v) for v in logits)) - logits[label]
    value = SeparatingConeLoss(radius, logit_scale=16.0)(x, labels, FRAME).item()
    assert math.isclose(value, total / 12, rel_tol=1e-6)


def test_radius_zero_is_cross_entropy():
    x, labels = features(12), torch.arange(12) % 5
    expected = F.cross_entropy(16 * F.normalize(x, dim=1) @ FRAME.T, labels)
    assert torch.allclose(SeparatingConeLoss(0.0, logit_scale=16.0)(x, labels, FRAME), expected)


def test_pull_is_zero_inside_and_the_value_continuous_across_the_surface():
    radius = math.radians(30)
    angles = torch.tensor([0.0, 10.0, 29.99, 30.01, 60.0, 180.0], dtype=torch.float64).deg2rad()
    cosine = torch.cos(angles).requires_grad_()
    value = cone_cosine(cosine, radius)
    (slope,) = torch.autograd.grad(value.sum(), cosine)
    assert torch.equal(slope[:3], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(value[:3], torch.ones(3, dtype=torch.float64))
    assert 0.999 < value[3] < 1
    torch.testing.assert_close(value[4], torch.tensor(0.5 / math.cos(radius), dtype=torch.float64))
    torch.testing.assert_close(slope[3:], torch.full((3,), 1 / math.cos(radius), dtype=torch.float64))


def test_from_chance_it_pulls_as_hard_as_cross_entropy():
    """No head start: features far outside the cone come in, among many classes too."""
    frame, labels = simplex_etf(100, 128).double(), torch.arange(100)
    noise = torch.randn(100, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = {}
    for radius in (0.0, 30.0):
        x = F.normalize(noise, dim=1).requires_grad_()
        loss = SeparatingConeLoss(radius, logit_scale=solve_logit_scale(frame))
        for _ in range(300):
            (slope,) = torch.autograd.grad(loss(x, labels, frame), x)
            x = (x - 5 * slope).detach().requires_grad_()
        angles[radius] = torch.rad2deg(torch.acos(F.cosine_similarity(x.detach(), frame).clamp(max=1)))
    assert angles[30.0].max() < 35
    assert angles[30.0].mean() > 25  # and they stay near the surface
    assert angles[0.0].mean() < 25


def spread_after_training(radius):
    """Largest and mean angle to the axis, in degrees, of free features trained from far outside the cone."""
    labels = torch.arange(60) % 5
    x = (FRAME[labels] + 0.8 * F.normalize(features(60), dim=1)).requires_grad_()
    loss = SeparatingConeLoss(radius, logit_scale=solve_logit_scale(FRAME))
    optimizer = torch.optim.SGD([x], lr=5.0)
    for _ in range(1200):
        optimizer.zero_grad()
        loss(x, labels, FRAME).backward()
        optimizer.step()
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
