"""Recompute a model's figures: `accelerate launch training/evaluate.py`; the same as `etf-zoo evaluate`."""

from etf_zoo.trainer.evaluate import main
from etf_zoo.trainer.run.script import run_script

if __name__ == "__main__":
    run_script(main)
