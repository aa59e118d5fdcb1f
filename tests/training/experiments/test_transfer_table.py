"""The transfer table: what it runs, that processes share it and it goes on where it stopped, and its report."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import yaml

from etf_zoo.trainer.data.batches import limited_rows
from etf_zoo.trainer.data.long_tail import long_tail_counts
from etf_zoo.trainer.data.subsets import few_shot_indices, load_images
from training.experiments import transfer_table
from training.experiments.transfer_report import paired_difference, rank_correlations, rows, write_report
from training.experiments.transfer_table import Table, cells, read_cells, run_cell

TABLE = {
    "weights": {
        "one": {"model": "test_resnet_etf", "pretrained": False, "control": "other"},
        "other": {"model": "test_resnet", "pretrained": False, "model_args": {"drop_rate": 0.1}},
    },
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
    assert "Controls: of one: other." in text
    top1 = {r["weights"]: r["top1"] for r in done.values() if r["method"] == "two shots"}
    row = next(line for line in text.splitlines() if line.startswith("| digits | two shots | one | 1 |"))
    assert f"| {top1['one']:.2f} | {top1['one'] - top1['other']:+.2f} |" in row
    assert (results / "accuracy.png").stat().st_size > 5000
    assert (results / "nc1.png").stat().st_size > 5000
    assert (results / "table.csv").read_text().startswith("data,method,weights,n,top1")
    assert not list((tmp_path / "w" / "runs").iterdir())

    # a kill: one line lost, the last one cut short; only these are run again, with the features that are there
    lines = (results / "cells.jsonl").read_text().splitlines(keepends=True)
    (results / "cells.jsonl").write_text("".join([*lines[:4], *lines[6:], lines[5][:30]]))
    monkeypatch.setattr("etf_zoo.trainer.tune.tuning.backbone_features", lambda *a, **k: pytest.fail("computed again"))
    run(tmp_path, monkeypatch)
    started = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert started == [json.loads(line)["key"] for line in lines[4:6]]
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


def test_other_weights_are_other_cells(monkeypatch):
    before = cells(Table(**TABLE))
    find = transfer_table.find_model

    def retrained(model, pretrained):
        found = find(model, pretrained)
        return dataclasses.replace(found, identity="new") if model == "test_resnet" else found

    monkeypatch.setattr(transfer_table, "find_model", retrained)
    kept = {cell.key for cell in cells(Table(**TABLE))} & {cell.key for cell in before}
    assert kept == {cell.key for cell in before if cell.weights == "one"}


def test_cells_are_saved_once():
    table = Table(**{**TABLE, "base": {**TABLE["base"], "epochs": 7}})
    assert {(cell.settings.save_every, cell.settings.eval_every) for cell in cells(table)} == {(7, 7)}
    watched = Table(**{**TABLE, "base": {**TABLE["base"], "epochs": 7, "holdout": 0.1}})
    assert {(cell.settings.save_every, cell.settings.eval_every) for cell in cells(watched)} == {(7, 1)}


# ---------------------------------------------------------------------------------------------- processes and failures


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path, monkeypatch, capsys):
    methods = {"ncm": {"weights": ["one"]}}
    table = Table(**{**TABLE, "source": {}, "methods": methods})
    held = cells(table)[0]
    with transfer_table._held(held, str(tmp_path / "w")) as mine:
        assert mine
        run(tmp_path, monkeypatch, source={}, methods=methods)
    assert held.key not in capsys.readouterr().out
    text = (tmp_path / "results" / "table.md").read_text()
    assert "1 cells of the recipe were not run" in text
    assert "| digits | ncm | one | 1 |" in text
    run(tmp_path, monkeypatch, source={}, methods=methods)
    assert "| digits | ncm | one | 2 |" in (tmp_path / "results" / "table.md").read_text()


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    methods = {"a lot": {"method": "ncm", "shots": 1000, "seeds": [0]}, "knn": {"seeds": [0]}, "ncm": {"seeds": [0]}}
    real = transfer_table.fit_probe

    def fit(method, *args, **kwargs):
        return {}["surprise"] if method == "knn" else real(method, *args, **kwargs)

    monkeypatch.setattr(transfer_table, "fit_probe", fit)
    weights = {"one": {"model": "test_resnet_etf", "pretrained": False}}
    with pytest.raises(ValueError, match=r"2 cells failed, see above: one\|digits\|a lot\|0.*, one\|digits\|knn\|0"):
        run(tmp_path, monkeypatch, source={}, methods=methods, weights=weights)
    assert "| digits | ncm | one | 1 |" in (tmp_path / "results" / "table.md").read_text()
    (expected, *trace, unexpected) = capsys.readouterr().err.splitlines()
    assert expected.startswith("one|digits|a lot|0|")
    assert "failed: 10 of 10 classes have fewer than 1000 images" in expected
    assert trace[0].startswith("Traceback")
    assert unexpected.endswith("failed: 'surprise'")


@pytest.mark.slow
def test_two_processes_share_the_cells(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    methods = {**TABLE["methods"], "many": {"method": "ncm", "shots": 1000, "seeds": [0], "weights": ["one"]}}
    with pytest.raises(ValueError, match=r"1 cells failed, see above: one\|digits\|many"):
        run(tmp_path, monkeypatch, "--jobs", "2", methods=methods)
    assert os.environ["OMP_NUM_THREADS"] == str(max(1, os.cpu_count() // 2))
    captured = capfd.readouterr()
    started = [line for line in captured.out.splitlines() if "|digits|" in line or "|||" in line]
    assert len(started) in (10, 11)  # the one that failed may be tried by both
    assert len(set(started)) == 10
    assert "fewer than 1000 images" in captured.err
    lines = (tmp_path / "results" / "cells.jsonl").read_text().splitlines()
    assert len(lines) == len(read_cells(tmp_path / "results" / "cells.jsonl")) == 9
    alone = cells(Table(**TABLE))[2]
    assert run_cell(alone, str(tmp_path / "alone")) in map(json.loads, lines)


# ------------------------------------------------------------------------------------------------ what a cell is run on


def one_cell(method, **changes):
    entries = {**TABLE, "source": {}, "seeds": [3], "methods": {method: {"weights": ["other"], "head": "learned"}}}
    (cell,) = cells(Table(**{**entries, **changes}))
    return cell


@pytest.mark.parametrize("method", ["ncm", "head"])
@pytest.mark.parametrize("choice", [{"limit": 70}, {"long_tail": 0.2}])
def test_probes_and_trainings_have_the_same_images(tmp_path, monkeypatch, method, choice):
    seen = []
    monkeypatch.setattr(transfer_table, "_collapse", lambda features, split: seen.append((features, split)) or {})
    cell = one_cell(method, data={"digits": {**TABLE["data"]["digits"], **choice}})
    found = run_cell(cell, str(tmp_path))
    ((features, split),) = seen
    assert found["images"] == len(features) == len(split)
    if "limit" in choice:
        train = load_images(cell.settings.data, "train")
        of_class = few_shot_indices(train.labels, 20, 0, train.label_names)  # of each class, the same for all seeds
        assert sorted(split.index) == sorted(of_class[limited_rows(200, 70, 3)])
    else:
        assert split.class_counts() == long_tail_counts(10, 20, 0.2)


def test_a_training_reports_the_images_that_it_was_given(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(transfer_table, "_collapse", lambda features, split: seen.append(len(features)) or {})
    found = run_cell(one_cell("head", base={**TABLE["base"], "holdout": 0.5}), str(tmp_path))
    assert [found["images"]] == seen == [100]


def test_cells_of_several_precisions(tmp_path):
    for method, precision in (("ncm", "fp32"), ("head", "bf16"), ("ncm", "bf16"), ("head", "fp32")):
        found = run_cell(one_cell(method, base={**TABLE["base"], "precision": precision}), str(tmp_path))
        assert found["nc1_pinv"] > 0


def test_a_model_with_two_classifiers(tmp_path):
    args = {"img_size": 32}
    weights = {"other": {"model": "deit_tiny_distilled_patch16_224", "pretrained": False, "model_args": args}}
    found = run_cell(one_cell("ncm", weights=weights, base={"sizes": [[0, 32]]}), str(tmp_path))
    assert found["top1"] > 20  # chance is 10
    assert found["total"] - found["tuned"] > 5_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"a": {"control": "third"}, "b": {}}}, "The control 'third' of 'a' is not among .*: b"),
        ({"weights": {"a": {"control": "a"}}}, "The control 'a' of 'a' is not among"),
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
    equal = paired_difference({0: 0.3, 1: 0.4}, {0: 0.1, 1: 0.2})  # up to rounding: no spread, so no interval
    assert equal[0] == pytest.approx(0.2)
    assert math.isnan(equal[1])
    assert paired_difference({0: 1.0}, {})[2] == 0


CONTROLS = {"b": "a", "d": "c"}


@pytest.fixture
def records():
    """Four weights on one data set, two seeds each, of which c lacks one; the source was not measured for d."""
    found = [
        {"weights": w, "data": "", "method": "", "seed": 0, "nc1_pinv": n}
        for w, n in zip("abc", (1, 3, 2), strict=True)
    ]
    accuracy = {"a": 10.0, "b": 30.0, "c": 20.0, "d": 40.0}
    for seed in range(2):
        found += [
            {
                "weights": w,
                "data": "x",
                "method": "m",
                "seed": seed,
                "top1": a + seed * (2 if w == "b" else 1),
                "tuned": 1,
                "total": 50,
                "nc1_pinv": 1 / a,
            }
            for w, a in accuracy.items()
            if (w, seed) != ("c", 1)
        ]
    return found


def test_rows_and_rank_correlations(records):
    table = rows(records, CONTROLS, "abcd")
    assert [r["weights"] for r in table] == list("abcd")
    assert (table[0]["top1"], table[0]["pairs"], table[0]["tuned_percent"]) == (10.5, 0, 2.0)
    assert [(r["control"], r["pairs"]) for r in table] == [("", 0), ("a", 2), ("", 0), ("c", 1)]
    assert (table[1]["minus_control"], table[3]["minus_control"]) == (20.5, 20.0)
    (entry,) = rank_correlations(table)
    assert (entry["n_source"], entry["n_target"]) == (3, 4)
    assert entry["source"] == pytest.approx(1)  # ranks 1 3 2 against 1 3 2
    assert entry["target"] == pytest.approx(-1)
    assert math.isnan(rank_correlations(table[:2])[0]["target"])
    assert np.isnan(rows(records[3:], {}, "abcd")[0]["nc1_source"])


def test_report(records, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_xlabel", lambda ax, label, **k: drawn.append((label, len(ax.lines))))
    write_report(records, tmp_path, controls=CONTROLS, kinds={}, order="abcd")
    text = (tmp_path / "table.md").read_text()
    assert "| weights | n | top-1 (%) | minus control |" in text
    assert "Controls: of b: a; of d: c." in text
    assert "| x | m | b | 2 | 31.00 | +20.50 ± 6.35 |" in text  # t(0.975, 1) = 12.7062 of differences 20 and 21
    assert "| x | m | d | 2 | 40.50 | +20.00 (n = 1) |" in text
    assert "| x | m | 1 | 3 | -1 | 4 |" in text
    assert "smallest two-sided p is 1/3 over 3 weights" in text
    assert (tmp_path / "summary.md").read_text().splitlines() == [
        "| data | method | a | b | c | d |",
        "|---|---|---|---|---|---|",
        "| x | m | 10.50 | 31.00; +20.50 ± 6.35 | 20.00 (n = 1) | 40.50; +20.00 (n = 1) |",
    ]
    assert drawn == [("NC1 at the source", 3), ("NC1 at the target", 4)]  # side by side
    drawn.clear()
    write_report(records[3:], tmp_path, controls={}, kinds={}, order="abcd")
    assert drawn == [("NC1 at the target", 4)]
    assert "Controls" not in (tmp_path / "table.md").read_text()
    assert "Over pretraining runs" not in (tmp_path / "table.md").read_text()


def test_report_over_pretraining_runs(records, tmp_path):
    """Two runs with a frame, b and d, and their controls a and c."""
    kinds = {"a": "learned", "b": "frame", "c": "learned", "d": "frame"}
    write_report(records, tmp_path, controls=CONTROLS, kinds=kinds, order="abcd")
    text = (tmp_path / "table.md").read_text()
    assert "| x | m | frame | 2 | 35.75 | +20.25 ± 3.18 |" in text  # t(0.975, 1) = 12.7062 of differences 20.5 and 20
    assert "| x | m | learned | 2 | 15.25 |  |" in text
    write_report(records, tmp_path, controls={"b": "a"}, kinds=kinds, order="abcd")
    assert "| x | m | frame | 2 | 35.75 | +20.50 (n = 1) |" in (tmp_path / "table.md").read_text()
