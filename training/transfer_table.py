"""Weights x data sets x methods x seeds: `python training/transfer_table.py --config training/recipes/transfer.yaml`.

Every finished cell is one line of `cells.jsonl` in `results`; a rerun does what is missing and writes table and plots
anew. Features of frozen backbones are kept in `work`. `--jobs 2` runs two cells at a time, each on its share of the
cores.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from a clone

import safetensors.torch
import torch
from accelerate import PartialState

from etf_zoo.metrics import NeuralCollapse
from training.config import final_size, parse
from training.launching import make_accelerator, run_script
from training.model import find_model, make_model
from training.parsing import parse_entries
from training.probes import PROBES, backbone_features, fit_probe
from training.subsets import Images, check_classes, few_shot_indices, holdout_indices, load_images
from training.transfer_report import write_report
from training.tuning import Finetune, fine_tune

NC1 = ("nc1_pinv", "nc1_quotient", "nc1_cdnv")


@dataclass
class Table:
    """What to measure.

    Attributes:
        results: Folder of `cells.jsonl`, the table and the plots.
        work: Folder of cached features and of runs while they last.
        weights: Name -> fields of a fine-tuning recipe that say where to start: `model`, `pretrained`.
        control: Name among `weights` that the others are compared with, seed by seed; empty for none.
        source: Data set the weights were pretrained on, for NC1 at the source; fields of `data`, empty for none.
        data: Name -> fields of `data`, and `per_class`: so many training images of each class.
        methods: Name -> fields of a fine-tuning recipe, `method` being the name itself by default; and `weights`,
            `data`, `seeds`: which of them, all by default.
        seeds: Seeds. A seed chooses the training images and is that of the fine-tuning.
        share: Share of each class's training images that a seed trains on, so that seeds differ in methods without
            chance of their own; 1 for all.
        base: Fields of a fine-tuning recipe that all share.
        jobs: Cells at a time.
        report_only: Write table and plots from what is there.
    """

    results: str = "training/results/transfer"
    work: str = "runs/transfer"
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    control: str = ""
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
            raise ValueError("A table needs weights, data, methods and seeds; jobs positive, share in (0, 1].")
        if self.control and self.control not in self.weights:
            raise ValueError(f"The control {self.control!r} is not among the weights {', '.join(self.weights)}.")
        for name, entry in self.methods.items():
            for key, known in (("weights", self.weights), ("data", self.data)):
                if unknown := set(entry.get(key, [])) - set(known):
                    raise ValueError(f"Method {name!r} names {key} that there are not: {', '.join(sorted(unknown))}.")


@dataclass(frozen=True)
class Cell:
    """One entry of the table.

    Attributes:
        weights: Name of the weights.
        data: Name of the data set; empty for the collapse at the source.
        method: Name of the method; empty likewise.
        seed: Seed.
        settings: The whole recipe.
        per_class: Training images of each class; 0 for all.
        share: See `Table`.
    """

    weights: str
    data: str
    method: str
    seed: int
    settings: Finetune
    per_class: int = 0
    share: float = 1.0

    @property
    def key(self) -> str:
        """Names and a hash of the settings: a changed recipe is another cell."""
        kept = dataclasses.asdict(self.settings)
        digest = hashlib.sha256(json.dumps([kept, self.per_class, self.share], sort_keys=True).encode()).hexdigest()
        return f"{self.weights}|{self.data}|{self.method}|{self.seed}|{digest[:12]}"


def cells(table: Table) -> list[Cell]:
    """All cells, the collapse at the source first, then by method, data set, weights and seed."""
    found = []
    if table.source:
        for weights, start in table.weights.items():
            settings = _settings(table, start, table.source, {"method": "ncm"})
            found.append(Cell(weights, "", "", settings.seed, settings))
    for method, entry in table.methods.items():
        own = {"method": method, **{k: v for k, v in entry.items() if k not in ("weights", "data", "seeds")}}
        for data in entry.get("data", table.data):
            fields = {k: v for k, v in table.data[data].items() if k != "per_class"}
            per_class = table.data[data].get("per_class", 0)
            for weights in entry.get("weights", table.weights):
                settings = _settings(table, table.weights[weights], fields, own)
                for seed in entry.get("seeds", table.seeds):
                    of_seed = dataclasses.replace(settings, seed=seed)
                    found.append(Cell(weights, data, method, seed, of_seed, per_class, table.share))
    return found


def _settings(table: Table, start: dict[str, Any], data: dict[str, Any], changes: dict[str, Any]) -> Finetune:
    entries = {"holdout": 0, **table.base, **start, **changes}
    entries["data"] = {**table.base.get("data", {}), **data}
    settings = parse_entries(Finetune, entries)
    if not settings.holdout:  # the test images are looked at once, at the end
        settings = dataclasses.replace(settings, eval_every=settings.epochs)
    return settings


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
    rows = _rows(cell, train)
    if settings.method in PROBES:
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
    output = Path(work) / "runs" / hashlib.sha256(cell.key.encode()).hexdigest()[:16]
    shutil.rmtree(output, ignore_errors=True)  # of a cell that was killed
    train = train.subset(rows)
    tuned = fine_tune(dataclasses.replace(settings, output=str(output)), train, test)
    if tuned is None:
        raise ValueError("time_budget has no place in a table: a cell is run to its end.")
    top1 = tuned.figures()["top1"]
    features = backbone_features(tuned.run.plain_model(), train, size=final_size(settings), device=_device())
    shutil.rmtree(output, ignore_errors=True)
    found = {"top1": top1, "tuned": tuned.tuned, "total": tuned.total, "images": len(train)}
    return {**names, **found, **_collapse(features, train)}


def _rows(cell: Cell, train: Images):
    """Training images of a seed: few of each class, or a share of each."""
    count = cell.settings.shots or cell.per_class
    if count and cell.settings.method in PROBES:
        return few_shot_indices(train.labels, count, cell.seed, train.label_names)
    if cell.per_class:
        return few_shot_indices(train.labels, cell.per_class, cell.seed, train.label_names)
    if cell.share < 1:
        return holdout_indices(train.labels, 1 - cell.share, cell.seed)[0]
    return torch.arange(len(train)).numpy()


def _device() -> torch.device:
    return make_accelerator().device


def _backbone_size(settings: Finetune) -> int:
    with torch.device("meta"):
        model: Any = make_model(dataclasses.replace(settings, head="learned", pretrained=False), 2)
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.get_classifier().parameters())


def _collapse(features: torch.Tensor, split: Images) -> dict[str, float]:
    collapse = NeuralCollapse(len(split.label_names), features.shape[1])
    collapse.update(features, torch.from_numpy(split.labels))
    return {name: value for name, value in collapse.compute().items() if name in NC1}


def _cached(settings: Finetune, name: str, split: Images, work: Path) -> torch.Tensor:
    """Features of a whole split, computed once; two processes do not compute the same."""
    source = find_model(settings.model, settings.pretrained)
    parts = [settings.data, name, final_size(settings), source.name, source.identity]
    parts += [settings.pretrained or settings.seed, settings.model_args, len(split)]
    file = work / "features" / (hashlib.sha256(repr(parts).encode()).hexdigest()[:16] + ".safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # falls with the process, whatever ends it
        if not file.is_file():
            model = make_model(dataclasses.replace(settings, head="learned"), len(split.label_names))
            features = backbone_features(model, split, size=final_size(settings), device=_device())
            safetensors.torch.save_file({"features": features.contiguous()}, file.with_suffix(".new"))
            os.replace(file.with_suffix(".new"), file)
    return safetensors.torch.load_file(file)["features"]


def read_cells(file: Path) -> dict[str, dict[str, Any]]:
    """Finished cells by key; a line that a kill cut short is dropped from the file."""
    if not file.is_file():
        return {}
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return {record["key"]: record for record in map(json.loads, whole.splitlines())}


def _append(file: Path, record: dict[str, Any]) -> None:
    with open(file, "a") as opened:
        opened.write(json.dumps(record) + "\n")
        opened.flush()
        os.fsync(opened.fileno())


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)


def main() -> None:
    table = parse(Table)
    if PartialState().num_processes > 1:
        raise ValueError("Run this script as one process; --jobs n runs n cells at a time.")
    results = Path(table.results)
    results.mkdir(parents=True, exist_ok=True)
    file = results / "cells.jsonl"
    wanted = cells(table)
    done = read_cells(file)
    missing = [] if table.report_only else [cell for cell in wanted if cell.key not in done]
    print(f"{len(wanted)} cells, {len(wanted) - len(missing)} done.", flush=True)
    if table.jobs == 1:
        for i, cell in enumerate(missing):
            _append(file, run_cell(cell, table.work))
            print(f"{i + 1} of {len(missing)}: {cell.key}", flush=True)
    else:
        context = multiprocessing.get_context("spawn")
        threads = (max(1, (os.cpu_count() or 1) // table.jobs),)
        with ProcessPoolExecutor(table.jobs, context, initializer=_start_worker, initargs=threads) as pool:
            running = {pool.submit(run_cell, cell, table.work): cell for cell in missing}
            for i, future in enumerate(as_completed(running)):
                _append(file, future.result())
                print(f"{i + 1} of {len(missing)}: {running[future].key}", flush=True)
    done = read_cells(file)
    records = [done[cell.key] for cell in wanted if cell.key in done]
    left = sum(cell.key not in done for cell in wanted)
    write_report(records, results, control=table.control, order=list(table.weights), left=left)
    print(f"Table: {results / 'table.md'}")


__all__ = ["Cell", "Table", "cells", "main", "read_cells", "run_cell"]

if __name__ == "__main__":
    run_script(main)
