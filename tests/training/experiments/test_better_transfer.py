"""What is compared, at which rate, and what the tables say of made-up figures; one whole cell on digits."""

import argparse
import dataclasses
from typing import Any

import numpy as np
import pytest
import timm
import torch

from etf_zoo.errors import DivergedError, EtfZooError
from etf_zoo.trainer.data.batches import load_split
from etf_zoo.trainer.data.sealed import choosing
from etf_zoo.trainer.recipe.config import Data, Recipe
from etf_zoo.trainer.run.model import make_model
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.tune.probes import backbone_features
from training.experiments import better_transfer, sooner, transfer_score
from training.experiments.better_transfer import CANDIDATES, chosen_rate, plan, recipe_of, tuning_rate
from training.experiments.better_transfer_table import METHODS, best_runs, by_set, partners, table, write_tables
from training.experiments.grid import Results
from training.experiments.intervals import pack
from training.experiments.transfer_score import Scoring, load_backbone

ARGS = argparse.Namespace(stage=1, only=None, seeds=None, rates=[0.1, 0.3], sets=["birds"], epochs=0, images=0)


def cell(name, lr, right, *, stage=1, seed=0, of=40, budget="", judged=None):
    """A finished cell whose methods all have the first so many images right."""
    hits = {method: [pack(np.arange(of) < right)] for method in METHODS}
    by = dict.fromkeys(METHODS, 100 * right / of)
    scores = {"birds": {**by, "hits": hits, "images": of, "full_by_rate": {"0.001": right, "0.002": right + 1}}}
    scores["birds"] |= {"judged": judged} if judged else {}
    found = {"name": name, "lr": lr, "stage": stage, "seed": seed, "source_top1": 10.0, "scores": scores}
    return {**found, **({"budget": budget} if budget else {})}


def test_heads_try_all_rates_and_candidates_take_that_of_their_kind():
    first = plan(ARGS, [], True)
    assert {(c.name, c.recipe.optim.lr) for c in first} == {
        (f"{head}{neck}", rate)
        for head in ("learned", "learned cosine", "frame")
        for neck in ("", ", MLP")
        for rate in (0.1, 0.3)
    }
    done = [cell("frame", 0.1, 5), cell("frame", 0.3, 9), cell("learned", 0.1, 7), cell("learned", 0.3, 6)]
    done += [cell("frame, MLP", 0.1, 8), cell("frame, MLP", 0.3, 7)]
    rates = {c.name: c.recipe.optim.lr for c in plan(ARGS, done, False)}
    assert rates["frame, two depths"] == 0.3
    assert rates["learned, entropy"] == 0.1
    assert rates["frame, MLP, entropy"] == rates["frame, MLP of 3 layers"] == 0.1
    assert "learned cosine, NONL" not in rates  # no rate is known
    assert "frame" not in rates  # tried before
    assert chosen_rate(done[1:], 1, "frame", (0.1, 0.3)) is None  # not all of them yet
    assert chosen_rate(done[1:], 2, "frame", (0.1, 0.3)) == 0.3  # an earlier stage counts as it is
    again = argparse.Namespace(**{**vars(ARGS), "seeds": [1], "only": ["frame, MLP"]})
    assert [c.recipe.optim.lr for c in plan(again, done, False)] == [0.1]


def test_a_run_that_diverged_is_a_rate_that_was_tried(tmp_path, monkeypatch):
    diverged = {"name": "learned, MLP", "lr": 0.3, "stage": 1, "seed": 0, "diverged": "The loss is nan."}
    done = [cell("learned, MLP", 0.1, 7), diverged]
    assert chosen_rate(done, 1, "learned, MLP", (0.1, 0.3)) == 0.1
    assert chosen_rate([diverged], 1, "learned, MLP", (0.3,)) is None
    assert "| learned, MLP | 1 | 0.1, 0.3 (diverged) | 0.1 |" in table(done, list(CANDIDATES))
    assert table([diverged], list(CANDIDATES)) == ""

    def fail(*_):
        raise DivergedError("The loss is nan.")

    monkeypatch.setattr(better_transfer, "_measure", fail)
    recipe = recipe_of(1, "learned, MLP", 0.3, 0, {})
    record = better_transfer.measure(tmp_path, better_transfer.Cell(1, "learned, MLP", 0, recipe, Scoring()))
    assert record == {**diverged, "head": "learned"}


def test_without_rates_to_try_all_take_those_of_the_stage_before_at_once():
    done = [cell("frame", 0.1, 5), cell("frame", 0.3, 9), cell("learned", 0.1, 7), cell("learned", 0.3, 6)]
    args = argparse.Namespace(**{**vars(ARGS), "stage": 2, "rates": [], "only": ["learned", "frame", "frame, entropy"]})
    assert plan(args, done, True) == []
    cells = plan(args, done, False)
    assert [(c.name, c.recipe.optim.lr) for c in cells] == [("learned", 0.1), ("frame", 0.3), ("frame, entropy", 0.3)]


def test_stage_three_takes_what_stage_two_chose():
    done = [
        cell("frame", 0.1, 5),
        cell("frame", 0.3, 9),
        cell("frame", 0.1, 9, stage=2),
        cell("frame", 0.3, 3, stage=2),
    ]
    args = argparse.Namespace(**{**vars(ARGS), "stage": 3, "only": ["frame"]})
    assert plan(args, done, True) == []
    cells = plan(args, done, False)
    assert [(c.seed, c.recipe.optim.lr, c.keep) for c in cells] == [(seed, 0.1, True) for seed in (0, 1, 2)]
    assert cells[0].scoring.test
    assert cells[0].scoring.rates == (tuning_rate(done, "frame"),) == (0.002,)


@pytest.mark.parametrize("stage", [1, 2])
def test_every_candidate_is_a_recipe_of_the_same_budget(stage):
    costs = {}
    for name in CANDIDATES:
        recipe = recipe_of(stage, name, 0.1, 0, {})
        costs[name] = recipe.batch_size * recipe.epochs * recipe.augment.views
        if recipe.data.label == "class" and not recipe.loss.stage_weight:
            model = make_model(dataclasses.replace(recipe, model="resnet10t_etf"), 200)
            assert model.num_classes == 200
    whole = costs["frame"]
    assert all(0.95 * whole < cost < 1.1 * whole for name, cost in costs.items() if "crop" not in name)
    views = recipe_of(stage, "frame, multi-crop", 0.1, 0, {})
    images = 97_500 if stage == 2 else 12_500  # and as many steps as without views
    steps = (images // views.batch_size) * views.epochs
    plain = recipe_of(stage, "frame", 0.1, 0, {})
    assert steps == pytest.approx((images // plain.batch_size) * plain.epochs, rel=0.25)


def test_tables():
    records = [cell("learned", 0.1, 20), cell("learned", 0.3, 10), cell("learned cosine", 0.1, 22)]
    records += [cell("frame", 0.1, 30, seed=seed) for seed in (0, 1)]
    assert {name: [r["lr"] for r in runs] for name, runs in best_runs(records).items()} == {
        "learned": [0.1],
        "learned cosine": [0.1],
        "frame": [0.1, 0.1],
    }
    text = table(records, list(CANDIDATES))
    assert "| learned | 1 | 0.1, 0.3 | 0.1 | 10.0 | 50.0 (-5.0) |" in text
    assert "| frame | 2 | 0.1 | 0.1 | 10.0 | 75.0 (+20.0) |" in text
    assert "| 75.00 (75.00, 75.00) | +20.00 |  |" in text  # of the seed that both have
    sets = by_set(records, list(CANDIDATES))
    assert "| frame | learned | ncm | 1 | +25.0 [" in sets  # the one seed that both have
    assert "| frame | learned cosine | full | 1 | +20.0 [" in sets


def test_another_budget_has_tables_of_its_own(tmp_path):
    short = [cell("learned", 0.1, 20), cell("frame", 0.3, 30), cell("frame", 0.1, 25)]
    long = [cell("learned", 0.3, 35, budget="12 epochs"), cell("frame", 0.1, 34, budget="12 epochs")]
    write_tables([*short, *long], tmp_path, list(CANDIDATES))
    names = {"stage1.md", "stage1_sets.md", "stage1_12_epochs.md", "stage1_12_epochs_sets.md"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert "| frame | 1 | 0.1, 0.3 | 0.3 |" in (tmp_path / "stage1.md").read_text()
    assert (tmp_path / "stage1.md").read_text() == table(short, list(CANDIDATES))
    assert (tmp_path / "stage1_12_epochs.md").read_text().endswith("| 85.00 | -2.50 |  |\n")
    # rates are those of the budget where all were tried there, else the stage's
    assert chosen_rate([*short, *long], 1, "frame") == 0.3
    assert chosen_rate([*short, *long], 1, "frame", budget="12 epochs") == 0.1
    assert chosen_rate([*short, *long], 1, "frame", (0.1, 0.3), budget="12 epochs") == 0.3
    args = argparse.Namespace(**{**vars(ARGS), "epochs": 12, "rates": [], "only": ["learned", "frame, entropy"]})
    cells = plan(args, short, False)
    assert [(c.name, c.recipe.optim.lr, c.recipe.epochs, c.budget) for c in cells] == [
        ("learned", 0.1, 12, "12 epochs"),
        ("frame, entropy", 0.3, 12, "12 epochs"),
    ]


def test_a_frame_stands_beside_learned_heads_with_the_same_additions():
    names = ["frame, MLP, entropy", "learned, entropy", "learned cosine, MLP, entropy", "learned"]
    records = [cell(name, 0.1, right) for name, right in zip(names, (30, 24, 26, 20), strict=True)]
    assert partners("frame, MLP, entropy", best_runs(records)) == [
        "learned, entropy",
        "learned cosine, MLP, entropy",
    ]
    assert partners("learned, entropy", best_runs(records)) == partners("frame", best_runs(records)) == []
    order = [*names, *CANDIDATES]
    assert "| 75.00 | +25.00 | +10.00 |" in table(records, order)
    assert "| frame, MLP, entropy | learned, entropy | ncm | 1 | +15.0 [" in by_set(records, order)


def test_figures_of_different_images_are_no_pair():
    same = [cell("learned", 0.1, 20, judged="a"), cell("frame", 0.1, 30, judged="a"), cell("learned cosine", 0.1, 3)]
    assert by_set(same, list(CANDIDATES))  # earlier cells do not say by which they were judged
    with pytest.raises(EtfZooError, match="different images of birds"):
        by_set([*same[:2], cell("frame, MLP", 0.1, 30, judged="b")], list(CANDIDATES))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_chooses_opens_no_test_split(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(better_transfer, "_measure", lambda *_: load_split(Data("digits", val_split="test"), "test"))
    recipe = recipe_of(stage, "frame", 0.1, 0, {})
    one = better_transfer.Cell(stage, "frame", 0, recipe, better_transfer.SCORING[stage])
    if stage == 3:
        assert len(better_transfer.measure(tmp_path, one)) == 450
    else:
        with pytest.raises(EtfZooError, match="while something is chosen"):
            better_transfer.measure(tmp_path, one)
    monkeypatch.setattr(sooner, "_measure", better_transfer._measure)
    with pytest.raises(EtfZooError, match="while something is chosen"):
        sooner.measure(tmp_path, sooner.Cell("frame", recipe))


def test_every_candidate_trains_a_step_and_is_scored_before_its_heads(tmp_path, monkeypatch):
    """What is scored after a training in bf16 is timm's backbone in float32, whatever stood behind it."""
    train: Any = load_split(Data("digits", size=32), "train").subset(np.arange(40))
    shares = np.full((len(train.images), 12), 1 / 12, np.float16)
    ways = {}
    for name, candidate in CANDIDATES.items():  # one of each kind: a head, a neck, a loss, views, labels
        parts = (candidate.get(part, {}) for part in ("model_args", "loss", "augment", "data"))
        ways.setdefault(str([candidate.get("head"), "target_cosine" in candidate, *map(sorted, parts)]), name)
    for name in ways.values():
        changes = {"model": "test_resnet_etf", "sizes": [[0, 32]], "epochs": 1, "batch_size": 30}
        folder = str(tmp_path / name.replace(" ", "_"))
        recipe = dataclasses.replace(recipe_of(1, name, 0.01, 0, changes), output=folder)
        split = train
        if recipe.data.label == "teacher":
            split = dataclasses.replace(train, label_names=[f"t{k}" for k in range(12)], shares=shares)
        run = Run(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, limit=0)), split, train)
        run.fit()
        model: Any = run.plain_model()
        assert run.step > 0
        target: Any = timm.create_model("test_resnet", num_classes=3)
        load_backbone(model, target)
        features = [backbone_features(one, train, size=32) for one in (model, target)]
        torch.testing.assert_close(*features, atol=1e-5, rtol=1e-5)


def test_the_backbone_alone_is_taken_over():
    model: Any = make_model(Recipe(model="test_resnet_etf", model_args={"neck": "mlp"}), 7)
    target: Any = timm.create_model("test_resnet", num_classes=3)
    own = target.fc.weight.clone()
    load_backbone(model, target)
    assert torch.equal(target.conv1[0].weight, model.conv1[0].weight)
    assert torch.equal(target.fc.weight, own)
    with pytest.raises(RuntimeError, match="lacks"):
        load_backbone(timm.create_model("test_vit", num_classes=3), target)


def test_images_to_judge_by(monkeypatch):
    monkeypatch.setattr(transfer_score, "near_duplicates", lambda features: np.arange(len(features)) // 2)
    monkeypatch.setattr(transfer_score, "backbone_features", lambda model, split, **_: torch.zeros(len(split), 1))
    fitted_on, judged = transfer_score.images_of("digits", Scoring(sets=("digits",)))
    whole = load_split(Data("digits", size=96), "train")
    assert len(fitted_on) + len(judged) == len(whole)
    assert 0.35 < len(judged) / len(whole) < 0.5  # pairs of two digits take more along
    rows = [set((np.asarray(split.index) // 2).tolist()) for split in (fitted_on, judged)]
    assert not rows[0] & rows[1]  # what looks alike is on one side
    train, test = transfer_score.images_of("digits", Scoring(sets=("digits",), test=True))
    assert (len(train), len(test)) == (len(whole), 450)
    with choosing(), pytest.raises(EtfZooError, match="while something is chosen"):
        transfer_score.images_of("digits", Scoring(sets=("digits",), test=True, epochs=3))


def test_a_cell_from_training_to_its_line(tmp_path, monkeypatch):
    """On digits, which stand for the source and for a set to transfer to."""
    monkeypatch.setattr(better_transfer, "UNTRAINED", 100)
    train = load_split(Data("digits", size=32), "train")
    monkeypatch.setattr(
        transfer_score, "images_of", lambda *_: (train.subset(np.arange(300)), train.subset(np.arange(300, 400)))
    )
    scoring = Scoring(size=32, epochs=1, images=64, sets=("digits",))
    source = {"data": {"source": "digits", "val_split": "test", "size": 32, "limit": 256}, "precision": "fp32"}
    changes = {**source, "model": "test_resnet_etf", "sizes": [[0, 32]], "epochs": 1}
    recipe = recipe_of(1, "frame, MLP", 0.1, 0, changes)
    one = better_transfer.Cell(1, "frame, MLP", 0, recipe, scoring, keep=True)
    record = better_transfer.measure(tmp_path, one)
    assert record["images"] == 256
    assert record["source_top1"] > 0
    scores = record["scores"]["digits"]
    assert all(0 <= scores[method] <= 100 for method in METHODS)
    assert scores["linear_probe"] > 30  # of ten classes
    assert len(scores["hits"]["5-shot"]) == 3
    assert (scores["images"], len(scores["judged"])) == (100, 12)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
    Results(tmp_path / "cells.jsonl", tmp_path / "locks").append({"key": one.key, **record})


def test_weights_of_the_zoo_are_scored_without_training(tmp_path, monkeypatch, capsys):
    args = argparse.Namespace(**{**vars(ARGS), "stage": 2})
    kept = {name: folder for name, folder in better_transfer.FINISHED.items() if folder.startswith("model_cards")}
    monkeypatch.setattr(better_transfer, "FINISHED", kept)  # others are where somebody trained them
    cells = better_transfer.finished(args)
    assert [(c.name, c.recipe.optim.lr, c.recipe.epochs) for c in cells] == [
        ("learned", 0.2, 23),
        ("frame, MLP, entropy, two depths", 0.3, 23),
    ]
    assert "frame is left out: there are no weights in model_cards/resnet18_etf.e23s30_tiny." in capsys.readouterr().out
    seen = {}
    monkeypatch.setattr(better_transfer, "score", lambda model, recipe, how: seen.update(model=model, how=how) or {})
    record = better_transfer.measure(tmp_path, cells[1])
    assert record["budget"] == "weights of the zoo"
    assert seen["model"].pretrained_cfg["tag"] == "e23p_tiny"
    assert (seen["how"].sets, seen["how"].test) == (("birds",), False)
    assert len({c.key for c in cells}) == 2


def test_epochs_until_and_own_rates():
    assert sooner.epochs_until([10.0, 20.0, 40.0], 30.0) == 2.5
    assert sooner.epochs_until([10.0, 20.0], 5.0) == 0.5
    assert sooner.epochs_until([10.0, 8.0, 20.0], 14.0) == 2.5
    assert sooner.epochs_until([10.0, 20.0], 21.0) == float("inf")
    common = {"model": "m", "images": 10, "epochs": 2, "size": 32, "seed": 0}
    records = [
        {**common, "name": "learned", "lr": 0.1, "curve": [5.0, 10.0]},
        {**common, "name": "learned", "lr": 0.3, "curve": [9.0, 8.0]},
        {**common, "name": "frame", "lr": 0.1, "curve": [10.0, 20.0]},
        {**common, "name": "frame, no norm", "lr": 0.1, "curve": [1.0, 2.0]},
    ]
    assert sooner.own_rates(records)["learned"][0]["lr"] == 0.1
    text = sooner.table(records)
    assert "| frame | 1 | 0.1 | 0.1 | 20.00 | 1.0 | 0.50 |" in text
    assert "| frame, no norm | 1 | 0.1 | 0.1 | 2.00 | never |  |" in text


def test_curves_of_a_short_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sooner, "UNTRAINED", 100)
    args = argparse.Namespace(model="resnet18_etf", epochs=2, size=32, images=256)
    recipe = sooner.recipe_of(args, "frame, no norm", 0.1, 0)
    assert recipe.model_args == {"feature_norm": "none"}
    data = dataclasses.replace(recipe.data, source="digits", val_split="test", size=32)
    recipe = dataclasses.replace(recipe, model="test_resnet_etf", data=data, precision="fp32")
    record = sooner.measure(tmp_path, sooner.Cell("frame, no norm", recipe))
    assert len(record["curve"]) == 2
    assert list(tmp_path.iterdir()) == []
    sooner.draw([record], tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 1
