"""Pretrain a model: `accelerate launch training/pretrain.py --config training/recipes/NAME.yaml`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from a clone

from training.config import Recipe, parse
from training.engine import Run
from training.export import check_storable, export_run
from training.launching import run_script


def main() -> None:
    recipe = parse(Recipe)
    check_storable(recipe)
    run = Run(recipe)
    if run.fit():
        metrics = export_run(run, run.folder / "model")
        run.accelerator.print(json.dumps(metrics["results"], indent=1))
        run.accelerator.print(f"Model folder: {run.folder / 'model'}")


if __name__ == "__main__":
    run_script(main)
