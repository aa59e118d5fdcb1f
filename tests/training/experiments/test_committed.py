"""The committed reports are what their committed cells give."""

import json
from typing import Any

import pytest

from etf_zoo.trainer.recipe.config import parse
from training.experiments import better_transfer, better_transfer_table, comparison, photos, pixels, sooner
from training.experiments.choices import read_choices
from training.experiments.comparison import Comparison
from training.experiments.grid import CELLS, Results
from training.experiments.pixels import Pixels
from training.experiments.readme import RESULTS, ROOT
from training.experiments.transfer_report import report, summary
from training.experiments.transfer_table import Table, cells, names_of, newest

RECIPES = ROOT / "training" / "recipes"
SEGMENTED = ["camvid_losses", "camvid_embedded"]
COMPARED = [
    "cifar100_heads",
    "head_start",
    "cifar100_rare",
    "cifar100_rare_01",
    "cifar100_rare_trials",
    "cifar100_tree",
    "cifar100_tree_trials",
    "tiny_tree",
    "tiny_tree_trials",
    "grocery_tree",
    "grocery_tree_trials",
]
PHOTOS = [name for name in photos.FOLDERS if (RESULTS / name / CELLS).is_file()]  # the others are still to be run
MEASURED = ["transfer", "transfer_rates", "flowers17_scratch"]  # recipes of tables that are by the present protocol


@pytest.mark.parametrize("name", MEASURED)
def test_transfer_tables(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    table = parse(Table, ["--config", str(RECIPES / f"{name}.yaml"), "--report_only"])
    wanted = cells(table, read_choices(RESULTS / name))
    records = newest(wanted, Results(RESULTS / name / CELLS, RESULTS).read())
    text = report(records, names_of(table), left=len(wanted) - len(records))
    assert (RESULTS / name / "table.md").read_text(encoding="utf-8") == text
    assert (RESULTS / name / "summary.md").read_text(encoding="utf-8") == f"{summary(records, names_of(table))}\n"


@pytest.mark.parametrize("name", [*COMPARED, *SEGMENTED])
def test_comparisons(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    kind, table = (Pixels, pixels.table) if name in SEGMENTED else (Comparison, comparison.table)
    settings: Any = parse(kind, ["--config", str(RECIPES / f"{name}.yaml")])
    records = Results(RESULTS / name / CELLS, RESULTS).read().values()
    assert (RESULTS / name / "table.md").read_text(encoding="utf-8") == table(settings, records)


def test_photos():
    grid = photos.read([RESULTS / name for name in PHOTOS])
    texts = {"summary": photos.tables(grid), "short": photos.short(grid), "heads": photos.differences(grid)}
    texts["defaults"] = photos.beside_defaults(grid)
    for name, text in texts.items():
        assert (RESULTS / "photos" / f"{name}.md").read_text(encoding="utf-8") == f"{text.strip()}\n"


def test_better_transfer(tmp_path):
    folder = RESULTS / "better_transfer"
    records = list(Results(folder / CELLS, RESULTS).read().values())
    better_transfer_table.write_tables(records, tmp_path, list(better_transfer.CANDIDATES))
    for file in tmp_path.iterdir():
        assert (folder / file.name).read_text(encoding="utf-8") == file.read_text(encoding="utf-8")


def test_sooner():
    folder = RESULTS / "sooner"
    records = list(Results(folder / CELLS, RESULTS).read().values())
    assert (folder / "table.md").read_text(encoding="utf-8") == sooner.table(records)


@pytest.mark.parametrize("name", [*COMPARED, *SEGMENTED, *MEASURED, *PHOTOS, "better_transfer", "sooner"])
def test_no_line_is_damaged(name):
    file = RESULTS / name / CELLS
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(Results(file, RESULTS).read()) == len(lines) == len({line["key"] for line in lines})
