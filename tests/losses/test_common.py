"""What every loss on (embeddings, labels, frame) promises: precision, half inputs, errors that name the fix."""

import pytest
import torch
from torch.nn import functional as F

from etf_zoo.frames import simplex_etf
from etf_zoo.losses import DotRegressionLoss, HierarchyCosineLoss, SeparatingConeLoss, SquaredLoss

LOSSES = {
    "dot regression": DotRegressionLoss(),
    "dot regression, counts": DotRegressionLoss([50, 20, 10, 5, 1]),
    "dot regression, lengths": DotRegressionLoss(feature_length=None, length_penalty=0.1),
    "dot regression, own length": DotRegressionLoss(feature_length="own"),
    "hierarchy cosine": HierarchyCosineLoss(0.4, logit_scale=8.0),
    "separating cone": SeparatingConeLoss(20.0),
    "squared": SquaredLoss(),
    "squared, centered": SquaredLoss(centered=True),
}
FRAME = simplex_etf(5, 7, orientation="random", seed=1)
LABELS = torch.tensor([0, 3, 3, 1, 4, 2])


def features(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(6, 7, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


@pytest.fixture(params=LOSSES, ids=str)
def loss(request):
    return LOSSES[request.param]


def test_gradcheck(loss):
    if getattr(loss, "feature_length", None) == "own":
        pytest.skip("no derivative: the wanted length is taken as given, see test_dot_regression.py")
    assert torch.autograd.gradcheck(lambda x: loss(x, LABELS, FRAME.double()), features(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(loss, dtype):
    x = features(dtype, scale=200.0)  # squares overflow float16
    value = loss(x, LABELS, FRAME)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.isfinite(x.grad).all()
    assert torch.allclose(value, loss(x.detach().float(), LABELS, FRAME), rtol=1e-6)


def test_autocast_changes_nothing(loss):
    plain = loss(features(), LABELS, FRAME)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(features(), LABELS, FRAME), plain)
    exact = loss(features(torch.float64), LABELS, FRAME.double())
    assert torch.allclose(plain.double(), exact, rtol=1e-5)


def test_arguments_by_name(loss):
    x = features()
    assert torch.equal(loss(embeddings=x, labels=LABELS, frame=FRAME), loss(x, LABELS, FRAME))
    assert torch.equal(loss(frame=FRAME, labels=LABELS, embeddings=x), loss(x, LABELS, FRAME))
    with pytest.raises(TypeError, match="'embeddings'"):
        loss(labels=LABELS, frame=FRAME)


def test_labels_of_any_integer_type(loss):
    assert torch.equal(loss(features(), LABELS.to(torch.uint8), FRAME), loss(features(), LABELS, FRAME))


@pytest.mark.parametrize("wrong", [-1, 5])
def test_labels_out_of_range(loss, wrong):
    with pytest.raises(ValueError, match=f"rows of the frame, 0 to 4; got {min(wrong, 0)} to"):
        loss(features(), torch.tensor([0, 3, wrong, 1, 4, 2]), FRAME)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_features_give_small_gradients(loss, dtype):
    """No larger than those of unit features: their direction, which no step can find, asks for nothing."""
    x = torch.zeros(6, 7, dtype=dtype, requires_grad=True)
    value = loss(x, LABELS, FRAME)
    value.backward()
    assert torch.isfinite(value)
    assert x.grad.abs().max() < 10


@pytest.mark.parametrize("length", [1e-8, 1e-5, 2e-3])
def test_short_features_give_finite_gradients_in_float16(loss, length):
    x = (length * F.normalize(features(torch.float64).detach(), dim=1)).half().requires_grad_()
    loss(x, LABELS, FRAME).backward()
    assert torch.isfinite(x.grad).all()


def test_features_on_their_prototypes_give_finite_gradients(loss):
    x = FRAME[LABELS].clone().requires_grad_()
    loss(x, LABELS, FRAME).backward()
    assert torch.isfinite(x.grad).all()
    y = (-FRAME[LABELS]).requires_grad_()
    loss(y, LABELS, FRAME).backward()
    assert torch.isfinite(y.grad).all()


def test_batch_order_and_repetition_do_not_matter(loss):
    x, order = F.normalize(features().detach(), dim=1), torch.tensor([5, 2, 0, 1, 4, 3])
    value = loss(x, LABELS, FRAME)
    assert torch.allclose(loss(x[order], LABELS[order], FRAME), value)
    assert torch.allclose(loss(torch.cat([x, x]), torch.cat([LABELS, LABELS]), FRAME), value)


def test_errors(loss):
    with pytest.raises(ValueError, match=r"Expected embeddings \(B, dim\).*embed"):
        loss(torch.randn(6, 8), LABELS, FRAME)
    with pytest.raises(ValueError, match=r"Expected class numbers \(6,\)"):
        loss(features(), LABELS[:5], FRAME)
    with pytest.raises(ValueError, match="soft labels"):
        loss(features(), torch.rand(6, 5), FRAME)
    with pytest.raises(ValueError, match="empty"):
        loss(torch.zeros(0, 7), LABELS[:0], FRAME)
