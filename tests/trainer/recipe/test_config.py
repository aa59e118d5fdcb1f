"""Recipes: YAML, overrides, and what a wrong one says."""

import math
from pathlib import Path

import pytest

from etf_zoo.trainer.evaluate import Evaluation
from etf_zoo.trainer.finetune import Finetune
from etf_zoo.trainer.recipe.config import (
    Ema,
    Loss,
    Optim,
    Recipe,
    changes,
    entries,
    final_size,
    parse,
    save_recipe,
    seconds,
    size_at,
)
from etf_zoo.trainer.segment.recipe import Segmentation
from training.experiments import pixels
from training.experiments.comparison import Comparison, recipe_of
from training.experiments.comparison import cells as cells_of
from training.experiments.transfer_table import Table, cells
from training.experiments.zoo import Zoo, entry_of

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_reads(path, tmp_path, monkeypatch):
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    (tmp_path / "runs" / "zoo").mkdir(parents=True)
    for card in (ROOT / "model_cards").iterdir():  # as if the models without weights had been trained
        for end in ("", *(file.stem.removeprefix("metrics") for file in card.glob("metrics_seed*.json"))):
            (tmp_path / "runs" / "zoo" / f"{card.name}{end}").symlink_to(card)
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    if "class_names:" in text and "variants:" in text:
        settings = parse(pixels.Pixels, ["--config", str(path)])
        assert all(pixels.recipe_of(settings, pixels.Cell(name, 0)).class_names for name in settings.variants)
    elif "variants:" in text:
        comparison = parse(Comparison, ["--config", str(path)])
        assert all(recipe_of(comparison, cell).data.label_column == cell.labels for cell in cells_of(comparison))
    elif "\nweights:" in text:
        # the weights of some are not kept, so they have no hash, and no rate that was chosen for them
        monkeypatch.setattr("training.experiments.transfer_table.WEIGHTS_NAME", "config.json")
        monkeypatch.setattr("training.experiments.transfer_table._identity", lambda *args, **kwargs: "")
        monkeypatch.setattr("training.experiments.choices.Choice.best", lambda self, *args: self.values[0])
        assert cells(parse(Table, ["--config", str(path)]))
    elif "\nclass_names:" in text:
        assert parse(Segmentation, ["--config", str(path)]).class_names
    elif "\nmodels:" in text:
        zoo = parse(Zoo, ["--config", str(path)])
        assert all(entry_of(zoo, name).recipe.tag for name in zoo.models)
    else:
        assert parse(Finetune if "compare:" in text else Recipe, ["--config", str(path)]).data.source


def test_overrides_and_roundtrip(tmp_path):
    recipe = parse(
        Recipe, ["--optim.lr", "0.5", "--model_args", '{"orientation": "blocks"}', "--sizes", "[[0, 32], [2, 64]]"]
    )
    assert (recipe.optim.lr, recipe.model_args, recipe.resume) == (0.5, {"orientation": "blocks"}, False)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert parse(Recipe, ["--config", str(tmp_path / "recipe.yaml")]) == recipe
    assert parse(Recipe, ["--config", str(tmp_path / "recipe.yaml"), "--resume", "--epochs", "3"]).resume
    assert parse(Evaluation, ["--model", "x"]).model == "x"


def test_sizes_by_epoch():
    recipe = Recipe(sizes=[[0, 32], [2, 48], [5, 64]])
    assert [size_at(recipe, e) for e in (0, 1, 2, 4, 5, 9)] == [32, 32, 48, 48, 64, 64]
    assert final_size(recipe) == 64
    assert final_size(Recipe(sizes=[[0, 32]], eval_size=96)) == 96


@pytest.mark.parametrize(("text", "value"), [("", math.inf), ("90", 90), ("45s", 45), ("9m", 540), ("1.5h", 5400)])
def test_seconds(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"time_budget": "soon"}, "such as 9m"),
        ({"sizes": [[3, 32]]}, "begins at epoch 0"),
        ({"head": "nice"}, "head takes one of frame, random, learned, learned_cosine, got 'nice'"),
        ({"precision": "fp8"}, "precision takes one of fp32, bf16, fp16, got 'fp8'"),
        ({"epochs": 0}, "epochs takes a whole number at least 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints takes a whole number at least 1, got 0"),
        ({"save_minutes": -1}, r"save_minutes takes a number in \[0, 1000000\] \(0 for none\), got -1"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**values)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Optim, {"min_lr": 1, "lr": 0.5}),
        (Optim, {"layer_decay": 0}),
        (Ema, {"decay": 1}),
        (Loss, {"variance_covariance": -1.0}),
    ],
)
def test_wrong_values_of_groups(kind, values):
    with pytest.raises(ValueError, match=next(iter(values))):
        kind(**values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lrr", "1"], "no field 'optim.lrr' (on the command line). Did you mean 'optim.lr'?"),
        (["--lr=1"], "no field 'lr' (on the command line). Did you mean 'optim.lr'?"),
        (["--xyz", "1"], "no field 'xyz' (on the command line). There are: output, model"),
        (["--epochs", "many"], "epochs takes a whole number at least 1, got 'many'"),
        (["--resume", "perhaps"], "resume takes true or false, got 'perhaps'"),
        (["--epochs", "0"], "epochs takes a whole number at least 1, got 0"),
        (["--config", "nowhere.yaml"], "Cannot read the recipe nowhere.yaml: No such file"),
        ("optim: {lerning_rate: 1}", "no field 'optim.lerning_rate' (in FILE). Did you mean"),
        ("epoch: 3", "no field 'epoch' (in FILE). Did you mean 'epochs'?"),
        ("epochs: [", "FILE is not YAML"),
        ("- epochs", "FILE has to be fields and values"),
        ("optim: {lr: fast}", "optim.lr takes a number in [0, 1000] (0 for the program's own), got 'fast'"),
    ],
)
def test_a_mistake_gets_one_line(arguments, message, tmp_path, capsys):
    if isinstance(arguments, str):
        file = tmp_path / "recipe.yaml"
        file.write_text(arguments)
        arguments, message = ["--config", str(file)], message.replace("FILE", str(file))
    with pytest.raises(SystemExit, match="2"):
        parse(Recipe, arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_dashes_and_underscores():
    args = ["--time-budget=9m", "--optim.weight-decay", "0.5", "--resume", "--model_args.drop_rate", "0.1"]
    recipe = parse(Recipe, args)
    assert (recipe.time_budget, recipe.optim.weight_decay, recipe.resume) == ("9m", 0.5, True)
    assert recipe.model_args == {"drop_rate": 0.1}


def test_changes_by_dotted_name():
    before = entries(Recipe())
    assert changes(before, Recipe()) == {}
    other = Recipe(epochs=31, optim=Optim(lr=0.1))
    assert changes(before, other) == {
        "optim.lr": "optim.lr 0.002 -> 0.1",
        "epochs": "epochs 30 -> 31",
    }
    assert changes({}, other) == {}


def test_help_describes_every_field(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(Recipe, ["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Peak learning rate; 0 for 0.002" in out
    assert "How many checkpoints are kept." in out
