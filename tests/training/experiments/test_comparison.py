"""The comparison's script: its cells, what it leaves, the second process, the table, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from etf_zoo.errors import DivergedError
from etf_zoo.trainer.data.batches import limited, load_split
from etf_zoo.trainer.recipe.config import Data, Recipe, parse
from etf_zoo.trainer.run.locks import acquire
from etf_zoo.trainer.run.model import make_model
from training.experiments import comparison
from training.experiments.choices import CHOICES
from training.experiments.comparison import Comparison, cells, small_stem, table
from training.experiments.grid import CELLS, Results, lock_file

PASSES = [{"labels": "label", "seed": 0}, {"labels": "label", "seed": 1, "only": ["frame"]}]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs the script on digits with two variants; gives its folder of results."""
    base = {"data": {"source": "digits", "val_split": "test", "size": 16, "limit": 256}, "sizes": [[0, 16]]}
    base |= {"model": "test_resnet_etf", "epochs": 1, "batch_size": 64, "tensorboard": False}
    base |= {"output": str(tmp_path / "runs")}
    file = tmp_path / "list.yaml"
    variants = {"frame": {"model_args": {"orientation": "blocks"}}, "learned, flat": {"head": "learned"}}
    settings = {"results": str(tmp_path / "results"), "base": base, "variants": variants, "passes": PASSES}
    file.write_text(yaml.safe_dump({**settings, "probe_labels": "coarse"}))

    def call(*args):
        monkeypatch.setattr("sys.argv", ["comparison.py", "--config", str(file), *args])
        comparison.main()
        return tmp_path / "results"

    return call


def test_refused(script, monkeypatch):
    with pytest.raises(ValueError, match="time_budget has no place in a comparison"):
        script("--base.time_budget", "0s")
    monkeypatch.setattr(
        "etf_zoo.trainer.run.launching.PartialState", lambda **kwargs: type("Two", (), {"num_processes": 2})
    )
    with pytest.raises(ValueError, match="as one process"):
        script()


def started(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "|label|" in line]


def test_cells_are_run_once_and_shared(script, tmp_path, capsys):
    settings = parse(Comparison, ["--config", str(tmp_path / "list.yaml")])
    wanted = comparison.with_digests(settings, cells(settings))
    with acquire(lock_file(tmp_path / "runs" / "locks", wanted[1].key)):
        results = script()  # another process has that cell
    assert started(capsys) == [wanted[0].key, wanted[2].key]
    assert "Not run: learned, flat (seed 0)." in (results / "table.md").read_text()
    script()
    assert started(capsys) == [wanted[1].key]
    done = Results(results / CELLS, tmp_path).read()
    assert set(done) == {cell.key for cell in wanted}
    found = {(cell.variant, cell.seed): done[cell.key] for cell in wanted}
    for cell in found.values():
        assert 0 <= cell["results"]["top1"] <= 100
        assert 10 < cell["results"]["probe_top1"] <= 100  # chance is 10
        assert "severity" not in cell["results"]  # digits have no tree
    assert found["learned, flat", 0]["training"]["recipe"]["head"] == "learned"
    top1 = [found["frame", seed]["results"]["top1"] for seed in (0, 1)]
    row = f"| frame | 2 | {np.mean(top1):.2f} ({top1[0]:.2f}, {top1[1]:.2f}) |"
    assert row in (results / "table.md").read_text()
    (results / "table.md").unlink()
    script("--table_only")
    assert row in (results / "table.md").read_text()


def test_changed_settings_start_anew(script, tmp_path):
    first, both = (Results(script("--base.optim.lr", rate) / CELLS, tmp_path).read() for rate in ("0.01", "1e-9"))
    assert len(both) == 2 * len(first)
    assert len({cell["results"]["loss"] for cell in both.values()}) == len(both)  # resumed, they would be the former's


def test_each_variant_has_its_own_rate(script, tmp_path, capsys):
    results = script("--rates", "[0.0001, 0.01]")
    trials = Results(results / CHOICES, tmp_path).read().values()
    tried = {(trial["variant"], trial["rate"]): trial["top1"] for trial in trials}
    assert set(tried) == {(name, rate) for name in ("frame", "learned, flat") for rate in (0.0001, 0.01)}
    assert {trial["seed"] for trial in trials} == {0}
    done = Results(results / CELLS, tmp_path).read().values()
    assert len(done) == 3
    for cell in done:
        best = max((0.0001, 0.01), key=lambda rate: tried[cell["variant"], rate])
        assert cell["training"]["recipe"]["optim"]["lr"] == best == 0.01
    assert "| frame | 2 | 0.01 |" in (results / "table.md").read_text()
    capsys.readouterr()
    script("--rates", "[0.0001, 0.01]")
    assert started(capsys) == []


def test_a_trial_that_opens_the_test_images_is_refused(script, tmp_path):
    settings = parse(Comparison, ["--config", str(tmp_path / "list.yaml"), "--holdout", "0.25"])
    with pytest.raises(ValueError, match="'test' was asked for while something is chosen"):
        comparison.run_cell(settings, cells(settings)[0])  # whose probe for the other labels is of test images


def test_what_is_held_out_looks_like_nothing_that_is_trained_on(script, tmp_path, monkeypatch):
    settings = parse(Comparison, ["--config", str(tmp_path / "list.yaml"), "--holdout", "0.25"])
    taken = []
    monkeypatch.setattr(comparison, "group_rows", lambda split: np.arange(len(split)) // 4)
    monkeypatch.setattr(comparison, "_SERIES", {})
    monkeypatch.setattr(comparison, "Run", lambda recipe, train, val, *args, **kw: taken.append((train, val)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        comparison.run_cell(settings, cells(settings)[0])
    data = settings.base.data
    whole = limited(load_split(dataclasses.replace(data, label_column="label"), "train"), data.limit, 0)
    place = {int(row): number for number, row in enumerate(whole.index)}
    train, held = ({place[int(row)] // 4 for row in split.index} for split in taken[0])
    assert len(taken[0][0]) + len(taken[0][1]) == 256
    assert 30 < len(taken[0][1]) < 80
    assert not train & held


def test_a_rate_that_diverges_is_tried(monkeypatch):
    def diverge(*args):
        raise DivergedError("not finite")

    monkeypatch.setattr(comparison, "run_cell", diverge)
    assert comparison.try_rate(Comparison(), comparison.Cell("a", "x", 0, 0.8))["top1"] == 0


def test_a_trial_of_another_process_is_waited_for(script, tmp_path):
    settings = parse(Comparison, ["--config", str(tmp_path / "list.yaml"), "--rates", "[0.01]"])
    lock = tmp_path / "locks"
    tried = comparison.trials(settings, cells(settings))[0][0]
    with acquire(lock_file(lock, tried.key)), pytest.raises(ValueError, match="Another process still tries rates"):
        comparison.at_own_rates(settings, cells(settings), lock)


def test_a_learned_head_may_start_as_timm_has_it():
    recipe = Recipe(model="resnet10t_etf", head="learned", model_args={"orientation": "blocks"}, seed=3)
    ours, theirs = (start(recipe, 5).state_dict() for start in (make_model, comparison.timm_start))
    assert not ours["fc.weight"].any()
    assert theirs["fc.weight"].std() > 0.01
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {"fc.weight", "fc.bias"}
    for wrong in ({"head": "frame"}, {"pretrained": True}):
        with pytest.raises(ValueError, match="random_start is for a learned head"):
            comparison.timm_start(dataclasses.replace(recipe, **wrong), 5)


def test_a_recipe_changes_where_its_variant_says(tmp_path):
    base = Recipe(output=str(tmp_path), data=Data("x", size=32), model_args={"neck": "mlp"})
    variants = {"a": {"data": {"long_tail": 0.1}, "model_args": {"orientation": "blocks"}}}
    settings = Comparison("", base, variants=variants, passes=[{"labels": "fine", "seed": 3}])
    (cell,) = cells(settings)
    recipe = comparison.recipe_of(settings, cell)
    expected = Data("x", size=32, long_tail=0.1, label_column="fine")
    assert recipe.data == dataclasses.replace(expected, test_share=recipe.data.test_share)
    assert recipe.model_args == {"neck": "mlp", "orientation": "blocks"}
    assert (recipe.seed, recipe.resume, base.model_args) == (3, False, {"neck": "mlp"})


def test_small_stem_changes_one_convolution():
    model = make_model(Recipe(model="resnet10t_etf"), 5)
    with pytest.raises(ValueError, match="conv1, which ResNetETF has not"):  # its stem is deep
        small_stem(model)
    model = make_model(Recipe(model="resnet18_etf"), 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small_stem(model)
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["conv1.weight"]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match="conv1, which Linear has not"):
        small_stem(nn.Linear(2, 2))


def test_unknown_variant():
    with pytest.raises(ValueError, match="variants that there are not: b"):
        cells(Comparison(variants={"a": {}}, passes=[{"labels": "x", "seed": 0, "only": ["a", "b"]}]))


def test_cells_of_another_protocol_are_left_out():
    settings = Comparison(variants={"a": {}, "b": {}}, passes=[{"labels": "x", "seed": 0}])
    records = [
        {"variant": "b", "labels": "x", "seed": 0, "protocol": comparison.PROTOCOL, "results": {"top1": 3.0}},
        {"variant": "a", "labels": "x", "seed": 0, "protocol": 1, "results": {"top1": 1.0}},
        {"variant": "b", "labels": "x", "seed": 0, "protocol": 1, "results": {"top1": 2.0}},
    ]
    text = table(settings, records)
    assert "| b | 1 | 3.00 |" in text
    assert "Not run: a (seed 0)." in text


def test_other_recipes_and_images_are_other_cells(monkeypatch):
    data = Data("digits", val_split="test", size=16)
    settings = Comparison(base=Recipe(data=data), variants={"a": {}}, passes=[{"labels": "label", "seed": 0}])
    (before,) = comparison.with_digests(settings, cells(settings))
    longer = dataclasses.replace(settings, base=Recipe(data=data, epochs=31, output="elsewhere"))
    (after,) = comparison.with_digests(longer, cells(longer))
    assert before.key != after.key
    moved = dataclasses.replace(settings, base=Recipe(data=data, output="elsewhere"))
    assert comparison.with_digests(moved, cells(moved)) == [before]
    monkeypatch.setattr("etf_zoo.trainer.data.resident.Split.digest", "other images")
    assert comparison.with_digests(settings, cells(settings)) != [before]
