"""Train a segmentation model: `accelerate launch training/segment.py --config training/recipes/NAME.yaml`."""

from etf_zoo.trainer.run.script import run_script
from etf_zoo.trainer.segment.script import main

if __name__ == "__main__":
    run_script(main)
