"""Weights x data sets x methods x seeds.

`python training/experiments/transfer_table.py --config training/recipes/transfer.yaml`.

Every finished cell is one line of `cells.jsonl` in `results`; a rerun does what is missing and writes table and plots
anew. Features of frozen backbones are kept in `work`. Several processes of this script share the cells, each taking the
next one that no other holds; `--jobs 2` starts two of them, each on its share of the cores.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.metrics import NeuralCollapse, mean_energy_share, participation_ratio
from etf_zoo.trainer.data.subsets import (
    Images,
    check_classes,
    few_shot_indices,
    holdout_indices,
    load_images,
    training_rows,
)
from etf_zoo.trainer.recipe.config import Data, parse
from etf_zoo.trainer.recipe.parsing import parse_entries
from etf_zoo.trainer.run.launching import refuse_processes
from etf_zoo.trainer.run.model import find_model, make_model
from etf_zoo.trainer.run.script import run_script
from etf_zoo.trainer.tune.probes import PROBES, backbone_size, fit_probe
from etf_zoo.trainer.tune.settle import once
from etf_zoo.trainer.tune.tuning import Finetune, features_of, fine_tune, strip_head
from etf_zoo.weights.native import WEIGHTS_NAME
from training.experiments.choices import Choice, Trials, as_said, read_choices
from training.experiments.frozen import frozen_features, hits, stored_inputs, tune_stored
from training.experiments.grid import CELLS, Results, digest, raise_failed, run_grid, settings_digest, weights_digest
from training.experiments.intervals import pack
from training.experiments.transfer_report import Names, write_report

PROTOCOL = 2  # how cells are measured; a change that changes figures is another one
WHAT_IT_IS = ("nc1_pinv", "nc1_quotient", "nc1_cdnv")  # of features, beside what they score
OF_WEIGHTS = ("control", "kind")  # fields of weights that are not of a recipe
OF_METHOD = ("weights", "data", "seeds", "control", "choose", "stage")  # likewise of a method


@dataclass
class Table:
    """What to measure.

    Attributes:
        results: Folder of `cells.jsonl`, the table and the plots.
        work: Folder of cached features, of locks, and of runs while they last.
        weights: Name -> fields of a fine-tuning recipe that say where to start: `model`, `pretrained`; and `control`:
            name of the weights that these are compared with, seed by seed; none by default; and `kind`, which several
            pretraining runs of one recipe share: the table then also has what they are together.
        source: Data set the weights were pretrained on, for NC1 at the source; fields of `data`, empty for none.
        data: Name -> fields of `data`, and `per_class`: so many training images of each class, the same for all seeds.
        methods: Name -> fields of a fine-tuning recipe, `method` being the name itself by default; and `weights`,
            `data`, `seeds`: which of them, all by default; `control`: the method that this one is compared with, on
            the same weights; `choose`: see `training/experiments/choose.py`; `stage`: of a probe, the stage of the
            backbone whose pooled output it is fitted to, such as `layer3`, instead of the last features. A list of
            `shots` stands for a method each, `<name> <n>-shot`, or the name alone for all images (0); a map
            {"shots": fields} also says what differs between them.
        seeds: Seeds. A seed chooses its `share` of the training images and is that of the fine-tuning.
        share: Share of each class's training images that a seed trains on, so that seeds differ in methods without
            chance of their own; 1 for all.
        base: Fields of a fine-tuning recipe that all share.
        jobs: Processes that run cells.
        report_only: Write table and plots from what is there; of several measurements of a cell, the last.
    """

    results: str = "training/results/transfer"
    work: str = "runs/transfer"
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    share: float = 1.0
    base: dict[str, Any] = field(default_factory=dict)
    jobs: int = 1
    report_only: bool = False

    def __post_init__(self):
        self.methods = dict(one for name, entry in self.methods.items() for one in _by_shots(name, entry))
        if not (self.weights and self.data and self.methods and self.seeds) or self.jobs < 1 or not 0 < self.share <= 1:
            raise EtfZooError("A table needs weights, data, methods and seeds; jobs positive, share in (0, 1].")
        for what, entries in (("weights", self.weights), ("methods", self.methods)):
            for name, control in _named(entries, "control").items():
                if control == name or control not in entries:
                    others = ", ".join(other for other in entries if other != name)
                    raise EtfZooError(f"The control {control!r} of {name!r} is not among the other {what}: {others}.")
        for name, entry in self.methods.items():
            for key, known in (("weights", self.weights), ("data", self.data)):
                if unknown := set(entry.get(key, [])) - set(known):
                    raise EtfZooError(f"Method {name!r} names {key} that there are not: {', '.join(sorted(unknown))}.")


def _by_shots(name: str, entry: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A method, or one for each number of images a class that its entry lists."""
    shots = entry.get("shots", 0)
    if isinstance(shots, int):
        return [(name, entry)]
    found = []
    for number in shots:
        own = {"method": name, **entry, "shots": int(number), **(shots[number] if isinstance(shots, dict) else {})}
        suffix = f" {number}-shot" if int(number) else ""
        if control := entry.get("control"):
            own["control"] = f"{control}{suffix}"
        found.append((f"{name}{suffix}", own))
    return found


def names_of(table: Table) -> Names:
    """What the report has to know of the recipe."""
    controls, kinds = (_named(table.weights, key) for key in OF_WEIGHTS)
    return Names(list(table.weights), controls, kinds, _named(table.methods, "control"))


def _named(entries: Mapping[str, dict[str, Any]], key: str) -> dict[str, str]:
    """Name of weights or of a method -> what its entry has under a key, for those that have it."""
    return {name: entry[key] for name, entry in entries.items() if entry.get(key)}


@dataclass(frozen=True)
class Cell:
    """One entry of the table.

    Attributes:
        weights: Name of the weights.
        data: Name of the data set; empty for the collapse at the source.
        method: Name of the method; empty likewise.
        seed: Seed.
        settings: The whole recipe.
        said: What of it is written in the table's recipe; the rest are defaults.
        identity: Digests of the weights and of the images; empty where only a report is wanted.
        per_class: Training images of each class; 0 for all.
        share: Of them that the seed trains on, see `Table`.
        stage: Of a probe, see `Table`; empty for the last features.
    """

    weights: str
    data: str
    method: str
    seed: int
    settings: Finetune
    said: dict[str, Any]
    identity: str
    per_class: int = 0
    share: float = 1.0
    stage: str = ""

    @property
    def recipe_key(self) -> str:
        """Names, and a digest of the settings."""
        stage = [self.stage] if self.stage else []
        said = settings_digest(self.said, PROTOCOL, self.per_class, self.share, *stage)
        return f"{self.weights}|{self.data}|{self.method}|{self.seed}|{said}"

    @property
    def key(self) -> str:
        """Also with the digests of weights and images: with other ones it is another cell."""
        return f"{self.recipe_key}|{self.identity}"


def cells(table: Table, chosen: Trials | None = None) -> list[Cell]:
    """All cells: the collapse at the source, then by seed, method, data set and weights.

    A table that time cuts short then has all its rows before it has all their seeds.

    Args:
        table: The recipe.
        chosen: What was tried on held-out training images, see `training/experiments/choose.py`.
    """
    found, measured = [], []
    here = available(table)
    if table.source:
        for weights, start in here.items():
            said = entries_of(table, start, table.source, {"method": "ncm"})
            settings = settings_of(said)
            found.append(Cell(weights, "", "", settings.seed, settings, said, _identity(table, settings, source=True)))
    for method, entry in table.methods.items():
        own = {"method": method, **{k: v for k, v in entry.items() if k not in OF_METHOD}}
        for data in entry.get("data", table.data):
            fields = {k: v for k, v in table.data[data].items() if k != "per_class"}
            per_class = table.data[data].get("per_class", 0)
            for weights in (name for name in entry.get("weights", table.weights) if name in here):
                said = entries_of(table, here[weights], fields, own)
                settings = settings_of(said)
                if "choose" in entry:
                    choice = Choice.of(method, entry)
                    value = choice.best(weights, data, chosen or {})
                    settings, said = choice.with_value(settings, value), {**said, choice.field: value}
                identity = _identity(table, settings)
                for seed in entry.get("seeds", table.seeds):
                    of_seed = dataclasses.replace(settings, seed=seed)
                    names = (weights, data, method, seed, of_seed, said, identity, per_class, table.share)
                    measured.append(Cell(*names, entry.get("stage", "")))
    return found + sorted(measured, key=lambda cell: cell.seed)


def available(table: Table) -> dict[str, dict[str, Any]]:
    """The weights that are there; the others are told. A report needs none of them."""
    found = {}
    for name, start in table.weights.items():
        try:
            if not table.report_only:
                source = find_model(start.get("model", Finetune.model), start.get("pretrained", True))
                if start.get("pretrained", True) and source.folder and not (source.folder / WEIGHTS_NAME).is_file():
                    raise EtfZooError(f"{source.folder.name} has no weights here.")
            found[name] = start
        except EtfZooError as error:
            print(f"Left out: {name}. {error}", file=sys.stderr, flush=True)
    return found


def entries_of(table: Table, start: dict[str, Any], data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """What a table says of some weights, data and method."""
    fields = {k: v for k, v in start.items() if k not in OF_WEIGHTS}
    return {"holdout": 0, **table.base, **fields, **changes, "data": {**table.base.get("data", {}), **data}}


def settings_of(entries: dict[str, Any]) -> Finetune:
    """The recipe of a cell."""
    settings = parse_entries(Finetune, entries)
    # without a holdout the test images are looked at once, at the end; and no cell goes on from a checkpoint
    looks = settings.eval_every if settings.holdout else once(settings)
    return dataclasses.replace(settings, eval_every=looks, save_every=once(settings))


def _identity(table: Table, settings: Finetune, source: bool = False) -> str:
    if table.report_only:
        return ""
    splits = (settings.data.val_split,) if source else (settings.data.train_split, settings.data.val_split)
    images = digest(*(_load(settings.data, split).digest for split in splits))
    return f"{weights_digest(settings.model, settings.pretrained)}|{images}"


_LOADED: dict[str, Images] = {}


def _load(data: Data, split: str) -> Images:
    """A split that is opened once in a process: all cells of a data set share it."""
    key = repr((data, split))
    if key not in _LOADED:
        _LOADED[key] = load_images(data, split)
    return _LOADED[key]


def run_cell(work: str, cell: Cell) -> dict[str, Any]:
    """Measure a cell."""
    settings = cell.settings
    names = {"weights": cell.weights, "data": cell.data, "method": cell.method, "seed": cell.seed}
    test = _load(settings.data, settings.data.val_split)
    if not cell.method:
        return {**names, **_nature(frozen_features(settings, test, Path(work)), test)}
    train = _load(settings.data, settings.data.train_split)
    check_classes(train, test)
    if cell.per_class:
        train = train.subset(few_shot_indices(train.labels, cell.per_class, 0, train.label_names))
    rows = np.arange(len(train)) if cell.share == 1 else holdout_indices(train.labels, 1 - cell.share, cell.seed)[0]
    if settings.method in PROBES:
        found = _probed(cell, train, rows, test, Path(work))
    elif settings.cache_views:
        found = _tuned_stored(cell, train, rows, test, Path(work))
    else:
        found = _tuned(cell, train.subset(rows), test, Path(work))
    correct = found.pop("correct")
    top1 = {"top1": 100 * float(correct.mean()), "correct": pack(correct), "test_images": len(correct)}
    return {**names, **top1, **found}


def _chosen(cell: Cell, train: Images, rows: np.ndarray) -> np.ndarray:
    """Of some rows of the training images those that a cell is fitted to."""
    found, _ = training_rows(
        train.labels[rows],
        train.label_names,
        shots=cell.settings.shots,
        long_tail=cell.settings.data.long_tail,
        limit=cell.settings.data.limit,
        seed=cell.seed,
    )
    return rows[found]


def _probed(cell: Cell, train: Images, rows: np.ndarray, test: Images, work: Path) -> dict[str, Any]:
    """Figures of a probe on some rows of the training images."""
    settings = cell.settings
    chosen = _chosen(cell, train, rows)
    features = frozen_features(settings, train, work, cell.stage)[torch.from_numpy(chosen)]
    fitted = train.subset(chosen)
    labels = torch.from_numpy(fitted.labels)
    probe = fit_probe(settings.method, features, labels, fitted.label_names, seed=cell.seed, strength=settings.strength)
    predicted = probe.predict(frozen_features(settings, test, work, cell.stage).numpy())
    found = {"correct": predicted == test.labels, "tuned": probe.tuned, "chosen": probe.chosen, **probe.details}
    found["total"] = _backbone_size(settings) + probe.tuned
    return {**found, "images": len(fitted), **_nature(features, fitted)}


def _tuned_stored(cell: Cell, train: Images, rows: np.ndarray, test: Images, work: Path) -> dict[str, Any]:
    """Figures of a training on what the frozen layers gave, once for all cells, for some rows of the images."""
    settings = dataclasses.replace(cell.settings, output=str(work / "runs" / digest(cell.key)))
    shutil.rmtree(settings.output, ignore_errors=True)  # of a cell that was killed
    chosen = _chosen(cell, train, rows)
    fitted = stored_inputs(settings, train, work, settings.cache_views).subset(chosen)
    features = frozen_features(settings, train, work)[torch.from_numpy(chosen)]
    correct, tuned, total = tune_stored(settings, fitted, stored_inputs(settings, test, work), features)
    shutil.rmtree(settings.output, ignore_errors=True)
    return {"correct": correct, "tuned": tuned, "total": total, "images": len(fitted)}


def _tuned(cell: Cell, train: Images, test: Images, work: Path) -> dict[str, Any]:
    output = work / "runs" / digest(cell.key)
    shutil.rmtree(output, ignore_errors=True)  # of a cell that was killed
    tuned = fine_tune(as_said(dataclasses.replace(cell.settings, output=str(output))), train, test)
    if tuned is None:
        raise EtfZooError("time_budget has no place in a table: a cell is run to its end.")
    correct, fitted = hits(tuned.model, cell.settings, tuned.test), tuned.train
    features = features_of(cell.settings, tuned.model, fitted)
    shutil.rmtree(output, ignore_errors=True)
    found = {"correct": correct, "tuned": tuned.tuned, "total": tuned.total, "images": len(fitted)}
    return {**found, **_nature(features, fitted)}


def _backbone_size(settings: Finetune) -> int:
    with torch.device("meta"):
        return backbone_size(make_model(dataclasses.replace(strip_head(settings), pretrained=False), 2))


def _nature(features: torch.Tensor, split: Images) -> dict[str, float]:
    """What features are, beside what they score: see `NOTE` of the report."""
    collapse = NeuralCollapse(len(split.label_names), features.shape[1])
    collapse.update(features, torch.from_numpy(split.labels))
    found = {name: value for name, value in collapse.compute().items() if name in WHAT_IT_IS}
    shares = {"mean_energy_share": mean_energy_share(features), "participation_ratio": participation_ratio(features)}
    return {**found, **shares}


def newest(wanted: list[Cell], done: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each cell the last measurement, by its names and settings alone, for a report without weights and images.

    Measurements of weights or images other than the last ones of the same name are left out: no table mixes them.
    """
    last: dict[str, dict[str, Any]] = {}
    identity: dict[tuple[str, str], str] = {}
    for key, record in done.items():
        recipe_key, weights, images = key.rsplit("|", 2)
        last[recipe_key] = {**record, "identity": (weights, images)}
        identity["weights", record["weights"]], identity["images", record["data"]] = weights, images
    found = [last[cell.recipe_key] for cell in wanted if cell.recipe_key in last]
    return [r for r in found if r["identity"] == (identity["weights", r["weights"]], identity["images", r["data"]])]


def main() -> None:
    refuse_processes()
    table = parse(Table)
    folder, locks = Path(table.results), Path(table.work) / "locks"
    results = Results(folder / CELLS, locks)
    wanted, failed = cells(table, read_choices(folder)), []
    if not table.report_only:
        done = results.read()
        print(f"{len(wanted)} cells, {sum(cell.key in done for cell in wanted)} done.", flush=True)
        failed = run_grid(wanted, partial(run_cell, table.work), results, locks, table.jobs)
    done = results.read()
    records = newest(wanted, done) if table.report_only else [done[c.key] for c in wanted if c.key in done]
    write_report(records, folder, names_of(table), left=len(wanted) - len(records))
    print(f"Table: {folder / 'table.md'}")
    raise_failed(failed)


__all__ = ["Cell", "Table", "available", "cells", "entries_of", "main", "names_of", "newest", "run_cell", "settings_of"]

if __name__ == "__main__":
    run_script(main)
