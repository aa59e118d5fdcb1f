"""The run of a segmentation: that of a classifier, with masks in the place of labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

from etf_zoo.metrics import sum_over_processes
from etf_zoo.metrics.segmentation import SegmentationScores
from etf_zoo.segmentation import Segmenter, load_segmenter, overlay, palette, save_segmenter, with_legend

from ..run.launching import in_float32
from ..run.run import Run
from .data import MaskSplit, eval_pairs, load_masks, train_pairs
from .objective import PixelObjective, pixel_cross_entropy
from .recipe import Segmentation

__all__ = ["SegmentationRun", "export", "measure_masks", "picture"]

RAREST = 4  # classes with the fewest training pixels, whose mean has a figure of its own


class SegmentationRun(Run):
    """A `Run` of a `Segmenter`: the same checkpoints, resuming, average, log and time budget.

    Args:
        recipe: What to do.
        train: Training images; loaded by the recipe if not given, as the next.
        val: Images to evaluate on after epochs.

    Raises:
        EtfZooError: See `Run` and `load_masks`.
    """

    recipe: Segmentation

    def __init__(self, recipe: Segmentation, train: MaskSplit | None = None, val: MaskSplit | None = None):
        train = train or load_masks(recipe, recipe.data.train_split)
        val = val or load_masks(recipe, recipe.data.val_split)
        super().__init__(recipe, cast(Any, train), cast(Any, val))

    def make_model(self) -> nn.Module:
        """The recipe's backbone, decoder and pixel classifier, on the CPU."""
        recipe = self.recipe
        set_seed(recipe.seed)
        return Segmenter(
            recipe.model,
            len(recipe.class_names),
            decoder=recipe.decoder,
            head=recipe.head,
            head_args=recipe.model_args,
            pretrained=recipe.pretrained,
        )

    def make_objective(self) -> PixelObjective:
        """Cross-entropy of pixels, and center collapse."""
        return PixelObjective(self.recipe, self.trained_model(), self.class_counts())

    def headline(self, figures: dict[str, float]) -> str:
        """Mean intersection over union."""
        return f"mIoU {figures['miou']:.2f} %"

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of an epoch's batches, from a step on."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        split, device = cast(Any, self.train_split), self.accelerator.device
        normalize = cast(Segmenter, self.trained_model()).normalize
        for images, masks in train_pairs(split, self.recipe, epoch, start=first, rank=rank, world=world, device=device):
            yield normalize(images), masks

    def evaluate(self, split: Any = None) -> dict[str, float]:
        """Figures on the validation images or on others, see `measure_masks`; of the averaged weights, if any."""
        model = self.trained_model() if self.stepper.ema is None else self.stepper.ema.module
        return self.measure(cast(Segmenter, model), split or self.val_split)

    def measure(self, model: Segmenter, split: Any) -> dict[str, float]:
        """Figures of a model; `rare_iou` is the mean over the classes with the fewest training pixels."""
        figures = measure_masks(model, split, self.accelerator, batch_size=self.eval_batch_size)
        rarest = np.argsort(self.class_counts(), kind="stable")[:RAREST]
        names = [self.recipe.class_names[k] for k in rarest]
        return figures | {"rare_iou": float(np.mean([figures[f"iou_{name}"] for name in names]))}


@torch.no_grad()
def measure_masks(model: Segmenter, split: MaskSplit, accelerator: Any, *, batch_size: int) -> dict[str, float]:
    """Figures of a model on a split, exact over processes; every process has to call it.

    Args:
        model: On the accelerator's device, without its wrappers.
        split: The images.
        accelerator: The processes.
        batch_size: Images per step and process.

    Returns:
        `loss` (cross-entropy of a pixel), what `SegmentationScores` computes, and `iou_NAME` of each class, in percent;
        NaN for one that neither occurs nor is predicted. `images`.
    """
    was_training = model.training
    model.eval()
    names = split.label_names
    scores = SegmentationScores(len(names), ignore_index=split.ignore_index, device=accelerator.device)
    loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    for images, masks in eval_pairs(split, batch_size, rank=rank, world=world, device=accelerator.device):
        with in_float32(model):
            logits = model(model.normalize(images))
        valid = (masks != split.ignore_index).sum()
        loss += pixel_cross_entropy(logits, masks, None, ignore_index=split.ignore_index) * valid
        scores.update(logits.argmax(1), masks)
    model.train(was_training)
    scores.reduce(accelerator)
    total = sum_over_processes(loss, accelerator).item()
    by_class = {f"iou_{name}": 100 * value for name, value in zip(names, scores.iou().tolist(), strict=True)}
    mean = total / max(int(scores.counts.sum()), 1)
    return {"loss": mean, **scores.compute(), **by_class, "images": len(split)}


@torch.no_grad()
def picture(model: Segmenter, split: MaskSplit, count: int, path: Path) -> None:
    """Images, truth and predictions side by side, a row each, with a legend, as a PNG.

    Args:
        model: In evaluation mode.
        split: The images, of which some at equal distances are shown.
        count: How many.
        path: Of the file.
    """
    rows = np.linspace(0, len(split) - 1, min(count, len(split))).astype(int)
    device = next(model.parameters()).device
    shown = []
    for images, masks in eval_pairs(split.subset(rows), 1, device=device):
        i, k = len(shown), len(split.label_names)
        image, guess = split.images[rows[i]], model(model.normalize(images)).argmax(1)[0].cpu().numpy()
        truth = masks[0].cpu().numpy()
        shown.append(np.concatenate([image, overlay(image, truth, k), overlay(image, guess, k)], axis=1))
    colors = palette(len(split.label_names)).tolist()
    with_legend(Image.fromarray(np.concatenate(shown)), list(zip(split.label_names, colors, strict=True))).save(path)


def export(run: SegmentationRun) -> dict[str, Any]:
    """Write the model folder of a finished run, and measure the model that the folder gives. All processes call it.

    Returns:
        What `metrics.json` holds: figures on the split to report on, and how the model was trained.
    """
    recipe, folder = run.recipe, run.folder / "model"
    model = cast(Segmenter, run.plain_model())
    if run.accelerator.is_main_process:
        save_segmenter(model, folder, label_names=recipe.class_names, image_size=recipe.image_size)
    run.accelerator.wait_for_everyone()
    split = load_masks(recipe, recipe.data.report_split)
    stored = load_segmenter(folder)[0].to(run.accelerator.device)
    figures = run.measure(stored, split)
    metrics = {"dataset": {"name": Path(split.source).name, "split": split.name}, "results": figures}
    metrics |= {"training": run.summary()}
    if run.accelerator.is_main_process:
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        if recipe.pictures:
            picture(stored, split, recipe.pictures, run.folder / "predictions.png")
    return metrics
