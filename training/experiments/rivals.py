"""What people would run instead, on the same backbone weights and images: fastai, transformers' Trainer, timm's script.

`python training/experiments/rivals.py prepare FOLDER --data flowers17 --shots 5` writes an image folder (`train/CLASS`,
`val/CLASS`) and the backbone: as a checkpoint in timm's key order, and as a folder that transformers opens. Then

    python training/experiments/rivals.py fastai FOLDER --epochs 20
    python training/experiments/rivals.py transformers FOLDER --epochs 20
    python training/experiments/rivals.py commands FOLDER --epochs 20   (of timm's train.py and of etf-zoo)

Settings are each tool's documented defaults: fastai's `fine_tune`, the values of transformers' image classification
example (Trainer, rate 2e-5, batches of 8, random resized crops and flips), what timm's script does unless told. The
number of epochs is the same for all. fastai belongs into an environment of its own. A line of JSON is printed.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models import save_for_hf

MODEL = "tf_efficientnet_lite0"
STORED, SIZE = 192, 160  # pixels
PACKAGES = ("torch", "timm", "fastai", "transformers")


def prepare(folder: Path, data: str, shots: int, seed: int) -> None:
    """Write images and weights."""
    from etf_zoo.models.find import load_model
    from etf_zoo.trainer.data.subsets import few_shot_indices, load_images
    from etf_zoo.trainer.recipe.config import Data

    for split, name in (("train", "train"), ("test", "val")):
        images = load_images(Data(source=data, size=STORED, resident=True, val_split="test"), split)
        if shots and split == "train":
            images = images.subset(few_shot_indices(images.labels, shots, seed, images.label_names))
        for row in range(len(images)):
            place = folder / name / images.label_names[images.labels[row]].replace("/", "_") / f"{row}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.picture(row)).save(place)
    model = load_model(MODEL)
    torch.save(model.state_dict(), folder / "lite0.pth")
    save_for_hf(model, str(folder / "lite0"), safe_serialization="both")
    config = json.loads((folder / "lite0" / "config.json").read_text())
    config.pop("model_args", None)  # of which transformers would take the number of classes twice
    (folder / "lite0" / "config.json").write_text(json.dumps(config))


def run_fastai(folder: Path, epochs: int, seed: int) -> float:
    """fastai's `vision_learner` and `fine_tune`; top-1 in percent."""
    from fastai.vision.all import (  # type: ignore[import-not-found]  # an environment of its own
        ImageDataLoaders,
        Resize,
        accuracy,
        aug_transforms,
        set_seed,
        vision_learner,
    )

    set_seed(seed)
    loaders = ImageDataLoaders.from_folder(
        folder,
        train="train",
        valid="val",
        item_tfms=Resize(STORED),
        batch_tfms=aug_transforms(size=SIZE),
        num_workers=0,
    )
    overlay = {"file": str(folder / "lite0.pth")}
    learner = vision_learner(loaders, MODEL, metrics=accuracy, pretrained_cfg_overlay=overlay)
    with learner.no_bar():
        learner.fine_tune(epochs)
    return 100 * float(learner.validate()[1])


def run_transformers(folder: Path, epochs: int, seed: int) -> float:
    """transformers' Trainer with the values of its image classification example; top-1 in percent."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder
    from transformers import Trainer, TrainingArguments
    from transformers.models.timm_wrapper import TimmWrapperForImageClassification

    torch.manual_seed(seed)
    normalize = transforms.Normalize([0.5] * 3, [0.5] * 3)
    crops = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    whole = [transforms.Resize(SIZE), transforms.CenterCrop(SIZE)]
    train, val = (
        ImageFolder(str(folder / name), transforms.Compose([*first, transforms.ToTensor(), normalize]))
        for name, first in (("train", crops), ("val", whole))
    )
    model = TimmWrapperForImageClassification.from_pretrained(
        folder / "lite0", num_labels=len(train.classes), ignore_mismatched_sizes=True
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "transformers"),
        remove_unused_columns=False,
        learning_rate=2e-5,
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        save_strategy="no",
        report_to=[],
        seed=seed,
    )

    def collate(pairs: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
        images, labels = zip(*pairs, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}

    def count(found: Any) -> dict[str, float]:
        return {"top1": 100 * float(np.mean(found.predictions.argmax(1) == found.label_ids))}

    trainer = Trainer(model, arguments, collate, train, val, compute_metrics=count)
    trainer.train()
    return trainer.evaluate()["eval_top1"]


def commands(folder: Path, epochs: int, seed: int) -> list[str]:
    """Of timm's script and of etf-zoo."""
    classes = len(list((folder / "train").iterdir()))
    return [
        f"python train.py {folder} --model {MODEL} --pretrained --pretrained-path {folder / 'lite0.pth'} --num-classes "
        f"{classes} --img-size {SIZE} --crop-pct 1.0 --epochs {epochs} --batch-size 16 --device cpu --workers 0 "
        f"--seed {seed} --output {folder / 'timm'}",
        f"etf-zoo finetune --data {folder} --model {MODEL}_etf --sizes '[[0, {SIZE}]]' --epochs {epochs} --seed {seed} "
        f"--output {folder / 'etf-zoo'}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "fastai", "transformers", "commands"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", default="flowers17")
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "prepare":
        prepare(args.folder, args.data, args.shots, args.seed)
    elif args.what == "commands":
        print(*commands(args.folder, args.epochs, args.seed), sep="\n")
    else:
        torch.set_num_threads(1)
        began, spent = time.time(), time.process_time()
        top1 = {"fastai": run_fastai, "transformers": run_transformers}[args.what](args.folder, args.epochs, args.seed)
        found = {"tool": args.what, "folder": str(args.folder), "epochs": args.epochs, "seed": args.seed, "top1": top1}
        found |= {"seconds": round(time.time() - began, 1), "cpu_seconds": round(time.process_time() - spent, 1)}
        packages = [name for name in PACKAGES if name != "fastai" or args.what == "fastai"]
        print(json.dumps({**found, "versions": {name: version(name) for name in packages}}))


if __name__ == "__main__":
    main()
