"""From a finished run to a Hub-ready folder: weights, config, recipe, curve, card, figures of the stored file."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from etf_zoo.errors import EtfZooError
from etf_zoo.sharing.card import METRICS_NAME, write_card
from etf_zoo.sharing.folder import save_folder

from ..data.batches import Split
from ..evaluate import Evaluation, command_line, evaluate_model
from ..recipe.config import Recipe, final_size, save_recipe
from .run import Run

__all__ = ["check_storable", "export_run", "plot_curve"]

matplotlib.use("Agg")

# Weights follow the terms of the data they were trained on.
LICENSES = {"tiny_imagenet": "cc-by-nc-4.0", "scikit-learn digits": "cc-by-4.0"}


def check_storable(recipe: Recipe) -> None:
    """Raise ValueError, before any training, on a model that no folder can hold: timm could not build it."""
    args = recipe.model_args
    changed = args.get("neck") not in (None, "none") or args.get("whitening") not in (None, False)
    if recipe.head == "learned" and changed:
        raise EtfZooError(
            "A learned head behind a neck or a whitening layer is a control that training/experiments/comparison.py "
            "measures; it has no model folder. Leave model_args.neck and model_args.whitening out, or use head=frame."
        )


def export_run(
    run: Run, folder: Path, *, references: list[dict[str, Any]] | None = None, name: str = ""
) -> dict[str, Any]:
    """Write a run's model folder and measure it from the file written. Every process of a run has to call it.

    Args:
        run: A finished run.
        folder: Where to.
        references: Figures to stand beside: `[{"model": name, "results": {...}}]`.
        name: What the stored model will be called in the command that measures it again; the folder by default.

    Returns:
        The content of `metrics.json`.
    """
    recipe, size = run.recipe, final_size(run.recipe)
    data_name = Path(run.train_split.source).name
    # fine-tuned weights stay under the terms of those they started from
    model: Any = run.plain_model()
    inherited = model.pretrained_cfg.get("license") if recipe.pretrained else None
    cfg = {
        "input_size": (3, size, size),
        "test_input_size": None,
        "pool_size": None,
        "mean": run.colors.mean,
        "std": run.colors.std,
        "crop_pct": 1.0 if isinstance(run.val_split, Split) else recipe.data.crop_pct,
        "test_crop_pct": None,
        "interpolation": "bilinear",
        "tag": recipe.tag or None,
        "license": inherited or LICENSES.get(data_name, "other"),
        "description": f"native: trained with head={recipe.head} on {data_name}",
    }
    if run.accelerator.is_main_process:
        save_folder(model, folder, pretrained_cfg=cfg, label_names=run.train_split.label_names)
        save_recipe(run.record(), folder / "recipe.yaml")
        if run.step:  # a classifier fitted to frozen features has no curve
            shutil.copy(run.folder / "metrics.jsonl", folder / "metrics.jsonl")
            plot_curve(folder / "metrics.jsonl", folder / "curve.png")
    run.accelerator.wait_for_everyone()

    evaluation = Evaluation(model=str(folder), data=recipe.data, batch_size=run.eval_batch_size)
    measured = evaluate_model(evaluation)
    del measured["images_per_second"]  # says more of the machine's other work than of the model
    metrics = {
        **measured,
        "command": command_line(dataclasses.replace(evaluation, model=name or str(folder))),
        "references": references or [],
        "training": run.summary(),
    }
    if run.accelerator.is_main_process:
        (folder / METRICS_NAME).write_text(json.dumps(metrics, indent=1) + "\n")
        write_card(folder)
    run.accelerator.wait_for_everyone()
    return metrics


def plot_curve(metrics_file: Path, picture: Path) -> None:
    """Loss and accuracy over epochs, from `metrics.jsonl`; not every epoch need have been evaluated."""
    records = [json.loads(line) for line in metrics_file.read_text().splitlines()]

    def draw(axes: Axes, name: str, label: str) -> None:
        axes.plot(*zip(*[(r["epoch"], r[name]) for r in records if name in r], strict=True), label=label)

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
