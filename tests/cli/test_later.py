"""A model that classes were added to is a model folder like any other: every command takes it."""

import json

import pytest
import torch

from etf_zoo.models.find import load_model
from etf_zoo.ood import familiarity
from etf_zoo.trainer.tune.incremental import read_memory
from etf_zoo_cli import main
from tests.made_data import write_folder

OLD, NEW = "abc", "de"


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Folder with a fine-tuned model, the grown one and its images."""
    place = tmp_path_factory.mktemp("grown")

    def images(name, classes, first, count):
        rows = {c: range(100 * i + first, 100 * i + first + count) for i, c in enumerate(OLD + NEW) if c in classes}
        write_folder(place / name, {"": rows})

    images("base", OLD, 0, 10)
    images("new", NEW, 0, 2)
    images("test", OLD + NEW, 50, 4)
    arguments = ["finetune", "--data", place / "base", "--model", "mobilenetv3_small_100_etf", "--reserve", "4"]
    arguments += ["--epochs", "1", "--batch_size", "8", "--sizes", "[[0, 32]]", "--holdout", "0.2"]
    arguments += ["--tensorboard", "false", "--output", place / "run"]
    assert main([*map(str, arguments)]) == 0
    arguments = ["add-classes", place / "run", place / "new", "--output", place / "out", "--test", place / "test"]
    assert main([*map(str, arguments)]) == 0
    return place


def answer(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_card_and_figures_tell_of_the_session(grown):
    metrics = json.loads((grown / "out" / "metrics.json").read_text())
    before = json.loads((grown / "run" / "model" / "metrics.json").read_text())
    assert metrics["training"] == before["training"]
    assert metrics["base"] == {"results": before["results"], "dataset": before["dataset"]}
    (session,) = metrics["added"]
    assert session["classes"] == list(NEW)
    assert (session["images"], session["room"], session["rejects"]) == (4, 2, True)
    rows = 4 * session["old"] * len(OLD) + 4 * session["new"] * len(NEW)  # right images, in percent
    assert metrics["results"]["top1"] == pytest.approx(rows / 20, abs=0.1)
    assert metrics["dataset"]["images"] == 20
    card = (grown / "out" / "README.md").read_text()
    for words in ("5 classes", "2 classes were added from 4 images: d, e", "% before", "2 of them in reserve"):
        assert words in card


def test_thresholds_are_those_of_the_new_model(grown):
    scores = json.loads((grown / "out" / "familiarity.json").read_text())["scores"]
    memory = read_memory(grown / "out", list(OLD + NEW))
    with torch.inference_mode():
        found = familiarity(load_model(str(grown / "out")).get_classifier()(memory.held)).sort().values
    assert scores == pytest.approx(found.tolist(), abs=0.02)  # stored in float16
    assert scores != json.loads((grown / "run" / "model" / "familiarity.json").read_text())["scores"]


def test_every_command_takes_it(capsys, grown, tmp_path):
    out = grown / "out"
    assert "room for more classes" in answer(capsys, "info", out)
    entries = json.loads(answer(capsys, "predict", out, grown / "test", "--reject", "0.2", "--json"))
    assert {p["label"] for entry in entries for p in entry["predictions"]} == set(OLD + NEW)
    figures = json.loads(answer(capsys, "evaluate", out, grown / "test", "--json"))["results"]
    assert figures == pytest.approx(json.loads((out / "metrics.json").read_text())["results"], rel=1e-4, abs=1e-4)
    answer(capsys, "evaluate", out, grown / "base")  # of a grown model without figures of its own, too
    index = tmp_path / "index.safetensors"
    answer(capsys, "embed", grown / "test", "--model", grown / "run", "--output", index)
    file = grown / "test" / "a" / "050.png"
    answer(capsys, "search", file, "--index", index, "--model", out)  # the gallery of the model before
    told = answer(capsys, "publish", out, "--repo-id", "someone/grown", "--dry-run")
    for name in ("ready", "metrics.json", "familiarity.json", "README.md"):
        assert name in told
    assert "memory" not in told  # of other people's images


def test_a_second_session_keeps_what_the_first_said(capsys, grown, tmp_path):
    write_folder(tmp_path / "more", {"": {"f": range(500, 503)}})
    told = answer(capsys, "add-classes", grown / "out", tmp_path / "more", "--output", tmp_path / "two")
    assert "1 classes added from 3 images; room for 1 more" in told
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert [session["classes"] for session in metrics["added"]] == [["d", "e"], ["f"]]
    assert metrics["base"] == json.loads((grown / "out" / "metrics.json").read_text())["base"]
    assert "results" not in metrics  # not measured: no test images
    assert "Not measured" in (tmp_path / "two" / "README.md").read_text()
    answer(capsys, "evaluate", tmp_path / "two", grown / "base", "--output", tmp_path / "two" / "metrics.json")
    answer(capsys, "card", tmp_path / "two")
    assert "Not measured" not in (tmp_path / "two" / "README.md").read_text()
    assert (tmp_path / "two" / "familiarity.json").is_file()


def test_of_a_folder_of_splits_the_one_for_training_is_learned_from(grown, tmp_path, capsys):
    splits = {
        split: {c: range(first, first + count) for c, first in (("d", 300), ("e", 400))}
        for split, count in (("train", 4), ("test", 2))
    }
    write_folder(tmp_path / "more", splits)
    arguments = (grown / "run", tmp_path / "more", "--output", tmp_path / "out")
    assert "2 classes added from 8 images" in answer(capsys, "add-classes", *arguments)
