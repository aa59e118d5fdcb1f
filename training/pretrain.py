"""Pretrain a model: `accelerate launch training/pretrain.py`; the same as `etf-zoo pretrain`."""

from etf_zoo.trainer.pretrain import main
from etf_zoo.trainer.run.script import run_script

if __name__ == "__main__":
    run_script(main)
