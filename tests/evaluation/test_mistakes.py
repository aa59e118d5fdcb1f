"""Where a model is wrong: against plain counting, and what has to hold of any predictions."""

import csv
from collections import Counter

import pytest
import torch
from PIL import Image

from etf_zoo.evaluation.measure import measure
from etf_zoo.evaluation.mistakes import (
    Mistake,
    Predictions,
    accuracy_by_class,
    draw_mistakes,
    format_mistakes,
    worst_confusions,
    write_mistakes,
)

NAMES = ["ash", "beech", "cedar", "date", "elm"]


@pytest.fixture
def found():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=generator)  # no elm
    noise = torch.randint(5, (200,), generator=generator)
    predicted = torch.where(torch.rand(200, generator=generator) < 0.6, labels, noise)
    return Predictions(labels, predicted, torch.rand(200, generator=generator))


def test_accuracy_by_class_is_what_counting_gives(found):
    pairs = list(zip(found.labels.tolist(), found.predicted.tolist(), strict=True))
    rows = accuracy_by_class(found, NAMES)
    assert {row.name for row in rows} == set(NAMES[:4])
    for row in rows:
        own = [predicted for label, predicted in pairs if NAMES[label] == row.name]
        assert row.images == len(own)
        assert row.top1 == pytest.approx(100 * sum(NAMES[p] == row.name for p in own) / len(own))
    assert [row.top1 for row in rows] == sorted(row.top1 for row in rows)
    whole = sum(row.top1 * row.images for row in rows) / 200
    assert whole == pytest.approx(100 * (found.labels == found.predicted).float().mean().item(), abs=1e-4)


def test_confusions_are_what_counting_gives(found):
    pairs = Counter((a, b) for a, b in zip(found.labels.tolist(), found.predicted.tolist(), strict=True) if a != b)
    rows = worst_confusions(found, NAMES, most=100)
    assert {(r.label, r.predicted): r.images for r in rows} == {(NAMES[a], NAMES[b]): n for (a, b), n in pairs.items()}
    assert [row.images for row in rows] == sorted((row.images for row in rows), reverse=True)
    assert worst_confusions(found, NAMES, most=3) == rows[:3]
    lost = {row.name: 100 - row.top1 for row in accuracy_by_class(found, NAMES)}
    for name, share in lost.items():  # what a class loses is what it is taken for
        assert sum(row.share for row in rows if row.label == name) == pytest.approx(share)


def test_nothing_wrong_is_nothing_said():
    right = Predictions(torch.arange(5), torch.arange(5), torch.ones(5))
    assert worst_confusions(right, NAMES) == []
    assert format_mistakes(accuracy_by_class(right, NAMES), []) == ""


def test_names_cannot_steer_the_terminal(found):
    names = [f"\x1b[2J{name}\n" for name in NAMES]
    shown = format_mistakes(accuracy_by_class(found, names), worst_confusions(found, names), most=2)
    assert "\x1b" not in shown
    assert len(shown.splitlines()) == 2 * (2 + 2)  # a blank line, a title, and two of each


def test_a_list_that_a_spreadsheet_reads(tmp_path):
    mistakes = [Mistake('a,"b".jpg', "ash", "new\nline", 0.25, 3)]
    rows = list(csv.DictReader(write_mistakes(mistakes, tmp_path / "e.csv").read_text().splitlines(keepends=True)))
    assert rows == [{"image": 'a,"b".jpg', "label": "ash", "predicted": "new\nline", "probability": "0.250000"}]
    with pytest.raises(ValueError, match="Make its folder first"):
        write_mistakes(mistakes, tmp_path / "none" / "e.csv")


def test_the_picture_shows_the_surest_mistakes_first(tmp_path):
    asked = []

    def picture(row):
        asked.append(row)
        return Image.new("RGB", (300, 100), (row, 0, 0))

    mistakes = [Mistake(f"/x/{i}.jpg", "ash" * 40, "elm", i / 10, i) for i in range(8)]
    with Image.open(draw_mistakes(mistakes, picture, tmp_path / "m.png", most=7)) as sheet:
        assert asked == [7, 6, 5, 4, 3, 2, 1]
        assert sheet.size == (6 * 168 + 8, 2 * 213 + 8)
        assert sheet.convert("RGB").getpixel((8 + 80, 8 + 80)) == (7, 0, 0)
        assert sheet.convert("RGB").getpixel((8 + 80, 8)) == (255, 255, 255)  # as wide as it was high
    tiny = Image.new("RGB", (8, 8), (1, 2, 3))
    with Image.open(draw_mistakes(mistakes[:1], lambda row: tiny, tmp_path / "t.png")) as sheet:
        assert sheet.convert("RGB").getpixel((8, 8)) == (1, 2, 3)  # enlarged to its whole tile
    with Image.open(draw_mistakes([], picture, tmp_path / "none.png")) as sheet:
        assert sheet.width > 0


def test_measure_gives_the_predictions_of_each_sample_in_order():
    torch.manual_seed(0)
    features, labels = torch.randn(30, 4), torch.arange(30) % 3
    head = torch.nn.Linear(4, 3)
    batches = [(features[i : i + 7], labels[i : i + 7]) for i in range(0, 30, 7)]
    done = measure(head, batches, forward=lambda model, x: (x, model(x)), predictions=True, store_limit=0)
    probabilities = head(features).softmax(1)
    assert torch.equal(done.predictions.labels, labels)
    assert torch.equal(done.predictions.predicted, probabilities.argmax(1))
    torch.testing.assert_close(done.predictions.confidence, probabilities.max(1).values.detach())
    assert done.figures["top1"] == pytest.approx(100 * (probabilities.argmax(1) == labels).float().mean().item())
    assert measure(head, batches, forward=lambda model, x: (x, model(x))).predictions is None
