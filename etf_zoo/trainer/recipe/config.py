"""The typed recipe: what a run does, read from YAML with command-line overrides."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml

from etf_zoo.errors import EtfZooError

from .fields import Choice, Count, Fields, Range, Texts
from .images import Augment, Data
from .parsing import parse
from .rules import (
    MAX_SEED,
    MAX_SIZE,
    MODEL_ARGS,
    SIZES,
    TIME,
    Name,
    NoneOr,
    Weight,
)

HEADS = ("frame", "random", "learned", "learned_cosine")
RATE = 2e-3  # the peak learning rate unless told
TEST_SHARE = 0.2  # of each class, where the data have no split to test on
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # our names -> accelerate's

__all__ = [
    "Data",
    "Augment",
    "Optim",
    "Ema",
    "Loss",
    "Recipe",
    "parse",
    "changes",
    "entries",
    "final_size",
    "save_recipe",
    "seconds",
    "size_at",
]


@dataclass
class Optim(Fields):
    """Optimizer and schedule, by timm's factories.

    Attributes:
        name: Any optimizer of `timm.optim.create_optimizer_v2`.
        lr: Peak learning rate; 0 for 0.002, and for 0.0005 where fine-tuning changes everything under a learned head.
        min_lr: Learning rate that the cosine ends at.
        layer_decay: Factor on the learning rate from one block to the one before it; 1 for the same rate everywhere.
        weight_decay: Not applied to norms, biases and what the model exempts.
        momentum: For optimizers that have it.
        betas: For Adam's family; empty for the optimizer's own.
        warmup_epochs: Linear warm-up, of N steps from `lr / (N + 1)`.
        clip_grad: Largest norm of the gradient; 0 for none.
    """

    group: ClassVar[str] = "optim"

    name: str = "adamw"
    lr: Annotated[float, Range(0, 1000, note="0 for the program's own")] = 0.0
    min_lr: Annotated[float, Range(0, 1000)] = 0.0
    layer_decay: Annotated[float, Range(0, 1, above=True, note="1 for none")] = 1.0
    weight_decay: Annotated[float, Range(0, 1000)] = 0.05
    momentum: Annotated[float, Range(0, 1, below=True)] = 0.9
    betas: list[Annotated[float, Range(0, 1, below=True)]] = field(default_factory=list)
    warmup_epochs: Annotated[float, Range(0, 100_000)] = 1.0
    clip_grad: Weight = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.lr and self.min_lr > self.lr:
            raise EtfZooError(f"optim.min_lr is at most optim.lr, got {self.min_lr} and {self.lr}.")


@dataclass
class Ema(Fields):
    """Exponential moving average of the weights, timm's. Where it is on, its weights are evaluated and exported.

    Attributes:
        decay: Share of the average kept at each step, such as 0.9999; 0 for no average.
        warmup: Start with a small decay that grows toward `decay`; else the average remembers the first weights long.
    """

    group: ClassVar[str] = "ema"

    decay: Annotated[float, Range(0, 1, below=True, note="0 for no average")] = 0.0
    warmup: bool = True


@dataclass
class Loss(Fields):
    """What is minimized.

    Attributes:
        name: `cross_entropy`, `dot_regression`, `hierarchy_cosine`, `hierarchical_subspaces`, `prototype_contrast`,
            `separating_cone` or `squared`; all but the first need a frame. A logit scale of a loss's own is the head's,
            unless given.
        args: Arguments of the loss, see `etf_zoo.losses`.
        class_weights: Weigh each class in the cross-entropy by the inverse of its number of training images.
        logit_adjustment: Strength of `etf_zoo.losses.logit_adjustment` in the cross-entropy; 1 is theory's, 0 none.
        class_scaling: Dot regression's prototype lengths from the class counts of the training images.
        variance_covariance: Weight of the variance-covariance penalty on the backbone's features; 0 for none.
        penalty_args: Arguments of that penalty.
        nearest_neighbor_entropy: Weight of `NearestNeighborEntropyLoss` on the backbone's features, 0.05 in its paper;
            0 for none.
        stage_weight: Weight of the cross-entropy of a second head of the same kind, behind an MLP of its own, on the
            pooled output of an earlier stage. It is gone from the finished model; 0 for none.
        stage: Name of the module whose output that is; by default timm's last stage but one.
    """

    group: ClassVar[str] = "loss"

    name: str = "cross_entropy"
    args: dict[str, Any] = field(default_factory=dict)
    class_weights: bool = False
    logit_adjustment: Weight = 0.0
    class_scaling: bool = False
    variance_covariance: Weight = 0.0
    penalty_args: dict[str, Any] = field(default_factory=dict)
    nearest_neighbor_entropy: Weight = 0.0
    stage_weight: Weight = 0.0
    stage: str = ""


@dataclass
class Recipe(Fields):
    """A training run.

    Attributes:
        output: Folder of the run.
        model: Any timm name.
        head: `frame` (an `_etf` model as it is; any other gets a frame), or a control: `random` (the same with
            independent random directions, drawn by the seed), `learned` (a plain trained classifier on the same
            backbone, from zeros), `learned_cosine` (the frame, its norm and scale, but its rows train).
        model_args: Keyword arguments for the model. `frame: hierarchy` and `subspaces` take `hierarchy.json`,
            `imbalanced` and `seli` the class counts (`trainer.run.imbalance`); `spherical_code` optimizes `code`.
        pretrained: Start from the tag's weights.
        data: The data.
        augment: Augmentation.
        optim: Optimizer and schedule.
        ema: Average of the weights.
        loss: What is minimized.
        epochs: Passes over the training images.
        batch_size: Images per optimizer step, over all processes.
        accumulate: Forward and backward passes that a process cuts its share of the batch into, for less memory.
        sizes: Training size by epoch: a list of [first epoch, pixels].
        eval_size: Size for evaluation and for the exported model; 0 for the last of `sizes`.
        label_smoothing: Of the cross-entropy.
        target_cosine: Cosine of a feature with its prototype at which the cross-entropy is to be least: sets the scale
            of the frame's logits, see `target_cosine_scale`. Two numbers: from the first to the last step, evenly.
        precision: `fp32`, `bf16` or `fp16`; the launch file has no say in it.
        compile: Whether to compile the training step's model with `torch.compile`; takes a while at the start.
        channels_last: Memory format; on a CPU about twice as fast for convolutions.
        seed: Of weights, data order and augmentation.
        eval_every: Epochs between evaluations; the last epoch is always evaluated.
        save_every: Epochs between checkpoints.
        save_steps: Also a checkpoint each so many steps; 0 for none.
        save_minutes: Also a checkpoint each so many minutes; 0 for none.
        keep_checkpoints: How many checkpoints are kept.
        log_every: Steps between two looks at the loss: progress bar, TensorBoard, and whether it is finite.
        tensorboard: Whether to write TensorBoard's files, into `tensorboard/` in `output`.
        time_budget: Such as `9m` or `2h`: save and stop after it. Empty for none.
        resume: Continue from the last checkpoint in `output`.
        tag: Name of the weights behind the architecture's, `<recipe>_<data>`.
        notes: Free text for the card.
    """

    heads: ClassVar[tuple[str, ...]] = HEADS
    own_rate: ClassVar[float] = RATE  # where `optim.lr` says none

    output: Name = "runs/run"
    model: Name = "resnet18_etf"
    head: str = "frame"
    model_args: Annotated[dict[str, Any], MODEL_ARGS] = field(default_factory=dict)
    pretrained: bool = False
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    ema: Ema = field(default_factory=Ema)
    loss: Loss = field(default_factory=Loss)
    epochs: Count = 30
    batch_size: Count = 256
    accumulate: Count = 1
    sizes: Annotated[list[list[int]], SIZES] = field(default_factory=lambda: [[0, 64]])
    eval_size: Annotated[int, Range(0, MAX_SIZE, note="0 for the last of sizes")] = 0
    label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.1
    target_cosine: list[Annotated[float, Range(0, 1, above=True)]] = field(default_factory=list)
    precision: Annotated[str, Choice(PRECISIONS, former=("no",))] = "fp32"
    compile: bool = False
    channels_last: bool = True
    seed: Annotated[int, Range(0, MAX_SEED)] = 0
    eval_every: Count = 1
    save_every: Count = 1
    save_steps: NoneOr = 0
    save_minutes: Weight = 0.0
    keep_checkpoints: Count = 2
    log_every: Count = 20
    tensorboard: bool = True
    time_budget: Annotated[str, Texts(f"(?:{TIME})?", "a number with s, m or h, such as 9m, or nothing")] = ""
    resume: bool = False
    tag: Annotated[str, Texts(r"[A-Za-z0-9_-]{0,100}", "letters, digits, _ and -")] = ""
    notes: str = ""

    def __post_init__(self):
        self.precision = "fp32" if self.precision == "no" else self.precision
        super().__post_init__()
        if self.head not in self.heads:
            raise EtfZooError(f"head takes one of {', '.join(self.heads)}, got {self.head!r}.")
        if not self.optim.lr and self.own_rate:
            self.optim = dataclasses.replace(self.optim, lr=self.own_rate)
        from .checks import check_loss, check_optimizer  # these import torch and timm

        check_optimizer(self.optim)
        check_loss(self.loss)
        if self.target_cosine:
            self._check_target_cosine()
        if self.loss.stage_weight and self.compile:
            raise EtfZooError("loss.stage_weight hooks into the model, which compile does not let it: set one of them.")
        if not self.data.size:
            largest = max(self.eval_size, *(pixels for _, pixels in self.sizes))
            self.data = dataclasses.replace(self.data, size=largest)
        if self.data.test_share == "auto":
            self.data = dataclasses.replace(self.data, test_share=TEST_SHARE)

    def _check_target_cosine(self) -> None:
        if len(self.target_cosine) > 2:
            raise EtfZooError(f"target_cosine is one number, or a first and a last one; got {self.target_cosine}.")
        of_args = [name for name in ("logit_scale", "feature_norm") if name in self.model_args]
        if self.head == "learned" or self.loss.name != "cross_entropy" or of_args:
            raise EtfZooError(
                "target_cosine sets the scale of a frame's cosines under cross-entropy: it takes head frame, random or "
                "learned_cosine, loss.name cross_entropy, and neither model_args.logit_scale nor feature_norm."
            )


def size_at(recipe: Recipe, epoch: int) -> int:
    """Training size in pixels at an epoch."""
    return max((pair for pair in recipe.sizes if pair[0] <= epoch), key=lambda pair: pair[0])[1]


def final_size(recipe: Recipe) -> int:
    """Size the model is evaluated and exported at."""
    return recipe.eval_size or recipe.sizes[-1][1]


def save_recipe(recipe: Any, path: Path) -> None:
    """Write the resolved recipe as YAML; a kill leaves the one that was there."""
    new = path.with_suffix(".new")
    new.write_text(yaml.safe_dump(entries(recipe), sort_keys=False))
    os.replace(new, path)


def changes(before: Mapping[str, Any], recipe: Any) -> dict[str, str]:
    """What a recipe has otherwise than an earlier one's `entries`: `{"optim.lr": "optim.lr 0.1 -> 0.2"}`."""
    before, now = _flat(before), _flat(entries(recipe))
    return {k: f"{k} {before[k]} -> {now[k]}" for k in now if k in before and before[k] != now[k]}


def entries(recipe: Any) -> dict[str, Any]:
    """A recipe's fields as YAML and JSON know them."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names; what has free keys, such as `model_args`, is one value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and not name.endswith("args")
        found |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def seconds(text: str) -> float:
    """`90`, `90s`, `9m` or `2h` in seconds; infinity for an empty text.

    Raises:
        ValueError: On anything else.
    """
    if not text:
        return float("inf")
    match = re.fullmatch(TIME, text)
    if not match:
        raise EtfZooError(f"A time budget is a number with s, m or h, such as 9m; got {text!r}.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
