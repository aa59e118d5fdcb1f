"""A fine-tuning: its recipe, gradient methods with early stopping, probes on frozen features, one test at the end."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from etf_zoo import attach_frame
from etf_zoo.errors import EtfZooError

from ..data.augment import colors_of
from ..data.batches import Split, frame_tree
from ..data.duplicates import joined
from ..data.near_duplicates import near_duplicates
from ..data.subsets import Images, split_training
from ..recipe.config import HEADS, Recipe, final_size
from ..recipe.fields import MAX_COUNT, Range
from ..run import checkpoint
from ..run.checkpoint import CHECKPOINTS
from ..run.export import Origin, export_model, export_run
from ..run.launching import make_accelerator
from ..run.measure import measure_split
from ..run.model import find_model, fit_scales, make_model
from ..run.run import Run
from ..run.summary import summarize
from ..run.watch import BestEpoch
from .later import store_familiarity, store_memory
from .methods import METHODS, first_tuned, fresh_neck, prepare, tuned_share, warm_head, warm_learned_head
from .parts import load_data
from .probes import PROBES, Probe, backbone_features, backbone_size, copy_linear, fit_probe, linear_classifier
from .rates import search_rate
from .settle import completed, settle, strip_head
from .trunk import frozen_once

__all__ = ["Finetune", "Tuned", "strip_head", "features_of", "fine_tune", "load_data", "start_head"]

WARM_HEADS = ("warm", "warm_learned")  # which know the classes before any training


@dataclass
class Finetune(Recipe):
    """A fine-tuning run; every field of a pretraining recipe, and:

    Attributes:
        model: timm or `_etf` name, `hf-hub:` id, model folder or the folder of a finished run.
        head: The new head, as in pretraining, or one that knows the classes before any training: `warm` (the simplex
            ETF nearest to the class means of the frozen features) or `warm_learned` (their linear probe, 2202.10054).
            `auto` is `learned`, and for `_etf` models `frame`, or with fewer than 100 images of most classes `warm`,
            where there is no reason against it, see `head_for`.
        method: `full`, `head` (frozen backbone), `layer` (one block and the head), `scl` (the same, with a skip
            connection to the last feature, 2212.12206), or on frozen features, with a head of their own,
            `linear_probe`, `knn`, `knn_20`, `ncm`, `ncm_euclid`, see `fit_probe`; what `head` and `model_args` say of a
            head is then left out.
        layer: Block that `layer` and `scl` tune; by default the last with at most a tenth of the parameters.
        holdout: Share of each class's training images that is held out, to draw the curve and to choose by. Images that
            look the same, to the eye or, with pretrained weights, by their features, stay together. Data with splits
            for training, validation and test have the validation images for it, and nothing is held out. With 0 and no
            such split the curve is over the test images, and nothing is chosen by it. Probes hold nothing out. `auto`
            is 0.1, and 0 where that is less than two images of most classes and nothing has to be chosen: few images
            are all trained on, and the test images are looked at once, after the last epoch.
        epochs: Passes over the training images; 0 for 20, or as many as give 100 steps.
        batch_size: As in pretraining; 0 for 64, or less where the images are too few for 100 steps of it: 32, 16.
        keep: `best`: the epoch with the best accuracy on the held-out images is the result; `last`: the last one is, as
            it is wherever nothing is held out.
        patience: Stop after so many evaluations without a better accuracy on the held-out images; 0 for never.
        lr: `auto` to search for the learning rate first: short trainings at rates around `optim.lr`, judged on the
            held-out images, with their curve in `rates.png`; a number is the same as `optim.lr`.
        cache_views: With `head`, `layer` and `scl`: compute the frozen layers once, for so many views of each training
            image (as evaluation has it, then augmented), and train on what they give; 0 to run them in every step, on
            images augmented anew.
        freeze_bn: Batch norms of the backbone keep the statistics of their pretraining, while their weights and biases
            train. `auto`: where everything is tuned from pretrained weights on fewer than three images of most classes.
        shots: Train on so many images of each class; 0 for all.
        strength: scikit-learn's C of the linear probe; 0 to choose it by cross-validation.
        sizes: As in pretraining; by default the size that the model was trained at.
        reserve: Room for so many classes to come, see `etf-zoo add-classes`: the frame has a prototype for each. An MLP
            then stands between backbone and frame, unless `model_args.neck` says otherwise, and the class means are
            kept beside the model.
        compare: Also run, with the same budget, order and seed, two references, as far as they differ from the run
            itself: the same model from random weights, and a learned head on the same weights, under cross-entropy.
    """

    heads: ClassVar[tuple[str, ...]] = (*HEADS, *WARM_HEADS, "auto")
    own_rate: ClassVar[float] = 0  # that of the head which is tuned, see `completed`

    output: str = "runs/finetune"
    model: str = "mobilenetv3_small_100_etf"
    head: str = "auto"
    pretrained: bool = True
    method: str = "full"
    layer: str = ""
    holdout: Annotated[float, Range(0, 1, below=True, note="0 for none")] | Literal["auto"] = "auto"
    keep: Literal["best", "last"] = "best"
    patience: Annotated[int, Range(0, note="0 for never")] = 0
    lr: Annotated[float, Range(0, above=True)] | Literal["auto", ""] = ""
    cache_views: Annotated[int, Range(0, note="0 to run the frozen layers in every step")] = 0
    freeze_bn: bool | Literal["auto"] = "auto"
    shots: Annotated[int, Range(0, note="0 for all")] = 0
    strength: Annotated[float, Range(0, note="0 to choose it")] = 0.0
    sizes: list[list[int]] = dataclasses.field(default_factory=list)
    epochs: Annotated[int, Range(0, MAX_COUNT, note="0 for 20, or more for few images")] = 0
    batch_size: Annotated[int, Range(0, MAX_COUNT, note="0 for 64, or less for few images")] = 0
    reserve: Annotated[int, Range(0, note="0 for none")] = 0
    compare: bool = False

    def __post_init__(self):
        source = find_model(self.model, self.pretrained)
        if self.head == "auto" and not source.is_twin:
            self.head = "learned"
        if not self.sizes:
            self.sizes = [[0, source.input_size]]
            self.data = dataclasses.replace(self.data, size=self.data.size or source.input_size)
        super().__post_init__()
        if self.method not in METHODS + PROBES:
            raise EtfZooError(f"method is one of {', '.join(METHODS + PROBES)}, got {self.method!r}.")
        if isinstance(self.lr, int | float):
            self.optim, self.lr = dataclasses.replace(self.optim, lr=self.lr), ""
        if self.reserve:
            if self.head not in ("frame", "random", "auto") or self.method in PROBES:
                raise EtfZooError(
                    f"Room for classes is in a fixed frame: --reserve takes --head frame or random and a method that "
                    f"trains, not {self.head} and {self.method}."
                )
            self.model_args = {"neck": "mlp", **self.model_args, "reserve": self.reserve}
        if self.freeze_bn is True and not self.pretrained:
            raise EtfZooError("Random weights have no batch statistics to keep: leave freeze_bn out, or pretrained.")
        if self.data.streaming:
            raise EtfZooError("Fine-tuning chooses among images, which a stream does not let it: data.streaming false.")
        if self.cache_views:
            self._check_cache()
        for name in ("compare", "lr") if self.method in PROBES else ():
            if getattr(self, name):
                raise EtfZooError(f"{name} is for training, not for {self.method}.")

    def _check_cache(self) -> None:
        if self.method not in METHODS or self.method == "full":
            raise EtfZooError(
                f"cache_views is for what freezes layers and trains (head, layer, scl), not {self.method}."
            )
        if self.augment.mixes or self.augment.views > 1 or self.compile or len(self.sizes) > 1:
            raise EtfZooError(
                "cache_views stores images one by one and at one size, and hooks into the model: set augment.mixup and "
                "augment.cutmix to 0, augment.large_views to 1, augment.small_views to 0, compile to false, and give a "
                "single size."
            )
        if self.loss.stage_weight:
            raise EtfZooError("cache_views leaves out the earlier stage that loss.stage_weight is for: set one to 0.")


@dataclass
class Tuned:
    """A finished fine-tuning.

    Attributes:
        settings: Its recipe.
        model: The result.
        train: The images that it was fitted on.
        test: The test images.
        held: Training images that were held out, if any.
        tuned: Parameters that were fitted.
        total: All parameters.
        run: Of a method that trains.
        start: Accuracy before any training, and on what; only of a warm head.
        probe: Of the methods on frozen features.
        top1: Their accuracy on the test images, in percent.
        no_folder: Why no folder can hold the model; empty where one can.
    """

    settings: Finetune
    model: nn.Module
    train: Images
    test: Images
    tuned: int
    total: int
    run: Run | None = None
    held: Images | None = None
    start: tuple[float, str] | None = None
    probe: Probe | None = None
    top1: float | None = None
    no_folder: str = ""

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return Path(self.settings.output)

    def export(
        self, folder: Path, references: list[dict[str, Any]] | None = None, report: Path | None = None
    ) -> dict[str, float]:
        """Write the Hub-ready folder; figures on the test images, measured from the stored weights.

        Args:
            folder: Where to.
            references: See `export_model`, as is the next.
            report: Folder for what is wrong.
        """
        if self.run:
            results = export_run(self.run, folder, references=references, report=report)["results"]
            if self.run.accelerator.is_main_process:
                store_familiarity(folder, self.held, max(self.settings.batch_size, 16))
                fitted_on = self.train if self.settings.reserve else None
                store_memory(folder, fitted_on, self.held, max(self.settings.batch_size, 16))
            self.run.accelerator.wait_for_everyone()
            return results
        training = summarize(self.settings, self.train, make_accelerator(), images=len(self.train))
        origin = Origin(
            self.settings,
            self.train.source,
            self.train.label_names,
            colors_of(self.model),
            isinstance(self.test, Split),
            max(self.settings.batch_size, 16),
            training,
        )
        return export_model(self.model, folder, origin, references=references, report=report)["results"]

    def figures(self) -> dict[str, float]:
        """Figures on the test images, in float32."""
        if self.run:
            return self.run.evaluate(self.test)
        return measure_split(
            self.model,
            self.test,
            size=final_size(self.settings),
            batch_size=max(self.settings.batch_size, 16),
            colors=colors_of(self.model),
            accelerator=make_accelerator(),
        )


def fine_tune(
    settings: Finetune,
    train: Images,
    test: Images,
    *,
    watched: Images | None = None,
    groups: np.ndarray | None = None,
) -> Tuned | None:
    """Do what a recipe says.

    Args:
        settings: The recipe.
        train: All training images.
        test: Test images; they are not looked at here, unless nothing is held out.
        watched: Images to choose the epoch by; by default a share of the training images, see `Finetune`.
        groups: `(N,)` numbers of training images that stay on one side of that share; by default each is its own.

    Returns:
        The result, or None if the time budget ran out first.

    Raises:
        EtfZooError: If there is something to choose and nothing to choose by.
    """
    is_probe = settings.method in PROBES
    if is_probe and checkpoint.names(Path(settings.output) / CHECKPOINTS):
        raise EtfZooError(f"{settings.output} holds the run of a training: choose another --output.")
    settings = settle(settings, train, watched)
    holdout = 0.0 if is_probe or watched is not None else settings.holdout
    if holdout and settings.pretrained:  # features of random weights tell no series from others
        model = make_model(strip_head(settings), len(train.label_names))
        series = near_duplicates(features_of(settings, model, train))
        groups = series if groups is None else joined(groups, series)
    fitted_on, held = split_training(
        train,
        holdout=holdout,
        shots=settings.shots,
        long_tail=settings.data.long_tail,
        limit=settings.data.limit,
        seed=settings.seed,
        groups=groups,
    )
    held = held if watched is None else watched
    for name in ("patience", "lr"):
        if getattr(settings, name) and held is None:
            raise EtfZooError(f"{name} needs held-out images to choose by: set holdout, such as 0.1.")
    settings = completed(settings, len(fitted_on))
    if settings.lr == "auto":
        say = make_accelerator(settings.precision).print
        found = search_rate(settings, lambda recipe: _train(recipe, fitted_on, held, test), say)
        if found is None:
            return None
        settings = found
    return _probe(settings, fitted_on, test) if is_probe else _train(settings, fitted_on, held, test)


def features_of(settings: Finetune, model: nn.Module, split: Images) -> torch.Tensor:
    """`backbone_features` at the size and on the device of a recipe."""
    device = make_accelerator(settings.precision).device
    return backbone_features(model, split, size=final_size(settings), device=device)


def _train(settings: Finetune, train: Images, held: Images | None, test: Images) -> Tuned | None:
    names = train.label_names
    model = make_model(settings, len(names), frame_tree(settings, names), train.class_counts())
    if settings.head in WARM_HEADS:
        start_head(model, settings, features_of(settings, model, train), torch.from_numpy(train.labels), names)
    frozen_to = first_tuned(model, settings.method, settings.layer) if settings.cache_views else ""
    prepare(model, settings.method, settings.layer, settings.freeze_bn is True)
    tuned, total = tuned_share(model)
    chooses = held is not None and (settings.keep == "best" or settings.patience > 0)
    best = BestEpoch(settings.patience, settings.keep == "best") if chooses else None
    splits = [train, held or test]
    with frozen_once(settings, model, frozen_to, splits) if frozen_to else nullcontext(splits) as (fitted, watched):
        run = Run(settings, fitted, watched, model, best=best)
        start = None
        if settings.head in WARM_HEADS and run.step == 0:
            on, what = (fitted, "training") if held is None else (watched, "held-out")
            start = run.evaluate(on)["top1"], f"{what} images"
            run.accelerator.print(f"Before any training: {start[0]:.2f} % of the {start[1]}.")
        run.accelerator.print(f"Tuning {tuned:,} of {total:,} parameters ({100 * tuned / total:.1f} %).")
        if note := fresh_neck(model, "neck" in settings.model_args):
            run.accelerator.print(note)
        finished = run.fit()
    run.train_split, run.val_split = splits  # from here on it is measured on images
    return Tuned(settings, run.plain_model(), train, test, tuned, total, run, held, start) if finished else None


def start_head(
    model: nn.Module, settings: Finetune, features: torch.Tensor, labels: torch.Tensor, names: list[str]
) -> None:
    """Give a model the head that its recipe starts from, in place; heads that know no images stay as they are.

    Args:
        model: As `make_model` made it.
        settings: The recipe.
        features: Of the frozen backbone, `(N, d)`.
        labels: `(N,)`.
        names: Of the K classes.

    Raises:
        EtfZooError: See `warm_head` and `warm_learned_head`.
    """
    if settings.head == "warm":
        warm_head(model, features, labels, names, settings.model_args)
        fit_scales(model, settings)
    elif settings.head == "warm_learned":
        warm_learned_head(model, features, labels, names, seed=settings.seed, strength=settings.strength)


def _probe(settings: Finetune, train: Images, test: Images) -> Tuned:
    settings, names, labels = strip_head(settings), train.label_names, torch.from_numpy(train.labels)
    model: Any = make_model(settings, len(names))
    layer: Any = linear_classifier(model)
    several = f"{type(model).__name__} has more than one linear layer behind its features"
    if layer is None and settings.method == "linear_probe":
        raise EtfZooError(f"{several}: a linear probe has no place in it. Take --method ncm, knn or head.")
    features, tested = (features_of(settings, model, split) for split in (train, test))
    probe = fit_probe(settings.method, features, labels, names, seed=settings.seed, strength=settings.strength)
    top1 = 100 * float(np.mean(probe.predict(tested.numpy()) == test.labels))
    total = backbone_size(model) + probe.tuned
    head, no_folder = "learned", ""
    if probe.linear is not None and layer is not None:
        copy_linear(probe, layer)
    elif probe.prototypes is not None and layer is not None:
        head = "frame"
        attach_frame(model, len(names), frame=probe.prototypes, logit_scale=probe.logit_scale)
    elif probe.linear is None and probe.prototypes is None:
        no_folder = f"{settings.method} keeps the training features themselves"
    else:
        no_folder = f"{several}, where class means have no place"
    notes = f"{settings.method} on frozen features: {probe.chosen}. {settings.notes}".strip()
    settings = dataclasses.replace(settings, head=head, notes=notes)
    share = f"{probe.tuned:,} of {total:,} parameters ({100 * probe.tuned / total:.1f} %)"
    make_accelerator(settings.precision).print(f"{probe.chosen}; {share}.")
    return Tuned(settings, model, train, test, probe.tuned, total, probe=probe, top1=top1, no_folder=no_folder)
