"""The script that measures a stored model again: its command, and what it refuses."""

import dataclasses
import json
import shlex

import pytest
import timm

from etf_zoo.sharing.folder import save_folder
from etf_zoo.trainer import evaluate
from etf_zoo.trainer.evaluate import Evaluation, command_line, evaluate_model
from etf_zoo.trainer.recipe.config import Data, Recipe, parse
from etf_zoo.trainer.run.export import check_storable

DIGITS = Data("digits", val_split="test", size=16)


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of an untrained model whose classes have these names."""

    def make(names):
        model = timm.create_model("test_resnet_etf", num_classes=10)
        cfg = {"input_size": (3, 16, 16), "crop_pct": 1.0}
        return str(save_folder(model, tmp_path / "model", pretrained_cfg=cfg, label_names=names))

    return make


def test_the_command_measures_the_same(folder, tmp_path, monkeypatch):
    settings = Evaluation(folder([str(i) for i in range(10)]), dataclasses.replace(DIGITS, max_corrupt=0.01), size=24)
    figures = evaluate_model(settings)
    assert figures["dataset"] == {"name": "scikit-learn digits", "split": "test", "images": 450, "size": 24}
    words = shlex.split(command_line(settings))
    assert words[:3] == ["accelerate", "launch", "training/evaluate.py"]
    assert parse(Evaluation, words[3:]) == settings
    output = tmp_path / "out.json"
    output.write_text('{"kept": 1}')
    monkeypatch.setattr("sys.argv", [*words[2:], "--output", str(output)])
    evaluate.main()
    written = json.loads(output.read_text())
    assert (written["kept"], written["results"]) == (1, figures["results"])


def test_every_option_is_in_the_command():
    data = dataclasses.replace(DIGITS, label_column="fine", num_classes=5, streaming=True, max_corrupt=0.5)
    settings = Evaluation("x_etf.tag", data, hierarchy="tree.json")
    assert parse(Evaluation, shlex.split(command_line(settings))[3:]) == settings


def test_classes_in_another_order(folder):
    names = [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="'1' is where that has '0'"):
        evaluate_model(Evaluation(folder([names[1], names[0], *names[2:]]), DIGITS))


def test_refused_before_the_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate_model", lambda settings: pytest.fail("measured"))
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", "x", "--output", str(tmp_path / "none" / "out.json")])
    with pytest.raises(ValueError, match="make it first"):
        evaluate.main()


@pytest.mark.parametrize("args", [{"neck": "mlp"}, {"whitening": {}}])
def test_what_no_folder_can_hold(args):
    check_storable(Recipe(model_args=args))
    check_storable(Recipe(head="learned", model_args={"neck": "none", "whitening": False}))
    with pytest.raises(ValueError, match="has no model folder"):
        check_storable(Recipe(head="learned", model_args=args))
