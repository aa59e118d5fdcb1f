"""Dot regression beside a plain loop, and its promise under imbalance."""

import math

import pytest
import torch
from torch.nn import functional as F

from etf_zoo.frames import simplex_etf
from etf_zoo.losses import DotRegressionLoss
from etf_zoo.losses.dot_regression import class_lengths

FRAME = simplex_etf(4, 6, orientation="random", seed=2).double()
LABELS = torch.tensor([0, 0, 1, 3, 2])


def features():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain(x, labels, frame, counts=None, length=1.0, penalty=0.0):
    total = 0.0
    for row, label in zip(x, labels.tolist(), strict=True):
        prototype = frame[label]
        if counts is not None:
            prototype = prototype * math.sqrt(sum(counts) / len(counts) / counts[label])
        norm = math.sqrt(float(row @ row))
        feature = row if length in (None, "own") else length * row / norm
        h = {None: 1.0, "own": norm}.get(length, length)
        wanted = h * math.sqrt(float(prototype @ prototype))
        total += (float(feature @ prototype) - wanted) ** 2 / (2 * h) + penalty * math.sqrt(float(feature @ feature))
    return total / len(x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length": 3.0},
        {"counts": [40, 10, 2, 1]},
        {"counts": [40, 10, 2, 1], "length": 2.0},
        {"length": None},
        {"length": None, "penalty": 0.3},
        {"length": "own"},
        {"length": "own", "penalty": 0.3, "counts": [40, 10, 2, 1]},
        {"length": None, "penalty": 0.3, "counts": [40, 10, 2, 1]},
    ],
)
def test_matches_a_plain_loop(options):
    loss = DotRegressionLoss(
        options.get("counts"), feature_length=options.get("length", 1.0), length_penalty=options.get("penalty", 0.0)
    )
    value = loss(features(), LABELS, FRAME).item()
    assert math.isclose(value, plain(features(), LABELS, FRAME, **options), rel_tol=1e-6)


def test_plain_form_is_half_the_squared_cosine_gap():
    cosines = F.cosine_similarity(features(), FRAME[LABELS])
    assert torch.allclose(DotRegressionLoss()(features(), LABELS, FRAME), 0.5 * (cosines - 1).square().mean())


def test_own_length_is_the_plain_form_weighed_by_it():
    """h / 2 (cos - 1)^2, and no gradient through the length that is wanted."""
    x = features().requires_grad_()
    value = DotRegressionLoss(feature_length="own")(x, LABELS, FRAME)
    lengths = x.detach().norm(dim=1)
    gaps = F.cosine_similarity(x.detach(), FRAME[LABELS]) - 1
    assert torch.allclose(value, (lengths / 2 * gaps.square()).mean())
    value.backward()
    assert torch.allclose(x.grad, gaps[:, None] * FRAME[LABELS] / len(x))


def test_gradient_lies_in_the_plane_of_feature_and_prototype():
    x = features().requires_grad_()
    DotRegressionLoss()(x, LABELS, FRAME).backward()
    for i, label in enumerate(LABELS.tolist()):
        plane = torch.stack([x.detach()[i], FRAME[label]], dim=1)
        projected = plane @ torch.linalg.lstsq(plane, x.grad[i][:, None]).solution
        assert torch.allclose(projected.squeeze(1), x.grad[i], atol=1e-12)


@pytest.mark.parametrize("counts", [None, [200, 40, 8, 2]])
def test_free_features_under_imbalance_become_the_etf(counts):
    sizes = [200, 40, 8, 2]
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    x = torch.randn(250, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    loss = DotRegressionLoss(counts)
    optimizer = torch.optim.LBFGS(
        [x], max_iter=400, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(x, labels, FRAME)
        value.backward()
        return value

    optimizer.step(closure)
    unit = F.normalize(x.detach(), dim=1)
    means = torch.stack([unit[labels == k].mean(dim=0) for k in range(4)])
    expected = (4 / 3) * (torch.eye(4, dtype=torch.float64) - 0.25)
    assert torch.allclose(means @ means.T, expected, atol=1e-3)
    assert all((unit[labels == k] - means[k]).norm(dim=1).max() < 2e-2 for k in range(4))


def test_learned_prototypes_under_imbalance_do_not():
    """The contrast the paper draws: with cross-entropy and a learned classifier rare classes move together."""
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([200, 200, 1, 1]))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(402, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([x, w], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        decay = 5e-3 * (x.square().sum() / len(x) + w.square().sum())
        value = F.cross_entropy(x @ w.T, labels) + decay
        value.backward()
        return value

    optimizer.step(closure)
    assert F.cosine_similarity(w[2], w[3], dim=0) > 0.5  # -1/3 in the ETF


def test_counts_weigh_classes_by_inverse_frequency():
    counts = [8, 4, 2, 2]
    assert torch.allclose(class_lengths(counts).square(), torch.tensor([0.5, 1.0, 2.0, 2.0]))
    x = features()
    single = [DotRegressionLoss()(x[i : i + 1], LABELS[i : i + 1], FRAME) for i in range(5)]
    weights = [4 / counts[label] for label in LABELS.tolist()]
    expected = sum(w * v for w, v in zip(weights, single, strict=True)) / 5
    assert torch.allclose(DotRegressionLoss(counts)(x, LABELS, FRAME), expected)


def test_lengths_are_no_state():
    assert not DotRegressionLoss([1, 2]).state_dict()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_counts": [3, 0]}, "positive count"),
        ({"feature_length": 0.0}, "feature_length"),
        ({"feature_length": "mine"}, "feature_length"),
        ({"length_penalty": -1.0}, "length_penalty"),
        ({"length_penalty": 0.1}, "feature_length='own' or None"),
    ],
)
def test_option_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DotRegressionLoss(**kwargs)


def test_wrong_number_of_counts():
    with pytest.raises(ValueError, match="2 classes, the frame 4"):
        DotRegressionLoss([3, 1])(features(), LABELS, FRAME)
