"""The transfer table: what it runs, that processes share it and it goes on where it stopped, and its report."""

import dataclasses
import json
import os

import numpy as np
import pytest
import yaml

from etf_zoo.trainer.data.batches import limited_rows
from etf_zoo.trainer.data.long_tail import long_tail_counts
from etf_zoo.trainer.data.subsets import few_shot_indices, load_images
from etf_zoo.trainer.run.locks import acquire
from etf_zoo.trainer.tune.tuning import fine_tune
from training.experiments import transfer_table
from training.experiments.grid import CELLS, Results, lock_file
from training.experiments.transfer_table import Table, cells, newest, run_cell

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


def read_cells(file):
    return Results(file, file.parent).read()


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
    row = next(line for line in text.splitlines() if line.startswith("| digits | two shots | one | 1 x 1 x 450 |"))
    assert f"| {top1['one']:.2f} [" in row
    assert f"| {top1['one'] - top1['other']:+.2f} [" in row
    assert (results / "accuracy.png").stat().st_size > 5000
    assert (results / "nc1.png").stat().st_size > 5000
    assert (results / "table.csv").read_text().startswith("data,method,weights,control,top1,low,high,runs")
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
    monkeypatch.setattr(transfer_table, "weights_digest", lambda model, pretrained: f"new {model}")
    after = cells(Table(**TABLE))
    assert not {cell.key for cell in after} & {cell.key for cell in before}
    assert [cell.recipe_key for cell in after] == [cell.recipe_key for cell in before]


def test_other_images_are_other_cells_and_other_features(tmp_path, monkeypatch):
    method = {"ncm": {"seeds": [0], "weights": ["one"]}}
    run(tmp_path, monkeypatch, source={}, methods=method)
    results = Results(tmp_path / "results" / CELLS, tmp_path)
    (before,) = results.read().values()
    real = transfer_table.load_images

    def shuffled(data, split):  # as many images of each class, other ones
        found = real(data, split)
        return dataclasses.replace(found, images=np.roll(found.images, 1, axis=0)) if split == "train" else found

    monkeypatch.setattr(transfer_table, "load_images", shuffled)
    transfer_table._LOADED.clear()
    run(tmp_path, monkeypatch, source={}, methods=method)
    transfer_table._LOADED.clear()
    assert len(list((tmp_path / "w" / "features").glob("*.safetensors"))) == 3  # train, train, test
    _, after = results.read().values()
    assert before["top1"] > after["top1"] + 30


def test_a_report_mixes_no_weights_and_no_images():
    table = Table(**{**TABLE, "source": {}, "methods": {"ncm": {"weights": ["one"]}}, "report_only": True})
    wanted = cells(table)
    assert [cell.identity for cell in wanted] == ["", ""]

    def done(*entries):
        return {
            f"{wanted[i].recipe_key}|{weights}|{images}": {"weights": "one", "data": "digits", "top1": top1}
            for i, weights, images, top1 in entries
        }

    def found(*entries):
        return [record["top1"] for record in newest(wanted, done(*entries))]

    assert found((0, "w", "x", 1), (1, "w", "x", 2)) == [1, 2]
    assert found((0, "w", "x", 1), (1, "w", "x", 2), (0, "v", "x", 3), (1, "v", "x", 4)) == [3, 4]
    assert found((0, "w", "x", 1), (1, "w", "x", 2), (0, "v", "x", 3)) == [3]
    assert found((0, "w", "x", 1), (1, "w", "y", 2)) == [2]


def test_weights_that_are_not_here_are_left_out_and_told(tmp_path, monkeypatch, capsys):
    figures_only = "model_cards/resnet18_etf.e23s30_tiny"
    weights = {**TABLE["weights"], "gone": {"model": str(tmp_path / "none")}, "figures": {"model": figures_only}}
    run(tmp_path, monkeypatch, source={}, weights=weights, methods={"ncm": {"seeds": [0]}})
    said = capsys.readouterr().err
    assert "Left out: gone. " in said
    assert "Left out: figures. resnet18_etf.e23s30_tiny has no weights here." in said
    assert "| gone |" not in (tmp_path / "results" / "table.md").read_text()


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
    with acquire(lock_file(tmp_path / "w" / "locks", held.key)):
        run(tmp_path, monkeypatch, source={}, methods=methods)
    assert held.key not in capsys.readouterr().out
    text = (tmp_path / "results" / "table.md").read_text()
    assert "1 cells of the recipe were not run" in text
    assert "| digits | ncm | one | 1 x 1 x 450 |" in text
    run(tmp_path, monkeypatch, source={}, methods=methods)
    assert "| digits | ncm | one | 1 x 2 x 450 |" in (tmp_path / "results" / "table.md").read_text()


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    methods = {"a lot": {"method": "ncm", "shots": 1000, "seeds": [0]}, "knn": {"seeds": [0]}, "ncm": {"seeds": [0]}}
    real = transfer_table.fit_probe

    def fit(method, *args, **kwargs):
        return {}["surprise"] if method == "knn" else real(method, *args, **kwargs)

    monkeypatch.setattr(transfer_table, "fit_probe", fit)
    weights = {"one": {"model": "test_resnet_etf", "pretrained": False}}
    with pytest.raises(ValueError, match=r"2 cells failed, see above: one\|digits\|a lot\|0.*, one\|digits\|knn\|0"):
        run(tmp_path, monkeypatch, source={}, methods=methods, weights=weights)
    assert "| digits | ncm | one | 1 x 1 x 450 |" in (tmp_path / "results" / "table.md").read_text()
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
    done = read_cells(tmp_path / "results" / "cells.jsonl")[alone.key]
    assert {"key": alone.key, **run_cell(str(tmp_path / "alone"), alone)} == done


# ------------------------------------------------------------------------------------------------ what a cell is run on


def one_cell(method, **changes):
    entries = {**TABLE, "source": {}, "seeds": [3], "methods": {method: {"weights": ["other"], "head": "learned"}}}
    (cell,) = cells(Table(**{**entries, **changes}))
    return cell


@pytest.mark.parametrize("method", ["ncm", "head"])
@pytest.mark.parametrize("choice", [{"limit": 70}, {"long_tail": 0.2}])
def test_probes_and_trainings_have_the_same_images(tmp_path, monkeypatch, method, choice):
    seen = []
    monkeypatch.setattr(transfer_table, "_nature", lambda features, split: seen.append((features, split)) or {})
    cell = one_cell(method, data={"digits": {**TABLE["data"]["digits"], **choice}})
    found = run_cell(str(tmp_path), cell)
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
    monkeypatch.setattr(transfer_table, "_nature", lambda features, split: seen.append(len(features)) or {})
    found = run_cell(str(tmp_path), one_cell("head", base={**TABLE["base"], "holdout": 0.5}))
    assert [found["images"]] == seen == [100]


def test_stored_inputs_give_what_a_training_on_images_gives(tmp_path):
    """With one view nothing is augmented: the same steps on the same numbers, up to their 16 bits."""
    fields = {
        "method": "layer",
        "layer": "layer4",
        "head": "warm_learned",
        "cache_views": 1,
        "shots": 5,
        "epochs": 3,
        "batch_size": 50,
    }
    cell = one_cell("ncm", methods={"layer": {**fields, "weights": ["other"]}})
    found = run_cell(str(tmp_path), cell)
    train, test = (load_images(cell.settings.data, split) for split in ("train", "test"))
    train = train.subset(few_shot_indices(train.labels, 20, 0, train.label_names))
    tuned = fine_tune(dataclasses.replace(cell.settings, output=str(tmp_path / "run")), train, test)
    assert found["images"] == len(tuned.train) == 50
    assert (found["tuned"], found["total"]) == (tuned.tuned, tuned.total)
    assert found["top1"] == pytest.approx(tuned.figures()["top1"], abs=1)
    assert found["top1"] > 30  # chance is 10
    assert run_cell(str(tmp_path), cell)["top1"] == found["top1"]  # from what is stored


def test_a_method_for_each_number_of_images():
    entry = {"method": "ncm", "shots": {"1": {"seeds": [1]}, "5": {}, "0": {"batch_size": 8}}, "control": "knn"}
    knn = {"shots": [1, 5, 0]}
    table = Table(**{**TABLE, "methods": {"mean": entry, "knn": knn}})
    assert list(table.methods) == ["mean 1-shot", "mean 5-shot", "mean", "knn 1-shot", "knn 5-shot", "knn"]
    wanted = {"method": "ncm", "shots": 1, "control": "knn 1-shot", "seeds": [1]}
    assert table.methods["mean 1-shot"] == wanted
    assert table.methods["mean"] == {"method": "ncm", "shots": 0, "control": "knn", "batch_size": 8}
    shots = {cell.method: cell.settings.shots for cell in cells(table) if cell.method}
    assert shots == {"mean 1-shot": 1, "mean 5-shot": 5, "mean": 0, "knn 1-shot": 1, "knn 5-shot": 5, "knn": 0}


def test_cells_of_several_precisions(tmp_path):
    for method, precision in (("ncm", "fp32"), ("head", "bf16"), ("ncm", "bf16"), ("head", "fp32")):
        found = run_cell(str(tmp_path), one_cell(method, base={**TABLE["base"], "precision": precision}))
        assert found["nc1_pinv"] > 0


def test_a_probe_of_a_stage(tmp_path):
    for stage, width in (("layer1", 32), ("", 96)):
        methods = {"ncm": {"weights": ["other"], "stage": stage}}
        (cell,) = cells(Table(**{**TABLE, "source": {}, "seeds": [3], "methods": methods}))
        found = run_cell(str(tmp_path), cell)
        assert found["tuned"] == 10 * width
        assert 0 < found["mean_energy_share"] < 1 < found["participation_ratio"] < width
    with pytest.raises(ValueError, match=r"no stage 'layer9', only .*features, layer1"):
        run_cell(str(tmp_path), dataclasses.replace(cell, stage="layer9"))


def test_a_model_with_two_classifiers(tmp_path):
    args = {"img_size": 32}
    weights = {"other": {"model": "deit_tiny_distilled_patch16_224", "pretrained": False, "model_args": args}}
    found = run_cell(str(tmp_path), one_cell("ncm", weights=weights, base={"sizes": [[0, 32]]}))
    assert found["top1"] > 20  # chance is 10
    assert found["total"] - found["tuned"] > 5_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"a": {"control": "third"}, "b": {}}}, "The control 'third' of 'a' is not among .*: b"),
        ({"weights": {"a": {"control": "a"}}}, "The control 'a' of 'a' is not among"),
        ({"methods": {}}, "needs weights, data, methods"),
        ({"methods": {"ncm": {"control": "knn"}}}, "The control 'knn' of 'ncm' is not among the other methods"),
        ({"methods": {"ncm": {"weights": ["third"]}}}, "Method 'ncm' names weights that there are not: third"),
        ({"share": 0.0}, "share in"),
    ],
)
def test_wrong_tables(changes, message):
    with pytest.raises(ValueError, match=message):
        Table(**{**TABLE, **changes})
