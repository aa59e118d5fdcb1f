"""The script that measures a stored model again: its command, and what it refuses."""

import csv
import dataclasses
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from etf_zoo.evaluation.mistakes import accuracy_by_class
from etf_zoo.sharing.folder import save_folder
from etf_zoo.trainer import evaluate
from etf_zoo.trainer.data.sources import open_rows
from etf_zoo.trainer.evaluate import Evaluation, TestData, command_line, evaluate_model
from etf_zoo.trainer.recipe.config import Data, Recipe
from etf_zoo.trainer.run.export import check_storable
from etf_zoo_cli import main as cli

DIGITS = TestData("digits", val_split="test", size=16)


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of an untrained model whose classes have these names."""

    def make(names, model=None, **changes):
        torch.manual_seed(0)
        model = model or timm.create_model("test_resnet_etf", num_classes=10)
        cfg = {"input_size": (3, 16, 16), "crop_pct": 1.0, **changes}
        path = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        return str(save_folder(model, path, pretrained_cfg=cfg, label_names=names, half=False))

    return make


NAMES = [str(i) for i in range(10)]


def test_the_command_measures_the_same(folder, tmp_path, monkeypatch, capsys):
    settings = Evaluation(folder(NAMES), dataclasses.replace(DIGITS, max_corrupt=0.01), size=24)
    record = evaluate_model(settings).record
    assert record["dataset"] == {"name": "scikit-learn digits", "split": "test", "images": 450, "size": 24}
    assert command_line(settings) == "etf-zoo evaluate MODEL digits --split test --size 24"
    output = tmp_path / "out.json"
    output.write_text('{"kept": 1}')
    words = [settings.model if word == "MODEL" else word for word in shlex.split(command_line(settings))[1:]]
    assert cli([*words, "--output", str(output), "--json"]) == 0
    written = json.loads(output.read_text())
    assert (written["kept"], written["results"]) == (1, record["results"])
    assert json.loads(capsys.readouterr().out)["results"] == record["results"]
    script = ["evaluate.py", "--model", settings.model, "--data", "digits", "--size", "24", "--output", str(output)]
    monkeypatch.setattr("sys.argv", script)
    evaluate.main()
    assert json.loads(output.read_text())["results"] == record["results"]
    assert "worst classes" in capsys.readouterr().out


def test_every_option_is_in_the_command():
    data = dataclasses.replace(DIGITS, source="org/set", label_column="fine", num_classes=5, streaming=True)
    words = command_line(Evaluation("x_etf.tag", data, hierarchy="tree.json"))
    assert words == (
        "etf-zoo evaluate x_etf.tag org/set --split test --hierarchy tree.json --data.label_column=fine "
        "--data.streaming=true --data.num_classes=5"
    )


def test_the_command_names_no_folder_of_this_machine(folder, tmp_path):
    data = dataclasses.replace(DIGITS, source=str(tmp_path))
    assert command_line(Evaluation(folder(NAMES), data)) == "etf-zoo evaluate MODEL DATA --split test"


def test_classes_in_another_order_are_matched_by_name(folder):
    first = evaluate_model(Evaluation(folder(NAMES), DIGITS))
    config = json.loads((Path(folder(NAMES)) / "config.json").read_text())
    model = timm.create_model("test_resnet_etf", num_classes=10, frame="random")
    other = [*NAMES[5:], *NAMES[:5]]
    model.load_state_dict(turned(timm.create_model(f"local-dir:{folder(NAMES)}", pretrained=True), 5))
    again = folder(other, model)
    assert config["label_names"] == NAMES
    second = evaluate_model(Evaluation(again, DIGITS))
    assert second.names == other
    for name, value in first.record["results"].items():
        assert second.record["results"][name] == pytest.approx(value, rel=1e-3), name
    for one, two in zip(first.mistakes, second.mistakes, strict=True):
        assert (one.image, one.label, one.predicted) == (two.image, two.label, two.predicted)


def turned(model, by):
    state = model.state_dict()
    return {**state, "fc.weight": state["fc.weight"].roll(-by, 0)}


def test_classes_that_the_model_does_not_know(folder):
    with pytest.raises(ValueError, match="does not know 1 of the data's 10 classes, such as '0'; it knows 'zero'"):
        evaluate_model(Evaluation(folder(["zero", *NAMES[1:]]), DIGITS))


def write_photos(root, count=4, size=(50, 40)):
    """Photos of two classes of digits' names in several splits, of another shape than the model's input."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "37":
            (root / split / name / "deeper").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize(size)
                image.save(root / split / name / ("deeper" if i % 2 else "") / f"{i}.png")
    return root


def test_a_nested_folder_with_a_split_val(folder, tmp_path):
    photos = write_photos(tmp_path / "photos")
    done = evaluate_model(Evaluation(folder(NAMES), TestData(str(photos))))
    assert done.record["dataset"] == {"name": "photos", "split": "val", "images": 8, "size": 16}
    assert {row.name for row in accuracy_by_class(done.predictions, done.names)} == {"3", "7"}
    one_class = evaluate_model(Evaluation(folder(NAMES), TestData(str(photos / "val"))))
    assert one_class.record["results"] == pytest.approx(done.record["results"])


def trained(folder, **data):
    """A model folder whose figures say what it was trained on."""
    recorded = {"dataset": {"split": data.pop("split")}, "training": {"recipe": {"data": data}}}
    (Path(folder) / "metrics.json").write_text(json.dumps(recorded))
    return folder


def test_what_was_held_out_in_training_is_found_again(folder, tmp_path):
    classes = write_photos(tmp_path / "photos", count=10) / "train"
    model = folder(NAMES)
    whole = evaluate_model(Evaluation(model, TestData(str(classes))))
    assert whole.record["dataset"] == {"name": "train", "split": "train", "images": 20, "size": 16}
    trained(model, source="train", test_share=0.3, split="held out")
    held = evaluate_model(Evaluation(model, TestData(str(classes))))
    assert held.record["dataset"] == {"name": "train", "split": "held out", "images": 6, "size": 16}
    rows = open_rows(Data(str(classes), test_share=0.3), "test", resident=True)
    assert {mistake.image for mistake in held.mistakes} <= {rows.where(row) for row in range(len(rows))}
    asked = evaluate_model(Evaluation(model, TestData(str(classes), val_split="train")))
    assert asked.record["dataset"]["images"] == 20


def test_which_folders_name_the_classes_is_known_from_training(folder, tmp_path):
    for color, name in (("red", "3"), ("red", "7"), ("blue", "5")):
        (tmp_path / "photos" / color / name).mkdir(parents=True)
        for i in range(3):
            Image.effect_noise((20, 20), 20 * i).save(tmp_path / "photos" / color / name / f"{i}.png")
    model = folder(NAMES)
    with pytest.raises(ValueError, match="does not know 2 of the data's 2 classes, such as 'blue'"):
        evaluate_model(Evaluation(model, TestData(str(tmp_path / "photos"))))
    trained(model, source="photos", class_level=2, split="test")
    done = evaluate_model(Evaluation(model, TestData(str(tmp_path / "photos"))))
    assert {row.name for row in accuracy_by_class(done.predictions, done.names)} == {"3", "5", "7"}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_one_pipeline_with_predict(folder, tmp_path, interpolation, capsys):
    """What `etf-zoo predict` says of each image is what evaluation counts; both as the model's config says."""
    photos = write_photos(tmp_path / "photos")
    model = folder(NAMES, interpolation=interpolation, crop_pct=0.8)
    done = evaluate_model(Evaluation(model, TestData(str(photos), val_split="val")))
    assert cli(["predict", model, str(photos / "val"), "--json", "--top", "1"]) == 0
    said = {entry["image"]: entry["predictions"][0] for entry in json.loads(capsys.readouterr().out)}
    wrong = {file for file, best in said.items() if f"/val/{best['label']}/" not in file}
    assert {mistake.image for mistake in done.mistakes} == wrong
    for mistake in done.mistakes:
        assert mistake.predicted == said[mistake.image]["label"]
        assert mistake.probability == pytest.approx(said[mistake.image]["probability"], abs=1e-5)


def test_errors_pictures_and_unreadable_files(folder, tmp_path, capsys):
    photos = write_photos(tmp_path / "photos")
    (photos / "val" / "3" / "0.png").write_bytes(b"no image")
    arguments = ["evaluate", folder(NAMES), str(photos), "--errors", str(tmp_path / "errors.csv")]
    assert cli([*arguments, "--pictures", str(tmp_path / "pictures"), "--json"]) == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert record["dataset"]["images"] == 7
    assert "1 images cannot be read and are left out:" in shown.err
    assert "3/0.png" in shown.err
    assert "Traceback" not in shown.err
    rows = list(csv.DictReader((tmp_path / "errors.csv").read_text().splitlines()))
    assert len(rows) == round(7 * (1 - record["results"]["top1"] / 100))
    for row in rows:
        assert Path(row["image"]).is_file()
        assert f"/val/{row['label']}/" in row["image"]
        assert row["label"] != row["predicted"]
    assert sum(row["images"] for row in record["by_class"]) == 7
    assert sum(row["images"] for row in record["confusions"]) == len(rows)
    with Image.open(tmp_path / "pictures" / "mistakes.png") as picture:
        assert picture.width > 160
    assert {"cosines.png", "confusion.png"} <= {path.name for path in (tmp_path / "pictures").iterdir()}


def test_refused_before_the_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate_model", lambda settings: pytest.fail("measured"))
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", "x", "--output", str(tmp_path / "none" / "out.json")])
    with pytest.raises(ValueError, match="make it first"):
        evaluate.main()


@pytest.mark.parametrize("args", [{"neck": "mlp"}, {"whitening": {}}])
def test_what_no_folder_can_hold(args):
    check_storable(Recipe(model_args=args))
    check_storable(Recipe(head="learned", model_args={"neck": "none", "whitening": False}))
    check_storable(Recipe(head="learned_cosine", model_args=args))
    with pytest.raises(ValueError, match=r"has no model folder\. Use head=learned_cosine, .* or head=frame"):
        check_storable(Recipe(head="learned", model_args=args))
