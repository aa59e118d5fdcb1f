"""Groups of near-duplicates, and folds that keep them together."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from etf_zoo.errors import EtfZooError
from etf_zoo.trainer.data.near_duplicates import grouped_folds, near_duplicates
from etf_zoo.trainer.data.sealed import choosing, refuse_test


def series(objects=40, pictures=3, noise=0.02):
    """Features of pictures in series, shuffled, and the object of each."""
    generator = torch.Generator().manual_seed(0)
    own = torch.arange(objects).repeat_interleave(pictures)
    own = own[torch.randperm(len(own), generator=generator)]
    features = torch.randn(objects, 32, generator=generator)[own] + 5
    return features + noise * torch.randn(len(own), 32, generator=generator), own.numpy()


def linked_slowly(features, near):
    """Groups by repeated passes over all pairs."""
    x = features.double().numpy()
    x = x - x.mean(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    groups = list(range(len(x)))
    for i in range(len(x)):
        for j in range(i):
            if x[i] @ x[j] > near and groups[i] != groups[j]:
                old, new = groups[i], groups[j]
                groups = [new if g == old else g for g in groups]
    return np.unique(groups, return_inverse=True)[1]


def same(groups):
    return groups[:, None] == groups[None]


def test_a_series_is_a_group(monkeypatch):
    features, own = series()
    assert (same(near_duplicates(features)) == same(own)).all()
    monkeypatch.setattr("etf_zoo.trainer.data.near_duplicates.ROWS", 7)  # block by block
    assert (same(near_duplicates(features)) == same(own)).all()


@pytest.mark.parametrize("near", [0.3, 0.6, 0.9])
def test_groups_are_connected_components(near):
    features = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    groups = near_duplicates(features, near)
    slow = linked_slowly(features, near)
    whole = np.bincount(slow)[slow] <= 12  # those of more than a fifth are split
    assert (same(groups)[whole] == same(slow)[whole]).all()
    assert not (same(groups) & ~same(slow)).any()
    assert sorted(set(groups)) == list(range(groups.max() + 1))


def test_collapsed_features_still_make_folds():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    features = 5 * F.one_hot(labels, 4).float() + 0.3 * torch.randn(200, 4, generator=generator)
    groups = near_duplicates(features)
    assert linked_slowly(features, 0.85).max() == 3  # a chain is a class
    assert np.bincount(groups).max() <= 40
    for fit, judged in grouped_folds(labels.numpy(), groups, 3, 0):
        assert set(labels[fit].tolist()) == set(labels[judged].tolist()) == {0, 1, 2, 3}


def test_exact_copies_stay_together_however_many():
    features = torch.cat([torch.ones(30, 4), torch.randn(10, 4, generator=torch.Generator().manual_seed(0))])
    assert len(set(near_duplicates(features)[:30])) == 1


def test_folds_break_no_group_and_keep_classes():
    features, own = series(objects=60)
    labels = own % 3
    groups = near_duplicates(features)
    folds = list(grouped_folds(labels, groups, 3, 0))
    assert sorted(np.concatenate([judged for _, judged in folds])) == list(range(len(labels)))
    for fit, judged in folds:
        assert not set(own[fit]) & set(own[judged])
        assert sorted([*fit, *judged]) == list(range(len(labels)))
        assert np.bincount(labels[judged]).min() >= 15
    again = list(grouped_folds(labels, groups, 3, 0))
    assert all((a[1] == b[1]).all() for a, b in zip(folds, again, strict=True))
    other = list(grouped_folds(labels, groups, 3, 1))
    assert any(len(a[1]) != len(b[1]) or (a[1] != b[1]).any() for a, b in zip(folds, other, strict=True))


def test_a_choice_that_asks_for_the_test_is_refused():
    refuse_test("test", "train")
    with choosing():
        refuse_test("train", "train")
        with pytest.raises(EtfZooError, match=r"'test' was asked for .* held-out images of 'train'"):
            refuse_test("test", "train")
    refuse_test("test", "train")
