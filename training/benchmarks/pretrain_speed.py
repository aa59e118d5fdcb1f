"""Training speed of this engine beside timm's training script, on the same images in one run.

    ETF_ZOO_DATA=... python training/benchmarks/pretrain_speed.py --out training/benchmarks/pretrain_speed_cpu.json

Ours is the engine as `training/pretrain.py` runs it: images decoded once, augmentation of whole batches, channels_last.
The peer is what timm's `train.py` does with the same model, batch, size, augmentation (random resized crop and flip),
precision and optimizer: `create_dataset` on a folder of image files, `create_loader` (PIL in worker processes,
prefetcher) and its step. The script's default memory format is contiguous; `--channels-last` is an option of it, so
both are measured and the ratio to each is given. The three take turns, a few rounds each; the first steps of a turn are
not counted. Workers of the peer stop between its turns.

The plain learned head is trained on both sides. `twin` is our engine with the fixed frame, whose ratio to ours with the
learned head says what a frame costs an epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter
from torch import nn

from etf_zoo.trainer.data.augment import IMAGENET
from etf_zoo.trainer.data.batches import Split, load_split
from etf_zoo.trainer.recipe.config import Data, Optim, Recipe
from etf_zoo.trainer.run.run import Run

OPTIM = Optim(name="sgd", lr=0.1, weight_decay=4e-5, warmup_epochs=0)


def write_folder(split: Split, folder: Path) -> None:
    """The images as JPEG files, `CLASS/NUMBER.jpg`, what timm's image folder reads."""
    for i, label in enumerate(split.labels):
        file = folder / f"{label:04d}" / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(split.picture(i))).save(buffer, "JPEG", quality=90)
        file.write_bytes(buffer.getvalue())


class Peer:
    """timm's pipeline and loop."""

    def __init__(self, folder: Path, args: argparse.Namespace, model: str, size: int, channels_last: bool):
        self.args, self.channels_last = args, channels_last
        self.device = torch.device(args.device)
        torch.manual_seed(0)
        net: Any = timm.create_model(model, num_classes=args.num_classes)
        self.model: nn.Module = net.to(self.device)
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = create_optimizer_v2(
            self.model, opt=OPTIM.name, lr=OPTIM.lr, weight_decay=OPTIM.weight_decay, momentum=OPTIM.momentum
        )
        images: Any = create_dataset("", root=str(folder))
        self.loader = create_loader(
            images,
            input_size=(3, size, size),
            batch_size=args.batch,
            is_training=True,
            scale=(0.35, 1.0),
            ratio=(0.75, 1.3333),
            hflip=0.5,
            color_jitter=0.0,
            interpolation="bilinear",
            mean=IMAGENET.mean,
            std=IMAGENET.std,
            num_workers=args.workers,
            device=self.device,
            persistent_workers=False,
        )

    def steps(self) -> Iterator[int]:
        """Images of each step, once it is done."""
        losses = AverageMeter()
        self.model.train()
        loss_fn = nn.CrossEntropyLoss()
        for images, labels in self.loader:
            if self.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
                loss = loss_fn(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            losses.update(loss.item(), len(images))
            yield len(images)


class Ours:
    """The engine, with a learned head or a frame."""

    def __init__(self, split: Split, folder: Path, args: argparse.Namespace, model: str, size: int, head: str):
        recipe = Recipe(
            output=str(folder),
            model=f"{model}_etf",
            head=head,
            data=Data(size=split.images.shape[1]),
            optim=OPTIM,
            epochs=1_000,
            batch_size=args.batch,
            sizes=[[0, size]],
            label_smoothing=0.0,
            precision=args.precision,
        )
        self.run = Run(recipe, split, split)
        self.epoch = 0

    def steps(self) -> Iterator[int]:
        self.run.model.train()
        self.epoch += 1
        for number, (images, labels) in enumerate(self.run.batches(self.epoch, 0)):
            self.run.stepper.step(number, images, labels)
            yield len(labels)


def rate(side: Peer | Ours, steps: int, warm: int) -> float:
    """Images a second over some steps, the first ones left out."""
    turns = side.steps()
    for _ in itertools.islice(turns, warm):
        pass
    began, images = time.perf_counter(), 0
    for count in itertools.islice(turns, steps):
        images += count
    if torch.cuda.is_available():  # the engine does not wait for each step
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    turns.close()  # type: ignore[attr-defined]
    return images / seconds


def compare(split: Split, args: argparse.Namespace, model: str) -> dict[str, Any]:
    """All sides on one model, taking turns."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        write_folder(split, images)
        sides: dict[str, Peer | Ours] = {
            "ours": Ours(split, Path(folder) / "ours", args, model, args.size, "learned"),
            "twin": Ours(split, Path(folder) / "twin", args, model, args.size, "frame"),
            "timm": Peer(images, args, model, args.size, channels_last=False),
            "timm, channels_last": Peer(images, args, model, args.size, channels_last=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, side in sides.items():
                rates[name].append(rate(side, args.steps, args.warm))
    found: dict[str, Any] = {"model": model, "images_per_second": rates}
    for peer in ("timm", "timm, channels_last"):
        found[f"ours / {peer}"] = statistics.median(a / b for a, b in zip(rates["ours"], rates[peer], strict=True))
    found["step time, twin / learned"] = statistics.median(
        a / b for a, b in zip(rates["ours"], rates["twin"], strict=True)
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenetv3_small_100"])
    parser.add_argument("--data", default="tiny_imagenet")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=8192, help="so many of the training images")
    parser.add_argument("--steps", type=int, default=40, help="counted in a turn")
    parser.add_argument("--warm", type=int, default=4, help="not counted at the start of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of the peer's loader")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if (args.steps + args.warm) * args.batch > args.images:
        parser.error(f"{args.steps + args.warm} steps of {args.batch} images do not fit into {args.images} images")
    whole = cast(Split, load_split(Data(args.data, size=64), "train"))  # resident, being small
    split = whole.subset(np.random.default_rng(0).permutation(len(whole))[: args.images])
    args.num_classes = len(split.label_names)
    results = []
    for model in args.models:
        results.append(compare(split, args, model))
        print(json.dumps(results[-1], indent=1), flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    report = {
        "command": "python training/benchmarks/pretrain_speed.py " + " ".join(sys.argv[1:]),
        "machine": {
            "device": device,
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "optimizer": dataclasses.asdict(OPTIM),
        "results": results,
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
