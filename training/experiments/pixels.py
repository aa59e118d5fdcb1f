"""Segmentation by several losses and heads under one budget.

`python training/experiments/pixels.py --config training/recipes/camvid_losses.yaml`.

Each cell (variant, seed) is one run of `training/segment.py`, measured on the test split from the stored model. A rerun
goes on where the last one stopped. The weight of center collapse is chosen by `trials`: the same runs, measured on the
validation split alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from etf_zoo.errors import EtfZooError
from etf_zoo.trainer.recipe.config import parse
from etf_zoo.trainer.recipe.parsing import merged, parse_entries
from etf_zoo.trainer.run import checkpoint
from etf_zoo.trainer.run.checkpoint import CHECKPOINTS
from etf_zoo.trainer.run.launching import refuse_processes
from etf_zoo.trainer.run.script import run_script
from etf_zoo.trainer.segment.data import load_masks
from etf_zoo.trainer.segment.recipe import Segmentation
from etf_zoo.trainer.segment.run import SegmentationRun, export
from training.experiments.grid import Record, fill_table, settings_digest, weights_digest
from training.experiments.transfer_report import markdown, mean_of_seeds


@dataclass
class Pixels:
    """What to compare.

    Attributes:
        results: Folder for the raw figures and the table.
        base: The recipe all share.
        variants: Name -> what it changes in the recipe.
        trials: Variants that are measured on the validation split only, to choose among.
        seeds: Of the runs.
        once: Variants that are run with the first seed only, as trials are.
        jobs: Processes that run cells.
        table_only: Write the table from what is there, run nothing.
    """

    results: str = ""
    base: Segmentation = field(default_factory=lambda: Segmentation(class_names=["a", "b"]))
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    trials: list[str] = field(default_factory=list)
    once: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    jobs: int = 1
    table_only: bool = False


@dataclass(frozen=True)
class Cell:
    """One training run."""

    variant: str
    seed: int
    settings: str = ""

    @property
    def key(self) -> str:
        """Names, and a digest of all that the figures depend on."""
        return f"{self.variant}|{self.seed}|{self.settings}"


def recipe_of(settings: Pixels, cell: Cell) -> Segmentation:
    """The recipe of a cell."""
    entries = merged(dataclasses.asdict(settings.base), settings.variants[cell.variant])
    words = [cell.variant.replace(" ", "_").replace(",", ""), str(cell.seed), cell.settings]
    folder = Path(settings.base.output) / "-".join(words)  # settings: a run under changed ones must not resume this
    entries |= {"seed": cell.seed, "output": str(folder), "resume": checkpoint.exists(folder / CHECKPOINTS)}
    return parse_entries(Segmentation, entries)


def cells(settings: Pixels) -> list[Cell]:
    """All cells, trials first, with digests of their recipes, weights and images."""
    base = settings.base
    single = {*settings.trials, *settings.once}
    if unknown := single - settings.variants.keys():
        raise EtfZooError(f"trials and once name variants that there are not: {', '.join(sorted(unknown))}.")
    images = [load_masks(base, split).digest for split in (base.data.train_split, base.data.val_split)]
    names = sorted(settings.variants, key=lambda name: name not in settings.trials)
    first = settings.seeds[0]
    wanted = [(name, seed) for seed in settings.seeds for name in names if name not in single or seed == first]
    found = []
    for name, seed in wanted:
        cell = Cell(name, seed)
        recipe = recipe_of(settings, cell)
        key = settings_digest(recipe, weights_digest(recipe.model, recipe.pretrained), *images)
        found.append(dataclasses.replace(cell, settings=key))
    return found


def run_cell(settings: Pixels, cell: Cell) -> Record:
    """Train one cell and measure it."""
    run = SegmentationRun(recipe_of(settings, cell))
    run.fit()
    is_trial = cell.variant in settings.trials
    figures = run.evaluate() if is_trial else export(run)["results"]
    split = run.recipe.data.val_split if is_trial else run.recipe.data.report_split
    return {"variant": cell.variant, "seed": cell.seed, "split": split, "results": figures, "training": run.summary()}


def table(settings: Pixels, records: Iterable[Record]) -> str:
    """Means over seeds for each variant, of mIoU and the rarest each seed's: on the test split; trials on the other."""
    records = list(records)
    text = []
    for title, is_trial in (("On the test images:", False), ("Trials, on the validation images:", True)):
        body = []
        for name in settings.variants:
            mine = [r["results"] for r in records if r["variant"] == name and (name in settings.trials) == is_trial]
            if mine:
                by_class = [f"iou_{label}" for label in settings.base.class_names]
                both = [mean_of_seeds([r[key] for r in mine], each=True) for key in ("miou", "rare_iou")]
                others = [mean_of_seeds([r[key] for r in mine]) for key in ("accuracy", *by_class)]
                body.append([name, str(len(mine)), *both, *others])
        if body:
            heads = ["variant", "runs", "mIoU", "four rarest", "accuracy", *settings.base.class_names]
            text += [title, "", *markdown(heads, body), ""]
    return "\n".join(text).strip() + "\n"


def main() -> None:
    refuse_processes()
    settings = parse(Pixels)
    fill_table(
        Path(settings.results),
        Path(settings.base.output) / "locks",
        partial(cells, settings),
        partial(run_cell, settings),
        partial(table, settings),
        jobs=settings.jobs,
        table_only=settings.table_only,
    )


if __name__ == "__main__":
    run_script(main)
