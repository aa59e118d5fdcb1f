"""Does a Kerdock frame learn? Real images, beside a learned matrix and random unit vectors.

    python training/experiments/kerdock.py --part instances
    python training/experiments/kerdock.py --part classes
    python training/experiments/kerdock.py --table

`instances`: every training image is a class of its own, which is a self-supervised pretraining; the backbone's features
are then probed on the transfer sets, beside those of supervised pretraining on the same images for as many steps, and
of the untrained network. `classes`: the 200 classes of Tiny ImageNet in 16 and 64 dimensions, where no simplex fits;
top-1 on its validation images.

Each cell is one training run, appended to `cells.jsonl`; cells that are there are not run again. Optimizer and rate are
the same for all: nothing was chosen by looking at these figures.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etf_zoo import frame_heads
from etf_zoo.trainer.data.batches import limited, load_split
from etf_zoo.trainer.data.resident import Split
from etf_zoo.trainer.recipe.config import Augment, Data, Optim, Recipe
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.tune.probes import backbone_features, fit_probe

RESULTS = Path("training/results/kerdock")
TRANSFER = {"flowers17": "test", "cub50": "test", "grocery": "test"}
PROBE_SIZE = 64
STRENGTH = 1e-2  # scikit-learn's C, for all models and sets alike

NARROW = {"channels": (32, 64, 128, 256)}  # half of resnet10t's, for a busy CPU

BASE = Recipe(
    model="resnet10t",
    model_args=NARROW,
    data=Data(source="tiny_imagenet", size=64),
    augment=Augment(crop_scale=[0.2, 1.0], color_jitter=[0.4, 0.4, 0.4, 0.1]),
    optim=Optim(name="adamw", lr=1e-3, weight_decay=0.05, warmup_epochs=1),
    batch_size=128,
    sizes=[[0, 32]],
    label_smoothing=0.0,
    tensorboard=False,
)
INSTANCES: dict[str, dict[str, Any]] = {
    "Kerdock": {"head": "frame", "model_args": {"frame": "kerdock"}},
    "random": {"head": "random"},
    "learned": {"head": "learned"},
    "supervised": {"head": "learned"},
    "untrained": {"head": "learned"},
}
FRAMES = {
    "learned": {"head": "learned"},
    "random": {"head": "random"},
    "Kerdock": {"model_args": {"frame": "kerdock"}},
    "spherical code": {"model_args": {"frame": "spherical_code"}},
}


def as_instances(split: Split) -> Split:
    """The same images, each a class of its own."""
    return replace(split, labels=np.arange(len(split)), label_names=[str(i) for i in range(len(split))])


def recipe_of(head: dict[str, Any], dim: int, folder: Path, args: argparse.Namespace) -> Recipe:
    """The common recipe with a head behind an MLP neck of some width."""
    return replace(
        BASE,
        head=head.get("head", "frame"),
        model_args={**NARROW, **head.get("model_args", {}), "neck": "mlp", "neck_features": dim},
        epochs=args.epochs,
        eval_every=args.epochs,
        save_every=args.epochs,
        seed=args.seed,
        output=str(folder),
    )


def train(recipe: Recipe, train_split: Any, val_split: Any) -> tuple[Any, dict[str, Any]]:
    """A trained model, and what is told of its training."""
    run = Run(recipe, train_split, val_split)
    if recipe.epochs and not run.fit():
        raise SystemExit("The time budget ended a run.")
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = {k: v for k, v in json.loads(lines[-1]).items() if k in ("train_loss", "train_top1", "val_top1", "val_loss")}
    return run.plain_model(), {**last, "steps": run.step, "seconds": round(run.seconds())}


def probed(model: Any) -> dict[str, float]:
    """Top-1 in percent of logistic regression on the features, by transfer set."""
    found = {}
    for name, held_out in TRANSFER.items():
        splits: list[Any] = [load_split(Data(source=name, size=PROBE_SIZE), split) for split in ("train", held_out)]
        features = [backbone_features(model, split, size=PROBE_SIZE) for split in splits]
        labels = [torch.from_numpy(split.labels) for split in splits]
        probe = fit_probe("linear_probe", features[0], labels[0], splits[0].label_names, strength=STRENGTH)
        found[name] = 100 * float((probe.predict(features[1].numpy()) == labels[1].numpy()).mean())
    return found


def instance_cell(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One pretraining, and its probes."""
    images: Any = limited(load_split(BASE.data, "train"), args.images, args.seed)
    folder = args.runs / f"instances-{name}-{args.images}-{args.epochs}-{args.seed}"
    recipe = recipe_of(INSTANCES[name], 256, folder, args)
    if name == "untrained":
        torch.manual_seed(args.seed)
        import timm

        shape: dict[str, Any] = {"num_classes": len(images.label_names), **NARROW}
        model, told = timm.create_model(recipe.model, **shape), {}
    else:
        own = images if name == "supervised" else as_instances(images)
        model, told = train(recipe, own, own.subset(np.arange(min(2000, len(own)))))
        told["classes"] = len(own.label_names)
        told["cosine"] = [head.frame_report().largest_cosine for head in frame_heads(model).values()]
    return {**told, "probe": probed(model.eval())}


def class_cell(name: str, dim: int, args: argparse.Namespace) -> dict[str, Any]:
    """One training on the 200 classes, and its accuracy on the validation images."""
    images = limited(load_split(BASE.data, "train"), args.images, args.seed)
    folder = args.runs / f"classes-{name}-{dim}-{args.images}-{args.epochs}-{args.seed}"
    recipe = recipe_of(FRAMES[name], dim, folder, args)
    model, told = train(recipe, images, load_split(BASE.data, "validation"))
    cosines = [head.frame_report().largest_cosine for head in frame_heads(model).values()]
    return {**told, "dim": dim, "cosine": cosines}


def cells(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """Names of a part's cells, and what runs each."""
    if args.part == "instances":
        return [(name, lambda name=name: instance_cell(name, args)) for name in INSTANCES]
    return [
        (f"{name}, d = {dim}", lambda name=name, dim=dim: class_cell(name, dim, args))
        for dim in (16, 64)
        for name in FRAMES
    ]


def read(part: str) -> list[dict[str, Any]]:
    """The cells of a part that are done."""
    file = RESULTS / "cells.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [cell for cell in map(json.loads, lines) if cell["part"] == part]


def table() -> str:
    """Both tables, in Markdown."""
    lines = ["# Does a Kerdock frame learn?", "", "Written by `python training/experiments/kerdock.py --table`."]
    lines += ["One run a row: no interval can be given.", "", "## Instance discrimination", ""]
    lines += ["| head | classes | images | epochs | seed | loss | training top-1 | " + " | ".join(TRANSFER) + " |"]
    lines += ["|---|" + "--:|" * (6 + len(TRANSFER))]
    for cell in read("instances"):
        probe = " | ".join(f"{cell['probe'][name]:.1f}" for name in TRANSFER)
        loss, top1 = (f"{cell[k]:.2f}" if k in cell else "" for k in ("train_loss", "train_top1"))
        lines.append(
            f"| {cell['name']} | {cell.get('classes', '')} | {cell['images']} | {cell['epochs']} | {cell['seed']} | "
            f"{loss} | {top1} | {probe} |"
        )
    lines += ["", "## 200 classes in few dimensions", ""]
    lines += ["| head | largest cosine | images | epochs | seed | loss | training top-1 | validation top-1 |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|--:|"]
    for cell in read("classes"):
        cosine = ", ".join(f"{value:.3f}" for value in cell["cosine"])
        lines.append(
            f"| {cell['name']} | {cosine} | {cell['images']} | {cell['epochs']} | {cell['seed']} | "
            f"{cell['train_loss']:.2f} | {cell['train_top1']:.1f} | {cell['val_top1']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("instances", "classes"))
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of cells")
    parser.add_argument("--runs", type=Path, default=Path("runs/kerdock"))
    parser.add_argument("--table", action="store_true", help="write table.md from the cells that are done")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    settings = {"images": args.images, "epochs": args.epochs, "seed": args.seed}
    for name, run in cells(args) if args.part else []:
        done = any(all(cell[k] == v for k, v in {**settings, "name": name}.items()) for cell in read(args.part))
        if done or (args.only and name not in args.only):
            continue
        began = time.monotonic()
        cell = {"part": args.part, "name": name, **settings, **run()}
        cell["wall_seconds"] = round(time.monotonic() - began)
        with (RESULTS / "cells.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        print(json.dumps(cell), flush=True)
    if args.table:
        (RESULTS / "table.md").write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
