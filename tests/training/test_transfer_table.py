"""The transfer table: what it runs, that it goes on where it stopped, and the statistics of its report."""

import json
import math

import numpy as np
import pytest
import yaml

from training import transfer_table
from training.transfer_report import paired_difference, rank_correlations, rows
from training.transfer_table import Table, cells, read_cells

TABLE = {
    "weights": {
        "one": {"model": "test_resnet_etf", "pretrained": False},
        "other": {"model": "test_resnet", "pretrained": False, "model_args": {"drop_rate": 0.1}},
    },
    "control": "other",
    "source": {"source": "digits", "val_split": "test", "size": 16},
    "data": {"digits": {"source": "digits", "val_split": "test", "size": 16, "per_class": 20}},
    "seeds": [0, 1],
    "base": {"sizes": [[0, 16]], "epochs": 1, "tensorboard": False},
    "methods": {
        "ncm": {},
        "two shots": {"method": "ncm", "shots": 2, "seeds": [0]},
        "head": {"head": "learned", "seeds": [0], "weights": ["other"]},
    },
}


def run(tmp_path, monkeypatch, *more, **changes):
    file = tmp_path / "table.yaml"
    file.write_text(
        yaml.safe_dump({**TABLE, "results": str(tmp_path / "results"), "work": str(tmp_path / "w"), **changes})
    )
    monkeypatch.setattr("sys.argv", ["transfer_table.py", "--config", str(file), *more])
    transfer_table.main()


def test_table_from_start_to_report(tmp_path, monkeypatch, capsys):
    run(tmp_path, monkeypatch)
    assert "9 cells, 0 done" in capsys.readouterr().out
    results = tmp_path / "results"
    done = read_cells(results / "cells.jsonl")
    assert len(done) == 9  # 2 at the source, 2 x 2 ncm, 2 with two shots, 1 head
    two_shots = next(r for r in done.values() if r["method"] == "two shots")
    assert two_shots["images"] == 20
    head = next(r for r in done.values() if r["method"] == "head")
    assert (head["tuned"], head["images"]) == (10 * 96 + 10, 200)
    assert all(r["nc1_pinv"] > 0 for r in done.values())
    text = (results / "table.md").read_text()
    assert "| digits | ncm | one | 2 |" in text
    assert (results / "accuracy.png").stat().st_size > 5000
    assert (results / "nc1.png").stat().st_size > 5000
    assert (results / "table.csv").read_text().startswith("data,method,weights,n,top1")
    assert not list((tmp_path / "w" / "runs").iterdir())

    # a kill: the last line cut short, another lost; only these are run again, with the features that are there
    lines = (results / "cells.jsonl").read_text().splitlines(keepends=True)
    (results / "cells.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    ran = []
    monkeypatch.setattr(transfer_table, "run_cell", lambda cell, work: ran.append(cell.key) or done[cell.key])
    monkeypatch.setattr(transfer_table, "backbone_features", lambda *a, **k: pytest.fail("computed again"))
    run(tmp_path, monkeypatch)
    assert ran == [json.loads(line)["key"] for line in lines[4:]]
    assert read_cells(results / "cells.jsonl") == done
    assert (results / "table.md").read_text() == text

    run(tmp_path, monkeypatch, "--report_only", seeds=[0, 1, 2])  # a wider recipe: what is missing is said
    assert "2 cells of the recipe were not run" in (results / "table.md").read_text()


def test_cells_with_the_same_settings_have_the_same_key():
    keys = [cell.key for cell in cells(Table(**TABLE))]
    assert len(set(keys)) == len(keys) == 9
    assert keys == [cell.key for cell in cells(Table(**TABLE))]
    changed = cells(Table(**{**TABLE, "base": {**TABLE["base"], "epochs": 2}}))
    assert not {cell.key for cell in changed} & set(keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": "third"}, "The control 'third' is not among"),
        ({"methods": {}}, "needs weights, data, methods"),
        ({"methods": {"ncm": {"weights": ["third"]}}}, "Method 'ncm' names weights that there are not: third"),
        ({"share": 0.0}, "share in"),
    ],
)
def test_wrong_tables(changes, message):
    with pytest.raises(ValueError, match=message):
        Table(**{**TABLE, **changes})


def test_paired_difference():
    mean, half, n = paired_difference({0: 3.0, 1: 5.0, 2: 4.0, 7: 100.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert (mean, n) == (2.0, 3)
    assert half == pytest.approx(4.302652730 * 1.0 / math.sqrt(3))  # t(0.975, 2), differences 2, 3, 1
    assert math.isnan(paired_difference({0: 1.0}, {0: 0.0})[1])
    assert paired_difference({0: 1.0}, {})[2] == 0


def test_rows_and_rank_correlations():
    records = [
        {"weights": w, "data": "", "method": "", "seed": 0, "nc1_pinv": n}
        for w, n in zip("abcd", (1, 2, 3, 4), strict=True)
    ]
    accuracy = {"a": 10.0, "b": 30.0, "c": 20.0, "d": 40.0}
    for seed in range(2):
        records += [
            {
                "weights": w,
                "data": "x",
                "method": "m",
                "seed": seed,
                "top1": a + seed,
                "tuned": 1,
                "total": 50,
                "nc1_pinv": 1 / a,
            }
            for w, a in accuracy.items()
        ]
    table = rows(records, "a", "abcd")
    assert [r["weights"] for r in table] == list("abcd")
    assert (table[0]["top1"], table[0]["pairs"], table[0]["tuned_percent"]) == (10.5, 0, 2.0)
    assert (table[1]["minus_control"], table[1]["half_interval"]) == (20.0, 0.0)
    (entry,) = rank_correlations(table)
    assert entry["n"] == 4
    assert entry["source"] == pytest.approx(0.8)  # ranks 1 3 2 4 against 1 2 3 4
    assert entry["target"] == pytest.approx(-1)
    assert math.isnan(rank_correlations(table[:2])[0]["target"])
    assert np.isnan(rows(records[4:], "", "abcd")[0]["nc1_source"])
