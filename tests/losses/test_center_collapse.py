"""Center collapse beside a plain loop over pixels; areas and absent classes do not count."""

import math

import pytest
import torch

from etf_zoo.frames import simplex_etf
from etf_zoo.losses import CenterCollapseLoss
from etf_zoo.losses.center_collapse import class_centers

FRAME = simplex_etf(5, 6, orientation="random", seed=2).double()


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 6, 3, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 3, 4), generator=generator)  # class 4 is absent
    labels[0, 0, :2] = 255
    return features, labels


def plain(features, labels, frame, scale):
    sums, counts = {}, {}
    for b in range(features.shape[0]):
        for i in range(features.shape[2]):
            for j in range(features.shape[3]):
                label = int(labels[b, i, j])
                if label != 255:
                    sums[label] = sums.get(label, 0) + features[b, :, i, j]
                    counts[label] = counts.get(label, 0) + 1
    total = 0.0
    for label, value in sums.items():
        center = value / counts[label]
        center = center / math.sqrt(float(center @ center))
        logits = [scale * float(center @ w) for w in frame]
        total += math.log(sum(math.exp(v) for v in logits)) - logits[label]
    return total / len(sums)


@pytest.mark.parametrize("seed", range(3))
def test_matches_a_plain_loop(seed):
    features, labels = batch(seed)
    value = CenterCollapseLoss(logit_scale=10.0)(features, labels, FRAME).item()
    assert math.isclose(value, plain(features, labels, FRAME, 10.0), rel_tol=1e-10)
    assert CenterCollapseLoss(logit_scale=10.0)(features=features, labels=labels, frame=FRAME).item() == value


def test_gradcheck():
    features, labels = batch()
    loss = CenterCollapseLoss()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, FRAME), features.requires_grad_())


def test_ignored_pixels_get_no_gradient():
    features, labels = batch()
    CenterCollapseLoss()(features.requires_grad_(), labels, FRAME).backward()
    assert torch.equal(features.grad[0, :, 0, :2], torch.zeros(6, 2, dtype=torch.float64))
    assert bool(features.grad[1].abs().sum() > 0)


def test_area_does_not_count():
    """Repeating the pixels of one class leaves the loss as it was."""
    features, labels = batch()
    more = torch.cat([features, features])
    others_ignored = torch.where(labels == 2, labels, 255)
    again = torch.cat([labels, others_ignored])
    loss = CenterCollapseLoss()
    assert torch.allclose(loss(more, again, FRAME), loss(features, labels, FRAME))


def test_centers_on_the_frame_cost_nothing():
    labels = torch.tensor([0, 1, 2, 3, 4, 0]).view(1, 2, 3)
    features = (3 * FRAME[labels]).movedim(-1, 1)
    assert CenterCollapseLoss(logit_scale=40.0)(features, labels, FRAME) < 1e-8


def test_a_map_without_classes_costs_nothing():
    features = torch.randn(1, 6, 2, 2, requires_grad=True)
    value = CenterCollapseLoss()(features, torch.full((1, 2, 2), 255), FRAME)
    value.backward()
    assert value.item() == 0
    assert torch.equal(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    features, labels = batch()
    x = (300 * features).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = CenterCollapseLoss()(x, labels.to(torch.uint8), FRAME)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [0.0, 1e-8, 1e-5])
def test_short_features_give_small_gradients(dtype, length):
    features, labels = batch()
    x = (length * torch.nn.functional.normalize(features, dim=1)).to(dtype).requires_grad_()
    CenterCollapseLoss()(x, labels, FRAME).backward()
    assert torch.isfinite(x.grad).all()
    assert length > 1e-6 or not x.grad.any()


def test_centers_of_nothing():
    centers, classes = class_centers(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 4)
    assert centers.shape == (0, 3)
    assert classes.shape == (0,)


def test_errors():
    features, labels = batch()
    with pytest.raises(ValueError, match=r"features \(B, C, H, W\)"):
        CenterCollapseLoss()(features[0], labels, FRAME)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*nearest"):
        CenterCollapseLoss()(features, labels[:, :2], FRAME)
    with pytest.raises(ValueError, match=r"\[0, 5\) or be ignore_index=0"):
        CenterCollapseLoss(ignore_index=0)(features, labels, FRAME)
    with pytest.raises(ValueError, match="logit_scale"):
        CenterCollapseLoss(logit_scale=-1)
