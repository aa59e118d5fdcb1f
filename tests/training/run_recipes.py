"""For tests that launch processes: runs recipes one after the other and leaves the weights, exports where `tag` is set.

`accelerate launch --config_file ... tests/training/run_recipes.py RECIPE.yaml ...`
"""

import sys

import torch

from etf_zoo.trainer.recipe.config import Recipe, parse
from etf_zoo.trainer.run.export import export_run
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.run.script import run_script
from etf_zoo.trainer.run.watch import BestEpoch


def main():
    for file in sys.argv[1:]:
        recipe = parse(Recipe, ["--config", file])
        run = Run(recipe, best=BestEpoch() if recipe.notes == "keep the best epoch" else None)
        run.fit()
        weights = run.plain_model().state_dict()
        if run.accelerator.is_main_process:
            torch.save(weights, run.folder / "weights.pt")
        if run.recipe.tag:
            export_run(run, run.folder / "model")


run_script(main)
