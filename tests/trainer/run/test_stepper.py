"""Steps on several views of an image, on a teacher's shares, and with a scale that follows a target cosine."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from etf_zoo.errors import EtfZooError
from etf_zoo.frames import simplex_etf
from etf_zoo.layers.logit_scale import smoothed_probability, solve_logit_scale, target_cosine_scale
from etf_zoo.trainer.data.batches import train_batches
from etf_zoo.trainer.data.resident import Split
from etf_zoo.trainer.recipe.config import Augment, Data, Loss, Optim, Recipe
from etf_zoo.trainer.run.launching import make_accelerator
from etf_zoo.trainer.run.model import make_model
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.run.stepper import Stepper, prepare

RECIPE = Recipe(
    model="test_resnet_etf",
    data=Data("digits", val_split="test", size=32, limit=64),
    optim=Optim(name="sgd", lr=0.1, warmup_epochs=0),
    batch_size=8,
    epochs=2,
    sizes=[[0, 32]],
    channels_last=False,
    label_smoothing=0.1,
)


def stepper(recipe, classes=5):
    accelerator = make_accelerator()
    model, optimizer = prepare(recipe, accelerator, make_model(recipe, classes))
    return Stepper(recipe, accelerator, model, optimizer, steps_per_epoch=4, class_counts=[])


def test_views_of_a_batch():
    images = np.random.default_rng(0).integers(256, size=(6, 48, 48, 3), dtype=np.uint8)
    split = Split(images, np.arange(6) % 3, ["a", "b", "c"], "made", "train")
    settings = Augment(large_views=2, small_views=4, small_scale=[0.1, 0.2])
    assert settings.views == 3
    (groups, labels), *rest = train_batches(split, settings, size=32, batch_size=6, seed=0, epoch=0)
    assert not rest
    assert [tuple(g.shape) for g in groups] == [(6, 2, 3, 32, 32), (6, 4, 3, 16, 16)]
    assert labels.shape == (6,)
    assert not torch.equal(groups[0][:, 0], groups[0][:, 1])  # each drawn anew
    again = next(train_batches(split, settings, size=32, batch_size=6, seed=0, epoch=0))[0]
    assert all(torch.equal(a, b) for a, b in zip(groups, again, strict=True))
    # the first large view is what there is without others
    one = next(train_batches(split, Augment(), size=32, batch_size=6, seed=0, epoch=0))[0]
    assert isinstance(one, torch.Tensor)
    assert torch.equal(one, groups[0][:, 0])


def test_the_loss_of_views_is_their_mean():
    recipe = dataclasses.replace(RECIPE, augment=Augment(large_views=2, small_views=4), accumulate=2)
    taken = stepper(recipe)
    model = copy.deepcopy(taken.plain).train()
    groups = [torch.randn(8, 2, 3, 32, 32), torch.randn(8, 4, 3, 16, 16)]
    labels = torch.arange(8) % 5
    expected = 0.0
    for half in (slice(0, 4), slice(4, 8)):
        for views in groups:
            logits = model(views[half].flatten(0, 1))
            wanted = labels[half].repeat_interleave(views.shape[1])
            expected += F.cross_entropy(logits, wanted, label_smoothing=0.1).item() * views.shape[1] / 6 / 2
    loss, right, count = taken.step(0, groups, labels).tolist()
    assert count == 8
    assert 0 <= right <= 8
    assert loss / 8 == pytest.approx(expected, rel=1e-4)


def test_shares_of_classes_are_learned():
    taken = stepper(dataclasses.replace(RECIPE, label_smoothing=0.0))
    model = copy.deepcopy(taken.plain).train()
    images, shares = torch.randn(8, 3, 32, 32), torch.rand(8, 5).softmax(1)
    expected = -(shares * model(images).log_softmax(1)).sum(1).mean().item()
    assert taken.step(0, images, shares).tolist()[0] / 8 == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("targets", "first", "last"), [([0.25], 0.25, 0.25), ([0.6, 0.15], 0.6, 0.15)])
@pytest.mark.parametrize("head", ["frame", "learned_cosine"])
def test_the_scale_follows_the_target_cosine(targets, first, last, head):
    taken = stepper(dataclasses.replace(RECIPE, target_cosine=targets, head=head))
    solved = solve_logit_scale(simplex_etf(5, 512), probability=smoothed_probability(5, 0.1))
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    seen = []
    for number in range(8):
        taken.step(number, images, labels)
        seen.append(taken.plain.fc.logit_scale.item())
    assert seen[0] == pytest.approx(solved / first, rel=1e-4)
    assert seen[-1] == pytest.approx(solved / last, rel=1e-4)
    assert seen == sorted(seen)


@pytest.mark.parametrize("cosine", [0.9, 0.4, 0.15])
def test_the_smoothed_cross_entropy_is_least_at_the_target(cosine):
    """A feature of cosine c with its prototype and equal ones with all others, over a grid of c."""
    classes, smoothing = 7, 0.1
    solved = solve_logit_scale(simplex_etf(classes, 16), probability=smoothed_probability(classes, smoothing))
    scale = target_cosine_scale(solved, cosine)
    grid = torch.linspace(0.01, 1, 1000)
    cosines = (-grid / (classes - 1))[:, None].repeat(1, classes)
    cosines[:, 0] = grid
    labels = torch.zeros(len(grid), dtype=torch.long)
    losses = F.cross_entropy(scale * cosines, labels, label_smoothing=smoothing, reduction="none")
    assert grid[losses.argmin()].item() == pytest.approx(cosine, abs=2e-3)


def test_errors(tmp_path):
    for cosine in (0.0, 1.1, float("nan")):
        with pytest.raises(EtfZooError, match="target cosine"):
            target_cosine_scale(7.0, cosine)
    assert target_cosine_scale(50.0, 0.1) == 100
    for wrong in (
        {"target_cosine": [0.6, 0.4, 0.2]},
        {"target_cosine": [0.6], "head": "learned"},
        {"target_cosine": [0.6], "model_args": {"logit_scale": 30.0}},
        {"target_cosine": [0.6], "loss": Loss("dot_regression")},
    ):
        with pytest.raises(EtfZooError, match="target_cosine"):
            dataclasses.replace(RECIPE, **wrong)
    with pytest.raises(EtfZooError, match="not mixed"):
        Augment(large_views=2, mixup=0.1)
    with pytest.raises(EtfZooError, match="resident"):
        Data("digits", label="teacher", streaming=True)
    data = dataclasses.replace(RECIPE.data, source="digits")
    run = Run(dataclasses.replace(RECIPE, output=str(tmp_path), data=data, augment=Augment(large_views=2)))
    assert run.fit()  # a whole run on views
