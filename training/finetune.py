"""Fine-tune a model: `accelerate launch training/finetune.py --config training/recipes/digits.yaml`."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from a clone

import numpy as np
import torch
from matplotlib.figure import Figure

from training.config import Recipe, final_size, parse
from training.data import eval_batches
from training.engine import Run
from training.export import export_run
from training.launching import run_script


@dataclass
class Finetune(Recipe):
    """A fine-tuning run; every field of a pretraining recipe, and:

    Attributes:
        compare: Also run, with the same budget, order and seed, two references: the same model from random weights, and
            a learned head on the same pretrained weights.
    """

    pretrained: bool = True
    compare: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.data.streaming:
            raise ValueError("Fine-tuning shows single test images, which a stream has not: data.streaming false.")


def plan(settings: Finetune) -> dict[str, Finetune]:
    """What to run, by the name it gets in the table; the first is the one asked for."""
    names = {"frame": "fixed frame", "random": "random frame", "learned": "learned head"}
    own = f"{names[settings.head]}, {'pretrained' if settings.pretrained else 'random weights'}"
    if not settings.compare:
        return {own: settings}
    output = Path(settings.output)
    return {
        own: settings,
        f"{names[settings.head]}, random weights": dataclasses.replace(
            settings, pretrained=False, output=str(output / "random_weights")
        ),
        "learned head, pretrained": dataclasses.replace(settings, head="learned", output=str(output / "learned_head")),
    }


@torch.inference_mode()
def _predictions(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities `(N, K)` and cosines between centred class means of the backbone's features `(K, K)`."""
    model: Any = run.plain_model().eval()
    probabilities, features = [], []
    for images, _ in eval_batches(
        run.val_split, size=final_size(run.recipe), batch_size=256, device=run.accelerator.device
    ):
        hidden = model.forward_features(images)
        features.append(model.forward_head(hidden, pre_logits=True).cpu())
        probabilities.append(model.forward_head(hidden).softmax(dim=1).cpu())
    labels = torch.from_numpy(run.val_split.labels[run.val_split.readable()])
    means = torch.stack([torch.cat(features)[labels == k].mean(dim=0) for k in range(len(run.val_split.label_names))])
    means = torch.nn.functional.normalize(means - means.mean(dim=0), dim=1)
    return torch.cat(probabilities).numpy(), (means @ means.T).numpy()


def plot(runs: dict[str, Run], path: Path) -> None:
    """Accuracy by epoch, cosines between class means, the hardest images and the easiest of each class (first run)."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=[1.15, 1]))
    axes = top.subplots(1, 1 + len(runs), width_ratios=[1.5] + [1] * len(runs))
    shown = None
    for i, (name, run) in enumerate(runs.items()):
        records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        axes[0].plot([r["epoch"] for r in records], [r["val_top1"] for r in records], marker="o", label=name)
        probabilities, cosines = _predictions(run)
        shown = (run, probabilities) if shown is None else shown
        picture = axes[1 + i].imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
        axes[1 + i].set_title(name.replace(", ", ",\n"), fontsize=11)
        axes[1 + i].set(xticks=[], yticks=[])
    axes[0].set(xlabel="epoch", ylabel="top-1 (%)", title=f"Test: {run.val_split.source}", ylim=(0, 101))
    axes[0].legend(frameon=False, loc="lower right")
    axes[0].spines[["top", "right"]].set_visible(False)
    top.colorbar(picture, ax=axes[-1], label="cosine between class means")

    run, probabilities = shown  # type: ignore[misc]
    shown_rows, names = run.val_split.readable(), run.val_split.label_names
    labels = run.val_split.labels[shown_rows]
    certainty = probabilities[np.arange(len(labels)), labels]
    columns = 12
    hardest = np.argsort(certainty)[:columns]
    easiest = [int(np.where(labels == k, certainty, -1).argmax()) for k in range(min(len(names), columns))]
    bottom.suptitle("Hardest test images, and the easiest of each class: prediction, probability; red: wrong")
    cells = bottom.subplots(2, columns)
    for ax in cells.flat:
        ax.axis("off")
    for ax, row in [*zip(cells[0], hardest, strict=False), *zip(cells[1], easiest, strict=False)]:
        guess = int(probabilities[row].argmax())
        ax.imshow(run.val_split.picture(int(shown_rows[row])))
        ax.set_title(
            f"{names[guess]}  {100 * probabilities[row, guess]:.0f} %",
            color="black" if guess == labels[row] else "crimson",
            fontsize=9,
        )
    figure.savefig(path, dpi=110)


def main() -> None:
    settings = parse(Finetune)
    runs: dict[str, Run] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name, recipe in plan(settings).items():
        print(f"{name}:", flush=True)
        runs[name] = Run(recipe)
        if not runs[name].fit():
            return
        figures[name] = runs[name].evaluate()
    first = next(iter(runs.values()))
    references = [{"model": name, "results": values} for name, values in list(figures.items())[1:]]
    export_run(first, first.folder / "model", references=references)
    if not first.accelerator.is_main_process:
        return
    plot(runs, first.folder / "picture.png")
    print(f"\n{'top-1 on ' + first.val_split.source:<40}{'%':>8}")
    for name, values in figures.items():
        print(f"{name:<40}{values['top1']:8.2f}")
    print(f"\nPicture: {first.folder / 'picture.png'}")
    print(f"Model:   {first.folder / 'model'}   (try: etf-zoo predict {first.folder / 'model'} IMAGE)")


if __name__ == "__main__":
    run_script(main)
