"""Accuracy by shots beside a loop, and its bounds."""

import pytest
import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.metrics.shots import accuracy_by_shots

COUNTS = [101, 100, 20, 19, 500, 1]


def test_matches_a_loop_and_groups_average_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (300,), generator=generator)
    predictions = torch.where(torch.rand(300, generator=generator) < 0.6, labels, (labels + 1) % 6)
    hits = {"many": [], "medium": [], "few": []}
    for guess, label in zip(predictions.tolist(), labels.tolist(), strict=True):
        group = "many" if COUNTS[label] > 100 else "medium" if COUNTS[label] >= 20 else "few"
        hits[group].append(guess == label)
    found = accuracy_by_shots(predictions, labels, COUNTS)
    assert found == pytest.approx({name: 100 * sum(v) / len(v) for name, v in hits.items()})
    whole = sum(found[name] * len(v) for name, v in hits.items()) / 300
    assert whole == pytest.approx(100 * (predictions == labels).double().mean().item())


def test_errors_and_empty_groups():
    assert accuracy_by_shots(torch.tensor([4]), torch.tensor([4]), COUNTS) == {"many": 100.0}
    with pytest.raises(EtfZooError, match="two vectors"):
        accuracy_by_shots(torch.zeros(2), torch.zeros(3), COUNTS)
    with pytest.raises(EtfZooError, match="class counts"):
        accuracy_by_shots(torch.tensor([0]), torch.tensor([6]), COUNTS)


def test_labels_of_any_integer_type():
    labels = torch.tensor([1, 1, 2])  # as a mask they would choose all classes
    right = {"many": 100.0, "medium": 100.0}
    assert accuracy_by_shots(labels, labels, [5, 500, 50]) == right
    assert accuracy_by_shots(labels.byte(), labels.byte(), [5, 500, 50]) == right
