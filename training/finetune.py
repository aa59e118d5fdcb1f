"""Fine-tune a model: `accelerate launch training/finetune.py`; the same as `etf-zoo finetune`."""

from etf_zoo.trainer.finetune import main
from etf_zoo.trainer.run.script import run_script

if __name__ == "__main__":
    run_script(main)
