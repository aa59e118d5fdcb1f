"""Fine-tuning on stored inputs of the first tuned layer beside fine-tuning on images."""

import dataclasses

import numpy as np
import pytest
import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.trainer.data.batches import view_batches
from etf_zoo.trainer.data.stored import StoredInputs
from etf_zoo.trainer.recipe.config import Augment, Ema, Loss, Optim
from etf_zoo.trainer.tune.parts import load_data
from etf_zoo.trainer.tune.tuning import fine_tune
from tests.trainer.tune.test_tuning import RECIPE as TUNING

RECIPE = dataclasses.replace(TUNING, head="learned")


@pytest.fixture(scope="module")
def digits():
    parts = load_data(RECIPE)
    return parts.train.subset(np.arange(200)), parts.test


def tuned_with(tmp_path, digits, views, **changes):
    settings = dataclasses.replace(RECIPE, output=str(tmp_path / f"{views}"), cache_views=views, **changes)
    return fine_tune(settings, *digits)


@pytest.mark.parametrize("method", ["head", "layer", "scl"])
def test_the_same_model_as_on_images_without_augmentation(tmp_path, digits, method):
    sgd = Optim(name="sgd", lr=0.05)  # Adam's first steps go by signs, which the rounding to float16 can turn
    runs = [tuned_with(tmp_path, digits, views, method=method, layer="layer4", optim=sgd) for views in (0, 1)]
    plain, stored = runs
    images = next(view_batches(digits[1], RECIPE.augment, size=16, batch_size=64, seed=0, view=0))
    with torch.inference_mode():
        wanted, found = (run.model.eval()(images) for run in runs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02 * wanted.std().item())
    assert wanted.std() > 0.01  # learned heads start from zeros
    assert stored.figures()["top1"] == pytest.approx(plain.figures()["top1"], abs=0.5)
    assert not any(module._forward_pre_hooks for module in stored.model.modules())
    assert stored.export(tmp_path / "model")["top1"] == pytest.approx(stored.figures()["top1"], abs=0.3)


def test_an_average_of_the_weights_and_a_warm_head(tmp_path, digits):
    tuned = tuned_with(tmp_path, digits, 2, method="layer", layer="layer4", head="warm", ema=Ema(0.9))
    assert tuned.start[0] > 20  # chance is 10
    assert tuned.figures()["images"] == 450  # the average takes images again


def test_views_are_drawn_anew_in_each_epoch():
    split = StoredInputs(
        type("S", (), {"labels": np.arange(6), "__len__": lambda s: 6})(), np.zeros((5, 6, 1), np.float16)
    )
    split.inputs[:] = np.arange(5, dtype=np.float16)[:, None, None]
    draws = []
    for epoch in (0, 1, 0):
        batches = split.train_batches([np.arange(6)], seed=0, epoch=epoch, start=0, device=torch.device("cpu"))
        draws.append(next(batches)[0].flatten().tolist())
    assert draws[0] == draws[2] != draws[1]
    assert len(set(draws[0] + draws[1])) > 2
    (inputs, labels), *_ = split.batches([np.array([3, 1])], torch.device("cpu"))
    assert inputs.flatten().tolist() == [0, 0]
    assert labels.tolist() == [3, 1]


def test_views_of_a_split(digits):
    flips = Augment(crop_scale=[0.5, 0.6], crop_ratio=[1.0, 1.0], flip=True)
    views = [
        torch.cat(list(view_batches(digits[0], flips, size=16, batch_size=64, seed=0, view=view)))
        for view in (0, 1, 2, 1)
    ]
    assert all(len(view) == 200 for view in views)
    assert torch.equal(views[1], views[3])
    assert not torch.equal(views[1], views[2])
    assert (views[0] - views[1]).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full"}, r"cache_views is for what freezes layers and trains .* not full"),
        ({"method": "ncm"}, r"not ncm"),
        ({"method": "head", "augment": Augment(mixup=0.2)}, r"augment\.mixup and augment\.cutmix to 0"),
        ({"method": "head", "sizes": [[0, 16], [1, 32]]}, r"a single size"),
        ({"method": "head", "augment": Augment(large_views=2)}, r"augment\.large_views to 1"),
        ({"method": "head", "loss": Loss(stage_weight=0.3)}, r"loss\.stage_weight"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(EtfZooError, match=message):
        dataclasses.replace(RECIPE, cache_views=1, **changes)
