"""The variance-covariance penalty beside a plain loop; whitened features cost nothing."""

import math

import pytest
import torch

from etf_zoo.losses import VarianceCovarianceLoss


def features(rows=7, dim=4):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_matches_a_plain_loop():
    x = 0.7 * features() + features(7, 1)
    n, d = x.shape
    means = [sum(float(x[b, i]) for b in range(n)) / n for i in range(d)]
    variance = covariance = 0.0
    for i in range(d):
        for j in range(d):
            c = sum((float(x[b, i]) - means[i]) * (float(x[b, j]) - means[j]) for b in range(n)) / (n - 1)
            if i == j:
                variance += max(0.0, 1.2 - math.sqrt(c + 1e-4)) / d
            else:
                covariance += c * c / d
    value = VarianceCovarianceLoss(2.0, 0.5, target=1.2)(features=x).item()
    assert variance > 0
    assert math.isclose(value, 2 * variance + 0.5 * covariance, rel_tol=1e-10)


def test_gradcheck():
    assert torch.autograd.gradcheck(VarianceCovarianceLoss(1.0, 1.0), (0.5 * features()).requires_grad_())


def test_white_features_cost_nothing_and_collapsed_ones_most():
    x = features(50, 4)
    white = torch.linalg.qr(x - x.mean(dim=0)).Q * 50**0.5
    assert VarianceCovarianceLoss()(white) < 1e-12
    collapsed = torch.ones(50, 4, dtype=torch.float64)
    assert math.isclose(VarianceCovarianceLoss()(collapsed).item(), 1 - math.sqrt(1e-4), rel_tol=1e-9)


def test_descent_decorrelates():
    x = (features(64, 1) + 0.3 * features(64, 6)).requires_grad_()
    loss = VarianceCovarianceLoss(1.0, 1.0)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    correlation = torch.corrcoef(x.detach().T)
    assert (correlation - torch.eye(6)).abs().max() < 0.05
    assert x.detach().std(dim=0).min() > 0.95


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    x = (30 * features()).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = VarianceCovarianceLoss()(x)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(x.grad).all()


def test_errors():
    with pytest.raises(ValueError, match="at least two rows"):
        VarianceCovarianceLoss()(features(1))
    with pytest.raises(ValueError, match="Pool maps"):
        VarianceCovarianceLoss()(torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match="negative"):
        VarianceCovarianceLoss(-1.0)
