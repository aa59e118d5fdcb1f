"""The quick start, short: three runs, a table, a picture, a folder that predicts."""

import json
from pathlib import Path

import pytest
from PIL import Image

from etf_zoo.models.find import load_model
from etf_zoo.trainer import finetune
from etf_zoo.trainer.tune.incremental import read_memory
from etf_zoo.trainer.tune.tuning import Finetune
from etf_zoo_cli import main as cli
from tests.made_data import write_folder


def test_what_no_folder_can_hold_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(finetune, "load_data", lambda settings: pytest.fail("data was read"))
    arguments = ["--data", "digits", "--head", "learned", "--model_args.neck", "mlp"]
    monkeypatch.setattr("sys.argv", ["finetune.py", *arguments])
    with pytest.raises(ValueError, match="has no model folder"):
        finetune.main()


def test_quick_start(tmp_path, monkeypatch, capsys):
    recipe = str(Path(__file__).parents[2] / "training" / "recipes" / "digits.yaml")
    arguments = ["finetune.py", "--config", recipe, "--output", str(tmp_path / "run"), "--epochs", "2"]
    arguments += ["--sizes", "[[0, 32]]", "--data.limit", "640"]
    monkeypatch.setattr("sys.argv", arguments)
    finetune.main()
    out = capsys.readouterr().out
    for name in ("fixed frame, pretrained", "fixed frame, random weights", "learned head, pretrained"):
        assert f"\n{name}  " in out
    metrics = json.loads((tmp_path / "run" / "model" / "metrics.json").read_text())
    assert metrics["results"]["top1"] > 30  # chance is 10
    assert [r["model"] for r in metrics["references"]] == ["fixed frame, random weights", "learned head, pretrained"]
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "cc-by-nc-4.0"  # of the embedded weights it started from
    picture = Image.open(tmp_path / "run" / "picture.png")
    assert picture.width > 800
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 500  # not an empty canvas

    image = tmp_path / "digit.png"
    Image.new("L", (8, 8), 255).save(image)
    assert cli(["predict", str(tmp_path / "run" / "model"), str(image)]) == 0
    assert "%" in capsys.readouterr().out


def test_evaluate_finds_the_same_figures(tmp_path, monkeypatch, capsys):
    """Photos of another shape than the model's input, stored resident for training: one pipeline measures them."""
    first = {"train": 0, "test": 40}
    splits = {split: {n: range(i + 8 * k, i + 8 * k + 8) for k, n in enumerate("abc")} for split, i in first.items()}
    photos = write_folder(tmp_path / "photos", splits)
    arguments = ["finetune.py", "--data", str(photos), "--model", "test_resnet_etf", "--pretrained", "false"]
    arguments += ["--sizes", "[[0, 16]]", "--epochs", "1", "--tensorboard", "false", "--output", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", arguments)
    finetune.main()
    model = tmp_path / "run" / "model"
    metrics = json.loads((model / "metrics.json").read_text())
    assert metrics["dataset"] == {"name": "photos", "split": "test", "images": 24, "size": 16}
    assert metrics["command"] == "etf-zoo evaluate MODEL DATA --split test"
    capsys.readouterr()
    for extra in (["--split", "test"], []):
        assert cli(["evaluate", str(tmp_path / "run"), str(photos), "--json", *extra]) == 0
        again = json.loads(capsys.readouterr().out)
        assert again["dataset"] == metrics["dataset"]
        for name in ("top1", "loss", "ece", "nc1_quotient"):  # to a rounding: batches are of other sizes
            assert again["results"][name] == pytest.approx(metrics["results"][name], rel=1e-5), name
    for file in model.iterdir():  # names only: nothing says where on this machine they lie
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert {path.name for path in (tmp_path / "run" / "pictures").iterdir()} >= {"mistakes.png", "confusion.png"}
    wrong = (tmp_path / "run" / "errors.csv").read_text().splitlines()[1:]
    assert len(wrong) == round(24 * (1 - metrics["results"]["top1"] / 100))
    classes = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert sum(row["images"] for row in classes["by_class"]) == 24


FRAME, RANDOM, HEAD = "fixed frame, pretrained", "fixed frame, random weights", "learned head, pretrained"


@pytest.mark.parametrize(
    ("settings", "planned"),
    [
        ({}, [(FRAME, "x"), (RANDOM, "x/random_weights"), (HEAD, "x/learned_head")]),
        ({"freeze_bn": True}, [(FRAME, "x"), (RANDOM, "x/random_weights"), (HEAD, "x/learned_head")]),
        ({"pretrained": False}, [(RANDOM, "x"), ("learned head, random weights", "x/learned_head")]),
        ({"head": "learned"}, [(HEAD, "x"), ("learned head, random weights", "x/random_weights")]),
        ({"head": "learned", "pretrained": False}, [("learned head, random weights", "x")]),
    ],
)
def test_what_was_asked_for_is_no_reference_of_itself(settings, planned):
    found = finetune.plan(Finetune(output="x", compare=True, **settings))
    assert [(name, recipe.output) for name, recipe in found.items()] == planned
    assert all(recipe.pretrained == ("pretrained" in name) for name, recipe in found.items())
    assert all((recipe.head == "learned") == ("learned" in name) for name, recipe in found.items())
    assert all(recipe.freeze_bn is not True for recipe in found.values() if not recipe.pretrained)


def test_a_comparison_goes_on_after_a_kill_in_its_first_run(tmp_path, monkeypatch, capsys):
    arguments = ["finetune.py", "--data", "digits", "--data.val_split", "test", "--data.size", "16", "--data.limit"]
    arguments += ["128", "--sizes", "[[0, 16]]", "--model", "test_resnet_etf", "--pretrained", "false", "--epochs", "1"]
    arguments += ["--tensorboard", "false", "--output", str(tmp_path / "run"), "--reserve", "5"]
    monkeypatch.setattr("sys.argv", [*arguments, "--compare", "false"])
    finetune.main()
    monkeypatch.setattr("sys.argv", [*arguments, "--compare", "--resume"])
    finetune.main()
    assert "learned head, random weights  " in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "model" / "metrics.json").read_text())
    assert [r["model"] for r in metrics["references"]] == ["learned head, random weights"]
    stored = json.loads((tmp_path / "run" / "model" / "familiarity.json").read_text())
    assert stored["images"] == len(stored["scores"]) == 136  # a tenth of the training images
    assert load_model(str(tmp_path / "run")).fc.reserve == 5
    assert len(read_memory(tmp_path / "run" / "model", [str(digit) for digit in range(10)]).means) == 10
