import dataclasses
import itertools
import math

import pytest
import torch

from etf_zoo.frames import frame_report, orthogonal_simplices, random_frame, simplex_etf
from etf_zoo.frames.report import simplex_report


def slow_cosines(weight):
    rows = [row / row.norm() for row in weight.double()]
    return [float(a @ b) for a, b in itertools.combinations(rows, 2)]


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 1), (3, 5), (10, 4), (40, 40)])
def test_against_all_pairs_one_by_one(num_classes, dim):
    weight = 3 * random_frame(num_classes, dim, seed=4)  # rows need not be unit
    report, pairs = frame_report(weight), slow_cosines(weight)
    ideal = -1 / (num_classes - 1)
    assert report.num_classes == num_classes
    assert report.dim == dim
    assert report.largest_cosine == pytest.approx(max(pairs), abs=1e-12)
    assert report.coherence == pytest.approx(max(map(abs, pairs)), abs=1e-12)
    assert report.equiangularity_error == pytest.approx(max(abs(c - ideal) for c in pairs), abs=1e-12)


def test_blocks_of_rows_see_every_pair():
    weight = random_frame(2100, 4, seed=0)
    weight[2099], weight[5] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, 1e-4, 0, 0])
    assert frame_report(weight).largest_cosine == pytest.approx(1, abs=1e-7)


def test_simplex_meets_its_bounds():
    report = frame_report(simplex_etf(100, 512))
    assert report.largest_cosine == pytest.approx(-1 / 99, abs=1e-6)
    assert report.rankin_bound == -1 / 99
    assert report.welch_bound == 0
    assert report.equiangularity_error < 1e-6
    assert report.tightness_error < 1e-5
    full = frame_report(simplex_etf(10, 9))  # K = d + 1: Welch's bound is met
    assert full.coherence == pytest.approx(full.welch_bound, abs=1e-6)
    assert full.welch_bound == pytest.approx(1 / 9)


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 1), (10, 9), (10, 40)])
def test_simplex_in_closed_form(num_classes, dim):
    measured, known = frame_report(simplex_etf(num_classes, dim)), simplex_report(num_classes, dim)
    assert dataclasses.asdict(known) == pytest.approx(dataclasses.asdict(measured), abs=1e-5)
    with pytest.raises(ValueError, match="at least 9 dimensions"):
        simplex_report(10, 8)


def test_orthoplex_and_untight_frames():
    report = frame_report(orthogonal_simplices(16, 8))
    assert report.rankin_bound == 0
    assert report.largest_cosine == pytest.approx(0, abs=1e-6)
    assert report.coherence == pytest.approx(1, abs=1e-6)
    assert report.tightness_error < 1e-5
    # two orthogonal lines, three vectors: eigenvalues 2 and 1, mean 1.5
    uneven = frame_report(torch.tensor([[1.0, 0], [-1, 0], [0, 1]]))
    assert uneven.tightness_error == pytest.approx(1 / 1.5)


def test_no_frame_beats_the_bounds():
    for num_classes, dim in [(3, 2), (5, 4), (9, 4), (20, 3)]:
        report = frame_report(random_frame(num_classes, dim, seed=num_classes))
        assert report.coherence >= report.welch_bound
        assert report.largest_cosine >= report.rankin_bound


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), "matrix"),
        (torch.ones(1, 3), "at least two rows"),
        (torch.tensor([[1.0, 0], [0, 0]]), "zero or not finite"),
        (torch.tensor([[1.0, 0], [math.nan, 0]]), "not finite"),
        ([[1.0, 0], [0, 1]], "a tensor .*got a list"),
        (torch.eye(2).long(), "floating point numbers, got torch.int64"),
    ],
)
def test_errors(weight, message):
    with pytest.raises(ValueError, match=message):
        frame_report(weight)
