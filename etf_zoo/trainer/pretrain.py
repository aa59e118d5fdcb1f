"""Pretrain a model: `accelerate launch training/pretrain.py --config training/recipes/NAME.yaml`."""

from __future__ import annotations

import json

from .recipe.config import Recipe, parse
from .run.export import check_storable, export_run
from .run.run import Run


def main() -> None:
    recipe = parse(Recipe)
    check_storable(recipe)
    run = Run(recipe)
    if run.fit():
        metrics = export_run(run, run.folder / "model")
        run.accelerator.print(json.dumps(metrics["results"], indent=1))
        run.accelerator.print(f"Model folder: {run.folder / 'model'}")
