"""Choices, such as that of a learning rate: on held-out training images, by code that cannot reach the test images."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.trainer.data.near_duplicates import grouped_folds, near_duplicates
from etf_zoo.trainer.data.sealed import choosing
from etf_zoo.trainer.data.subsets import Images, load_images, training_rows
from etf_zoo.trainer.recipe.config import Data
from etf_zoo.trainer.run.model import make_model
from etf_zoo.trainer.tune.probes import PROBES
from etf_zoo.trainer.tune.settle import once
from etf_zoo.trainer.tune.tuning import Finetune, features_of, fine_tune, strip_head
from training.experiments.frozen import frozen_features, stored_inputs, tune_stored
from training.experiments.grid import Record, Results, digest, settings_digest

__all__ = ["CHOICES", "Candidate", "Choice", "TrainingImages", "as_said", "choose", "held_out_figures", "read_choices"]

CHOICES = "choices.jsonl"
CLOSED = "none: choices are made on held-out training images"  # in the place of the test split's name
FOLDS = 4  # one of them is held out
Trials = dict[tuple[str, str, str], dict[Any, float]]  # (weights, data, method) -> value -> accuracy


class TrainingImages:
    """The training images of a data set: all that a choice gets to see.

    Args:
        data: Where they are. The copy that choices get does not name the test split, so opening it raises; and while
            something is chosen no other split opens, see `etf_zoo.trainer.data.sealed`.

    Example:
        >>> from etf_zoo.trainer.recipe.config import Data
        >>> images = TrainingImages(Data("digits", val_split="test", size=16))
        >>> len(images.load())
        1347
    """

    def __init__(self, data: Data):
        self.data = dataclasses.replace(data, val_split=CLOSED)

    def load(self, split: str = "") -> Images:
        """The training images.

        Raises:
            ValueError: If another split is asked for.
        """
        if split not in ("", self.data.train_split):
            raise EtfZooError(
                f"A choice asked for the split {split!r}. Choices are made on held-out images of "
                f"{self.data.train_split!r}; the test images are for what was chosen."
            )
        return load_images(self.data, self.data.train_split)


@dataclass(frozen=True)
class Choice:
    """What a method leaves to be chosen.

    Attributes:
        method: Name of the method.
        field: Field of the recipe, such as `optim.lr`.
        values: To choose among, the same for all weights.
    """

    method: str
    field: str
    values: tuple[Any, ...]

    @classmethod
    def of(cls, method: str, entry: Mapping[str, Any]) -> Choice:
        """What the entry of a method says under `choose`: `{field: optim.lr, values: [0.001, 0.002]}`.

        Raises:
            ValueError: If it says something else.
        """
        asked = entry["choose"]
        if not isinstance(asked, dict) or asked.keys() != {"field", "values"} or not isinstance(asked["values"], list):
            raise EtfZooError(f"Method {method!r}: choose is {{field: optim.lr, values: [...]}}, got {asked}.")
        return cls(method, asked["field"], tuple(asked["values"]))

    def with_value(self, settings: Finetune, value: Any) -> Finetune:
        """The recipe with a value in the field.

        Raises:
            ValueError: If there is no such field.
        """
        group, _, name = self.field.rpartition(".")
        owner: Any = getattr(settings, group, None) if group else settings
        if not hasattr(owner, name):
            raise EtfZooError(f"Method {self.method!r}: there is no field {self.field!r} to choose a value of.")
        changed = dataclasses.replace(owner, **{name: value})
        return dataclasses.replace(settings, **{group: changed}) if group else changed

    def best(self, weights: str, data: str, trials: Trials) -> Any:
        """The best value; of equals the first.

        Raises:
            ValueError: If some value was not tried yet.
        """
        tried = trials.get((weights, data, self.method), {})
        missing = [value for value in self.values if value not in tried]
        if missing:
            raise EtfZooError(
                f"Not tried yet: {self.field} {', '.join(map(str, missing))} of {self.method!r} from {weights!r} on "
                f"{data!r}. Run training/experiments/choose.py with the same --config first."
            )
        return max(self.values, key=lambda value: tried[value])


@dataclass(frozen=True)
class Candidate:
    """One value to try, a cell of a grid.

    Attributes:
        weights: Name of the weights.
        data: Name of the data set.
        method: Name of the method.
        value: To try.
        settings: The whole recipe with it.
        identity: Digests of the weights and of the training images.
    """

    weights: str
    data: str
    method: str
    value: Any
    settings: Finetune
    identity: str

    @property
    def key(self) -> str:
        """Names, and a digest of all that the accuracy depends on."""
        return f"{self.weights}|{self.data}|{self.method}|{self.value}|{settings_digest(self.settings, self.identity)}"


def held_out_figures(work: str, candidate: Candidate) -> Record:
    """Accuracy of a candidate on held-out training images."""
    folder = Path(work) / "choices" / digest(candidate.key)
    names = {name: getattr(candidate, name) for name in ("weights", "data", "method", "value")}
    return {**names, **choose(candidate.settings, TrainingImages(candidate.settings.data), folder, Path(work))}


def choose(settings: Finetune, images: TrainingImages, work: Path, frozen: Path | None = None) -> Record:
    """Train on three quarters of the training images, and measure on the others; near-duplicates stay together.

    Args:
        settings: What to try.
        images: The training images; nothing else is opened.
        work: Folder of the run while it lasts.
        frozen: Folder to keep what frozen layers give in; None not to.

    Returns:
        `top1` in percent, `fitted` and `held_out`: numbers of images.

    Raises:
        ValueError: For a probe, which chooses by cross-validation itself; with a time budget.
    """
    if settings.method in PROBES:
        raise EtfZooError(f"{settings.method} chooses by cross-validation itself.")
    settings = dataclasses.replace(settings, data=images.data, output=str(work), holdout=0, eval_every=once(settings))
    settings = as_said(settings)
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    with choosing():
        train = images.load()
        backbone = strip_head(settings)
        if frozen:
            features = frozen_features(backbone, train, frozen)
        else:
            features = features_of(backbone, make_model(backbone, len(train.label_names)), train)
        kept, held = next(grouped_folds(train.labels, near_duplicates(features), FOLDS, settings.seed))
        if frozen and settings.cache_views:
            some = training_rows(train.labels[kept], train.label_names, shots=settings.shots, seed=settings.seed)[0]
            fitted = stored_inputs(settings, train, frozen, settings.cache_views).subset(kept[some])
            judged = stored_inputs(settings, train, frozen).subset(held)
            correct, _, _ = tune_stored(settings, fitted, judged, features[torch.from_numpy(kept[some])])
            top1 = 100 * float(correct.mean())
        else:
            tuned = fine_tune(settings, train.subset(kept), train.subset(held))
            if tuned is None:
                raise EtfZooError("time_budget has no place in a choice: each value is run to its end.")
            top1 = tuned.figures()["top1"]
    shutil.rmtree(work, ignore_errors=True)
    return {"top1": top1, "fitted": len(kept), "held_out": len(held)}


def as_said(settings: Finetune) -> Finetune:
    """A recipe that settles nothing by the number of images: what a cell does is written in its recipe."""
    return dataclasses.replace(settings, freeze_bn=settings.freeze_bn is True)


def read_choices(folder: Path) -> Trials:
    """Accuracy of each value that was tried, by weights, data and method; of several trials the last."""
    found: Trials = {}
    for record in Results(folder / CHOICES, folder).read().values():
        found.setdefault((record["weights"], record["data"], record["method"]), {})[record["value"]] = record["top1"]
    return found
