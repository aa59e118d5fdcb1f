"""Tiny ImageNet from scratch on one GPU: seconds from the first step to 55 % and to 58 % validation top-1, five runs.

    ETF_ZOO_DATA=... python training/benchmarks/tiny_record.py --out training/benchmarks/tiny_record_gpu.json

ResNet-18 of timm, at most 64 pixels, images resident on the GPU, Muon in bf16. The clock runs while steps are taken,
from the first one on, which therefore counts what is compiled or tuned; it stands still while the validation images are
measured, which is given apart. An epoch's end is the first moment that accuracy is known. `--epochs` is the length that
the schedule is made for: the fewest at which all runs arrive; choose it on held-out training images (`--held_out`),
before the validation images are looked at.

On a CPU, `--toy` runs one epoch of 512 images of 16 pixels, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from etf_zoo.trainer.data.batches import Split, load_split
from etf_zoo.trainer.recipe.config import Augment, Data, Optim, Recipe
from etf_zoo.trainer.run.run import Run

GOALS = (55.0, 58.0)
HELD_OUT = 50  # images of each class


def make_recipe(args: argparse.Namespace, seed: int, output: str) -> Recipe:
    """What a run does."""
    sizes = [[0, 48], [args.epochs // 2, 64]] if args.epochs > 1 else [[0, 64]]
    return Recipe(
        output=output,
        model="resnet18_etf",
        head=args.head,
        data=Data("tiny_imagenet", size=64),
        augment=Augment(crop_scale=[0.25, 1.0], cutmix=1.0, mixup=0.2, mix_prob=args.mix, randaug_ops=args.randaug),
        optim=Optim(name="muon", lr=args.lr, weight_decay=0.05, warmup_epochs=min(2, args.epochs / 10)),
        epochs=args.epochs,
        batch_size=args.batch,
        sizes=[[0, 16]] if args.toy else sizes,
        precision="bf16",
        compile=args.compile,
        seed=seed,
    )


def splits(args: argparse.Namespace) -> tuple[Split, Split]:
    """Images to train on, and to measure on."""
    train: Any = load_split(Data("tiny_imagenet", size=64), "train")
    if args.toy:
        return train.subset(np.arange(0, len(train), len(train) // 512)[:512]), train.subset(np.arange(64))
    if not args.held_out:
        return train, load_split(Data("tiny_imagenet", size=64), "validation")  # type: ignore[return-value]
    order = np.random.default_rng(0).permutation(len(train))
    place = np.empty(len(train), dtype=np.int64)  # of each image among those of its class
    seen = np.zeros(len(train.label_names), dtype=np.int64)
    for row in order:
        place[row] = seen[train.labels[row]]
        seen[train.labels[row]] += 1
    return train.subset(np.flatnonzero(place >= HELD_OUT)), train.subset(np.flatnonzero(place < HELD_OUT))


def train_once(args: argparse.Namespace, seed: int, data: tuple[Split, Split]) -> dict[str, Any]:
    """One run: accuracy and seconds after each epoch, and when each goal was reached."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(make_recipe(args, seed, folder), *data)
        epochs, spent, measuring = [], 0.0, 0.0
        for epoch in range(args.epochs):
            run.model.train()
            began = time.perf_counter()
            for images, labels in run.batches(epoch, 0):
                run.stepper.step(run.step, images, labels)
                run.step += 1
            _wait()
            spent += time.perf_counter() - began
            if epoch + 1 < args.look_from and not args.toy:
                continue
            began = time.perf_counter()
            top1 = run.evaluate()["top1"]
            measuring += time.perf_counter() - began
            epochs.append({"epoch": epoch + 1, "seconds": spent, "top1": top1})
            print(f"seed {seed}, epoch {epoch + 1}: {top1:.2f} % after {spent:.1f} s", flush=True)
    reached = {str(goal): next((e["seconds"] for e in epochs if e["top1"] >= goal), None) for goal in GOALS}
    return {"seed": seed, "epochs": epochs, "seconds_to": reached, "seconds_of_measuring": measuring}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--look_from", type=int, default=12, help="first epoch after which accuracy is measured")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--head", default="frame")
    parser.add_argument("--mix", type=float, default=0.5, help="share of the images that are mixed")
    parser.add_argument("--randaug", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--held_out", action="store_true", help="measure on 50 training images of each class instead")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.toy:
        args.epochs, args.runs, args.batch = 1, 1, 64
    elif not torch.cuda.is_available():
        raise SystemExit("This needs a GPU; --toy tries the script on a CPU.")
    data, runs = splits(args), []
    report: dict[str, Any] = {
        "command": "python training/benchmarks/tiny_record.py " + " ".join(sys.argv[1:]),
        "machine": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "runs": runs,
    }
    for seed in range(args.runs):
        runs.append(train_once(args, seed, data))
        for goal in map(str, GOALS):
            times = [r["seconds_to"][goal] for r in runs]
            report[f"seconds to {goal} %"] = None if None in times else statistics.median(times)
        if args.out:  # after each run: one that is cut short leaves what it has
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in report.items() if k != "runs"}, indent=1))


if __name__ == "__main__":
    main()
