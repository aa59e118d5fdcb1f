"""From a finished run to a Hub-ready folder: weights, config, recipe, curve, card, figures of the stored file."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors import SafetensorError
from torch import nn

from etf_zoo.errors import EtfZooError, StorageError
from etf_zoo.ood import FAMILIARITY_NAME
from etf_zoo.sharing.card import METRICS_NAME, write_card
from etf_zoo.sharing.folder import save_folder
from etf_zoo.weights.config import read_config
from etf_zoo.weights.native import CONFIG_NAME, MEMORY_NAME

from ..data.augment import Colors
from ..data.batches import Split
from ..data.loader import INTERPOLATION
from ..evaluate import Evaluation, TestData, command_line, evaluate_model, public_name
from ..recipe.config import Recipe, final_size, save_recipe
from .checkpoint import reason
from .launching import make_accelerator
from .log import METRICS, read_records
from .model import find_model
from .run import Run

__all__ = ["Origin", "check_storable", "export_model", "export_run", "plot_curve"]

matplotlib.use("Agg")

CURVE = "curve.png"
# What lies beside a model and says something of it: of an earlier one in the same folder it would be wrong.
BESIDE = (METRICS_NAME, METRICS, CURVE, FAMILIARITY_NAME, MEMORY_NAME)
# Weights follow the terms of the data they were trained on.
LICENSES = {"tiny_imagenet": "cc-by-nc-4.0", "scikit-learn digits": "cc-by-4.0"}


def check_storable(recipe: Recipe) -> None:
    """Raise ValueError, before any training, on a model that no folder can hold: timm could not build it."""
    args = recipe.model_args
    changed = args.get("neck") not in (None, "none") or args.get("whitening") not in (None, False)
    if recipe.head == "learned" and (changed or _starts_whitened(recipe)):
        raise EtfZooError(
            "A learned head behind a neck or a whitening layer is a control that training/experiments/comparison.py "
            "measures; it has no model folder. Use head=learned_cosine, whose prototypes are learned too, or "
            "head=frame, or leave model_args.neck, model_args.whitening and weights with whitening out."
        )


def _starts_whitened(recipe: Recipe) -> bool:
    folder = find_model(recipe.model, recipe.pretrained).folder if recipe.pretrained else None
    return folder is not None and bool(read_config(folder / CONFIG_NAME).get("model_args", {}).get("whitening"))


@dataclass(frozen=True)
class Origin:
    """How a model came about, as far as its folder tells.

    Attributes:
        recipe: That would make it again from the start.
        train_source: Folder or Hub name of the training images.
        label_names: Names of the classes, in order.
        colors: What its pixels are centered and scaled by.
        whole_images: Whether it sees resident images, which are seen whole, rather than `data.crop_pct` of others.
        batch_size: Images per step and process to measure it with.
        training: What `metrics.json` says of it, see `summarize`.
        records: `metrics.jsonl` of its training; None for a classifier that was fitted to frozen features.
    """

    recipe: Recipe
    train_source: str
    label_names: Sequence[str]
    colors: Colors
    whole_images: bool
    batch_size: int
    training: dict[str, Any]
    records: Path | None = None


def by_names(recipe: Recipe) -> Recipe:
    """A recipe that names its data, model and output without the folders of this machine that they lie in."""
    shown = copy.deepcopy(recipe)  # a changed one would look its model up
    shown.output, shown.model = public_name(recipe.output), public_name(recipe.model)
    shown.data.source = public_name(recipe.data.source)
    return shown


def export_run(run: Run, folder: Path, **kwargs: Any) -> dict[str, Any]:
    """`export_model` of a finished run's result. Every process of the run has to call it."""
    origin = Origin(
        run.record(),
        run.train_split.source,
        run.train_split.label_names,
        run.colors,
        isinstance(run.val_split, Split),
        run.eval_batch_size,
        run.summary(),
        run.folder / METRICS,
    )
    return export_model(run.plain_model(), folder, origin, **kwargs)


def export_model(
    model: nn.Module,
    folder: Path,
    origin: Origin,
    *,
    references: list[dict[str, Any]] | None = None,
    name: str = "",
    report: Path | None = None,
) -> dict[str, Any]:
    """Write a model folder and measure it from the file written. Every process has to call it.

    Args:
        model: A timm model in one piece; the main process's is written.
        folder: Where to.
        origin: How the model came about.
        references: Figures to stand beside: `[{"model": name, "results": {...}}]`.
        name: What the stored model will be called in the command that measures it again; the folder by default.
        report: Folder for a list of the images that are wrong (`errors.csv`), accuracy by class and worst confusions
            (`classes.json`), and `pictures`; None for none of them.

    Returns:
        The content of `metrics.json`.

    Raises:
        StorageError: If the folder cannot be written, on a full disk for one; files that were in it stay whole.
    """
    accelerator = make_accelerator()
    with _storage(folder, origin):
        if accelerator.is_main_process:
            _write_model(model, folder, origin)
    accelerator.wait_for_everyone()
    data = TestData(**{**vars(origin.recipe.data), "val_split": origin.recipe.data.report_split})
    evaluation = Evaluation(model=str(folder), data=data, batch_size=origin.batch_size)
    if report:
        evaluation.errors, evaluation.pictures = str(report / "errors.csv"), str(report / "pictures")
    evaluated = evaluate_model(evaluation)
    measured = evaluated.record
    del measured["images_per_second"]  # says more of the machine's other work than of the model
    metrics = {
        **measured,
        "command": command_line(
            dataclasses.replace(evaluation, model=name or str(folder)), measured["dataset"]["split"]
        ),
        "references": references or [],
        "training": {**origin.training, "recipe": dataclasses.asdict(by_names(origin.recipe))},
    }
    with _storage(folder, origin):
        if accelerator.is_main_process:
            (folder / METRICS_NAME).write_text(json.dumps(metrics, indent=1) + "\n")
            if report:
                (report / "classes.json").write_text(json.dumps(evaluated.by_class(), indent=1) + "\n")
            write_card(folder)
    accelerator.wait_for_everyone()
    return metrics


def _write_model(model: Any, folder: Path, origin: Origin) -> None:
    recipe, size, data_name = origin.recipe, final_size(origin.recipe), Path(origin.train_source).name
    # fine-tuned weights stay under the terms of those they started from
    inherited = model.pretrained_cfg.get("license") if recipe.pretrained else None
    is_enlarged = origin.whole_images and size > (recipe.data.size or size)  # from the array of resident images
    cfg = {
        "input_size": (3, size, size),
        "test_input_size": None,
        "pool_size": None,
        "mean": origin.colors.mean,
        "std": origin.colors.std,
        "crop_pct": 1.0 if origin.whole_images else recipe.data.crop_pct,
        "test_crop_pct": None,
        "interpolation": "bilinear" if is_enlarged else INTERPOLATION,
        "tag": recipe.tag or None,
        "license": inherited or LICENSES.get(data_name, "other"),
        "description": f"native: trained with head={recipe.head} on {data_name}",
    }
    save_folder(model, folder, pretrained_cfg=cfg, label_names=origin.label_names)
    for name in BESIDE:
        (folder / name).unlink(missing_ok=True)
    save_recipe(by_names(recipe), folder / "recipe.yaml")
    if origin.records is not None:
        shutil.copy(origin.records, folder / METRICS)
        plot_curve(folder / METRICS, folder / CURVE)


@contextmanager
def _storage(folder: Path, origin: Origin) -> Iterator[None]:
    """What the system refuses, in one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        left = "" if origin.records is None else "The run's checkpoints are intact: "
        raise StorageError(
            f"Could not write the model folder {folder}: {reason(error)}. {left}Make room, or mend the folder's "
            f"permissions, then give the same command{' and --resume' if left else ' again'}."
        ) from error


def plot_curve(metrics_file: Path, picture: Path) -> None:
    """Loss and accuracy over epochs, from `metrics.jsonl`; not every epoch need have been evaluated."""
    records = read_records(metrics_file)

    def draw(axes: Axes, name: str, label: str) -> None:
        points = [(r["epoch"], r[name]) for r in records if name in r]
        axes.plot([epoch for epoch, _ in points], [value for _, value in points], label=label)

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, "train_loss", "training")
    draw(left, "val_loss", "validation")
    left.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    left.legend(frameon=False)
    draw(right, "train_top1", "training (augmented)")
    draw(right, "val_top1", "validation")
    right.set(xlabel="epoch", ylabel="top-1 (%)", title="Accuracy")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
