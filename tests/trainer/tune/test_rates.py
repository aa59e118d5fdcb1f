"""`--lr auto`: which rate it takes, what it leaves, and that it looks at no test image."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from etf_zoo.errors import DivergedError
from etf_zoo.trainer.data.batches import Split
from etf_zoo.trainer.run.watch import BestEpoch
from etf_zoo.trainer.tune import rates
from etf_zoo.trainer.tune.parts import load_data
from etf_zoo.trainer.tune.rates import FACTORS, search_rate, short
from etf_zoo.trainer.tune.tuning import fine_tune
from tests.trainer.tune.test_tuning import RECIPE


def recipe(tmp_path, **changes):
    return dataclasses.replace(RECIPE, output=str(tmp_path / "run"), **changes)


def judged(figures):
    """A training that is as good as a table says: rate -> (top-1, loss); a rate that is not there diverges."""

    def train(settings):
        rate = round(settings.optim.lr, 6)
        if rate not in figures:
            raise DivergedError("nan")
        run = type("Run", (), {"best": BestEpoch()})
        run.best.observe(1, dict(zip(("top1", "loss"), figures[rate], strict=True)))
        return type("Tuned", (), {"run": run})

    return train


def test_the_best_rate_is_taken_and_its_curve_kept(tmp_path):
    settings, said = recipe(tmp_path, lr="auto"), []
    figures = {0.0005: (40.0, 1.0), 0.0015: (70.0, 1.1), 0.005: (70.0, 1.0), 0.015: (60.0, 0.5)}
    found = search_rate(settings, judged(figures), said.append)
    assert (found.optim.lr, found.lr, found.resume) == (0.005, "", False)
    kept = json.loads((tmp_path / "run" / "rates.json").read_text())
    wanted = [*((rate, figure[0]) for rate, figure in figures.items()), (0.05, None)]
    assert [(round(one["lr"], 6), one["top1"]) for one in kept["tried"]] == wanted
    assert (tmp_path / "run" / "rates.png").stat().st_size > 2000
    assert said[-2] == "lr 0.05: no figure, it diverged"
    assert said[-1].startswith("Taken: lr 0.005; ")
    assert not (tmp_path / "run" / "rates").exists()
    resumed = dataclasses.replace(settings, resume=True)
    assert search_rate(resumed, judged({}), said.append).optim.lr == 0.005  # it is not done again
    other = dataclasses.replace(resumed, seed=5)
    assert search_rate(other, judged({0.015: (1.0, 1.0)}), said.append).optim.lr == pytest.approx(0.015)


def test_a_search_that_was_interrupted_goes_on(tmp_path):
    """Its budget is for the whole: what is left of it is the training's."""
    settings = recipe(tmp_path, lr="auto", time_budget="1h")
    table, asked = {round(0.005 * factor, 6): (10.0, 1.0) for factor in FACTORS}, []

    def train(settings, until=2):
        asked.append((round(settings.optim.lr, 6), settings.time_budget, settings.resume))
        if len(asked) == until:
            (Path(settings.output) / "checkpoints" / "step_00000007").mkdir(parents=True)
            return None
        return judged(table)(settings)

    assert search_rate(settings, train, lambda line: None) is None
    found = search_rate(dataclasses.replace(settings, resume=True), train, lambda line: None)
    rates = sorted(table)
    assert [rate for rate, _, _ in asked] == [*rates[:2], *rates[1:]]  # the second goes on, the first is done
    assert [resume for _, _, resume in asked] == [False, False, True, False, False, False]
    budgets = [float(budget.removesuffix("s")) for _, budget, _ in asked]
    assert all(3590 < budget <= 3600 for budget in budgets)
    assert 3590 < float(found.time_budget.removesuffix("s")) <= 3600
    assert found.resume is False  # the training itself has not begun


def test_without_time_nothing_is_chosen(tmp_path, capsys):
    parts = load_data(RECIPE)
    settings = recipe(tmp_path, lr="auto", epochs=1, time_budget="0s")
    assert fine_tune(settings, parts.train.subset(np.arange(300)), parts.test) is None
    assert "Go on with the same command and --resume" in capsys.readouterr().out
    resumed = dataclasses.replace(settings, resume=True, time_budget="")
    tuned = fine_tune(resumed, parts.train.subset(np.arange(300)), parts.test)
    assert tuned.settings.optim.lr in [pytest.approx(0.005 * factor) for factor in FACTORS]


def test_a_rate_at_the_end_is_said(tmp_path):
    said = []
    table = {round(0.005 * factor, 6): (10.0 * i, 1.0) for i, factor in enumerate(FACTORS)}
    assert search_rate(recipe(tmp_path), judged(table), said.append).optim.lr == 0.05
    assert "at the end of those tried" in said[-1]


def test_no_rate_works(tmp_path):
    with pytest.raises(ValueError, match="No learning rate gave a figure"):
        search_rate(recipe(tmp_path), judged({}), lambda line: None)


def test_a_short_training():
    long = dataclasses.replace(RECIPE, epochs=100, lr="auto", optim=dataclasses.replace(RECIPE.optim, min_lr=1e-3))
    for settings, epochs in (
        (long, 5),
        (dataclasses.replace(long, epochs=10), 2),
        (dataclasses.replace(long, epochs=1), 1),
    ):
        made = short(settings, 1e-4)
        assert (made.epochs, made.optim.lr, made.optim.min_lr, made.lr) == (epochs, 1e-4, 1e-4, "")


def test_the_search_sees_held_out_images_and_no_test(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "FACTORS", (0.01, 1.0))
    parts = load_data(RECIPE)
    train, seen = parts.train.subset(np.arange(300)), set()
    take = Split.take

    def watched(split, rows, device, **options):
        seen.update(id(split) for _ in rows[:1])
        return take(split, rows, device, **options)

    monkeypatch.setattr(Split, "take", watched)
    tuned = fine_tune(recipe(tmp_path, lr="auto", epochs=1, keep="last"), train, parts.test)
    assert id(parts.test) not in seen
    assert tuned.settings.optim.lr in (0.005, 0.005 * 0.01)
    assert tuned.settings.lr == ""
    kept = json.loads((tmp_path / "run" / "rates.json").read_text())
    assert len(kept["tried"]) == 2
    assert torch.isfinite(next(tuned.model.parameters())).all()
