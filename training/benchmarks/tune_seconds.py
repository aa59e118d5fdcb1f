"""What each way of fine-tuning costs, and what it gives: Flowers-17, a few images of each class, one core.

`python training/benchmarks/tune_seconds.py --output training/benchmarks/tune_seconds_cpu.json`. EfficientNet-lite0 with
ImageNet's weights at 160 pixels, `finetune`'s defaults for the rest. Seconds are of the processor, from the weights to
the tuned model, without reading the data and without the test. One run of each: the accuracies only say that each did
what it should, those of `docs/results/photos.md` have intervals.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.trainer.data.subsets import few_shot_indices, load_images
from etf_zoo.trainer.recipe.config import Data
from etf_zoo.trainer.tune.tuning import Finetune, fine_tune

MODEL, SIZE = "tf_efficientnet_lite0_etf", 160
METHODS: dict[str, dict[str, Any]] = {
    "ncm": {"method": "ncm"},
    "linear_probe": {"method": "linear_probe"},
    "head, cached": {"method": "head", "head": "learned", "cache_views": 1},
    "layer conv_head, cached": {"method": "layer", "layer": "conv_head", "head": "learned", "cache_views": 4},
    "layer, cached": {"method": "layer", "head": "learned", "cache_views": 4},
    "layer": {"method": "layer", "head": "learned"},
    "full": {"method": "full"},
}


def measure(changes: dict[str, Any], shots: int, folder: Path) -> dict[str, Any]:
    """Seconds and accuracy of one way."""
    data = Data(source="flowers17", size=192, resident=True, val_split="test")
    train, test = (load_images(data, split) for split in ("train", "test"))
    train = train.subset(few_shot_indices(train.labels, shots, 0, train.label_names)) if shots else train
    settings = Finetune(model=MODEL, data=data, sizes=[[0, SIZE]], output=str(folder), tensorboard=False, **changes)
    began = time.process_time()
    tuned = fine_tune(settings, train, test)
    if tuned is None:
        raise EtfZooError("A run ended before its time.")
    spent = time.process_time() - began
    top1 = tuned.top1 if tuned.top1 is not None else tuned.figures()["top1"]
    shutil.rmtree(folder, ignore_errors=True)
    return {"cpu_seconds": round(spent, 1), "top1": round(top1, 2), "tuned": tuned.tuned, "total": tuned.total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = {}
    for name in args.methods:
        with TemporaryDirectory() as folder:
            runs[name] = measure(METHODS[name], args.shots, Path(folder) / "run")
        print(name, runs[name], flush=True)
    what = f"flowers17, {args.shots or 'all'} images a class, {MODEL}, {SIZE} px, one core"
    found = {"command": f"python training/benchmarks/tune_seconds.py {shlex.join(sys.argv[1:])}", "what": what}
    args.output.write_text(json.dumps({**found, "torch": torch.__version__, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
