"""Train, export, measure and card the zoo and its controls: `accelerate launch training/experiments/zoo.py [NAME ...]`.

The models are those of `training/recipes/zoo_gpu.yaml` or, without an accelerator, `zoo_cpu.yaml`; all of them, or
those named. Run again, it goes on where it stopped; what is finished is only exported and measured anew. Results land
in `model_cards/<arch>_etf.<tag>` and `model_cards/<arch>_control.<tag>`.

`--jobs 2` trains two at a time, a model beside its control: each with its share of the cores, or all on one GPU, which
small models leave waiting for the processor. What they print then goes to `log.txt` in the folder of each run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from etf_zoo.errors import EtfZooError
from etf_zoo.models.names import base_name
from etf_zoo.sharing.card import METRICS_NAME, write_card
from etf_zoo.trainer.data.batches import load_split
from etf_zoo.trainer.recipe.config import Recipe, parse, seconds
from etf_zoo.trainer.recipe.parsing import merged, parse_entries
from etf_zoo.trainer.run import checkpoint
from etf_zoo.trainer.run.checkpoint import CHECKPOINTS
from etf_zoo.trainer.run.export import check_storable, export_run
from etf_zoo.trainer.run.launching import process_state, refuse_processes
from etf_zoo.trainer.run.locks import acquire
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.run.script import run_script
from etf_zoo.weights.native import WEIGHTS_NAME
from training.experiments.grid import lock_file, run_jobs
from training.experiments.readme import ROOT, write_tables

KINDS = {"frame": "etf", "learned": "control", "learned_cosine": "cosine_control", "random": "random_control"}


@dataclass
class Zoo:
    """A list of models.

    Attributes:
        base: What their recipes share.
        models: Name -> what it changes in the recipe, and besides it: `heads`, of the model and its controls; `keep`,
            those whose weights are kept, by default the model's (of the others only the figures are); `seeds`: of
            others than the recipe's own only the figures are kept; `beside`, models of the list that its cards and
            theirs compare with each other, and which name it in turn; it may name itself.
    """

    base: Recipe = field(default_factory=Recipe)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A model of the list with its controls: what the list says, resolved."""

    recipe: Recipe
    heads: list[str]
    keep: list[str]
    seeds: list[int]
    beside: list[str]


def entry_of(zoo: Zoo, name: str) -> Entry:
    """A model of the list.

    Raises:
        ValueError: If it is not there, or names a kind of head that there is not.
    """
    if name not in zoo.models:
        raise EtfZooError(f"The list has no model {name!r}, only {', '.join(zoo.models)}.")
    changes = dict(zoo.models[name])
    heads, keep = changes.pop("heads", ["frame", "learned"]), changes.pop("keep", ["frame"])
    if unknown := {*heads, *keep} - KINDS.keys():
        raise EtfZooError(f"{name}: heads and keep are of {', '.join(KINDS)}, not {', '.join(sorted(unknown))}.")
    seeds, beside = changes.pop("seeds", None), [other for other in changes.pop("beside", []) if other != name]
    recipe = parse_entries(Recipe, merged(dataclasses.asdict(zoo.base), changes))
    return Entry(recipe, heads, keep, seeds or [recipe.seed], beside)


@dataclass(frozen=True)
class Job:
    """One run of the list.

    Attributes:
        recipe: What to train.
        folder: Where the model goes.
        keep: Whether with its weights.
        figures_only: Write the figures alone, as one of several seeds.
    """

    recipe: Recipe
    folder: Path
    keep: bool
    figures_only: bool

    @property
    def key(self) -> str:
        """What messages call it."""
        return self.recipe.output


def folders_of(entry: Entry, cards: Path) -> dict[str, Path]:
    """Where a model and its controls go, by kind of head."""
    name = f"{base_name(entry.recipe.model)}_{{}}.{entry.recipe.tag}"
    return {head: cards / name.format(kind) for head, kind in KINDS.items()}


def jobs_of(entry: Entry, cards: Path) -> list[Job]:
    """All runs of a model and its controls, seed by seed."""
    jobs = []
    for seed in entry.seeds:
        for head in entry.heads:
            folder, own = folders_of(entry, cards)[head], seed == entry.recipe.seed
            output = f"{entry.recipe.output}/{folder.name}" + ("" if own else f"_seed{seed}")
            recipe = dataclasses.replace(entry.recipe, head=head, seed=seed, output=output)
            jobs.append(Job(recipe, folder, own and head in entry.keep, not own))
    return jobs


def train(job: Job, until: float = math.inf) -> None:
    """Train a model, or go on, and write its folder, unless it is `until` (by `time.time`) first."""
    (left,) = broadcast_object_list([until - time.time()])  # by the main process's clock: all stop or none
    if left <= 0:
        return
    budget = f"{left:.0f}s" if math.isfinite(left) else ""
    output = Path(job.recipe.output)
    run = Run(dataclasses.replace(job.recipe, time_budget=budget, resume=checkpoint.exists(output / CHECKPOINTS)))
    if not run.fit():
        return  # the time is up
    exported, name = output / "model", job.folder.name
    stored = name if job.recipe.head == "frame" else f"model_cards/{name}"  # timm knows the first by name
    export_run(run, exported, name=stored if job.keep else str(exported))
    if run.accelerator.is_main_process:
        if job.figures_only:
            job.folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(exported / METRICS_NAME, job.folder / f"metrics_seed{job.recipe.seed}.json")
        else:
            ignored = shutil.ignore_patterns() if job.keep else shutil.ignore_patterns(WEIGHTS_NAME)
            shutil.copytree(exported, job.folder, ignore=ignored, dirs_exist_ok=True)


def train_alone(locks: Path, until: float, logged: bool, job: Job) -> None:
    """`train`, unless another process of this script is at it.

    Args:
        locks: Folder of locks.
        until: See `train`.
        logged: Whether what is printed goes to `log.txt` in the folder of the run.
        job: The run.
    """
    folder = Path(job.recipe.output)
    with acquire(lock_file(locks, job.recipe.output)) as free, contextlib.ExitStack() as stack:
        if not free:
            return
        print(f"{job.recipe.output} begins", flush=True)
        if logged:
            folder.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(open(folder / "log.txt", "a"))
            stack.enter_context(contextlib.redirect_stdout(log))
            stack.enter_context(contextlib.redirect_stderr(log))
        train(job, until)


def train_all(jobs: list[Job], count: int, until: float = math.inf) -> None:
    """Train all, several at a time.

    Raises:
        ValueError: On wrong data, before any begins. At the end, if some failed; the others go on.
    """
    sources = [job.recipe.data for job in jobs]
    for data in (d for i, d in enumerate(sources) if d not in sources[:i]):  # decoded once, not by each process
        load_split(data, data.train_split)
        load_split(data, data.val_split)
    locks = Path(jobs[0].recipe.output).parent / "locks"
    failed = [job.recipe.output for job in run_jobs(partial(train_alone, locks, until, count > 1), jobs, count)]
    if failed:
        raise EtfZooError(f"{len(failed)} of {len(jobs)} runs failed, see above: {', '.join(failed)}.")


def stand_beside(folders: list[Path]) -> None:
    """Write each folder's figures into the others' as references, and their cards."""
    metrics = {folder: json.loads((folder / METRICS_NAME).read_text()) for folder in folders}
    for folder, own in metrics.items():
        own["references"] = [{"model": f.name, "results": m["results"]} for f, m in metrics.items() if f != folder]
        (folder / METRICS_NAME).write_text(json.dumps(own, indent=1) + "\n")
        write_card(folder)


def default_list() -> Path:
    """The list for this machine."""
    return ROOT / "training" / "recipes" / ("zoo_gpu.yaml" if torch.accelerator.is_available() else "zoo_cpu.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models of the list; all by default")
    parser.add_argument("--list", type=Path, metavar="FILE", help="another list of models")
    parser.add_argument("--data", default="", help="folder of the data; by default the list's, in $ETF_ZOO_DATA")
    parser.add_argument("--heads", nargs="+", choices=KINDS, help="some of the model and its controls")
    parser.add_argument("--seeds", nargs="+", type=int, help="others than the list's")
    parser.add_argument("--time-budget", default="", help="such as 9m: save and stop")
    parser.add_argument("--jobs", type=int, default=1, help="how many to train at a time")
    parser.add_argument("--output", default="", help="folder for the runs; by default the list's")
    parser.add_argument("--cards", type=Path, default=ROOT / "model_cards", help="folder for the models")
    args = parser.parse_args()
    until = time.time() + seconds(args.time_budget)
    if args.jobs < 1:
        raise EtfZooError(f"--jobs is at least 1, got {args.jobs}.")
    if args.jobs > 1:
        refuse_processes()
    processes = process_state()
    zoo = parse(Zoo, ["--config", str(args.list or default_list())])
    if args.data:
        zoo.base.data.source = args.data
    entries = []
    for name in args.names or zoo.models:
        entry = entry_of(zoo, name)
        recipe = dataclasses.replace(entry.recipe, output=args.output or entry.recipe.output)
        heads, seeds = args.heads or entry.heads, args.seeds or entry.seeds
        entries.append(dataclasses.replace(entry, recipe=recipe, heads=heads, seeds=seeds))
    beside = [[entry_of(zoo, name) for name in entry.beside] for entry in entries]  # wrong names end it here
    for entry in entries:
        for head in entry.heads:
            check_storable(dataclasses.replace(entry.recipe, head=head))
    jobs = [job for entry in entries for job in jobs_of(entry, args.cards)]
    try:
        if processes.num_processes > 1:  # they train each model together; one that fails fails for all
            for job in jobs:
                train(job, until)
        else:
            train_all(jobs, args.jobs, until)
    finally:
        if processes.is_main_process:
            for entry, others in zip(entries, beside, strict=True):
                folders = [f for e in [entry, *others] for f in folders_of(e, args.cards).values()]
                stand_beside([f for f in folders if (f / METRICS_NAME).is_file()])
    if processes.is_main_process and args.cards == ROOT / "model_cards":
        write_tables()


if __name__ == "__main__":
    run_script(main)
