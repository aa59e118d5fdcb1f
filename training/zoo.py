"""Train, export, measure and card the zoo and its controls: `accelerate launch training/zoo.py [NAME ...]`.

The models are those of `training/recipes/zoo_gpu.yaml` or, without an accelerator, `zoo_cpu.yaml`; all of them, or
those named. Run again, it goes on where it stopped; what is finished is only exported and measured anew. Results land
in `model_cards/<arch>_etf.<tag>` and `model_cards/<arch>_control.<tag>`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from a clone

import torch
from accelerate.utils import broadcast_object_list

from etf_zoo.card import METRICS_NAME, write_card
from etf_zoo.heads import base_name
from etf_zoo.pretrained import WEIGHTS_NAME
from training import checkpoint
from training.config import Recipe, parse, seconds
from training.engine import CHECKPOINTS, Run
from training.export import check_storable, export_run
from training.launching import process_state, run_script
from training.parsing import merged, parse_entries
from training.readme import ROOT, write_tables

KINDS = {"frame": "etf", "learned": "control", "random": "random_control"}


@dataclass
class Zoo:
    """A list of models.

    Attributes:
        base: What their recipes share.
        models: Name -> what it changes in the recipe, and besides it: `heads`, of the model and its controls; `keep`,
            the controls whose weights are kept (of the others only the figures are); `seeds`: of others than the
            recipe's own only the figures are kept.
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


def entry_of(zoo: Zoo, name: str) -> Entry:
    """A model of the list.

    Raises:
        ValueError: If it is not there, or names a kind of head that there is not.
    """
    if name not in zoo.models:
        raise ValueError(f"The list has no model {name!r}, only {', '.join(zoo.models)}.")
    changes = dict(zoo.models[name])
    heads, keep = changes.pop("heads", ["frame", "learned"]), changes.pop("keep", [])
    if unknown := {*heads, *keep} - KINDS.keys():
        raise ValueError(f"{name}: heads and keep are of {', '.join(KINDS)}, not {', '.join(sorted(unknown))}.")
    seeds = changes.pop("seeds", None)
    recipe = parse_entries(Recipe, merged(dataclasses.asdict(zoo.base), changes))
    return Entry(recipe, heads, keep, seeds or [recipe.seed])


def train_and_export(recipe: Recipe, folder: Path, *, keep: bool, figures_only: bool) -> None:
    """One model: train it, or go on, and write its folder unless the time budget runs out first.

    Args:
        recipe: What to train.
        folder: Where the model goes.
        keep: Whether with its weights.
        figures_only: Write the figures alone, as one of several seeds.
    """
    output = Path(recipe.output)
    run = Run(dataclasses.replace(recipe, resume=checkpoint.exists(output / CHECKPOINTS)))
    if not run.fit():
        return  # the time is up
    exported = output / "model"
    stored = folder.name if recipe.head == "frame" else f"model_cards/{folder.name}"  # timm knows the first by name
    export_run(run, exported, name=stored if keep else str(exported))
    if run.accelerator.is_main_process:
        if figures_only:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(exported / METRICS_NAME, folder / f"metrics_seed{recipe.seed}.json")
        else:
            ignored = shutil.ignore_patterns() if keep else shutil.ignore_patterns(WEIGHTS_NAME)
            shutil.copytree(exported, folder, ignore=ignored, dirs_exist_ok=True)


def train(entry: Entry, cards: Path, until: float = math.inf) -> None:
    """All runs of a model and its controls, seed by seed, and their cards; `until` is by `time.monotonic`."""
    tag = f"{base_name(entry.recipe.model)}_{{}}.{entry.recipe.tag}"
    for seed in entry.seeds:
        for head in entry.heads:
            folder, own = cards / tag.format(KINDS[head]), seed == entry.recipe.seed
            output = f"{entry.recipe.output}/{folder.name}" + ("" if own else f"_seed{seed}")
            (left,) = broadcast_object_list([until - time.monotonic()])  # by the main process's clock: all stop or none
            if left <= 0:
                break
            budget = f"{left:.0f}s" if math.isfinite(left) else ""
            recipe = dataclasses.replace(entry.recipe, head=head, seed=seed, output=output, time_budget=budget)
            train_and_export(recipe, folder, keep=own and (head == "frame" or head in entry.keep), figures_only=not own)
    if process_state().is_main_process:
        folders = [cards / tag.format(kind) for kind in KINDS.values()]
        stand_beside([folder for folder in folders if (folder / METRICS_NAME).is_file()])


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
    parser.add_argument("--output", default="", help="folder for the runs; by default the list's")
    parser.add_argument("--cards", type=Path, default=ROOT / "model_cards", help="folder for the models")
    args = parser.parse_args()
    until = time.monotonic() + seconds(args.time_budget)
    processes = process_state()
    zoo = parse(Zoo, ["--config", str(args.list or default_list())])
    if args.data:
        zoo.base.data.source = args.data
    entries = []
    for name in args.names or zoo.models:
        entry = entry_of(zoo, name)
        recipe = dataclasses.replace(entry.recipe, output=args.output or entry.recipe.output)
        entries.append(Entry(recipe, args.heads or entry.heads, entry.keep, args.seeds or entry.seeds))
    for entry in entries:
        for head in entry.heads:
            check_storable(dataclasses.replace(entry.recipe, head=head))
    for entry in entries:
        train(entry, args.cards, until)
    if processes.is_main_process and args.cards == ROOT / "model_cards":
        write_tables()


if __name__ == "__main__":
    run_script(main)
