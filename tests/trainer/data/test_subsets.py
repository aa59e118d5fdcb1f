"""Parts of a training split."""

import numpy as np
import pytest
import torch

from etf_zoo.trainer.data.batches import Split, limited_rows
from etf_zoo.trainer.data.subsets import check_classes, few_shot_indices, holdout_indices, split_training, training_rows

LABELS = np.repeat([0, 1, 2], [20, 11, 3])


def split(labels, names="abc"):
    labels = np.asarray(labels)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8)
    return Split(images, labels, list(names), "made up")


def test_holdout_is_stratified_and_disjoint():
    kept, held = holdout_indices(LABELS, 0.1, seed=0)
    assert sorted([*kept, *held]) == list(range(34))
    assert np.bincount(LABELS[held]).tolist() == [2, 1, 1]
    assert holdout_indices(LABELS, 0.1, 0)[1].tolist() == held.tolist()
    assert holdout_indices(LABELS, 0.1, 1)[1].tolist() != held.tolist()
    assert np.bincount(LABELS[holdout_indices(LABELS, 0.99, 0)[0]]).tolist() == [1, 1, 1]
    assert 3 not in LABELS[holdout_indices([0, 0, 1], 0.5, 0)[1]]  # a class of one image stays whole


def test_few_shots():
    five = few_shot_indices(np.repeat(range(4), 10), 5, 0, list("abcd"))
    two = few_shot_indices(np.repeat(range(4), 10), 2, 0, list("abcd"))
    assert np.bincount(np.repeat(range(4), 10)[five]).tolist() == [5] * 4
    assert set(two) < set(five)


def test_split_training():
    data = split(np.repeat([0, 1], 20), "ab")
    fit, held = split_training(data, holdout=0.25, shots=3, seed=0)
    assert (len(fit), len(held)) == (6, 10)
    shown, watched = (
        set(part.take(np.arange(len(part)), torch.device("cpu"))[0][:, 0, 0, 0].tolist()) for part in (fit, held)
    )
    assert (len(shown), len(watched)) == (6, 10)
    assert not shown & watched
    whole, none = split_training(data)
    assert len(whole) == 40
    assert none is None
    tail, _ = split_training(data, long_tail=0.1)
    assert np.bincount(tail.labels).tolist() == [20, 2]


def test_a_limit_is_that_of_training():
    labels = np.repeat([0, 1], 20)
    kept, held = training_rows(labels, ["a", "b"], holdout=0.25, limit=7, seed=3)
    assert set(kept) == set(holdout_indices(labels, 0.25, 3)[0][limited_rows(30, 7, 3)])  # which it trains on
    assert (len(kept), len(held)) == (7, 10)
    assert len(training_rows(labels, ["a", "b"], limit=100)[0]) == 40


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: holdout_indices([0, 1, 2], 0.5, 0), "No class has two images"),
        (lambda: holdout_indices([0, 0], 1.0, 0), "in \\(0, 1\\)"),
        (lambda: few_shot_indices(LABELS, 5, 0, list("abc")), "such as 'c' with 3. Ask for at most 3 shots"),
        (lambda: few_shot_indices(LABELS, -1, 0, list("abc")), "shots must be positive"),
        (lambda: split_training(split(LABELS), shots=2, long_tail=0.1), "set one"),
        (lambda: check_classes(split([1, 1, 1]), split([1])), "all of one class \\(b\\)"),
        (lambda: check_classes(split([0, 1]), split([0, 2])), "1 classes without a training image, such as 'c'"),
        (lambda: check_classes(split([0, 1, 2]), split([0, 1], "abd")), "number their classes differently"),
        (lambda: check_classes(split([0, 1, 2]), split([0, 2], "abd")), "such as 'd'"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_fitting_classes_pass():
    check_classes(split([0, 1, 2]), split([2, 1]))
    check_classes(split([0, 1]), split([1, 0]))  # a class with no image on either side
