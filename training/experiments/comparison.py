"""Heads side by side under one budget.

`accelerate launch training/experiments/comparison.py --config training/recipes/NAME.yaml`.

Each cell (variant, labels, seed) is one training run. Cells are run in the order of the file; several processes of this
script share them, each taking the next one that no other holds, and a rerun goes on where the last one stopped. Every
finished cell is one line of `cells.jsonl` in `results`, from which the table is written. Where `rates` are to be
chosen, each trial is one line of `choices.jsonl`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate.utils import set_seed
from torch import nn

from etf_zoo.errors import DivergedError, EtfZooError
from etf_zoo.metrics.shots import accuracy_by_shots
from etf_zoo.models.head_config import split_head_args
from etf_zoo.models.names import base_name
from etf_zoo.trainer.data.batches import AnySplit, find_source, limited, load_hierarchy, load_split
from etf_zoo.trainer.data.duplicates import group_rows
from etf_zoo.trainer.data.holdout import holdout_indices
from etf_zoo.trainer.data.long_tail import long_tail_indices
from etf_zoo.trainer.data.sealed import choosing
from etf_zoo.trainer.recipe.config import Data, Recipe, final_size, parse
from etf_zoo.trainer.recipe.parsing import merged, parse_entries
from etf_zoo.trainer.run import checkpoint
from etf_zoo.trainer.run.checkpoint import CHECKPOINTS
from etf_zoo.trainer.run.launching import refuse_processes
from etf_zoo.trainer.run.model import find_model, make_model
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.run.script import run_script
from etf_zoo.trainer.tune.probes import backbone_features, fit_probe
from training.experiments.choices import CHOICES
from training.experiments.frozen import predictions
from training.experiments.grid import (
    Record,
    Results,
    fill_table,
    raise_failed,
    run_grid,
    settings_digest,
    weights_digest,
)
from training.experiments.transfer_report import markdown, mean_of_seeds

PROTOCOL = 2  # how cells are measured; a change that changes figures is another one
HELD_OUT = 0.25  # of the training images, to choose rates by


@dataclass
class Comparison:
    """What to compare.

    Attributes:
        results: Folder for the raw figures and the table.
        base: The recipe all share.
        stem: `timm` for the model's own first layers, `3x3` for a stride-2 3x3 convolution in the place of its 7x7 one,
            as small images want it.
        variants: Name -> what it changes in the recipe.
        passes: What to run, in order: `labels` (a label column), `seed`, and `only` (variants; all by default).
        probe_labels: After training on other labels than these, a linear probe of the frozen features for these.
        probe_strength: scikit-learn's C of that probe, on standardized features.
        holdout: Share of the training images to measure on in the place of `val_split`, for choices; 0 for none.
        rates: Learning rates to choose among, each variant and labels for itself, with the first seed: by accuracy on
            a quarter of the training images, those that look the same on one side. Empty for the recipe's.
        random_start: Variants whose learned head starts from timm's random weights in the place of zeros.
        crm: Variants whose figures after conditional risk minimization have a row of their own.
        jobs: Processes that run cells.
        table_only: Write the table from what is there, run nothing.
    """

    results: str = ""
    base: Recipe = field(default_factory=Recipe)
    stem: str = "timm"
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    passes: list[dict[str, Any]] = field(default_factory=list)
    probe_labels: str = ""
    probe_strength: float = 0.01
    holdout: float = 0.0
    rates: list[float] = field(default_factory=list)
    random_start: list[str] = field(default_factory=list)
    crm: list[str] = field(default_factory=list)
    jobs: int = 1
    table_only: bool = False


@dataclass(frozen=True)
class Cell:
    """One training run of the comparison."""

    variant: str
    labels: str
    seed: int
    rate: float = 0.0  # learning rate; 0 for that of the recipe
    settings: str = ""  # digest of the recipe and the images

    @property
    def name(self) -> str:
        """Of its folder: with the settings, as a run under changed ones must not resume from the former's."""
        variant = self.variant.replace(" ", "_").replace("+", "and").replace(",", "")
        return f"{variant}-{self.labels}-{self.seed}-{self.settings}"

    @property
    def key(self) -> str:
        """Names, and a digest of all that the figures depend on."""
        return f"{self.variant}|{self.labels}|{self.seed}|{self.settings}"


def cells(settings: Comparison) -> list[Cell]:
    """All cells, in the order to run them."""
    if settings.base.time_budget:
        raise EtfZooError("time_budget has no place in a comparison, whose cells are run to their end.")
    found = []
    for entry in settings.passes:
        unknown = set(entry.get("only", [])) - settings.variants.keys()
        if unknown:
            raise EtfZooError(f"passes name variants that there are not: {', '.join(sorted(unknown))}.")
        names = [name for name in settings.variants if name in entry.get("only", settings.variants)]
        found += [Cell(name, entry["labels"], entry["seed"]) for name in names]
    return found


def with_digests(settings: Comparison, wanted: list[Cell]) -> list[Cell]:
    """The cells with digests of their recipes and images in their keys."""
    held = settings.holdout
    images = {
        labels: [load_split(data, split).digest for split in (data.train_split, data.val_split)[: 1 if held else 2]]
        for labels in {cell.labels for cell in wanted}
        for data in [dataclasses.replace(settings.base.data, label_column=labels)]
    }
    shared = [PROTOCOL, settings.stem, settings.probe_labels, settings.probe_strength, *([held] if held else [])]
    found = []
    for cell in wanted:
        recipe = recipe_of(settings, cell)
        weights = weights_digest(recipe.model, recipe.pretrained)
        start = ["random start"] if cell.variant in settings.random_start else []
        key = settings_digest(recipe, *shared, *start, weights, *images[cell.labels])
        found.append(dataclasses.replace(cell, settings=key))
    return found


def trials(settings: Comparison, wanted: list[Cell]) -> tuple[list[Cell], Comparison]:
    """Cells that try every rate for every variant and labels, with the first seed; and what they are measured by."""
    first: dict[tuple[str, str], Cell] = {}
    for cell in wanted:
        first.setdefault((cell.variant, cell.labels), cell)
    base = dataclasses.replace(settings.base, output=str(Path(settings.base.output) / "trials"))
    trying = dataclasses.replace(settings, base=base, holdout=HELD_OUT, probe_labels="")
    tried = [dataclasses.replace(cell, rate=rate) for cell in first.values() for rate in settings.rates]
    return with_digests(trying, tried), trying


def at_own_rates(settings: Comparison, wanted: list[Cell], locks: Path) -> list[Cell]:
    """The cells, each with the rate that was best for its variant and labels; what is not tried yet is tried first.

    Raises:
        EtfZooError: If a trial failed, or another process has not ended one.
    """
    tried, trying = trials(settings, wanted)
    results = Results(Path(settings.results) / CHOICES, locks)
    raise_failed(run_grid(tried, partial(try_rate, trying), results, locks, settings.jobs))
    done = results.read()
    if missing := [cell.key for cell in tried if cell.key not in done]:
        raise EtfZooError(f"Another process still tries rates: {', '.join(missing)}. Run this again when it has ended.")
    best: dict[tuple[str, str], float] = {}
    for cell in sorted(tried, key=lambda cell: done[cell.key]["top1"], reverse=True):  # of equals the first
        best.setdefault((cell.variant, cell.labels), cell.rate)
    return [dataclasses.replace(cell, rate=best[cell.variant, cell.labels]) for cell in wanted]


def try_rate(settings: Comparison, cell: Cell) -> dict[str, Any]:
    """Accuracy of a cell on held-out training images; 0 where it diverged."""
    try:
        top1 = run_cell(settings, cell)["results"]["top1"]
    except DivergedError as error:  # which says something of the rate
        print(f"{cell.key}: {error}", file=sys.stderr, flush=True)
        top1 = 0.0
    return {"variant": cell.variant, "labels": cell.labels, "seed": cell.seed, "rate": cell.rate, "top1": top1}


def recipe_of(settings: Comparison, cell: Cell) -> Recipe:
    """The recipe of a cell."""
    entries = merged(dataclasses.asdict(settings.base), settings.variants[cell.variant])
    entries["seed"], entries["data"]["label_column"] = cell.seed, cell.labels
    if cell.rate:
        entries["optim"]["lr"] = cell.rate
    entries["output"] = str(Path(settings.base.output) / cell.name)
    entries["resume"] = checkpoint.exists(Path(entries["output"]) / CHECKPOINTS)
    return parse_entries(Recipe, entries)


def small_stem(model: nn.Module) -> None:
    """Replace a ResNet's 7x7 stride-2 convolution by a 3x3 one, in place."""
    old = getattr(model, "conv1", None)
    if not isinstance(old, nn.Conv2d):
        raise EtfZooError(f"stem 3x3 replaces a convolution called conv1, which {type(model).__name__} has not.")
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")


def timm_start(recipe: Recipe, num_classes: int) -> nn.Module:
    """The model of a learned head as timm starts it: the same backbone, the head's weights random."""
    if recipe.head != "learned" or recipe.pretrained:
        raise EtfZooError("random_start is for a learned head on a backbone from random weights.")
    set_seed(recipe.seed)
    base = base_name(find_model(recipe.model, False).architecture)
    return timm.create_model(base, num_classes=num_classes, **split_head_args(recipe.model_args)[1])


def run_cell(settings: Comparison, cell: Cell) -> dict[str, Any]:
    """Train one cell and measure it; on held-out training images, to choose by, with all others closed."""
    with choosing() if settings.holdout else nullcontext():
        return _run_cell(settings, cell)


def _run_cell(settings: Comparison, cell: Cell) -> dict[str, Any]:
    recipe = recipe_of(settings, cell)
    train: Any = load_split(recipe.data, recipe.data.train_split)
    if settings.holdout:
        train: Any = limited(train, recipe.data.limit, recipe.seed)
        stays, held = holdout_indices(train.labels, settings.holdout, 0, _series(train))
        train, val = train.subset(stays), train.subset(held)
    else:
        val = load_split(recipe.data, recipe.data.val_split)
    rows = np.arange(len(train))
    if recipe.data.long_tail:
        rows = long_tail_indices(train.labels, recipe.data.long_tail, recipe.seed)
        train = train.subset(rows)
    tree = _tree(recipe.data, val)
    model = make_model(recipe, len(train.label_names), tree, train.class_counts())
    if cell.variant in settings.random_start:
        model = timm_start(recipe, len(train.label_names))
    if settings.stem == "3x3":
        # a neck drew random numbers: draw the stem after what all backbones drew, so that all get the same
        make_model(dataclasses.replace(recipe, head="learned", model_args={}), len(train.label_names))
        small_stem(model)
    run = Run(recipe, train, val, model, distances=tree)
    run.fit()
    figures = last_figures(run)
    if recipe.data.long_tail:
        judged: Any = run.val_split
        guesses = predictions(run.plain_model(), judged, final_size(recipe))
        figures |= accuracy_by_shots(guesses, torch.from_numpy(judged.labels), train.class_counts())
    if settings.probe_labels and settings.probe_labels != cell.labels:
        data = dataclasses.replace(recipe.data, label_column=settings.probe_labels)
        figures["probe_top1"] = probe(run, data, rows, settings.probe_strength)
    names = {"variant": cell.variant, "labels": cell.labels, "seed": cell.seed, "protocol": PROTOCOL}
    return {**names, "results": figures, "training": run.summary()}


_SERIES: dict[str, np.ndarray] = {}


def _series(split: Any) -> np.ndarray:
    """`group_rows` of a split, compared once in a process: all trials hold out of the same images."""
    if split.digest not in _SERIES:
        _SERIES[split.digest] = group_rows(split)
    return _SERIES[split.digest]


def last_figures(run: Run) -> dict[str, float]:
    """What the run's evaluation after its last epoch gave."""
    figures = run.records[-1]
    return {name.removeprefix("val_"): value for name, value in figures.items() if name.startswith("val_")}


def _tree(data: Data, split: AnySplit) -> torch.Tensor | None:
    """Distances between the classes; None where the data's tree has not these classes as leaves."""
    if not (Path(find_source(data.source)) / "hierarchy.json").is_file():
        return None
    try:
        return load_hierarchy(data, split.label_names)
    except ValueError:  # coarse classes are inner nodes
        return None


def probe(run: Run, data: Data, rows: np.ndarray, strength: float) -> float:
    """Top-1 (%) of a logistic regression on the frozen features of the images that the run was trained on.

    Args:
        run: The finished run.
        data: Its data, with the label column to fit.
        rows: Of the training split, those left by a long tail.
        strength: scikit-learn's C.
    """
    train = load_split(data, data.train_split)
    val: Any = load_split(data, data.val_split)
    train: Any = limited(train.subset(rows), data.limit, run.recipe.seed)
    x, test = (
        backbone_features(run.plain_model(), split, size=final_size(run.recipe), device=run.accelerator.device)
        for split in (train, val)
    )
    fitted = fit_probe("linear_probe", x, torch.as_tensor(train.labels), train.label_names, strength=strength)
    return 100 * float((fitted.predict(test.numpy()) == val.labels).mean())


def table(settings: Comparison, records: Iterable[Record]) -> str:
    """For each variant means over seeds, and of accuracies each seed's, from the last measurement of each cell.

    Cells of another protocol are left out.
    """
    own = [cell for cell in records if cell["protocol"] == PROTOCOL]
    last = {(cell["variant"], cell["labels"], cell["seed"]): cell for cell in own}
    columns = {
        "top-1": "top1",
        "NC1 (quotient)": "nc1_quotient",
        "NC1 (CDNV)": "nc1_cdnv",
        "severity": "severity",
        "hier. dist@5": "hier_dist@5",
        "HOPS": "hops",
        "HOPS@20": "hops@20",
        "many": "many",
        "medium": "medium",
        "few": "few",
        "probe": "probe_top1",
    }
    lines = []
    for labels in dict.fromkeys(entry["labels"] for entry in settings.passes):
        some = [cell for cell in last.values() if cell["labels"] == labels]
        shown = {k: v for k, v in columns.items() if any(v in cell["results"] for cell in some)}
        body = []
        for name in settings.variants:
            mine = [cell for cell in some if cell["variant"] == name]
            for prefix, words in (("", ""), ("crm_", ", CRM"))[: 1 + (name in settings.crm)] if mine else ():
                results = [_shown(cell["results"], prefix) for cell in mine]
                values = [
                    mean_of_seeds([r[k] for r in results if k in r], each=k.endswith("top1")) for k in shown.values()
                ]
                rates = {cell["training"]["recipe"]["optim"]["lr"] for cell in mine} if settings.rates else ()
                rate = [", ".join(f"{rate:g}" for rate in sorted(rates))] if settings.rates else []
                body.append([f"{name}{words}", str(len(mine)), *rate, *values])
        header = ["variant", "seeds", *(["rate"] if settings.rates else []), *shown]
        lines += [f"Trained on `{labels}`:", "", *markdown(header, body)]
        planned = [cell for cell in cells(settings) if cell.labels == labels]
        have = {(cell["variant"], cell["seed"]) for cell in some}
        left = []
        for seed in dict.fromkeys(cell.seed for cell in planned):
            missing = [cell.variant for cell in planned if cell.seed == seed and (cell.variant, seed) not in have]
            some_done = any(seed == other for _, other in have)
            left += [f"{'; '.join(missing) if some_done else 'all'} (seed {seed})"] if missing else []
        lines += ["", f"Not run: {'; '.join(left)}." if left else "", ""]
    return "\n".join(lines).strip() + "\n"


def _shown(results: dict[str, float], prefix: str) -> dict[str, float]:
    """Figures with a prefix, shares in percent."""
    found = {name.removeprefix(prefix): value for name, value in results.items() if name.startswith(prefix)}
    shares = [name for name in found if name.startswith("hops") or (prefix and name == "top1")]
    return found | {name: 100 * found[name] for name in shares}


def to_measure(settings: Comparison, locks: Path) -> list[Cell]:
    """All cells with their keys, once their rates are chosen."""
    found = cells(settings)
    return with_digests(settings, at_own_rates(settings, found, locks) if settings.rates else found)


def main() -> None:
    refuse_processes()
    settings = parse(Comparison)
    folder, locks = Path(settings.results), Path(settings.base.output) / "locks"
    passes = len(settings.passes)
    # with rates to choose pass by pass: the first are then whole before the rates of the last are tried
    for last in range(1, passes + 1) if settings.rates and not settings.table_only else [passes]:
        now = dataclasses.replace(settings, passes=settings.passes[:last])
        measure, write = partial(run_cell, settings), partial(table, settings)
        listed = partial(to_measure, now, locks)
        fill_table(folder, locks, listed, measure, write, jobs=settings.jobs, table_only=settings.table_only)


if __name__ == "__main__":
    run_script(main)
