"""Long tails beside the formula, class by class."""

import numpy as np
import pytest

from etf_zoo.trainer.data.long_tail import long_tail_counts, long_tail_indices


@pytest.mark.parametrize("imbalance", [0.1, 0.02, 0.01, 0.005])
def test_counts_follow_the_formula(imbalance):
    counts = long_tail_counts(100, 500, imbalance)
    for k, count in enumerate(counts):
        exact = 500 * imbalance ** (k / 99)
        assert exact - 1 < count <= exact + 1e-6
    assert counts[0] == 500
    assert counts[-1] == int(round(500 * imbalance, 6))
    assert counts == sorted(counts, reverse=True)


def test_total_of_long_tailed_cifar():
    assert sum(long_tail_counts(100, 500, 0.01)) == 10847  # CIFAR-100-LT as it is commonly reported


def test_no_class_is_left_empty():
    assert long_tail_counts(10, 20, 0.005)[-1] == 1


def test_indices_have_these_counts():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), [60, 50, 55, 70, 50, 80, 50, 90, 51, 52]))
    kept = long_tail_indices(labels, 0.1, seed=0)
    assert np.bincount(labels[kept]).tolist() == long_tail_counts(10, 50, 0.1)
    assert len(np.unique(kept)) == len(kept)
    assert (np.diff(kept) > 0).all()


def test_seed_chooses_and_tails_nest():
    labels = np.repeat(np.arange(5), 40)
    a, b = long_tail_indices(labels, 0.1, seed=0), long_tail_indices(labels, 0.1, seed=1)
    assert np.array_equal(a, long_tail_indices(labels, 0.1, seed=0))
    assert not np.array_equal(a, b)
    assert set(long_tail_indices(labels, 0.05, seed=0)) < set(a)


def test_imbalance_one_is_balanced():
    labels = np.repeat(np.arange(4), [5, 6, 7, 5])
    assert np.bincount(labels[long_tail_indices(labels, 1.0, seed=0)]).tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("labels", "imbalance", "message"),
    [
        ([0, 1, 1], 0.0, "imbalance"),
        ([0, 1, 1], 1.5, "imbalance"),
        ([0, 2, 2], 0.1, r"Classes without a sample: \[1\]"),
        ([0.0, 1.0], 0.1, "class numbers"),
        ([-1, 0], 0.1, "class numbers"),
        ([0, 0], 0.1, "at least 2 classes"),
    ],
)
def test_errors(labels, imbalance, message):
    with pytest.raises(ValueError, match=message):
        long_tail_indices(np.array(labels), imbalance, seed=0)
