"""Weights x data sets x methods x seeds.

`python training/experiments/transfer_table.py --config training/recipes/transfer.yaml`.

Every finished cell is one line of `cells.jsonl` in `results`; a rerun does what is missing and writes table and plots
anew. Features of frozen backbones are kept in `work`. Several processes of this script share the cells, each taking the
next one that no other holds; `--jobs 2` starts two of them, each on its share of the cores.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import safetensors.torch
import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.metrics import NeuralCollapse
from etf_zoo.trainer.data.subsets import (
    Images,
    check_classes,
    few_shot_indices,
    holdout_indices,
    load_images,
    training_rows,
)
from etf_zoo.trainer.recipe.config import final_size, parse
from etf_zoo.trainer.recipe.parsing import parse_entries
from etf_zoo.trainer.run.launching import is_deliberate, refuse_processes, run_script, side_by_side
from etf_zoo.trainer.run.locks import acquire
from etf_zoo.trainer.run.model import find_model, make_model
from etf_zoo.trainer.tune.probes import PROBES, backbone_size, fit_probe
from etf_zoo.trainer.tune.tuning import Finetune, bare, features_of, fine_tune
from training.experiments.transfer_report import write_report

CELLS = "cells.jsonl"
NC1 = ("nc1_pinv", "nc1_quotient", "nc1_cdnv")


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
            `data`, `seeds`: which of them, all by default.
        seeds: Seeds. A seed chooses its `share` of the training images and is that of the fine-tuning.
        share: Share of each class's training images that a seed trains on, so that seeds differ in methods without
            chance of their own; 1 for all.
        base: Fields of a fine-tuning recipe that all share.
        jobs: Processes that run cells.
        report_only: Write table and plots from what is there.
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
        if not (self.weights and self.data and self.methods and self.seeds) or self.jobs < 1 or not 0 < self.share <= 1:
            raise EtfZooError("A table needs weights, data, methods and seeds; jobs positive, share in (0, 1].")
        for name, control in _named(self, "control").items():
            if control == name or control not in self.weights:
                others = ", ".join(other for other in self.weights if other != name)
                raise EtfZooError(f"The control {control!r} of {name!r} is not among the other weights: {others}.")
        for name, entry in self.methods.items():
            for key, known in (("weights", self.weights), ("data", self.data)):
                if unknown := set(entry.get(key, [])) - set(known):
                    raise EtfZooError(f"Method {name!r} names {key} that there are not: {', '.join(sorted(unknown))}.")


def _named(table: Table, key: str) -> dict[str, str]:
    """Name of weights -> their `control` or `kind`, for those that have one."""
    return {name: entry[key] for name, entry in table.weights.items() if entry.get(key)}


@dataclass(frozen=True)
class Cell:
    """One entry of the table.

    Attributes:
        weights: Name of the weights.
        data: Name of the data set; empty for the collapse at the source.
        method: Name of the method; empty likewise.
        seed: Seed.
        settings: The whole recipe.
        identity: Of the weights, see `etf_zoo.trainer.run.model.Source`.
        per_class: Training images of each class; 0 for all.
        share: Of them that the seed trains on, see `Table`.
    """

    weights: str
    data: str
    method: str
    seed: int
    settings: Finetune
    identity: str
    per_class: int = 0
    share: float = 1.0

    @property
    def key(self) -> str:
        """Names and a hash of settings and weights: a changed recipe, or one with other weights, is another cell."""
        kept = [dataclasses.asdict(self.settings), self.identity, self.per_class, self.share]
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        return f"{self.weights}|{self.data}|{self.method}|{self.seed}|{digest[:12]}"

    @property
    def file_name(self) -> str:
        """A hash of the key."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:16]


def cells(table: Table) -> list[Cell]:
    """All cells: the collapse at the source, then by seed, method, data set and weights.

    A table that time cuts short then has all its rows before it has all their seeds.
    """
    found, measured = [], []
    if table.source:
        for weights, start in table.weights.items():
            settings = _settings(table, start, table.source, {"method": "ncm"})
            found.append(Cell(weights, "", "", settings.seed, settings, _identity(settings)))
    for method, entry in table.methods.items():
        own = {"method": method, **{k: v for k, v in entry.items() if k not in ("weights", "data", "seeds")}}
        for data in entry.get("data", table.data):
            fields = {k: v for k, v in table.data[data].items() if k != "per_class"}
            per_class = table.data[data].get("per_class", 0)
            for weights in entry.get("weights", table.weights):
                settings = _settings(table, table.weights[weights], fields, own)
                identity = _identity(settings)
                for seed in entry.get("seeds", table.seeds):
                    of_seed = dataclasses.replace(settings, seed=seed)
                    measured.append(Cell(weights, data, method, seed, of_seed, identity, per_class, table.share))
    return found + sorted(measured, key=lambda cell: cell.seed)


def _settings(table: Table, start: dict[str, Any], data: dict[str, Any], changes: dict[str, Any]) -> Finetune:
    fields = {k: v for k, v in start.items() if k not in ("control", "kind")}
    entries = {"holdout": 0, **table.base, **fields, **changes}
    entries["data"] = {**table.base.get("data", {}), **data}
    settings = parse_entries(Finetune, entries)
    # without a holdout the test images are looked at once, at the end; and no cell goes on from a checkpoint
    looks = settings.eval_every if settings.holdout else settings.epochs
    return dataclasses.replace(settings, eval_every=looks, save_every=settings.epochs)


def _identity(settings: Finetune) -> str:
    return find_model(settings.model, settings.pretrained).identity


def run_cell(cell: Cell, work: str) -> dict[str, Any]:
    """Measure a cell."""
    settings = cell.settings
    names = {"key": cell.key, "weights": cell.weights, "data": cell.data, "method": cell.method, "seed": cell.seed}
    test = load_images(settings.data, settings.data.val_split)
    if not cell.method:
        features = _cached(settings, settings.data.val_split, test, Path(work))
        return {**names, **_collapse(features, test)}
    train = load_images(settings.data, settings.data.train_split)
    check_classes(train, test)
    if cell.per_class:
        train = train.subset(few_shot_indices(train.labels, cell.per_class, 0, train.label_names))
    rows = np.arange(len(train)) if cell.share == 1 else holdout_indices(train.labels, 1 - cell.share, cell.seed)[0]
    if settings.method in PROBES:
        chosen, _ = training_rows(
            train.labels[rows],
            train.label_names,
            shots=settings.shots,
            long_tail=settings.data.long_tail,
            limit=settings.data.limit,
            seed=cell.seed,
        )
        rows = rows[chosen]
        features = _cached(settings, settings.data.train_split, train, Path(work))[torch.from_numpy(rows)]
        train = train.subset(rows)
        labels = torch.from_numpy(train.labels)
        probe = fit_probe(
            settings.method, features, labels, train.label_names, seed=cell.seed, strength=settings.strength
        )
        predicted = probe.predict(_cached(settings, settings.data.val_split, test, Path(work)).numpy())
        found = {"top1": 100 * float((predicted == test.labels).mean()), "tuned": probe.tuned, "chosen": probe.chosen}
        found["total"] = _backbone_size(settings) + probe.tuned
        return {**names, **found, "images": len(train), **_collapse(features, train)}
    output = Path(work) / "runs" / cell.file_name
    shutil.rmtree(output, ignore_errors=True)  # of a cell that was killed
    tuned = fine_tune(dataclasses.replace(settings, output=str(output)), train.subset(rows), test)
    if tuned is None:
        raise EtfZooError("time_budget has no place in a table: a cell is run to its end.")
    top1 = tuned.figures()["top1"]
    fitted: Any = tuned.run.train_split
    features = features_of(settings, tuned.run.plain_model(), fitted)
    shutil.rmtree(output, ignore_errors=True)
    found = {"top1": top1, "tuned": tuned.tuned, "total": tuned.total, "images": len(fitted)}
    return {**names, **found, **_collapse(features, fitted)}


def _backbone_size(settings: Finetune) -> int:
    with torch.device("meta"):
        return backbone_size(make_model(dataclasses.replace(bare(settings), pretrained=False), 2))


def _collapse(features: torch.Tensor, split: Images) -> dict[str, float]:
    collapse = NeuralCollapse(len(split.label_names), features.shape[1])
    collapse.update(features, torch.from_numpy(split.labels))
    return {name: value for name, value in collapse.compute().items() if name in NC1}


def _cached(settings: Finetune, name: str, split: Images, work: Path) -> torch.Tensor:
    """Features of a whole split, computed once; two processes do not compute the same."""
    settings, source = bare(settings), find_model(settings.model, settings.pretrained)
    parts = [settings.data, name, final_size(settings), source.name, source.identity]
    parts += [settings.pretrained or settings.seed, settings.model_args, len(split)]
    file = work / "features" / (hashlib.sha256(repr(parts).encode()).hexdigest()[:16] + ".safetensors")
    with acquire(file.with_suffix(".lock"), wait=True):
        if not file.is_file():
            features = features_of(settings, make_model(settings, len(split.label_names)), split)
            safetensors.torch.save_file({"features": features.contiguous()}, file.with_suffix(".new"))
            os.replace(file.with_suffix(".new"), file)
    return safetensors.torch.load_file(file)["features"]


@contextmanager
def _finished(file: Path) -> Iterator[TextIO]:
    """`cells.jsonl` for one process at a time, without a line that a kill cut short."""
    with open(file, "a+") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        opened.seek(0)
        text = opened.read()
        opened.truncate(len(text[: text.rfind("\n") + 1].encode()))
        opened.seek(0)
        yield opened


def read_cells(file: Path) -> dict[str, dict[str, Any]]:
    """Finished cells by key."""
    with _finished(file) as opened:
        return {record["key"]: record for record in map(json.loads, opened)}


def _append(file: Path, record: dict[str, Any]) -> None:
    with _finished(file) as opened:
        opened.write(json.dumps(record) + "\n")
        opened.flush()
        os.fsync(opened.fileno())


def _held(cell: Cell, work: str) -> AbstractContextManager[bool]:
    """Whether no other process has the cell; then this one has it till the end of the block."""
    return acquire(Path(work) / "locks" / f"{cell.file_name}.lock")


def run_missing(wanted: list[Cell], file: Path, work: str) -> None:
    """Run the cells that are not finished and that no other process holds. One that fails is told; the others go on."""
    for cell in wanted:
        with _held(cell, work) as free:
            if not free or cell.key in read_cells(file):
                continue
            print(cell.key, flush=True)
            try:
                _append(file, run_cell(cell, work))
            except Exception as error:
                if not is_deliberate(error):
                    traceback.print_exc()
                print(f"{cell.key} failed: {error}", file=sys.stderr, flush=True)


def _run_jobs(jobs: int, *args: Any) -> None:
    """`run_missing` in several processes."""
    context = side_by_side(jobs)
    workers = [context.Process(target=run_missing, args=args) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main() -> None:
    refuse_processes()
    table = parse(Table)
    wanted, results = cells(table), Path(table.results)
    results.mkdir(parents=True, exist_ok=True)
    file = results / CELLS
    done = read_cells(file)
    print(f"{len(wanted)} cells, {sum(cell.key in done for cell in wanted)} done.", flush=True)
    failed = []
    if not table.report_only:
        if table.jobs == 1:
            run_missing(wanted, file, table.work)
        else:
            _run_jobs(table.jobs, wanted, file, table.work)
        done = read_cells(file)
        for cell in wanted:
            if cell.key not in done:
                with _held(cell, table.work) as free:  # else another process is at it
                    failed += [cell.key] if free and cell.key not in read_cells(file) else []
    records = [done[cell.key] for cell in wanted if cell.key in done]
    left = len(wanted) - len(records)
    controls, kinds = _named(table, "control"), _named(table, "kind")
    write_report(records, results, controls=controls, kinds=kinds, order=list(table.weights), left=left)
    print(f"Table: {results / 'table.md'}")
    if failed:
        raise EtfZooError(f"{len(failed)} cells failed, see above: {', '.join(failed)}.")


__all__ = ["Cell", "Table", "cells", "main", "read_cells", "run_cell", "run_missing"]

if __name__ == "__main__":
    run_script(main)
