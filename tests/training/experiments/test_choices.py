"""Choices: made on held-out training images, by code to which the test images are closed."""

import dataclasses

import pytest
import yaml

from etf_zoo.trainer.data.batches import load_split
from etf_zoo.trainer.data.subsets import load_images
from etf_zoo.trainer.recipe.config import Data
from etf_zoo.trainer.tune.tuning import Finetune
from training.experiments import choices, choose, transfer_table
from training.experiments.choices import CHOICES, Choice, TrainingImages, read_choices
from training.experiments.grid import CELLS, Results
from training.experiments.transfer_table import Table, cells

DATA = Data("digits", val_split="test", size=16)
TABLE = {
    "weights": {"one": {"model": "test_resnet_etf", "pretrained": False}},
    "data": {"digits": {"source": "digits", "val_split": "test", "size": 16}},
    "seeds": [0],
    "base": {"sizes": [[0, 16]], "epochs": 2, "tensorboard": False},
    "methods": {
        "full": {"choose": {"field": "optim.lr", "values": [1.0e-12, 0.01]}},
        "ncm": {},
    },
}


def settings(**changes):
    entries = {"model": "test_resnet_etf", "pretrained": False, "data": DATA, "sizes": [[0, 16]], "epochs": 1}
    return Finetune(**{**entries, "tensorboard": False, **changes})


def test_a_choice_that_asks_for_the_test_images_raises():
    images = TrainingImages(DATA)
    assert len(images.load()) == len(images.load("train")) == 1347
    with pytest.raises(ValueError, match=r"asked for the split 'test'.*held-out images of 'train'"):
        images.load("test")
    with pytest.raises(ValueError, match="not 'none: choices are made on held-out training images'"):
        load_images(images.data, images.data.val_split)


def test_what_chooses_opens_the_training_split_alone(tmp_path, monkeypatch):
    opened, real = [], load_split
    for module in ("data.subsets", "data.batches", "run.run"):
        name = f"etf_zoo.trainer.{module}.load_split"
        monkeypatch.setattr(name, lambda data, split: opened.append((data.val_split, split)) or real(data, split))
    found = choices.choose(settings(), TrainingImages(DATA), tmp_path / "work")
    assert set(opened) == {(choices.CLOSED, "train")}
    assert found["fitted"] + found["held_out"] == 1347
    assert 300 < found["held_out"] < 380
    assert 0 <= found["top1"] <= 100
    assert not (tmp_path / "work").exists()


def test_stored_inputs_change_no_choice(tmp_path):
    recipe = settings(method="head", head="warm_learned", cache_views=1, shots=5, epochs=3, batch_size=16)
    found = [choices.choose(recipe, TrainingImages(DATA), tmp_path / "a", frozen) for frozen in (None, tmp_path / "b")]
    assert found[0]["held_out"] == found[1]["held_out"]
    assert found[0]["top1"] == pytest.approx(found[1]["top1"], abs=1)
    assert found[0]["top1"] > 20  # chance is 10


@pytest.mark.parametrize("known", [None, DATA])
def test_a_recipe_that_looks_for_test_images_while_choosing_fails(tmp_path, monkeypatch, known):
    """By the name that it was given, or by one that it knows otherwise."""

    def peek(recipe, *_):
        data = known or recipe.data
        return load_images(data, data.val_split)

    monkeypatch.setattr(choices, "fine_tune", peek)
    with pytest.raises(ValueError, match="was asked for while something is chosen"):
        choices.choose(settings(), TrainingImages(DATA), tmp_path / "work")


def test_a_table_takes_what_was_chosen(tmp_path, monkeypatch, capsys):
    file = tmp_path / "table.yaml"
    file.write_text(yaml.safe_dump({**TABLE, "results": str(tmp_path / "results"), "work": str(tmp_path / "w")}))
    monkeypatch.setattr("sys.argv", ["script.py", "--config", str(file)])
    with pytest.raises(ValueError, match=r"Not tried yet: optim.lr 1e-12, 0.01 of 'full' from 'one' on 'digits'"):
        transfer_table.main()
    choose.main()
    trials = read_choices(tmp_path / "results")
    tried = trials["one", "digits", "full"]
    assert tried[0.01] > tried[1e-12]
    capsys.readouterr()
    choose.main()
    assert "|full|" not in capsys.readouterr().out  # once is enough
    transfer_table.main()
    done = Results(tmp_path / "results" / CELLS, tmp_path).read()
    assert {record["method"] for record in done.values()} == {"full", "ncm"}
    chosen = next(cell for cell in cells(Table(**TABLE), trials) if cell.method == "full")
    assert chosen.settings.optim.lr == 0.01
    assert chosen.settings.data.val_split == "test"
    assert chosen.key in done
    assert len(Results(tmp_path / "results" / CHOICES, tmp_path).read()) == 2


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"choose is {field: optim.lr, values"):
        Choice.of("full", {"choose": [0.1]})
    with pytest.raises(ValueError, match=r"no field 'optim\.rate'"):
        Choice("full", "optim.rate", (1,)).with_value(settings(), 1)
    assert Choice("full", "epochs", (1,)).with_value(settings(), 3).epochs == 3
    with pytest.raises(ValueError, match="ncm chooses by cross-validation itself"):
        choices.choose(settings(method="ncm"), TrainingImages(DATA), tmp_path)
    with pytest.raises(ValueError, match="time_budget has no place in a choice"):
        choices.choose(settings(time_budget="0s"), TrainingImages(DATA), tmp_path / "work")


def test_of_equals_the_first():
    choice = Choice("full", "optim.lr", (0.1, 0.2, 0.3))
    trials = {("w", "d", "full"): {0.1: 50.0, 0.2: 60.0, 0.3: 60.0}}
    assert choice.best("w", "d", trials) == 0.2
    assert dataclasses.replace(choice, values=(0.3, 0.2)).best("w", "d", trials) == 0.3
