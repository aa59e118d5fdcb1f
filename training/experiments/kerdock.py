"""Does a Kerdock frame learn? Real images, beside a learned matrix and random unit vectors.

    python training/experiments/kerdock.py --part instances
    python training/experiments/kerdock.py --part instances --model test_resnet --dim 64 --images 2000 --epochs 20
    python training/experiments/kerdock.py --part classes --seeds 0 1 2
    python training/experiments/kerdock.py --table

`instances`: every training image is a class of its own, which is a self-supervised pretraining; the backbone's features
are then probed on the transfer sets, beside those of supervised pretraining on the same images for as many steps, and
of the untrained network. `classes`: the 200 classes of Tiny ImageNet in 16 and 64 dimensions, where no simplex fits: an
MLP neck and a head are trained on the features of a trained model, which saw these classes; so the figures say
how well the dimensions serve the classes, not how well a backbone learns. Top-1 on 5,000 validation images.

Each cell is one training run, appended to `cells.jsonl`; cells that are there are not run again. Optimizer and rate are
the same for all heads: nothing was chosen by looking at these figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etf_zoo import FrameClassifier, frame_heads
from etf_zoo.frames import spherical_code
from etf_zoo.layers.cosine import learn_prototypes
from etf_zoo.layers.necks import mlp_neck
from etf_zoo.trainer.data.batches import limited, load_split
from etf_zoo.trainer.data.resident import Split
from etf_zoo.trainer.recipe.config import Augment, Data, Optim, Recipe
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.tune.probes import backbone_features, fit_probe
from training.experiments.transfer_report import markdown

RESULTS = Path("training/results/kerdock")
TRANSFER = {"flowers17": "test", "cub50": "test", "grocery": "test"}
PROBE_SIZE = 64
STRENGTH = 1e-2  # scikit-learn's C, for all models and sets alike

MODELS = {"resnet10t": {"channels": (32, 64, 128, 256)}, "test_resnet": {}}  # half of resnet10t's, for a busy CPU
ZOO = "local-dir:model_cards/resnet18_control.e23_tiny"  # whose features the heads of `classes` are trained on
FEATURE_IMAGES, VAL_IMAGES = 20_000, 5_000

BASE = Recipe(
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
HEADS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "learned": lambda dim, k, seed: nn.Sequential(mlp_neck(512, dim), nn.Linear(dim, k)),
    "learned cosine": lambda dim, k, seed: learn_prototypes(frame_head("random", dim, k, seed)),
    "random": lambda dim, k, seed: frame_head("random", dim, k, seed),
    "Kerdock": lambda dim, k, seed: frame_head("kerdock", dim, k, seed),
    "spherical code": lambda dim, k, seed: frame_head(spherical_code(k, dim, seed=seed), dim, k, seed),
}


def frame_head(frame: Any, dim: int, classes: int, seed: int) -> FrameClassifier:
    """A fixed frame behind an MLP neck."""
    return FrameClassifier(512, classes, frame=frame, neck="mlp", neck_features=dim, seed=seed)


def as_instances(split: Split) -> Split:
    """The same images, each a class of its own."""
    return replace(split, labels=np.arange(len(split)), label_names=[str(i) for i in range(len(split))])


def recipe_of(head: dict[str, Any], folder: Path, args: argparse.Namespace) -> Recipe:
    """The common recipe with a head behind an MLP neck of some width."""
    return replace(
        BASE,
        model=args.model,
        head=head.get("head", "frame"),
        model_args={**MODELS[args.model], **head.get("model_args", {}), "neck": "mlp", "neck_features": args.dim},
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
    folder = args.runs / f"instances-{name}-{args.model}-{args.dim}-{args.images}-{args.epochs}-{args.seed}"
    recipe = recipe_of(INSTANCES[name], folder, args)
    if name == "untrained":
        torch.manual_seed(args.seed)
        shape: dict[str, Any] = {"num_classes": len(images.label_names), **MODELS[args.model]}
        model, told = timm.create_model(recipe.model, **shape), {}
    else:
        own = images if name == "supervised" else as_instances(images)
        model, told = train(recipe, own, own.subset(np.arange(min(2000, len(own)))))
        told["classes"] = len(own.label_names)
        told["cosine"] = [head.frame_report().largest_cosine for head in frame_heads(model).values()]
    return {**told, "probe": probed(model.eval())}


def zoo_features() -> list[tuple[Tensor, Tensor]]:
    """Features and labels of the training and the validation images."""
    model: Any = timm.create_model(ZOO, pretrained=True)
    found = []
    for name, count in (("train", FEATURE_IMAGES), ("validation", VAL_IMAGES)):
        split: Any = limited(load_split(BASE.data, name), count, 0)
        found.append((backbone_features(model, split, size=64), torch.from_numpy(split.labels)))
    return found


def class_cell(name: str, dim: int, seed: int, data: list[tuple[Tensor, Tensor]], args: Any) -> dict[str, Any]:
    """A neck and a head, trained on features; accuracy on the validation images."""
    torch.manual_seed(seed)
    (x, y), (val_x, val_y) = data
    head = HEADS[name](dim, 200, seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    total = args.epochs * (len(x) // 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    losses: list[float] = []
    for _ in range(args.epochs):
        for rows in torch.randperm(len(x))[: len(x) // 256 * 256].split(256):
            loss = F.cross_entropy(head(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    head.eval()
    with torch.no_grad():
        right = (head(val_x).argmax(dim=1) == val_y).float().mean().item()
    cosine = [head.frame_report().largest_cosine] if isinstance(head, FrameClassifier) else []
    last = losses[-total // args.epochs :]
    return {"dim": dim, "train_loss": sum(last) / len(last), "val_top1": 100 * right, "cosine": cosine}


def read(part: str) -> list[dict[str, Any]]:
    """The cells of a part that are done."""
    file = RESULTS / "cells.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [cell for cell in map(json.loads, lines) if cell["part"] == part]


def instances_table() -> str:
    """Instance discrimination, in Markdown."""
    columns = ["head", "network", "d", "classes", "images", "epochs", "loss", "training top-1", *TRANSFER]
    body = []
    for cell in read("instances"):
        loss, top1 = (f"{cell[k]:.2f}" if k in cell else "" for k in ("train_loss", "train_top1"))
        row = [cell["name"], cell["model"], cell["dim"], cell.get("classes", ""), cell["images"], cell["epochs"]]
        body.append([*map(str, row), loss, top1, *(f"{cell['probe'][name]:.1f}" for name in TRANSFER)])
    return "\n".join(markdown(columns, body)) + "\n"


def classes_table() -> str:
    """200 classes in few dimensions, in Markdown."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for cell in read("classes"):
        groups.setdefault((cell["dim"], cell["name"]), []).append(cell)
    body = []
    for (dim, name), runs in sorted(groups.items()):
        cosine = ", ".join(f"{value:.3f}" for value in runs[0]["cosine"])
        top1 = [run["val_top1"] for run in runs]
        shown = f"{statistics.mean(top1):.2f}"
        if len(runs) > 1:
            shown += f" ({min(top1):.2f} to {max(top1):.2f})"
        loss = statistics.mean(run["train_loss"] for run in runs)
        body.append([str(dim), name, str(len(runs)), cosine, f"{loss:.3f}", shown])
    columns = ["d", "head", "runs", "largest cosine", "training loss", "validation top-1 (range)"]
    return "\n".join(markdown(columns, body)) + "\n"


def is_done(wanted: dict[str, Any]) -> bool:
    """Whether a cell with these settings is there."""
    return any(all(cell.get(k) == v for k, v in wanted.items()) for cell in read(wanted["part"]))


def keep(cell: dict[str, Any]) -> None:
    """Append a cell."""
    with (RESULTS / "cells.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(cell) + "\n")
    print(json.dumps(cell), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("instances", "classes"))
    parser.add_argument("--model", choices=tuple(MODELS), default="resnet10t", help="of instances")
    parser.add_argument("--dim", type=int, default=256, help="of instances")
    parser.add_argument("--images", type=int, default=20_000, help="of instances")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of instances")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of classes")
    parser.add_argument("--only", nargs="*", help="names of cells")
    parser.add_argument("--runs", type=Path, default=Path("runs/kerdock"))
    parser.add_argument("--table", action="store_true", help="write the tables of the cells that are done")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.part == "instances":
        for name in args.only or INSTANCES:
            wanted = {"part": args.part, "name": name, "model": args.model, "dim": args.dim}
            wanted |= {"images": args.images, "epochs": args.epochs, "seed": args.seed}
            if not is_done(wanted):
                keep({**wanted, **instance_cell(name, args)})
    if args.part == "classes":
        data = zoo_features()
        for seed in args.seeds:
            for dim in (16, 64):
                for name in args.only or HEADS:
                    wanted = {"part": args.part, "name": name, "dim": dim, "epochs": args.epochs, "seed": seed}
                    if not is_done(wanted):
                        keep({**wanted, **class_cell(name, dim, seed, data, args)})
    if args.table:
        (RESULTS / "instances.md").write_text(instances_table(), encoding="utf-8")
        (RESULTS / "classes.md").write_text(classes_table(), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
