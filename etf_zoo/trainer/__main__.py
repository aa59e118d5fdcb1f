"""`accelerate launch -m etf_zoo.trainer finetune ...`: what `etf-zoo finetune --processes N` starts N times."""

import sys
from importlib import import_module

from .run.script import run_script

if __name__ == "__main__":
    name = sys.argv.pop(1)
    run_script(import_module(f"etf_zoo.trainer.{name}").main)
