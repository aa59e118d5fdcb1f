"""How much sooner does a fixed frame get to where a learned head ends? Curves of short runs, each at its own rate.

    python training/experiments/sooner.py --model mobilenetv3_small_100_etf
    python training/experiments/sooner.py --model resnet18_etf --seeds 0 1 2
    python training/experiments/sooner.py --model mobilenetv3_small_100_etf --images 0 --epochs 27 --size 64 --jobs 4
    python training/experiments/sooner.py

Four heads tell what makes a difference: the frame; a learned head; a learned cosine head, which has the frame's norm
and scale but trains its rows; a frame without the norm, whose logits are products with raw features. Each tries the
rates of `--rates`, and the best by its final accuracy is its own. Accuracy is that of 2,500 training images of the
source that no run trains on, after every epoch. A finished run is a line of `cells.jsonl`, and what is there is not run
again. Without a model the table and the curves of the runs that are done are written.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from etf_zoo.errors import EtfZooError
from etf_zoo.trainer.data.batches import load_split
from etf_zoo.trainer.data.sealed import choosing
from etf_zoo.trainer.recipe.config import Recipe
from etf_zoo.trainer.recipe.parsing import merged, parse_entries
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.run.script import run_script
from training.experiments.better_transfer import SOURCE, UNTRAINED
from training.experiments.grid import CELLS, Results, raise_failed, run_grid, settings_digest
from training.experiments.transfer_report import markdown

matplotlib.use("Agg")

RESULTS = Path("training/results/sooner")
HEADS: dict[str, dict[str, Any]] = {
    "learned": {"head": "learned"},
    "frame": {},
    "learned cosine": {"head": "learned_cosine"},
    "frame, no norm": {"model_args": {"feature_norm": "none"}},
}
MUON = {"name": "muon", "weight_decay": 0.05, "clip_grad": 1.0}
# what a recipe has otherwise, and the rates to try
MODELS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "mobilenetv3_small_100_etf": ({"optim": {"weight_decay": 4e-5}}, (0.1, 0.3)),
    "resnet18_etf": ({}, (0.1, 0.3)),
    "convnext_atto_etf": ({"optim": MUON, "model_args": {"ls_init_value": 0.1}}, (0.005, 0.01)),
}
Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One training."""

    name: str
    recipe: Recipe

    @property
    def key(self) -> str:
        recipe = self.recipe
        return f"{recipe.model} {self.name} lr{recipe.optim.lr:g} seed{recipe.seed} {settings_digest(recipe)}"


def recipe_of(args: argparse.Namespace, name: str, rate: float, seed: int) -> Recipe:
    """A head's recipe."""
    common = {
        "model": args.model,
        "epochs": args.epochs,
        "sizes": [[0, args.size]],
        "data": {"limit": args.images},
        "optim": {"lr": rate},
        "seed": seed,
        "save_every": args.epochs,
        "keep_checkpoints": 1,
    }
    own, _ = MODELS[args.model]
    return parse_entries(Recipe, merged(merged(merged(SOURCE, own), common), HEADS[name]))


def measure(work: Path, cell: Cell) -> Record:
    """Train, and keep the curve; no split can be opened but that of training."""
    with choosing():
        return _measure(work, cell)


def _measure(work: Path, cell: Cell) -> Record:
    folder = work / cell.key.replace(" ", "_").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)
    recipe = replace(cell.recipe, output=str(folder))
    source: Any = load_split(recipe.data, "train")
    order = np.random.default_rng(0).permutation(len(source))
    run = Run(recipe, source.subset(np.sort(order[UNTRAINED:])), source.subset(np.sort(order[:UNTRAINED])))
    if not run.fit():
        raise EtfZooError("The time budget ended a run.")
    shutil.rmtree(folder)
    return {
        "model": recipe.model,
        "name": cell.name,
        "seed": recipe.seed,
        "lr": recipe.optim.lr,
        "epochs": recipe.epochs,
        "images": run.train_images,
        "size": recipe.sizes[-1][1],
        "device": run.accelerator.device.type,
        "seconds": round(run.seconds()),
        "curve": [record["val_top1"] for record in run.records],
        "train_loss": [record["train_loss"] for record in run.records],
    }


def epochs_until(curve: Sequence[float], target: float) -> float:
    """Epochs until a curve first reaches an accuracy, straight lines between its points; infinity if it never does.

    Args:
        curve: Accuracy after each epoch.
        target: The accuracy.

    Example:
        >>> epochs_until([10.0, 20.0, 40.0], 30.0)
        2.5
    """
    before = 0.0
    for epoch, value in enumerate(curve):
        if value >= target:
            return epoch + (target - before) / (value - before) if value > before else float(epoch)
        before = value
    return math.inf


def own_rates(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Head -> its runs at the rate that ends best on average, by seed."""
    found = {}
    for name in (n for n in HEADS if any(r["name"] == n for r in records)):
        own = [r for r in records if r["name"] == name]
        rates = {r["lr"] for r in own}
        best = max(rates, key=lambda rate: statistics.mean(r["curve"][-1] for r in own if r["lr"] == rate))
        found[name] = sorted((r for r in own if r["lr"] == best), key=lambda r: r["seed"])
    return found


def groups_of(records: Sequence[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """Runs that belong beside one another: of one model, number of images and epochs, and size."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[k] for k in ("model", "images", "epochs", "size")), []).append(record)
    return found


def table(records: Sequence[Record]) -> str:
    """All groups in Markdown."""
    columns = ["model", "images", "epochs", "pixels", "head", "runs", "rates tried", "rate", "final top-1"]
    columns += ["epochs until the learned head's final accuracy", "share of them"]
    body = []
    for group, own in groups_of(records).items():
        heads = own_rates(own)
        for name, runs in heads.items():
            tried = ", ".join(f"{rate:g}" for rate in sorted({r["lr"] for r in own if r["name"] == name}))
            final = statistics.mean(r["curve"][-1] for r in runs)
            row = [*map(str, group), name, str(len(runs)), tried, f"{runs[0]['lr']:g}", f"{final:.2f}"]
            if name == "learned" or "learned" not in heads:
                body.append([*row, "", ""])
                continue
            target = statistics.mean(r["curve"][-1] for r in heads["learned"])
            needed = statistics.mean(epochs_until(r["curve"], target) for r in runs)
            never = math.isinf(needed)
            body.append([*row, "never" if never else f"{needed:.1f}", "" if never else f"{needed / group[2]:.2f}"])
    return "\n".join(markdown(columns, body)) + "\n"


def draw(records: Sequence[Record], folder: Path) -> None:
    """A picture of curves for each group: the mean over runs at each head's own rate."""
    for (model, images, epochs, size), own in groups_of(records).items():
        figure = Figure(figsize=(5.5, 3.4), layout="constrained")
        axes = figure.subplots()
        heads = own_rates(own)
        for name, runs in heads.items():
            mean = np.mean([r["curve"] for r in runs], axis=0)
            axes.plot(range(1, len(mean) + 1), mean, label=f"{name} ({runs[0]['lr']:g})")
        if "learned" in heads:
            axes.axhline(statistics.mean(r["curve"][-1] for r in heads["learned"]), color="0.7", lw=0.8, zorder=0)
        axes.set(xlabel="epoch", ylabel="top-1 (%)", title=f"{model}, {images:,} images at {size} px")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, title="head (rate)")
        figure.savefig(folder / f"{model}_{images}_{epochs}_{size}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS))
    parser.add_argument("--only", nargs="+", choices=tuple(HEADS), default=list(HEADS))
    parser.add_argument("--rates", type=float, nargs="+", help="by default the model's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=12_500, help="of the source; 0 for all but those held out")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/sooner"))
    args = parser.parse_args()
    results, failed = Results(args.results / CELLS, args.work / "locks"), []
    if args.model:
        rates = args.rates or MODELS[args.model][1]
        cells = [
            Cell(name, recipe_of(args, name, rate, seed)) for seed in args.seeds for rate in rates for name in args.only
        ]
        failed = run_grid(cells, partial(measure, args.work), results, args.work / "locks", args.jobs)
    records = list(results.read().values())
    (args.results / "table.md").write_text(table(records), encoding="utf-8")
    draw(records, args.results)
    raise_failed(failed)


if __name__ == "__main__":
    run_script(main)
