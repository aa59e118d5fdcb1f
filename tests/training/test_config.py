"""Recipes: YAML, overrides, and what a wrong one says."""

import math
from pathlib import Path

import pytest

from training.config import Recipe, final_size, parse, save_recipe, seconds, size_at
from training.evaluate import Evaluation
from training.finetune import Finetune

RECIPES = sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_reads(path):
    kind = Finetune if "compare" in path.read_text() else Recipe
    assert parse(kind, ["--config", str(path)]).data.source


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
        ({"head": "nice"}, "frame, random, learned"),
        ({"precision": "fp8"}, "fp32, bf16 or fp16"),
        ({"epochs": 0}, "must be positive"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**values)


def test_unknown_field_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(Recipe, ["--optim.learning", "1"])
    assert "optim.learning" in capsys.readouterr().err
