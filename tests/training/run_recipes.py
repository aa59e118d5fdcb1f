"""For tests that launch processes: runs recipes one after the other and leaves the weights, exports where `tag` is set.

`accelerate launch --config_file ... tests/training/run_recipes.py RECIPE.yaml ...`
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from training.config import Recipe, parse
from training.engine import Run
from training.export import export_run
from training.launching import run_script


def main():
    for file in sys.argv[1:]:
        run = Run(parse(Recipe, ["--config", file]))
        run.fit()
        weights = run.plain_model().state_dict()
        if run.accelerator.is_main_process:
            torch.save(weights, run.folder / "weights.pt")
        if run.recipe.tag:
            export_run(run, run.folder / "model")


run_script(main)
