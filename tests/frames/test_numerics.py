"""Directions of features: exact where there is one, zero with zero gradient where there is none, in every precision."""

import math

import pytest
import torch
from torch.nn import functional as F

from etf_zoo import FrameClassifier
from etf_zoo.frames.numerics import directed_lengths, unit

SHORTEST = {torch.float16: 1e-3, torch.bfloat16: 1e-6, torch.float32: 1e-6, torch.float64: 1e-6}
each_dtype = pytest.mark.parametrize("dtype", SHORTEST)


def directions(dtype, dim=8, rows=6):
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return F.normalize(x, dim=1).to(dtype)


@each_dtype
def test_ordinary_features_are_as_torch_normalizes_them(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for length in (0.01, 1.0, 300.0):
        x = length * directions(dtype)
        assert torch.equal(unit(x), F.normalize(x.to(wide), dim=1))
        assert unit(x).dtype == wide
    long = 50 * torch.ones(2, 2048, dtype=dtype)  # the squared length is more than float16 can hold
    torch.testing.assert_close(unit(long).norm(dim=-1), torch.ones(2, dtype=wide))


@each_dtype
def test_short_features_give_zero_and_no_gradient(dtype):
    for length in (0.0, 0.1 * SHORTEST[dtype]):
        x = (length * directions(dtype)).requires_grad_()
        y = unit(x)
        y.backward(100 * torch.ones_like(y))
        assert torch.equal(y, torch.zeros_like(y))
        assert torch.equal(x.grad, torch.zeros_like(x))


@each_dtype
def test_gradients_have_a_bound_in_the_precision_of_the_features(dtype):
    """A gradient of 30, more than a batch of one passes on at scale 16, never overflows, whatever the length."""
    for exponent in torch.linspace(-9, 2, 45).tolist():
        x = (10**exponent * directions(dtype)).requires_grad_()
        y = unit(x)
        y.backward(30 * F.one_hot(torch.arange(6), 8).to(y.dtype))
        assert torch.isfinite(x.grad).all()
        assert x.grad.norm(dim=1).max() <= 30 / SHORTEST[dtype]


def test_what_features_were_computed_from_decides():
    x = torch.full((1, 4), 1e-4)
    assert torch.equal(unit(x), torch.full((1, 4), 0.5))
    assert torch.equal(unit(x, x.half()), torch.zeros(1, 4))
    assert directed_lengths(x, x.half()).item() == math.inf


def test_what_is_not_finite_stays_so():
    x = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [3.0, 4.0]])
    assert torch.isnan(unit(x)).any(dim=1).tolist() == [True, True, False]


def test_gradcheck():
    assert torch.autograd.gradcheck(unit, (directions(torch.float64) * 3).requires_grad_())


@pytest.mark.parametrize("norm", ["l2", "batch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_features_in_a_head(dtype, norm):
    head = FrameClassifier(8, 5, feature_norm=norm)
    x = torch.zeros(6, 8, dtype=dtype, requires_grad=True)
    F.cross_entropy(head(x), torch.arange(6) % 5).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
