"""Intervals: their coverage on simulated data, against a plain bootstrap, and what is paired with what."""

import math

import numpy as np
import pytest

from training.experiments.intervals import (
    Estimate,
    estimate,
    pack,
    paired_difference,
    rank_correlation,
    stacked,
    unpack,
)

# (runs, subsets, images), and standard deviations of what runs, subsets, images and each cell add to a score
SIMULATED = [
    ((1, 1, 340), (0.0, 0.0, 0.8, 0.6)),
    ((1, 3, 340), (0.0, 0.04, 0.8, 0.6)),
    ((3, 3, 340), (0.1, 0.02, 0.8, 0.6)),
]
MORE = [
    ((1, 3, 340), (0.0, 0.0, 0.8, 0.6)),
    ((1, 3, 340), (0.0, 0.12, 0.8, 0.6)),
    ((1, 3, 2000), (0.0, 0.04, 0.8, 0.6)),
    ((3, 1, 340), (0.06, 0.0, 0.8, 0.6)),
    ((3, 3, 340), (0.04, 0.04, 0.8, 0.6)),
    ((5, 4, 100), (0.1, 0.1, 0.8, 0.6)),
]


def normal(shape, spreads, rng):
    """A normal effect of each level, and of each cell, added up."""
    levels = [(shape[0], 1, 1), (1, shape[1], 1), (1, 1, shape[2]), shape]
    return sum(spread * rng.normal(size=level) for spread, level in zip(spreads, levels, strict=True))


def simulated(shape, spreads, rng):
    """Differences of hits, -1, 0 or 1, whose true mean is 0: the score is large either way in a third of them."""
    score = normal(shape, spreads, rng)
    return (score > 1).astype(float) - (score < -1)


def coverage(shape, spreads, trials):
    rng = np.random.default_rng(7)
    found = [estimate(simulated(shape, spreads, rng), draws=500, seed=i) for i in range(trials)]
    covered = np.mean([e.low <= 0 <= e.high for e in found])
    assert np.mean([e.tells for e in found]) == pytest.approx(1 - covered)
    return covered


@pytest.mark.parametrize(("shape", "spreads"), SIMULATED)
def test_an_interval_of_95_percent_holds_the_truth_in_95_percent(shape, spreads):
    assert 0.93 <= coverage(shape, spreads, 800) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "spreads"), SIMULATED + MORE)
def test_coverage_in_more_cases_and_trials(shape, spreads):
    assert 0.93 <= coverage(shape, spreads, 4000) <= 0.97


def paired_hits(spread, rng):
    """Differences of hits of two methods on three subsets, each with an effect of its own on a method's logits."""
    images = 2 * rng.normal(size=(1, 1, 2485))

    def hits():
        logits = 0.8 + spread * rng.normal(size=(1, 3, 1)) + images + rng.normal(size=(1, 3, 2485))
        return (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)

    return hits() - hits()


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.15, 0.3])
def test_three_subsets_of_a_paired_difference_are_covered_less(spread):
    """As the module says: where the images part cancels, what is left of the subsets has two degrees of freedom."""
    rng = np.random.default_rng(7)
    found = [estimate(paired_hits(spread, rng), draws=500, seed=i) for i in range(1000)]
    assert 0.86 <= np.mean([e.low <= 0 <= e.high for e in found]) <= 0.94


def plain_bootstrap(values, draws, rng):
    """The reference: draw runs, subsets and images anew, each with replacement, and take percentiles."""
    means = []
    for _ in range(draws):
        rows = np.ix_(*(rng.integers(n, size=n) for n in values.shape))
        means.append(100 * values[rows].mean())
    return np.quantile(means, [0.025, 0.975])


def test_with_many_of_each_it_is_the_plain_bootstrap():
    rng = np.random.default_rng(3)
    values = normal((30, 25, 200), (0.05, 0.05, 0.3, 0.05), rng)
    found = estimate(values)
    low, high = plain_bootstrap(values, 600, rng)
    assert found.high - found.low == pytest.approx(high - low, rel=0.1)
    assert found.low == pytest.approx(low, abs=0.1 * (high - low))


def test_why_it_is_not_the_plain_bootstrap_with_few():
    rng = np.random.default_rng(5)
    missed = 0
    for _ in range(200):
        low, high = plain_bootstrap(normal((1, 3, 50), (0, 0.2, 0.1, 0.1), rng), 150, rng)
        missed += not low <= 0 <= high
    assert missed / 200 > 0.12  # of 95 % intervals


def test_over_images_alone_it_is_the_binomial_interval():
    hits = np.arange(1000) < 800
    found = estimate(hits[None, None])
    half = 1.959964 * 100 * math.sqrt(0.8 * 0.2 / 1000)
    assert (found.mean, found.runs, found.subsets, found.images) == (80.0, 1, 1, 1000)
    assert found.high - 80 == pytest.approx(half, rel=0.05)
    assert 80 - found.low == pytest.approx(half, rel=0.05)
    assert estimate(hits[None, None]) == found  # the same figures give the same interval
    assert math.isnan(estimate(np.ones((1, 1, 1))).low)


def test_a_difference_is_paired_by_run_seed_and_image():
    rng = np.random.default_rng(0)
    easy = rng.random(200) < 0.5
    control = {("0", seed): easy ^ (rng.random(200) < 0.02) for seed in (0, 1, 2, 9)}
    own = {key: hits | (np.arange(200) < 20) for key, hits in control.items() if key[1] != 9}
    found = paired_difference(own, control)
    expected = 100 * np.mean([own[k].mean() - control[k].mean() for k in own])
    assert (found.mean, found.subsets, found.images) == (pytest.approx(expected), 3, 200)
    assert found.tells
    assert found.low > 0
    unpaired = estimate(stacked(own))
    assert found.high - found.low < 0.75 * (unpaired.high - unpaired.low)  # what is easy for both is no part of it
    nothing = paired_difference(own, {})
    assert (nothing.runs, nothing.tells) == (0, False)
    assert math.isnan(nothing.mean)


def test_all_the_same_tells_nothing():
    hits = {("0", seed): np.arange(50) < 25 for seed in range(3)}
    found = paired_difference(hits, hits)
    assert (found.mean, found.low, found.high, found.tells) == (0, 0, 0, False)


def test_runs_count_with_the_seeds_that_all_have():
    hits = {("0", 0): np.ones(8, bool), ("0", 1): np.ones(8, bool), ("1", 1): np.zeros(8, bool)}
    assert stacked(hits).tolist() == [[[1.0] * 8], [[0.0] * 8]]
    with pytest.raises(ValueError, match="no seed in common"):
        stacked({("0", 0): np.ones(8, bool), ("1", 1): np.ones(8, bool)})
    with pytest.raises(ValueError, match="different test images: 7 and 8"):
        stacked({("0", 0): np.ones(8, bool), ("0", 1): np.ones(7, bool)})
    with pytest.raises(ValueError, match=r"\(runs, subsets, images\)"):
        estimate(np.ones((3, 4)))


@pytest.mark.parametrize("count", [1, 8, 13, 340])
def test_hits_in_a_line(count):
    hits = np.random.default_rng(count).random(count) < 0.5
    text = pack(hits)
    assert len(text) == 2 * -(-count // 8)
    assert np.array_equal(unpack(text, count), hits)
    with pytest.raises(ValueError, match="hits were expected"):
        unpack(text, count + 8)
    with pytest.raises(ValueError, match="hexadecimal"):
        unpack("xy", 8)


def test_rank_correlation():
    assert rank_correlation([(1, 10), (3, 30), (2, 20)]) == pytest.approx(1)
    assert rank_correlation([(1, 30), (3, 10), (2, 20)]) == pytest.approx(-1)
    assert math.isnan(rank_correlation([(1, 10), (2, 20)]))
    assert math.isnan(rank_correlation([(1, 10), (1, 20), (1, 30)]))


def test_tells():
    assert [Estimate(1, low, high, 1, 1, 9).tells for low, high in ((0.1, 2), (-2, -0.1), (-1, 1))] == [1, 1, 0]
    assert not Estimate(1, math.nan, math.nan, 1, 1, 1).tells
