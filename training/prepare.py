"""Write a split as arrays: `accelerate launch training/prepare.py`; the same as `etf-zoo prepare`."""

from etf_zoo.trainer.prepare import main
from etf_zoo.trainer.run.script import run_script

if __name__ == "__main__":
    run_script(main)
