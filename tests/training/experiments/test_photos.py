"""The tables and the picture of photographs, from made cells."""

import numpy as np
import pytest

from training.experiments import photos
from training.experiments.grid import CELLS, Results
from training.experiments.intervals import pack


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two grids; the learned head is right on the first half of ten images, the cosine head on the first seven."""
    found = []
    for name, methods in (("photos", {"ncm": 4, "head learned 5-shot": 5, "head learned cosine 5-shot": 7}), ("b", {})):
        folder = tmp_path / name
        results = Results(folder / CELLS, tmp_path / "locks")
        for method, right in methods.items():
            for seed in (0, 1):
                correct = np.arange(10) < right
                record = {"weights": "w", "data": "d", "method": method, "seed": seed, "correct": pack(correct)}
                results.append({"key": f"{method}|{seed}", **record, "test_images": 10})
        found.append(folder)
    monkeypatch.setattr(photos, "RESULTS", tmp_path)
    monkeypatch.setattr(photos, "FOLDERS", ("photos", "b"))
    return found


def test_controls():
    names = ("head learned", "full learned", "top learned", "full warm frame", "scl learned", "layer frame", "ncm")
    controls = ["head learned"] * 3 + ["full learned"] * 2 + ["layer learned", ""]
    assert [photos.control_of(name) for name in names] == controls


@pytest.mark.parametrize(
    ("method", "wanted"),
    [("ncm", ("ncm", 0)), ("layer warm frame 10-shot", ("layer warm frame", 10)), ("x shot", ("x shot", 0))],
)
def test_shots_in_a_name(method, wanted):
    assert photos.split_shots(method) == wanted


def test_what_each_cell_of_the_table_says(folders):
    cells = photos.read(folders)
    names = ("ncm", "head learned 5-shot", "head learned cosine 5-shot")
    assert cells.keys() == {("w", "d", *photos.split_shots(name)) for name in names}
    text = photos.tables(cells)
    assert "**d**, w, 10 test images:" in text
    assert "| ncm |  |  |  | 40.0 [" in text
    assert "| best |  | head learned cosine |  | ncm |" in text
    assert photos.short(cells).splitlines()[2] == "| ncm | - / - / - / 40.0 |"
    lines = photos.differences(cells).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| d | w | 5 a class | head learned cosine | head learned | +20.0 [")
    assert lines[2].endswith("| 2 x 10 |")


def test_defaults_are_compared_on_the_draws_that_both_have(folders):
    results = Results(folders[1] / CELLS, folders[1] / "locks")
    cell = {"weights": "w", "data": "d", "method": "finetune twin 5-shot", "test_images": 10}
    for seed, right in ((1, 4), (2, 10)):
        results.append({"key": f"x{seed}", **cell, "seed": seed, "correct": pack(np.arange(10) < right)})
    rows = photos.beside_defaults(photos.read(folders)).splitlines()[2:]
    assert len(rows) == 1
    assert rows[0].startswith("| d | w | 5 a class | finetune twin | 70.0 | head learned cosine: 70.0, -30.0 [")
    assert rows[0].endswith(" (1) |  |  | 2 |")


def test_larger_weights_stand_in_the_tables_alone(folders):
    results = Results(folders[1] / CELLS, folders[1] / "locks")
    cell = {"weights": "v", "data": "d", "method": "linear_probe", "test_images": 10, "seed": 0}
    results.append({"key": "v", **cell, "correct": pack(np.arange(10) < 9)})
    cells = photos.read(folders)
    assert "**d**, v, 10 test images:" in photos.tables(cells)
    assert photos.short(cells).splitlines()[0] == "| 1 / 5 / 10 / all images a class | d, w |"


def test_the_report(folders):
    photos.main()
    assert (folders[0] / "shots.png").stat().st_size > 1000
    text = (folders[0] / "table.md").read_text()
    assert "## Chosen" in text
    assert (folders[0] / "summary.md").read_text() in text
