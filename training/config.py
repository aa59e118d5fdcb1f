"""The typed recipe: what a run does, read from YAML with command-line overrides."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import yaml
from jsonargparse import auto_cli

HEADS = ("frame", "random", "learned")

__all__ = ["Data", "Augment", "Optim", "Loss", "Recipe", "parse", "final_size", "save_recipe", "seconds", "size_at"]


@dataclass
class Data:
    """Where images and labels come from.

    Attributes:
        source: Folder that `datasets.load_dataset` reads, the name of such a folder in $ETF_ZOO_DATA, a Hub name, or
            `digits` (scikit-learn's, no download).
        train_split: Split to train on.
        val_split: Split to report on.
        image_column: Column of images.
        label_column: Column of integer labels.
        size: Side in pixels that images are stored at, resized and centre-cropped once.
        limit: Use only the first so many training images of a fixed shuffle; 0 for all.
        long_tail: Thin the training classes out to an exponential long tail: size of the smallest class over the
            largest, such as 0.01; 0 for none.
    """

    source: str = ""
    train_split: str = "train"
    val_split: str = "validation"
    image_column: str = "image"
    label_column: str = "label"
    size: int = 64
    limit: int = 0
    long_tail: float = 0.0


@dataclass
class Augment:
    """Augmentation of training batches.

    Attributes:
        crop_scale: Smallest and largest share of the area that a random resized crop keeps.
        crop_ratio: Smallest and largest aspect ratio of that crop.
        flip: Whether to mirror half of the images; off where left and right carry meaning.
    """

    crop_scale: list[float] = field(default_factory=lambda: [0.35, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])
    flip: bool = True


@dataclass
class Optim:
    """Optimiser and schedule, by timm's factories.

    Attributes:
        name: Any optimiser of `timm.optim.create_optimizer_v2`.
        lr: Peak learning rate.
        weight_decay: Not applied to norms, biases and what the model exempts.
        momentum: For optimisers that have it.
        betas: For Adam's family; empty for the optimiser's own.
        warmup_epochs: Linear warm-up from zero.
        clip_grad: Largest norm of the gradient; 0 for none.
    """

    name: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    betas: list[float] = field(default_factory=list)
    warmup_epochs: float = 1.0
    clip_grad: float = 0.0


@dataclass
class Loss:
    """What is minimised.

    Attributes:
        name: `cross_entropy`, `dot_regression`, `hierarchy_cosine`, `separating_cone` or `squared`; all but the first
            need a fixed frame. Where a loss has a logit scale of its own it is the head's, unless given.
        args: Arguments of the loss, see `etf_zoo.losses`.
        class_weights: Weigh each class in the cross-entropy by the inverse of its number of training images.
        class_scaling: Dot regression's prototype lengths from the class counts of the training images.
        variance_covariance: Weight of the variance-covariance penalty on the backbone's features; 0 for none.
        penalty_args: Arguments of that penalty.
    """

    name: str = "cross_entropy"
    args: dict[str, Any] = field(default_factory=dict)
    class_weights: bool = False
    class_scaling: bool = False
    variance_covariance: float = 0.0
    penalty_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recipe:
    """A training run.

    Attributes:
        output: Folder of the run.
        model: Any timm name.
        head: `frame` (an `_etf` model as it is; any other gets a frame), `random` (the same with independent random
            directions: a control) or `learned` (a plain trained classifier on the same backbone: the control).
        model_args: Keyword arguments for the model, such as `orientation` or `moving: true`. `frame: hierarchy` takes
            its tree from the data's `hierarchy.json`.
        pretrained: Start from the tag's weights.
        data: The data.
        augment: Augmentation.
        optim: Optimiser and schedule.
        loss: What is minimised.
        epochs: Passes over the training images.
        batch_size: Images per step, over all processes.
        sizes: Training size by epoch: a list of [first epoch, pixels].
        eval_size: Size for evaluation and for the exported model; 0 for the last of `sizes`.
        label_smoothing: Of the cross-entropy.
        precision: `no` (float32), `bf16` or `fp16`.
        channels_last: Memory format; on a CPU about twice as fast for convolutions.
        seed: Of weights, data order and augmentation.
        eval_every: Epochs between evaluations; the last epoch is always evaluated.
        save_every: Epochs between checkpoints.
        time_budget: Such as `9m` or `2h`: save and stop after it. Empty for none.
        resume: Continue from the last checkpoint in `output`.
        tag: Name of the weights behind the architecture's, `<recipe>_<data>`.
        notes: Free text for the card.
    """

    heads: ClassVar[tuple[str, ...]] = HEADS

    output: str = "runs/run"
    model: str = "resnet18_etf"
    head: str = "frame"
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    loss: Loss = field(default_factory=Loss)
    epochs: int = 30
    batch_size: int = 256
    sizes: list[list[int]] = field(default_factory=lambda: [[0, 64]])
    eval_size: int = 0
    label_smoothing: float = 0.1
    precision: str = "no"
    channels_last: bool = True
    seed: int = 0
    eval_every: int = 1
    save_every: int = 1
    time_budget: str = ""
    resume: bool = False
    tag: str = ""
    notes: str = ""

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("epochs and batch_size must be positive.")
        if self.head not in self.heads:
            raise ValueError(f"head is one of {', '.join(self.heads)}, got {self.head!r}.")
        if not self.sizes or any(len(pair) != 2 for pair in self.sizes) or self.sizes[0][0] != 0:
            raise ValueError(f"sizes is a list of [first epoch, pixels] that begins at epoch 0, got {self.sizes}.")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision is no, bf16 or fp16, got {self.precision!r}.")
        seconds(self.time_budget)


def size_at(recipe: Recipe, epoch: int) -> int:
    """Training size in pixels at an epoch."""
    return max((pair for pair in recipe.sizes if pair[0] <= epoch), key=lambda pair: pair[0])[1]


def final_size(recipe: Recipe) -> int:
    """Size the model is evaluated and exported at."""
    return recipe.eval_size or recipe.sizes[-1][1]


T = TypeVar("T")
_FLAGS = ("--resume", "--pretrained", "--compare", "--loss.class_weights")


def parse(kind: type[T], args: list[str] | None = None) -> T:
    """Read a recipe from `--config FILE` and overrides such as `--optim.lr 1e-3`."""
    args = list(sys.argv[1:] if args is None else args)
    args = ["--data.source" if arg == "--data" else arg for arg in args]
    for i in reversed(range(len(args))):  # a flag may stand alone: --resume is --resume true
        if args[i] in _FLAGS and (i + 1 == len(args) or args[i + 1].startswith("--")):
            args.insert(i + 1, "true")
    return cast(T, auto_cli(kind, args=args, as_positional=False))


def save_recipe(recipe: Any, path: Path) -> None:
    """Write the resolved recipe as YAML."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(recipe))), sort_keys=False))


def seconds(text: str) -> float:
    """`90`, `90s`, `9m` or `2h` in seconds; infinity for an empty text.

    Raises:
        ValueError: On anything else.
    """
    if not text:
        return float("inf")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text)
    if not match:
        raise ValueError(f"A time budget is a number with s, m or h, such as 9m; got {text!r}.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
