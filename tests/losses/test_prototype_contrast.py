"""The loss over the batch beside a plain loop; transposed cross-entropy; what pulls and what pushes."""

import math

import pytest
import torch
from torch.nn import functional as F

from etf_zoo.frames import simplex_etf
from etf_zoo.losses import PrototypeContrastLoss

FRAME = simplex_etf(5, 8, orientation="random", seed=3).double()
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0, 0])


def features(rows=10, seed=1):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("own_class", [True, False])
def test_matches_a_plain_loop(own_class):
    x, scale, total = features(), 7.0, 0.0
    unit = [row / math.sqrt(float(row @ row)) for row in x]
    for i, label in enumerate(LABELS.tolist()):
        w = FRAME[label]
        others = [u for u, other in zip(unit, LABELS.tolist(), strict=True) if own_class or other != label]
        total += math.log(sum(math.exp(scale * float(w @ u)) for u in others)) - scale * float(w @ unit[i])
    value = PrototypeContrastLoss(own_class, logit_scale=scale)(x, LABELS, FRAME).item()
    assert math.isclose(value, total / len(x), rel_tol=1e-6)


@pytest.mark.parametrize("own_class", [True, False])
def test_gradcheck(own_class):
    loss = PrototypeContrastLoss(own_class, logit_scale=3.0)
    x, w = features().requires_grad_(), FRAME.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: loss(x, LABELS, w), (x, w))


def test_with_one_image_a_class_it_is_cross_entropy_of_the_transposed_logits():
    x, labels = features(5), torch.tensor([3, 1, 0, 4, 2])
    logits = 16 * F.normalize(x, dim=1) @ FRAME.T
    expected = F.cross_entropy(logits.T[labels], torch.arange(5))
    torch.testing.assert_close(PrototypeContrastLoss()(x, labels, FRAME), expected)


def test_own_class_pushes_in_the_one_and_not_in_the_other():
    """Two features of a class, one near its prototype and one far: does the near one push the far one away?"""
    x = torch.stack([FRAME[0] + 0.1 * features(1)[0], features(1, seed=2)[0], FRAME[1]])
    labels = torch.tensor([0, 0, 1])
    pulls = {}
    for own_class in (True, False):
        x = x.detach().requires_grad_()
        PrototypeContrastLoss(own_class, logit_scale=30.0)(x, labels, FRAME).backward()
        assert x.grad is not None
        pulls[own_class] = -(x.grad[0] @ (FRAME[0] - (FRAME[0] @ F.normalize(x[0], dim=0)) * F.normalize(x[0], dim=0)))
    assert pulls[False] > pulls[True]


@pytest.mark.parametrize("own_class", [True, False])
def test_descent_finds_the_prototypes(own_class):
    x, labels = features().requires_grad_(), torch.arange(10) % 5  # as many images of each class
    loss, optimizer = PrototypeContrastLoss(own_class, logit_scale=8.0), torch.optim.Adam([x], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss(x, labels, FRAME).backward()
        optimizer.step()
    cosines = F.normalize(x.detach(), dim=1) @ FRAME.T
    assert torch.equal(cosines.argmax(dim=1), labels)
    # the paper's optimum; the loss is flat about it where the own class is in the sum
    at_best = loss(FRAME[labels], labels, FRAME)
    torch.testing.assert_close(loss(x, labels, FRAME), at_best, atol=0.02, rtol=0)
    assert loss(features(), labels, FRAME) > at_best + 0.5
    assert cosines.gather(1, labels[:, None]).min() > (0.6 if own_class else 0.95)


def test_a_batch_of_one_class_is_pulled_and_finite():
    x, labels = features(4).requires_grad_(), torch.zeros(4, dtype=torch.long)
    value = PrototypeContrastLoss(False, logit_scale=2.0)(x, labels, FRAME)
    value.backward()
    expected = -2 * (F.normalize(x, dim=1) @ FRAME[0]).mean()
    torch.testing.assert_close(value, expected)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("own_class", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(own_class, dtype):
    x = features().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = PrototypeContrastLoss(own_class, logit_scale=64.0)(x, LABELS, FRAME.float())
    value.backward()
    assert value.dtype == torch.float32
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_errors():
    for scale in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="logit_scale"):
            PrototypeContrastLoss(logit_scale=scale)
    with pytest.raises(ValueError, match="soft labels"):
        PrototypeContrastLoss()(features(), torch.rand(10, 5), FRAME)
    with pytest.raises(ValueError, match="rows of the frame"):
        PrototypeContrastLoss()(features(), LABELS + 3, FRAME)
