"""The entropy term beside a plain loop; it is least where features are spread, and parts those that are near."""

import math

import pytest
import torch

from etf_zoo.frames import simplex_etf
from etf_zoo.losses import NearestNeighborEntropyLoss


def features(rows=7, dim=4):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_matches_a_plain_loop():
    x = features()
    unit = [[float(v) / math.sqrt(sum(float(w) ** 2 for w in row)) for v in row] for row in x]
    total = 0.0
    for i, one in enumerate(unit):
        distances = [math.dist(one, other) for j, other in enumerate(unit) if j != i]
        total -= math.log(min(distances)) / len(unit)
    assert math.isclose(NearestNeighborEntropyLoss()(features=x).item(), total, rel_tol=1e-10)


def test_gradcheck():
    assert torch.autograd.gradcheck(NearestNeighborEntropyLoss(), features().requires_grad_())


def test_length_and_rotation_do_not_matter():
    x, loss = features(), NearestNeighborEntropyLoss()
    turn = torch.linalg.qr(features(4, 4)).Q
    lengths = torch.linspace(0.1, 9, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss(lengths * x @ turn), loss(x))


def test_a_simplex_of_features_has_the_least_loss():
    """No K unit vectors are farther from their nearest neighbors: sqrt(2K/(K-1))."""
    loss, frame = NearestNeighborEntropyLoss(), simplex_etf(6, 8).double()
    least = -math.log(math.sqrt(2 * 6 / 5))
    assert math.isclose(loss(frame).item(), least, rel_tol=1e-6)
    assert loss(features(6, 8)) > least


def test_descent_parts_features_that_are_near():
    x = (torch.ones(8, 6, dtype=torch.float64) + 0.01 * features(8, 6)).requires_grad_()
    loss, optimizer = NearestNeighborEntropyLoss(), torch.optim.Adam([x], lr=0.05)
    before = loss(x).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    assert loss(x).item() < before - 3
    assert torch.pdist(torch.nn.functional.normalize(x, dim=1)).min() > 1


def test_distances_that_a_cosine_would_hide_are_seen():
    x = torch.eye(4)[[0, 0, 1, 2]]
    x[1, 1] = 1e-4
    expected = -(2 * math.log(1e-4) + 2 * math.log(math.sqrt(2))) / 4
    assert math.isclose(NearestNeighborEntropyLoss()(x).item(), expected, rel_tol=1e-3)


def test_equal_and_empty_features_have_a_finite_loss_and_gradient():
    for start in (torch.ones(4, 3), torch.zeros(4, 3)):
        x = start.requires_grad_()
        value = NearestNeighborEntropyLoss(eps=1e-3)(x)
        value.backward()
        assert math.isclose(value.item(), -math.log(1e-3), rel_tol=1e-5)
        assert x.grad is not None
        assert torch.equal(x.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    x = (30 * features()).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = NearestNeighborEntropyLoss()(x)
    value.backward()
    assert value.dtype == torch.float32
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_errors():
    with pytest.raises(ValueError, match="at least two rows"):
        NearestNeighborEntropyLoss()(features(1))
    with pytest.raises(ValueError, match="Pool maps"):
        NearestNeighborEntropyLoss()(torch.randn(2, 3, 4, 4))
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="eps"):
            NearestNeighborEntropyLoss(eps=eps)
