"""IoU from a confusion matrix beside loops over pixels; counts add up over batches."""

import math

import pytest
import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.metrics.segmentation import SegmentationScores


def maps(seed=0, k=4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (3, 7, 5), generator=generator)
    predictions = torch.where(torch.rand(3, 7, 5, generator=generator) < 0.5, labels, labels.roll(1))
    labels[0, :2] = 255
    return predictions, labels


def slow(predictions, labels, k):
    pairs = [(p, t) for p, t in zip(predictions.flatten().tolist(), labels.flatten().tolist(), strict=True) if t != 255]
    iou = []
    for c in range(k):
        both = sum(p == c and t == c for p, t in pairs)
        either = sum(c in (p, t) for p, t in pairs)
        iou.append(both / either if either else math.nan)
    recalls = []
    for c in range(k):
        own = [p == c for p, t in pairs if t == c]
        recalls += [sum(own) / len(own)] if own else []
    return iou, sum(p == t for p, t in pairs) / len(pairs), sum(recalls) / len(recalls)


def test_matches_loops_in_any_batches():
    predictions, labels = maps()
    iou, accuracy, recall = slow(predictions, labels, 5)  # class 4 never occurs
    whole, parts = SegmentationScores(5), SegmentationScores(5)
    whole.update(predictions, labels)
    for p, t in zip(predictions, labels, strict=True):
        parts.update(p, t)
    assert torch.equal(whole.counts, parts.counts)
    figures = whole.compute()
    assert whole.iou().tolist()[:4] == pytest.approx(iou[:4])
    assert math.isnan(whole.iou()[4])
    assert figures["miou"] == pytest.approx(100 * sum(iou[:4]) / 4)
    assert figures["accuracy"] == pytest.approx(100 * accuracy)
    assert figures["class_accuracy"] == pytest.approx(100 * recall)


def test_all_right_and_all_wrong():
    labels = torch.tensor([[0, 1, 255]])
    scores = SegmentationScores(2)
    scores.update(torch.tensor([[0, 1, 1]]), labels)
    assert scores.compute()["miou"] == 100
    scores = SegmentationScores(2)
    scores.update(torch.tensor([[1, 0, 0]]), labels)
    assert scores.compute()["miou"] == 0


def test_errors():
    with pytest.raises(EtfZooError, match="No pixel"):
        SegmentationScores(3).compute()
    with pytest.raises(EtfZooError, match="one shape"):
        SegmentationScores(3).update(torch.zeros(2, 2).long(), torch.zeros(2, 3).long())
    with pytest.raises(EtfZooError, match=r"0 to 7"):
        SegmentationScores(3).update(torch.tensor([7, 0]), torch.tensor([0, 0]))
    with pytest.raises(EtfZooError, match="at least 2"):
        SegmentationScores(1)
