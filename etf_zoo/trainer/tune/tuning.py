"""A fine-tuning: its recipe, gradient methods with early stopping, probes on frozen features, one test at the end."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors.torch
import torch
from torch import nn

from etf_zoo import attach_frame
from etf_zoo.errors import EtfZooError
from etf_zoo.models.head_config import split_head_args

from ..data.batches import frame_tree
from ..data.subsets import Images, check_classes, load_images, split_training
from ..recipe.config import HEADS, Recipe, final_size
from ..run.export import export_run
from ..run.launching import is_sharded, make_accelerator
from ..run.log import METRICS
from ..run.model import find_model, make_model
from ..run.run import Run
from .methods import METHODS, prepare, tuned_share, warm_head
from .probes import PROBES, Probe, backbone_features, backbone_size, fit_probe, linear_classifier

__all__ = ["Finetune", "Tuned", "Tuning", "bare", "features_of", "fine_tune", "load_data"]

BEST = "best.safetensors"


@dataclass
class Finetune(Recipe):
    """A fine-tuning run; every field of a pretraining recipe, and:

    Attributes:
        model: timm or `_etf` name, `hf-hub:` id, model folder or the folder of a finished run.
        head: The new head: `frame`, `random`, `learned`, or `warm`: the simplex ETF nearest to the class means of the
            frozen features, which knows the classes before any training. By default `frame` for `_etf` models and
            `learned` for others.
        method: `full`, `head` (frozen backbone), `layer` (one block and the head), `scl` (the same, with a skip
            connection to the last feature, 2212.12206), or on frozen features, with a head of their own,
            `linear_probe`, `knn`, `knn_20`, `ncm`, `ncm_euclid`, see `fit_probe`; what `head` and `model_args` say of a
            head is then left out.
        layer: Block that `layer` and `scl` tune; by default the last with at most a tenth of the parameters.
        holdout: Share of each class's training images that is held out, to draw the curve and to stop by. With 0 the
            curve is over the test images, and nothing is chosen by it. Probes hold nothing out.
        patience: Stop after so many epochs without a better accuracy on the held-out images, and keep the best; 0 for
            never.
        shots: Train on so many images of each class; 0 for all.
        strength: scikit-learn's C of the linear probe; 0 to choose it by cross-validation.
        sizes: As in pretraining; by default the size that the model was trained at.
        compare: Also run, with the same budget, order and seed, two references, as far as they differ from the run
            itself: the same model from random weights, and a learned head on the same weights.
    """

    heads: ClassVar[tuple[str, ...]] = (*HEADS, "warm")

    output: str = "runs/finetune"
    model: str = "mobilenetv3_small_100_etf"
    head: str = ""
    pretrained: bool = True
    method: str = "full"
    layer: str = ""
    holdout: float = 0.1
    patience: int = 0
    shots: int = 0
    strength: float = 0.0
    sizes: list[list[int]] = dataclasses.field(default_factory=list)
    epochs: int = 20
    batch_size: int = 64
    compare: bool = False

    def __post_init__(self):
        source = find_model(self.model, self.pretrained)
        self.head = self.head or ("frame" if source.is_twin else "learned")
        if not self.sizes:
            self.sizes = [[0, source.input_size]]
            self.data = dataclasses.replace(self.data, size=max(self.data.size, source.input_size))
        super().__post_init__()
        if self.method not in METHODS + PROBES:
            raise EtfZooError(f"method is one of {', '.join(METHODS + PROBES)}, got {self.method!r}.")
        if self.patience and not self.holdout:
            raise EtfZooError("Early stopping (patience) needs held-out images: set holdout, such as 0.1.")
        if self.data.streaming:
            raise EtfZooError("Fine-tuning chooses among images, which a stream does not let it: data.streaming false.")
        if self.compare and self.method in PROBES:
            raise EtfZooError(f"compare is for training, not for {self.method}.")


@dataclass
class Tuned:
    """A finished fine-tuning.

    Attributes:
        run: Its run, with the model; of a probe, one of no steps.
        test: The test images.
        tuned: Parameters that were fitted.
        total: All parameters.
        start: Accuracy before any training, and on what; only of a warm head.
        probe: Of the methods on frozen features.
        top1: Their accuracy on the test images, in percent.
        no_folder: Why no folder can hold the model; empty where one can.
    """

    run: Run
    test: Images
    tuned: int
    total: int
    start: tuple[float, str] | None = None
    probe: Probe | None = None
    top1: float | None = None
    no_folder: str = ""

    def export(self, folder: Path, references: list[dict[str, Any]] | None = None) -> dict[str, float]:
        """Write the Hub-ready folder; figures on the test images, measured from the stored weights."""
        return export_run(self.run, folder, references=references)["results"]

    def figures(self) -> dict[str, float]:
        """Figures on the test images."""
        return self.run.figures_on(self.test)


class Tuning(Run):
    """A run that watches the accuracy on held-out images, stops when it no longer rises, and goes back to the best."""

    def __init__(self, recipe: Finetune, train: Images, held: Images | None, test: Images, model: nn.Module):
        super().__init__(recipe, train=train, val=held or test, model=model)
        self.patience = recipe.patience
        if self.patience and is_sharded(self.accelerator):
            raise EtfZooError("Early stopping is not available under FSDP: set --patience 0.")
        if not self.patience and self.accelerator.is_main_process:  # the weights of an earlier session that had some
            (self.folder / BEST).unlink(missing_ok=True)
        file = self.folder / METRICS
        lines = file.read_text().splitlines() if recipe.resume and file.is_file() else []
        records = [json.loads(line) for line in lines]
        scores = [(r["val_top1"], -r["val_loss"]) for r in records if "val_top1" in r]
        self.unwatched = len(scores)  # evaluations of sessions that kept no best weights
        if self.patience and recipe.resume and (self.folder / BEST).is_file():
            with safetensors.safe_open(self.folder / BEST, "pt") as best:
                self.unwatched = int(best.metadata()["unwatched"])
        self.scores = scores[self.unwatched :]

    def evaluate(self) -> dict[str, float]:
        """Figures on the held-out images; with early stopping, the best weights so far are kept."""
        figures = super().evaluate()
        score = (figures["top1"], -figures["loss"])
        if self.patience and score > max(self.scores, default=(-1.0, 0.0)) and self.accelerator.is_main_process:
            weights = {
                name: value.detach().cpu().contiguous() for name, value in self.plain_model().state_dict().items()
            }
            kept = {"unwatched": str(self.unwatched)}
            safetensors.torch.save_file(weights, self.folder / (BEST + ".new"), kept)
            (self.folder / (BEST + ".new")).replace(self.folder / BEST)
        self.scores.append(score)
        return figures

    def enough(self) -> bool:
        """Whether the best accuracy is `patience` evaluations old."""
        return bool(self.patience and self.scores) and (
            len(self.scores) - 1 - self.scores.index(max(self.scores)) >= self.patience
        )

    def fit(self) -> bool:
        """Train to the end, or until it is enough; then take the best weights."""
        if not super().fit():
            return False
        if self.patience and self.scores:  # none if the run had ended when it was told to stop early
            self.accelerator.wait_for_everyone()
            self.plain_model().load_state_dict(safetensors.torch.load_file(self.folder / BEST))
            best = self.scores.index(max(self.scores))
            self.accelerator.print(
                f"Best of {len(self.scores)} evaluations: {best + 1}, {self.scores[best][0]:.2f} % held out."
            )
        return True


def load_data(settings: Recipe) -> tuple[Images, Images]:
    """Training and test images, checked against each other."""
    accelerator = make_accelerator(settings.precision)
    with accelerator.local_main_process_first():  # one process decodes, its neighbors find the array
        train = load_images(settings.data, settings.data.train_split)
        test = load_images(settings.data, settings.data.val_split)
    check_classes(train, test)
    return train, test


def fine_tune(settings: Finetune, train: Images, test: Images) -> Tuned | None:
    """Do what a recipe says.

    Args:
        settings: The recipe.
        train: All training images.
        test: Test images; they are not looked at here, unless nothing is held out.

    Returns:
        The result, or None if the time budget ran out first.
    """
    is_probe = settings.method in PROBES
    fitted_on, held = split_training(
        train,
        holdout=0 if is_probe else settings.holdout,
        shots=settings.shots,
        long_tail=settings.data.long_tail,
        limit=settings.data.limit,
        seed=settings.seed,
    )
    settings = dataclasses.replace(settings, batch_size=min(settings.batch_size, len(fitted_on)))
    return _probe(settings, fitted_on, test) if is_probe else _train(settings, fitted_on, held, test)


def bare(settings: Finetune) -> Finetune:
    """The recipe of the same backbone under its own classifier, which frozen features do not depend on."""
    _, args = split_head_args(settings.model_args)
    return dataclasses.replace(settings, head="learned", model_args=args)


def features_of(settings: Finetune, model: nn.Module, split: Images) -> torch.Tensor:
    """`backbone_features` at the size and on the device of a recipe."""
    device = make_accelerator(settings.precision).device
    return backbone_features(model, split, size=final_size(settings), device=device)


def _train(settings: Finetune, train: Images, held: Images | None, test: Images) -> Tuned | None:
    names = train.label_names
    model = make_model(settings, len(names), frame_tree(settings, names))
    if settings.head == "warm":
        features = features_of(settings, model, train)
        warm_head(model, features, torch.from_numpy(train.labels), names, settings.model_args)
    prepare(model, settings.method, settings.layer)
    tuned, total = tuned_share(model)
    run = Tuning(settings, train, held, test, model)
    start = None
    if settings.head == "warm" and run.step == 0:
        on, what = (train, "training") if held is None else (held, "held-out")
        start = run.figures_on(on)["top1"], f"{what} images"
        run.accelerator.print(f"Before any training: {start[0]:.2f} % of the {start[1]}.")
    run.accelerator.print(f"Tuning {tuned:,} of {total:,} parameters ({100 * tuned / total:.1f} %).")
    return Tuned(run, test, tuned, total, start) if run.fit() else None


def _probe(settings: Finetune, train: Images, test: Images) -> Tuned:
    settings, names, labels = bare(settings), train.label_names, torch.from_numpy(train.labels)
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
        with torch.no_grad():
            layer.weight.copy_(probe.linear[0].view_as(layer.weight))
            layer.bias.copy_(probe.linear[1])
    elif probe.linear is None and probe.prototypes is None:
        no_folder = f"{settings.method} keeps the training features themselves"
    elif layer is None:
        no_folder = f"{several}, where class means have no place"
    else:
        head = "frame"
        attach_frame(model, len(names), frame=probe.prototypes, logit_scale=probe.logit_scale)
    notes = f"{settings.method} on frozen features: {probe.chosen}. {settings.notes}".strip()
    settings = dataclasses.replace(settings, head=head, notes=notes)
    run = Run(settings, train=train, val=test, model=model)
    run.accelerator.print(
        f"{probe.chosen}; {probe.tuned:,} of {total:,} parameters ({100 * probe.tuned / total:.1f} %)."
    )
    return Tuned(run, test, probe.tuned, total, probe=probe, top1=top1, no_folder=no_folder)
