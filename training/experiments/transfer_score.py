"""How well a backbone transfers: probes on its frozen features, and a short tuning in full, set by set.

Every backbone gets the same learned head, zero at the start, so that two of them differ in their features alone; what
stood behind the features in pretraining, a neck and a frame or a classifier, is thrown away.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from etf_zoo.models.names import split_head, timm_classifier_names
from etf_zoo.trainer.data.batches import limited
from etf_zoo.trainer.data.holdout import holdout_indices
from etf_zoo.trainer.data.near_duplicates import near_duplicates
from etf_zoo.trainer.data.subsets import Images, few_shot_indices, load_images
from etf_zoo.trainer.recipe.config import Augment, Data, Optim, Recipe
from etf_zoo.trainer.run.launching import make_accelerator
from etf_zoo.trainer.run.model import make_model
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.tune.probes import backbone_features, fit_probe
from training.experiments.frozen import predictions
from training.experiments.grid import digest
from training.experiments.intervals import pack

__all__ = ["METHODS", "SETS", "Scoring", "load_backbone", "score"]

SETS = ("flowers17", "cub50", "grocery")
METHODS = ("linear_probe", "ncm", "5-shot", "full")
STRENGTH = 0.01  # scikit-learn's C, of features standardized each
SHOTS = 5
DRAWS = 3  # of the few shots
HELD = 0.4  # of each class's training images
# whose features tell which training images look alike; scored nowhere here. A tag, for the default may become another
GROUPING = "mobilenetv3_small_100_etf.e27_tiny"


@dataclass(frozen=True)
class Scoring:
    """How to score.

    Attributes:
        size: Pixels of a side.
        epochs: Of the tuning.
        images: To tune on, of a fixed shuffle; 0 for all.
        rates: AdamW's, of the tuning: each is tried.
        chosen_strength: Whether the linear probe's strength is chosen by cross-validation, which takes longer.
        test: Measure on the test images instead of held-out training images.
        sets: Names of the data sets.
    """

    size: int = 48
    epochs: int = 5
    images: int = 600
    rates: tuple[float, ...] = (0.001,)
    chosen_strength: bool = False
    test: bool = False
    sets: tuple[str, ...] = SETS


def score(model: Any, recipe: Recipe, how: Scoring) -> dict[str, dict[str, Any]]:
    """Score a pretrained model.

    Args:
        model: As it was trained.
        recipe: Of its training: architecture, seed, precision, and a folder for what comes on the way.
        how: See `Scoring`.

    Returns:
        Set -> method -> accuracy in percent on the images that judge; `full` is that at the best of the rates *by those
        very images* unless there is one rate, and `full_by_rate` has all. `hits` has which images were right, and
        `judged` a digest of which images these are, wherever they were decoded: figures of other ones are no pair.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in how.sets:
        fitted_on, judged = images_of(name, how)
        truth = torch.from_numpy(judged.labels)
        answers = {**_frozen(model, fitted_on, judged, how, recipe.seed)}
        tuned = {rate: _tuned(model, recipe, rate, fitted_on, judged, how) for rate in how.rates}
        by_rate = {rate: _accuracy(guesses, truth) for rate, guesses in tuned.items()}
        answers["full"] = [tuned[max(by_rate, key=lambda rate: by_rate[rate])]]
        found[name] = {method: float(np.mean([_accuracy(g, truth) for g in answers[method]])) for method in METHODS}
        found[name]["full_by_rate"] = {str(rate): accuracy for rate, accuracy in by_rate.items()}
        found[name]["hits"] = {method: [pack((g == truth).numpy()) for g in answers[method]] for method in METHODS}
        rows = np.arange(len(truth)) if judged.index is None else judged.index
        found[name]["images"], found[name]["judged"] = len(truth), digest(rows.tolist(), truth.tolist())
    return found


def _accuracy(guesses: Tensor, truth: Tensor) -> float:
    return 100 * (guesses == truth).double().mean().item()


@functools.cache
def images_of(name: str, how: Scoring) -> tuple[Images, Images]:
    """Images to fit on, and to judge by: a share of the training images, those that look alike on one side."""
    train = load_images(Data(source=name, size=96), "train")
    if how.test:
        return train, load_images(Data(source=name, size=96), "test")
    device = make_accelerator().device
    grouping: Any = timm.create_model(GROUPING, pretrained=True)
    groups = near_duplicates(backbone_features(grouping, train, size=64, device=device))
    rows, held = holdout_indices(train.labels, HELD, 0, groups)
    return train.subset(rows), train.subset(held)


def _frozen(model: Any, fitted_on: Images, judged: Images, how: Scoring, seed: int) -> dict[str, list[Tensor]]:
    """Answers of the probes."""
    device, names = make_accelerator().device, fitted_on.label_names
    x, queries = (backbone_features(model, split, size=how.size, device=device) for split in (fitted_on, judged))
    labels = torch.from_numpy(fitted_on.labels)

    def answer(method: str, rows: Tensor, strength: float = STRENGTH) -> Tensor:
        probe = fit_probe(method, x[rows], labels[rows], names, seed=seed, strength=strength)
        return torch.from_numpy(probe.predict(queries.numpy()))

    whole = torch.arange(len(x))
    few = [torch.from_numpy(few_shot_indices(fitted_on.labels, SHOTS, draw, names)) for draw in range(DRAWS)]
    return {
        "linear_probe": [answer("linear_probe", whole, 0.0 if how.chosen_strength else STRENGTH)],
        "ncm": [answer("ncm", whole)],
        "5-shot": [answer("linear_probe", rows) for rows in few],
    }


def load_backbone(model: Any, target: nn.Module) -> None:
    """Copy all weights of a model but those of its classifier, and of heads that only training had, into another.

    Raises:
        RuntimeError: If one that the other needs is missing.
    """
    own = target.state_dict()
    classifiers = timm_classifier_names(target)
    backbone, _ = split_head(model.state_dict(), classifiers)
    found = {name: value for name, value in backbone.items() if name in own}
    missing, _ = target.load_state_dict(found, strict=False)
    if left := [name for name in missing if not name.startswith(tuple(f"{c}." for c in classifiers))]:
        raise RuntimeError(f"The backbone lacks {', '.join(left[:3])}.")


def _tuned(model: Any, recipe: Recipe, rate: float, fitted_on: Images, judged: Images, how: Scoring) -> Tensor:
    """Answers of the whole network, tuned at a rate; the last epoch counts."""
    some: Any = limited(fitted_on, how.images, 0)
    batch = min(64, len(some))
    tuning = Recipe(
        output=str(Path(recipe.output) / "tuned"),
        model=recipe.model.removesuffix("_etf"),
        head="learned",
        data=Data(source=some.source, size=96),
        augment=Augment(crop_scale=[0.35, 1.0]),
        optim=Optim(lr=rate, warmup_epochs=1),
        batch_size=batch,
        epochs=how.epochs,
        sizes=[[0, how.size]],
        eval_every=how.epochs,
        save_every=how.epochs,
        precision=recipe.precision,
        seed=recipe.seed,
        tensorboard=False,
    )
    network = make_model(tuning, len(some.label_names))
    load_backbone(model, network)
    shutil.rmtree(tuning.output, ignore_errors=True)
    few = judged.subset(np.arange(min(64, len(judged))))  # the end of an epoch is measured on something
    run = Run(tuning, some, few, network)
    run.fit()
    answers = predictions(run.plain_model(), judged, how.size)
    shutil.rmtree(tuning.output)
    return answers
