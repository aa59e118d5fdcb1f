"""The picture of a fine-tuning: accuracy by epoch, cosines between class means, the hardest and easiest images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure

from ..data.augment import Colors
from ..data.batches import eval_batches
from ..data.subsets import Images
from ..recipe.config import final_size
from ..run.run import Run

__all__ = ["plot"]

COLUMNS = 12


@torch.no_grad()
def _predictions(run: Run, test: Images) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class probabilities `(N, K)`, labels `(N,)`, and cosines `(K, K)` between centered class means of features."""
    device = run.accelerator.device
    model: Any = run.plain_model().to(device).eval()  # of a sharded run it is a copy on the CPU
    probabilities, features, labels = [], [], []
    batches = eval_batches(test, size=final_size(run.recipe), batch_size=256, colors=run.colors, device=device)
    for images, own in batches:
        hidden = model.forward_features(images)
        features.append(model.forward_head(hidden, pre_logits=True).flatten(1).cpu())
        probabilities.append(model.forward_head(hidden).softmax(dim=1).cpu())
        labels.append(own.cpu())
    truth, found = torch.cat(labels), torch.cat(features)
    means = torch.stack([found[truth == k].mean(dim=0) for k in truth.unique()])
    means = torch.nn.functional.normalize(means - means.mean(dim=0), dim=1)
    return torch.cat(probabilities).numpy(), truth.numpy(), (means @ means.T).numpy()


def _pixels(test: Images, rows: list[int], size: int) -> np.ndarray:
    """Some images as the model sees them, `(n, size, size, 3)` in 0..1."""
    plain = Colors((0.0,) * 3, (1.0,) * 3)
    batches = eval_batches(test.subset(np.array(rows)), size=size, batch_size=len(rows), colors=plain)
    return torch.cat([images for images, _ in batches]).permute(0, 2, 3, 1).numpy().clip(0, 1)


def plot(runs: dict[str, Run], test: Images, path: Path, *, curve: str = "Test") -> None:
    """Draw the picture; the images are those of the first run.

    Args:
        runs: Finished runs by the name to show.
        test: The test images.
        path: Of the PNG.
        curve: What the accuracy by epoch was measured on.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=[1.15, 1]))
    axes = top.subplots(1, 1 + len(runs), width_ratios=[1.5] + [1] * len(runs))
    shown = None
    for i, (name, run) in enumerate(runs.items()):
        records = [record for record in run.records if "val_top1" in record]
        axes[0].plot([r["epoch"] for r in records], [r["val_top1"] for r in records], marker="o", label=name)
        *found, cosines = _predictions(run, test)
        shown = shown or found
        picture = axes[1 + i].imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
        axes[1 + i].set_title(name.replace(", ", ",\n"), fontsize=11)
        axes[1 + i].set(xticks=[], yticks=[])
    source = Path(test.source).name if Path(test.source).exists() else test.source
    axes[0].set(xlabel="epoch", ylabel="top-1 (%)", title=f"{curve}: {source}", ylim=(0, 101))
    axes[0].legend(frameon=False, loc="lower right")
    axes[0].spines[["top", "right"]].set_visible(False)
    top.colorbar(picture, ax=axes[-1], label="cosine between class means")

    probabilities, labels = cast(list[np.ndarray], shown)
    run, names = next(iter(runs.values())), test.label_names
    certainty = probabilities[np.arange(len(labels)), labels]
    hardest = np.argsort(certainty)[:COLUMNS]
    easiest = [int(np.where(labels == k, certainty, -1).argmax()) for k in np.unique(labels)[:COLUMNS]]
    bottom.suptitle("Hardest test images, and the easiest of each class: prediction, probability; red: wrong")
    cells = bottom.subplots(2, COLUMNS)
    for ax in cells.flat:
        ax.axis("off")
    rows = [*hardest.tolist(), *easiest]
    spots = [*cells[0][: len(hardest)], *cells[1][: len(easiest)]]
    images = test.readable()[rows].tolist()  # without those that could not be read, of which there are no probabilities
    for ax, row, pixels in zip(spots, rows, _pixels(test, images, final_size(run.recipe)), strict=True):
        guess = int(probabilities[row].argmax())
        ax.imshow(pixels)
        ax.set_title(
            f"{names[guess][:12]}  {100 * probabilities[row, guess]:.0f} %",
            color="black" if guess == labels[row] else "crimson",
            fontsize=9 if max(map(len, names)) < 4 else 6,
        )
    figure.savefig(path, dpi=110)
