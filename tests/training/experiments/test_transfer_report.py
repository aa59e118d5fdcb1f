"""The transfer table's report: rows, intervals, pairs, kinds of weights, heads, and what is drawn."""

import math

import numpy as np
import pytest

from training.experiments.intervals import pack, paired_difference, unpack
from training.experiments.transfer_report import (
    Names,
    head_rows,
    over_runs,
    rank_correlations,
    rows,
    summary,
    write_report,
)

NAMES = Names("abcd", {"b": "a", "d": "c"})
IMAGES = 200


def hits(percent, seed):
    """So many of the test images, beginning at another one for each seed."""
    return np.roll(np.arange(IMAGES) < IMAGES * percent / 100, seed)


def cell(weights, percent, seed, method="m"):
    own = hits(percent, seed)
    figures = {"top1": 100 * own.mean(), "correct": pack(own), "test_images": IMAGES}
    names = {"weights": weights, "data": "x", "method": method, "seed": seed}
    return {**names, **figures, "tuned": 1, "total": 50, "nc1_pinv": 1 / percent}


@pytest.fixture
def records():
    """Four weights on one data set, two seeds each, of which c lacks one; the source was not measured for d."""
    found = [
        {"weights": w, "data": "", "method": "", "seed": 0, "nc1_pinv": n}
        for w, n in zip("abc", (1, 3, 2), strict=True)
    ]
    accuracy = {"a": 10, "b": 30, "c": 20, "d": 40}
    for seed in range(2):
        found += [
            cell(w, a + seed * (2 if w == "b" else 1), seed) for w, a in accuracy.items() if (w, seed) != ("c", 1)
        ]
    return found


def test_rows_and_rank_correlations(records):
    table = rows(records, NAMES)
    assert [r["weights"] for r in table] == list("abcd")
    assert (table[0]["top1"], table[0]["minus_images"], table[0]["tuned_percent"]) == (10.5, 0, 2.0)
    assert [(r["control"], r["minus_subsets"]) for r in table] == [("", 0), ("a", 2), ("", 0), ("c", 1)]
    assert (table[1]["minus_control"], table[3]["minus_control"]) == (20.5, 20.0)
    assert all(r["low"] < r["top1"] < r["high"] for r in table)
    expected = paired_difference(
        *({("0", s): hits(first + s * step, s) for s in range(2)} for first, step in ((30, 2), (10, 1)))
    )
    assert (table[1]["minus_low"], table[1]["minus_high"]) == (expected.low, expected.high)
    (entry,) = rank_correlations(table)
    assert (entry["n_source"], entry["n_target"]) == (3, 4)
    assert entry["source"] == pytest.approx(1)  # ranks 1 3 2 against 1 3 2
    assert entry["target"] == pytest.approx(-1)
    assert math.isnan(rank_correlations(table[:2])[0]["target"])
    assert np.isnan(rows(records[3:], Names("abcd"))[0]["nc1_source"])


def test_report(records, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_xlabel", lambda ax, label, **k: drawn.append((label, len(ax.lines))))
    write_report(records, tmp_path, NAMES, left=3)
    text = (tmp_path / "table.md").read_text()
    assert "| weights | n | top-1 (%) | minus control |" in text
    assert "Controls: of b: a; of d: c." in text
    assert "3 cells of the recipe were not run." in text
    b, d = (next(line for line in text.splitlines() if line.startswith(f"| x | m | {w} |")) for w in "bd")
    assert b.startswith("| x | m | b | 1 x 2 x 200 | 31.00 [")
    assert "| +20.50 [+" in b
    assert "] \\* |" in b  # tells from zero
    assert "| +20.00 [+" in d
    assert "(n = 1 x 1 x 200) |" in d
    assert "| x | m | 1 | 3 | -1 | 4 |" in text
    assert "smallest two-sided p is 1/3 over 3 weights" in text
    assert "mean share |" not in text  # no cell has it
    assert drawn == [("NC1 at the source", 3), ("NC1 at the target", 4)]  # side by side
    drawn.clear()
    write_report(records[3:], tmp_path, Names("abcd"))
    assert drawn == [("NC1 at the target", 4)]
    assert "Controls" not in (tmp_path / "table.md").read_text()
    assert "Over the pretraining runs" not in (tmp_path / "table.md").read_text()
    write_report(records[:3], tmp_path / "none", NAMES)  # nothing but the source: no table
    assert not (tmp_path / "none").exists()


def test_summary(records):
    head, _, row = summary(records, NAMES).splitlines()
    assert head == "| data | method | a | b | c | d |"
    a, b, c, d = row.split(" | ")[2:]
    assert a == "10.50"
    assert b.startswith("31.00; +20.50 [+")
    assert c == "20.00 (1 of 2 subsets)"
    assert d.endswith("(n = 1 x 1 x 200) |")


def test_a_difference_within_its_interval_is_not_marked(records):
    close = [cell(w, percent, seed) for w, percent in (("a", 50), ("b", 50.5)) for seed in range(3)]
    for r in close[3:]:  # other images
        r["correct"] = pack(~unpack(r["correct"], IMAGES))
    (row,) = [r for r in rows(close, NAMES) if r["weights"] == "b"]
    assert row["minus_low"] < 0 < row["minus_high"]
    assert not row["minus_tells"]
    assert "\\*" not in summary(close, NAMES)


def test_over_pretraining_runs(records):
    """Two runs with a frame, b and d, and their controls a and c."""
    names = Names("abcd", NAMES.controls, {"a": "learned", "b": "frame", "c": "learned", "d": "frame"})
    learned, frame = over_runs(records, names)
    assert (frame["weights"], frame["runs"], frame["subsets"]) == ("frame", 2, 2)
    assert frame["top1"] == pytest.approx(35.75)
    assert (frame["minus_runs"], frame["minus_subsets"]) == (2, 1)  # c has one seed
    assert frame["minus_control"] == pytest.approx(20)
    assert learned["minus_images"] == 0
    single = over_runs(records, Names("abcd", {"b": "a"}, names.kinds))[1]
    assert (single["minus_runs"], single["minus_control"]) == (1, 20.5)


def test_heads_on_the_same_weights(records):
    other = [cell("a", 20, seed, "n") for seed in range(2)]
    (row,) = head_rows([*records, *other], Names("abcd", methods={"n": "m"}))
    assert (row["method"], row["control"], row["weights"], row["minus_control"]) == ("n", "m", "a", 9.5)
    assert head_rows(records, Names("abcd", methods={"m": "n"})) == []


def test_columns_of_what_features_are(records, tmp_path):
    for r in records[3:]:
        r["mean_energy_share"] = 0.25
    write_report(records, tmp_path, NAMES)
    text = (tmp_path / "table.md").read_text()
    assert "| NC1 target | mean share |" in text
    assert "| 0.25 |" in text
    assert "participation |" not in text
