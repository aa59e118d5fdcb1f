"""Scores of familiarity against plain loops, what they cannot depend on, and their errors."""

import json
import math
import re

import pytest
import torch

from etf_zoo import FrameClassifier, ood
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import simplex_etf


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 12, generator=generator), torch.randn(40, 12, generator=generator), simplex_etf(5, 12)


def test_scores_are_what_plain_loops_give(drawn):
    x, train, frame = drawn
    labels = torch.arange(40) % 5
    means = [sum(train[i] / train[i].norm() for i in range(k, 40, 5)) for k in range(5)]
    slow = {
        "cosine": [max(cosine(row, w) for w in frame) for row in x],
        "length": [math.sqrt(sum(float(v) ** 2 for v in row)) for row in x],
        "energy": [0.5 * math.log(sum(math.exp(float(v) / 0.5) for v in row)) for row in x],
        "mean": [max(cosine(row, m) for m in means) for row in x],
        "neighbor": [sorted((cosine(row, t) for t in train), reverse=True)[3] for row in x],
        "familiarity": [max(float(v) for v in row) for row in x],
    }
    fast = {
        "cosine": ood.largest_cosine(x, frame),
        "length": ood.feature_length(x),
        "energy": ood.energy(x, 0.5),
        "mean": ood.mean_cosine(x, ood.fit_means(train, labels, 5)),
        "neighbor": ood.neighbor_cosine(x, train, k=4),
        "familiarity": ood.familiarity(x),
    }
    for name, wanted in slow.items():
        torch.testing.assert_close(fast[name], torch.tensor(wanted), atol=1e-5, rtol=1e-5, msg=name)


def test_share_in_the_span_is_that_of_an_orthonormal_basis(drawn):
    x, _, frame = drawn
    basis = []  # Gram-Schmidt, of the K - 1 rows that are independent
    for row in frame[:-1].double():
        for axis in basis:
            row = row - (row @ axis) * axis
        basis.append(row / row.norm())
    slow = torch.tensor([sum(float(row.double() @ axis) ** 2 for axis in basis) / float(row @ row) for row in x])
    torch.testing.assert_close(ood.span_share(x, frame), slow, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ood.span_share(frame.sum(0, keepdim=True) + 2 * frame[:1], frame), torch.ones(1))
    assert ood.span_share(torch.zeros(1, 12), frame) == 0


def test_directions_do_not_depend_on_lengths_nor_on_the_frame_s_turn(drawn):
    x, train, frame = drawn
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))[0]
    for score in (ood.largest_cosine, ood.span_share):
        torch.testing.assert_close(score(x, frame), score(3 * x, frame))
        torch.testing.assert_close(score(x, frame), score(x @ turn, frame @ turn), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ood.neighbor_cosine(x, train), ood.neighbor_cosine(2 * x @ turn, 5 * train @ turn))
    assert torch.allclose(ood.feature_length(2 * x), 2 * ood.feature_length(x))


def test_the_largest_logit_of_a_frame_is_its_largest_cosine():
    head = FrameClassifier(12, 5)
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(2))
    cosines = ood.largest_cosine(head.embed(x), head.weight)
    torch.testing.assert_close(ood.familiarity(head(x)), head.logit_scale * cosines)


def test_a_threshold_loses_no_more_than_it_may(tmp_path):
    scores = torch.randn(400, generator=torch.Generator().manual_seed(3))
    for reject in (0.0, 0.05, 0.333, 0.9):
        limit = ood.threshold(scores, reject)
        lost = int((scores.double() < limit).sum())
        assert reject * 400 - 1 < lost <= reject * 400
    ood.write_familiarity(tmp_path, scores)
    assert ood.read_threshold(tmp_path, 0.05) == pytest.approx(ood.threshold(scores, 0.05), abs=1e-6)
    many = torch.randn(20_000, generator=torch.Generator().manual_seed(4))
    entry = json.loads(ood.write_familiarity(tmp_path, many).read_text())
    assert (entry["images"], len(entry["scores"])) == (20_000, 1001)
    assert (many < ood.read_threshold(tmp_path, 0.05)).float().mean() == pytest.approx(0.05, abs=0.002)


def test_errors_name_the_fix(drawn, tmp_path):
    x, train, frame = drawn
    cases = [
        (lambda: ood.largest_cosine(x[:, :5], frame), "widths differ"),
        (lambda: ood.span_share(x, frame[:, :3]), "widths differ"),
        (lambda: ood.neighbor_cosine(x, train, k=41), "between 1 and 40"),
        (lambda: ood.neighbor_cosine(x, train, k=0), "between 1 and 40"),
        (lambda: ood.energy(x, 0.0), "positive"),
        (lambda: ood.fit_means(train, torch.zeros(40, dtype=torch.long), 2), "counts"),
        (lambda: ood.fit_means(train, torch.zeros(3, dtype=torch.long), 2), "labels"),
        (lambda: ood.threshold([1.0, 2.0], 1.0), "in \\[0, 1\\)"),
        (lambda: ood.threshold([1.0, 2.0], 0.05), "2 held-out images cannot tell"),
        (lambda: ood.threshold([], 0.05), "finite"),
        (lambda: ood.threshold([math.nan], 0.0), "finite"),
        (lambda: ood.read_threshold(None, 0.05), "etf-zoo finetune"),
        (lambda: ood.read_threshold(tmp_path, 0.05), "--holdout"),
    ]
    for call, words in cases:
        with pytest.raises(EtfZooError, match=words):
            call()
    (tmp_path / ood.FAMILIARITY_NAME).write_text("{}")
    with pytest.raises(EtfZooError, match="cannot be read"):
        ood.read_threshold(tmp_path, 0.05)


@pytest.mark.parametrize("count", [3, 7, 30, 333])
def test_the_share_that_is_advised_is_taken(count):
    scores = torch.arange(count).double()
    with pytest.raises(EtfZooError, match="take at least") as caught:
        ood.threshold(scores, 0.5 / count)
    ood.threshold(scores, float(re.search(r"at least ([\d.]+),", str(caught.value))[1]))
