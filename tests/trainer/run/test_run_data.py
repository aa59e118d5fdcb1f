"""The engine on every kind of data, and with mixed images."""

import dataclasses

import pytest
import torch

from etf_zoo.trainer.recipe.config import Augment, Data, Loss, Optim, Recipe
from etf_zoo.trainer.run.run import Run
from tests.made_data import write_folder, write_parquet

RECIPE = Recipe(
    model="mobilenetv3_small_050_etf",
    data=Data("digits", val_split="test", size=32, limit=128),
    optim=Optim(lr=1e-3),
    epochs=1,
    batch_size=32,
    sizes=[[0, 32]],
    tensorboard=False,
)
STRONG = Augment(randaug_ops=2, erase=0.2, mixup=0.2, cutmix=1.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def run(tmp_path, name, **changes):
    return Run(dataclasses.replace(RECIPE, output=str(tmp_path / name), **changes))


def check_resumes(tmp_path, **changes):
    whole = run(tmp_path, "whole", **changes)
    assert whole.fit()
    stopped = run(tmp_path, "stopped", time_budget="0s", log_every=1, **changes)
    assert not stopped.fit()
    assert 0 < stopped.step < whole.step
    resumed = run(tmp_path, "stopped", resume=True, **changes)
    assert resumed.fit()
    for key, value in whole.plain_model().state_dict().items():
        assert torch.equal(value, resumed.plain_model().state_dict()[key]), key
    return whole


def test_mixed_images_train_and_resume(tmp_path):
    check_resumes(tmp_path, augment=STRONG, accumulate=2)


def test_mixed_labels_reach_the_loss(tmp_path):
    trained = run(tmp_path, "run", augment=Augment(mixup=1e6), label_smoothing=0.0)
    images, labels = next(trained.batches(0, 0))
    seen = []
    stepper, objective = trained.stepper, trained.stepper.objective
    stepper.objective = lambda forward, x, y: seen.append((x, y)) or objective(forward, x, y)
    stepper.objective.after_step = objective.after_step
    sums = stepper.step(0, images, labels)
    x, y = seen[0]
    torch.testing.assert_close(x, (images + images.roll(1, 0)) / 2, atol=0.02, rtol=0)
    same = labels == labels.roll(1)
    torch.testing.assert_close(y.max(1).values, torch.where(same, 1.0, 0.5), atol=0.01, rtol=0)
    assert sums[2] == len(labels)
    assert 0 <= sums[1] <= len(labels)


@pytest.mark.parametrize(
    "changes", [{"loss": Loss(name="dot_regression")}, {"model_args": {"moving": True}}], ids=["loss", "moving frame"]
)
def test_mixing_needs_a_loss_that_takes_shares(tmp_path, changes):
    with pytest.raises(ValueError, match=r"augment.mixup and augment.cutmix .*set them to 0"):
        run(tmp_path, "run", augment=Augment(cutmix=1.0), **changes)


def test_images_that_are_not_resident(tmp_path):
    classes = {"train": {"a": range(20), "b": range(20, 40)}, "val": {"a": [0, 2], "b": [21]}}
    source = write_folder(tmp_path / "made", classes)
    data = Data(str(source), resident=False, workers=0, long_tail=0.5, val_split="val")
    whole = check_resumes(tmp_path, data=data, augment=Augment(randaug_ops=1), batch_size=8)
    assert whole.train_split.class_counts() == [20, 10]
    assert whole.evaluate()["images"] == 3


def test_streams(tmp_path):
    source = write_parquet(tmp_path / "many", {"train": [0, 1] * 16, "validation": [0, 1, 1]}, list("ab"), shards=3)
    data = Data(str(source), streaming=True, workers=0, train_images=32, shuffle_buffer=8)
    whole = check_resumes(tmp_path, data=data, batch_size=8)
    assert whole.evaluate()["images"] == 3
    with pytest.raises(ValueError, match="need the class counts, which a stream does not have"):
        run(tmp_path, "scaled", data=data, batch_size=8, loss=Loss(name="dot_regression", class_scaling=True))
