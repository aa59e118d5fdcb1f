"""Features that `training/incremental.py` fits heads on.

`train_base` trains a small backbone on the first 60 classes of CIFAR-100, whose split is our data's own and not the
official one, behind a neck and a frame with room for all 100. Of each base class 50 training images are held out:
rates are chosen by them. `photo_features` takes EfficientNet-lite0 with ImageNet weights for `cub50` and `grocery`;
that backbone knows more than the base classes. A file is named `DATA-BACKBONE-SEED.safetensors`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from etf_zoo import FrameClassifier
from etf_zoo.losses import DotRegressionLoss
from etf_zoo.models.find import load_model
from etf_zoo.trainer.data.augment import augment, normalize
from etf_zoo.trainer.data.batches import load_split
from etf_zoo.trainer.data.resident import Split
from etf_zoo.trainer.recipe.config import Augment, Data
from training.experiments.later_features import features_of, open_rows

__all__ = ["LOSSES", "PROTOCOLS", "RESULTS", "SmallNet", "append", "held_out", "photo_features", "train_base"]

RESULTS = Path("training/results/later")
LOSSES = ("cross_entropy", "dot_regression")
BATCH = 128
SIZES = (24, 24, 24, 24, 24, 32, 32)  # pixels, by epoch
OPTIMIZER, RATE, DECAY = "muon", 0.02, 0.05  # ahead of AdamW and SGD in two epochs, on held-out images
AUGMENT = Augment(crop_scale=[0.5, 1.0])
LENGTH = 10.0  # of dot regression's features: about what cross-entropy's scale does for its gradient


@dataclass(frozen=True)
class Protocol:
    """Which classes are there from the start, and how many sessions of five follow."""

    base: int
    sessions: int


PROTOCOLS = {"cifar100": Protocol(60, 8), "cub50": Protocol(30, 4), "grocery": Protocol(51, 6)}


class SmallNet(ResNet):
    """A ResNet of four blocks, 32 to 256 channels, with a 3x3 stem of stride 2: what two cores can train."""

    def __init__(self):
        block: Any = BasicBlock
        super().__init__(block, (1, 1, 1, 1), num_classes=0, channels=(32, 64, 128, 256), stem_width=32)
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.maxpool = nn.Identity()
        self.layer1 = nn.Sequential(BasicBlock(32, 32))


def held_out(labels: NDArray[np.int64], base: int, most: int = 50) -> NDArray[np.bool_]:
    """Which training images judge choices: of each base class a fifth, at most so many; the same for every seed."""
    held = np.zeros(len(labels), dtype=bool)
    generator = np.random.default_rng(7)
    for k in range(base):
        rows = np.flatnonzero(labels == k)
        held[generator.permutation(rows)[: min(most, max(1, len(rows) // 5))]] = True
    return held


def _prepared(images: NDArray[np.uint8]) -> Tensor:
    """uint8 `(B, H, W, 3)` to `(B, 3, H, W)`, channels last in memory."""
    return torch.tensor(images).permute(0, 3, 1, 2)


def train_base(loss_name: str, seed: int, folder: Path) -> float:
    """Train the backbone and a head with room on the base classes; write features of all images and the head.

    Returns:
        Top-1 (%) on the held-out images of the base classes, as trained.
    """
    data, base, total = Data(source="cifar100", label_column="fine_label", size=32), PROTOCOLS["cifar100"].base, 100
    train, test = (load_split(data, split) for split in ("train", "test"))
    if not isinstance(train, Split) or not isinstance(test, Split):
        raise TypeError("CIFAR-100 fits memory.")
    torch.manual_seed(seed)
    generator, regression = torch.Generator().manual_seed(seed), DotRegressionLoss(feature_length=LENGTH)
    net: Any = SmallNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    head = FrameClassifier(net.num_features, base, reserve=total - base, neck="mlp")
    held = held_out(train.labels, base)
    rows = np.flatnonzero((train.labels < base) & ~held)
    model, steps = nn.ModuleList([net, head]), len(rows) // BATCH
    optimizer: Any = create_optimizer_v2(model, opt=OPTIMIZER, lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps * len(SIZES), pct_start=0.15, cycle_momentum=False
    )
    started = time.time()
    for epoch, size in enumerate(SIZES):
        order = rows[torch.randperm(len(rows), generator=generator).numpy()]
        right = 0
        model.train()
        for batch in order[: steps * BATCH].reshape(steps, BATCH):
            labels = torch.from_numpy(train.labels[batch])
            images = normalize(augment(_prepared(train.images[batch]), AUGMENT, size, generator))
            with torch.autocast("cpu", torch.bfloat16):
                features = net(images.contiguous(memory_format=torch.channels_last))
            embeddings = head.embed(features.float())
            logits = head.scale() * embeddings @ head.weight.T  # of all directions, those in reserve too
            if loss_name == "cross_entropy":
                loss = F.cross_entropy(logits, labels)
            else:
                loss = regression(embeddings, labels, head.weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += int((logits.detach()[:, :base].argmax(1) == labels).sum())
        rate = f"{100 * right / steps / BATCH:.1f} % in training, {time.time() - started:.0f} s"
        print(f"epoch {epoch + 1}, {size} px: {rate}", flush=True)
    minutes = (time.time() - started) / 60
    model.eval()

    @torch.inference_mode()
    def features_in(images: NDArray[np.uint8]) -> Tensor:
        return torch.cat([net(normalize(_prepared(images[i : i + 500]).float())) for i in range(0, len(images), 500)])

    found = {
        "train": features_in(train.images),
        "train_labels": torch.from_numpy(train.labels),
        "held": torch.from_numpy(held),
        "test": features_in(test.images),
        "test_labels": torch.from_numpy(test.labels),
    }
    about: dict[str, Any] = {"loss": loss_name, "seed": seed, "minutes": round(minutes, 1)}
    with torch.inference_mode():
        for split, chosen in (("train", found["held"]), ("test", found["test_labels"] < base)):
            right = head(found[split][chosen]).argmax(1) == found[f"{split}_labels"][chosen]
            about["held_top1" if split == "train" else "base_top1"] = round(100 * right.float().mean().item(), 2)
    stored = {f"head.{name}": value.contiguous() for name, value in head.state_dict().items()}
    save_file({**found, **stored}, folder / f"cifar100-{loss_name}-{seed}.safetensors")
    append(RESULTS / "sessions_base.jsonl", about)
    print(about, flush=True)
    return about["held_top1"]


def photo_features(folder: Path) -> None:
    """Features of a pretrained backbone for the sets of photographs."""
    model = load_model("tf_efficientnet_lite0_etf", pretrained=True)
    model.pretrained_cfg["input_size"] = (3, 160, 160)
    for source in ("cub50", "grocery"):
        file = folder / f"{source}-imagenet-0.safetensors"
        if file.is_file():
            continue
        found = {}
        for split in ("train", "test"):
            part = features_of(model, open_rows(Data(source=source), split, resident=True))
            found |= {split: part["features"], f"{split}_labels": part["labels"]}
        found["held"] = torch.from_numpy(held_out(found["train_labels"].numpy(), PROTOCOLS[source].base))
        save_file(found, file)
        print(file, flush=True)


def append(file: Path, entry: dict[str, Any]) -> None:
    """Add a line of JSON to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")
