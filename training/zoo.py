"""Train, export, measure and card models of the zoo with their controls: `accelerate launch training/zoo.py RECIPE...`.

Each recipe in `training/recipes/` with a `tag` is a model. Run again, it goes on where it stopped; what is finished is
only exported and measured anew. Results land in `model_cards/<arch>_etf.<tag>` and `model_cards/<arch>_control.<tag>`,
the control without its weights unless its name is given with --keep.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from a clone

from accelerate import PartialState

from etf_zoo.card import METRICS_NAME, write_card
from etf_zoo.heads import base_name
from etf_zoo.pretrained import WEIGHTS_NAME
from training import checkpoint
from training.config import Recipe, parse
from training.engine import CHECKPOINTS, Run
from training.export import export_run
from training.launching import run_script
from training.readme import ROOT, write_table

KINDS = {"frame": "etf", "learned": "control", "random": "random_control"}


def train_and_export(recipe_file: Path, head: str, *, time_budget: str, keep: set[str]) -> Path | None:
    """One model: train it, or go on, and write its folder.

    Returns:
        The folder, or None if the time budget ran out first.
    """
    recipe = parse(Recipe, ["--config", str(recipe_file)])
    name = f"{base_name(recipe.model)}_{KINDS[head]}.{recipe.tag}"
    output = Path(recipe.output if head == "frame" else f"{recipe.output}_{KINDS[head]}")
    resume = checkpoint.exists(output / CHECKPOINTS)
    run = Run(dataclasses.replace(recipe, head=head, output=str(output), time_budget=time_budget, resume=resume))
    if not run.fit():
        return None
    folder = ROOT / "model_cards" / name
    kept = head == "frame" or name in keep
    exported = output / "model"
    export_run(run, exported, name=name if kept else str(exported))
    if run.accelerator.is_main_process:
        ignored = shutil.ignore_patterns() if kept else shutil.ignore_patterns(WEIGHTS_NAME)
        shutil.copytree(exported, folder, ignore=ignored, dirs_exist_ok=True)
    return folder


def stand_beside(folders: list[Path]) -> None:
    """Write each folder's figures into the others' as references, and their cards."""
    metrics = {folder: json.loads((folder / METRICS_NAME).read_text()) for folder in folders}
    for folder, own in metrics.items():
        own["references"] = [{"model": f.name, "results": m["results"]} for f, m in metrics.items() if f != folder]
        (folder / METRICS_NAME).write_text(json.dumps(own, indent=1) + "\n")
        write_card(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="+", metavar="RECIPE", help="name of a file in training/recipes, without .yaml"
    )
    parser.add_argument("--heads", nargs="+", choices=KINDS, default=["frame", "learned"])
    parser.add_argument("--time_budget", default="", help="for each model, such as 9m: save and stop")
    parser.add_argument("--keep", nargs="*", default=[], metavar="NAME", help="controls whose weights are kept")
    args = parser.parse_args()
    for recipe in args.recipes:
        file = ROOT / "training" / "recipes" / f"{recipe}.yaml"
        if not file.is_file():
            parser.error(f"there is no recipe {file}")
        done = [train_and_export(file, head, time_budget=args.time_budget, keep=set(args.keep)) for head in args.heads]
        if PartialState().is_main_process:
            stand_beside([folder for folder in done if folder is not None])
    if PartialState().is_main_process:
        write_table()


if __name__ == "__main__":
    run_script(main)
