"""Classes that come later: base classes, then sessions of five classes with five images each (2302.03004's protocol).

    python training/experiments/fscil.py --part base --features FOLDER [--loss cross_entropy] [--seed 0]
    python training/experiments/fscil.py --part photos --features FOLDER
    python training/experiments/fscil.py --part choose --features FOLDER
    python training/experiments/fscil.py --part sessions --features FOLDER
    python training/experiments/fscil.py --table

`base` trains a small backbone on the first 60 classes of CIFAR-100, whose split is our data's own and not the official
one, and writes its features. `photos` writes those of EfficientNet-lite0 with ImageNet weights for `cub50` and
`grocery`; the backbone then knows more than the base classes. `choose` picks the rate of each method on base
classes alone: fifteen of them take the part of new ones, and images held out of training judge. `sessions` draws five
images of each new class by seed and fits each head, all on the same frozen features and with one mean of each class
seen before for a memory. Results go to `training/results/later/`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from etf_zoo import FrameClassifier
from etf_zoo.layers.cosine import learn_prototypes
from etf_zoo.losses import DotRegressionLoss
from etf_zoo.models.find import load_model
from etf_zoo.trainer.data.batches import load_split
from etf_zoo.trainer.data.resident import Split
from etf_zoo.trainer.recipe.config import Data
from etf_zoo.trainer.tune.incremental import fit_neck
from training.experiments.later_features import features_of
from training.experiments.later_features import open_rows as open_images

RESULTS = Path("training/results/later")
SHOTS, WAYS = 5, 5
EPOCHS, BATCH = 4, 128
NECK = 256  # features between neck and prototypes


@dataclass(frozen=True)
class Protocol:
    """Which classes are there from the start, and how many sessions of five follow."""

    base: int
    sessions: int


PROTOCOLS = {"cifar100": Protocol(60, 8), "cub50": Protocol(30, 4), "grocery": Protocol(51, 6)}
GRID = [(100, rate) for rate in (1e-3, 3e-3, 1e-2)]  # steps and rate of a session
TRIALS = (100, 101)  # seeds that are chosen by
METHODS = ("frame", "nearest mean", "learned linear", "learned cosine")


# ------------------------------------------------------------------------------------------------- features, once a set


class SmallNet(ResNet):
    """A ResNet of four blocks, 32 to 256 channels, with a 3x3 stem of stride 2: what two cores can train."""

    def __init__(self):
        block: Any = BasicBlock
        super().__init__(block, (1, 1, 1, 1), num_classes=0, channels=(32, 64, 128, 256), stem_width=32)
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.maxpool = nn.Identity()
        self.layer1 = nn.Sequential(BasicBlock(32, 32))


def prepared(images: np.ndarray | Tensor) -> Tensor:
    """uint8 `(B, H, W, 3)` to `(B, 3, H, W)` floats about zero."""
    x = torch.as_tensor(images).permute(0, 3, 1, 2).float()
    return ((x - 127.5) / 64).contiguous(memory_format=torch.channels_last)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to four pixels, half of them mirrored."""
    size, x = x.shape[-1], F.pad(x, (4, 4, 4, 4))
    shifts = torch.randint(0, 9, (len(x), 2), generator=generator).tolist()
    mirrored = (torch.rand(len(x), generator=generator) < 0.5).tolist()
    rows = [image[:, i : i + size, j : j + size] for image, (i, j) in zip(x, shifts, strict=True)]
    rows = [row.flip(-1) if flip else row for row, flip in zip(rows, mirrored, strict=True)]
    return torch.stack(rows).contiguous(memory_format=torch.channels_last)


def train_base(loss_name: str, seed: int, folder: Path) -> None:
    """Train the backbone on the base classes, behind a neck and a frame with room; write features of all images."""
    data = Data(source="cifar100", label_column="fine_label", size=32)
    train, test = (load_split(data, split) for split in ("train", "test"))
    if not isinstance(train, Split) or not isinstance(test, Split):
        raise TypeError("CIFAR-100 fits memory.")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net: Any = SmallNet().to(memory_format=torch.channels_last)
    base, total = PROTOCOLS["cifar100"].base, 100
    head = FrameClassifier(256, base, reserve=total - base, neck="mlp")
    rows = np.flatnonzero(train.labels < base)
    parameters = [*net.parameters(), *head.parameters()]
    steps = EPOCHS * (len(rows) // BATCH)
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.15)
    regression, started = DotRegressionLoss(feature_length=10.0), time.time()
    for epoch in range(EPOCHS):
        order = torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)].numpy()
        right = seen = 0
        net.train()
        head.train()
        for first in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[first : first + BATCH]
            images, labels = augmented(prepared(train.images[batch]), generator), torch.from_numpy(train.labels[batch])
            embeddings = head.embed(net(images))
            logits = head.scale() * embeddings @ head.weight.T  # of all directions, those in reserve too
            if loss_name == "cross_entropy":
                loss = F.cross_entropy(logits, labels, label_smoothing=0.0)
            else:
                loss = regression(embeddings, labels, head.weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right, seen = right + int((logits[:, :base].argmax(1) == labels).sum()), seen + len(labels)
        print(f"epoch {epoch + 1}: {100 * right / seen:.1f} % in training, {time.time() - started:.0f} s", flush=True)
    net.eval()
    head.eval()

    @torch.inference_mode()
    def features(images: np.ndarray) -> Tensor:
        return torch.cat([net(prepared(images[i : i + 500])) for i in range(0, len(images), 500)])

    found = {
        "train": features(train.images),
        "train_labels": torch.from_numpy(train.labels),
        "test": features(test.images),
        "test_labels": torch.from_numpy(test.labels),
    }
    with torch.inference_mode():
        known = found["test_labels"] < base
        top1 = (head(found["test"][known]).argmax(1) == found["test_labels"][known]).float().mean()
    print(f"base classes, as trained: {100 * top1:.2f} %")
    save_file(found, folder / f"cifar100-{loss_name}-{seed}.safetensors")
    about = {"loss": loss_name, "seed": seed, "epochs": EPOCHS, "base_top1": 100 * top1.item()}
    append(RESULTS / "sessions_base.jsonl", {**about, "minutes": round((time.time() - started) / 60, 1)})


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
            part = features_of(model, open_images(Data(source=source), split, resident=True))
            found |= {split: part["features"], f"{split}_labels": part["labels"]}
        save_file(found, file)
        print(file, flush=True)


# ------------------------------------------------------------------------------------------------------------- methods


class Head:
    """A classifier on frozen features that learns base classes, then sessions, by one of `METHODS`."""

    def __init__(self, method: str, width: int, base: int, total: int, seed: int):
        torch.manual_seed(seed)
        self.method, self.base = method, base
        self.means = torch.zeros(0, width)
        self.shift, self.scale = torch.zeros(width), torch.ones(width)
        self.net: Any = None
        if method == "frame":
            self.net = FrameClassifier(width, base, reserve=total - base, neck="mlp", neck_features=NECK)
        elif method == "learned cosine":
            frame = FrameClassifier(width, base, reserve=total - base, neck="mlp", neck_features=NECK)
            holder = nn.Sequential(frame)
            self.net = learn_prototypes(holder)[0]  # type: ignore[index]
        elif method == "learned linear":
            self.net = nn.Linear(width, total)

    def scaled(self, x: Tensor) -> Tensor:
        """Features as the head takes them: each standardized by the base classes' images, raw for class means."""
        return (x - self.shift) / self.scale

    def logits(self, x: Tensor, classes: int) -> Tensor:
        """Of the first classes, from scaled features."""
        if self.net is None:
            return F.normalize(x, dim=1) @ F.normalize(self.means, dim=1).T
        return self.net(x)[:, :classes]

    def fit_base(self, x: Tensor, y: Tensor) -> None:
        """Cross-entropy over the base classes' images, two epochs or 200 steps, and their means for the memory."""
        if self.net is not None:
            self.shift, self.scale = x.mean(0), x.std(0).clamp(min=1e-6)
        x = self.scaled(x)
        self.means = means_of(x, y, self.base)
        if self.net is None:
            return
        order = torch.Generator().manual_seed(0)
        rate = 1e-2 if self.method == "learned linear" else 1e-3
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=rate, weight_decay=0.05)
        count = max(1, len(x) // BATCH)
        epochs = max(2, 200 // count)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * count)
        self.net.train()
        for _ in range(epochs):
            rows = torch.randperm(len(x), generator=order)[: count * BATCH]
            for part in rows.chunk(count):
                loss = F.cross_entropy(self._of_all(x[part]), y[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self.net.eval()

    def _of_all(self, x: Tensor) -> Tensor:
        """Logits of all directions, those of classes to come too, as in the training of the backbone."""
        if isinstance(self.net, FrameClassifier):
            return self.net.scale() * self.net.embed(x) @ self.net.weight.T
        return self.net(x)

    def add(self, x: Tensor, y: Tensor, steps: int, rate: float) -> None:
        """A session: images of five classes that are numbered on."""
        x = self.scaled(x)
        old, count = len(self.means), int(y.max()) + 1
        before, self.means = self.means, torch.cat([self.means, means_of(x, y - old, count - old)])
        if isinstance(self.net, FrameClassifier):
            self.net.add_classes(count - old)
        if self.method == "frame":
            fit_neck(self.net, before, x, y, steps=steps, rate=rate)
        elif self.net is not None:
            inputs, labels = torch.cat([before, x]), torch.cat([torch.arange(old), y])
            weights = 1 / torch.bincount(labels, minlength=count).float()  # a class weighs as much as another
            optimizer = torch.optim.AdamW(self.net.parameters(), lr=rate, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for _ in range(steps):
                loss = F.cross_entropy(self.logits(inputs, count), labels, weights)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()


def means_of(x: Tensor, y: Tensor, count: int) -> Tensor:
    return torch.stack([x[y == k].mean(0) for k in range(count)])


@torch.no_grad()
def accuracy(head: Head, x: Tensor, y: Tensor, classes: int) -> float:
    return 100 * (head.logits(head.scaled(x), classes).argmax(1) == y).float().mean().item()


def based(method: str, data: dict[str, Tensor], base: int, total: int, seed: int) -> Head:
    """A head that knows the base classes."""
    head = Head(method, data["train"].shape[1], base, total, seed)
    rows = data["train_labels"] < base
    head.fit_base(data["train"][rows], data["train_labels"][rows])
    return head


# ------------------------------------------------------------------------------------------------------------ protocol


def run(data: dict[str, Tensor], head: Head, sessions: int, seed: int, *, steps: int, rate: float) -> Any:
    """Top-1 on all classes seen, of a head that knows the base classes and after each session; and at the end on both.

    The head is left as it was.
    """
    head, base = copy.deepcopy(head), head.base
    generator = np.random.default_rng(seed)
    x, y, tested, truth = data["train"], data["train_labels"], data["test"], data["test_labels"]
    top1 = [accuracy(head, tested[truth < base], truth[truth < base], base)]
    for session in range(sessions):
        first = base + session * WAYS
        rows = [generator.permutation(np.flatnonzero((y == k).numpy()))[:SHOTS] for k in range(first, first + WAYS)]
        chosen = torch.from_numpy(np.concatenate(rows))
        head.add(x[chosen], y[chosen], steps, rate)
        known = truth < first + WAYS
        top1.append(accuracy(head, tested[known], truth[known], first + WAYS))
    classes = base + sessions * WAYS
    old, new = truth < base, (truth >= base) & (truth < classes)
    return {
        "top1": [round(value, 2) for value in top1],
        "old": round(accuracy(head, tested[old], truth[old], classes), 2),
        "new": round(accuracy(head, tested[new], truth[new], classes), 2),
    }


def sets(folder: Path) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Name of the data, of the backbone, and its features."""
    for file in sorted(folder.glob("*.safetensors")):
        source, backbone = file.stem.split("-", 1)
        if source in PROTOCOLS:
            yield source, backbone, load_file(file)


def choosing_part(data: dict[str, Tensor], base: int) -> dict[str, Tensor]:
    """Base classes' training images alone: a fifth of each class is what is judged by."""
    x, y = data["train"][data["train_labels"] < base], data["train_labels"][data["train_labels"] < base]
    held = torch.zeros(len(y), dtype=torch.bool)
    generator = torch.Generator().manual_seed(7)
    for k in range(base):
        rows = (y == k).nonzero()[:, 0]
        held[rows[torch.randperm(len(rows), generator=generator)[: max(1, len(rows) // 5)]]] = True
    return {"train": x[~held], "train_labels": y[~held], "test": x[held], "test_labels": y[held]}


def choose(folder: Path) -> None:
    """The rate of each method on each set, by the mean accuracy of all sessions over two draws."""
    chosen: dict[str, Any] = {}
    for source, backbone, data in sets(folder):
        base = PROTOCOLS[source].base
        part = choosing_part(data, base)
        for method in METHODS:
            heads = {seed: based(method, part, base - 15, base, seed) for seed in TRIALS}
            scores = {}
            for steps, rate in GRID if method != "nearest mean" else GRID[:1]:
                found = [run(part, head, 3, seed, steps=steps, rate=rate)["top1"] for seed, head in heads.items()]
                scores[steps, rate] = statistics.mean(value for top1 in found for value in top1)
            steps, rate = max(scores, key=lambda key: scores[key])
            chosen[f"{source} {backbone} {method}"] = {
                "steps": steps,
                "rate": rate,
                "top1": round(scores[steps, rate], 2),
            }
            print(source, backbone, method, chosen[f"{source} {backbone} {method}"], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "sessions_chosen.json").write_text(json.dumps(chosen, indent=1) + "\n")


def sessions(folder: Path, seeds: int) -> None:
    """The protocol, by method and seed (of the images drawn and of the heads' start)."""
    chosen = json.loads((RESULTS / "sessions_chosen.json").read_text())
    (RESULTS / "sessions.jsonl").unlink(missing_ok=True)
    for source, backbone, data in sets(folder):
        protocol = PROTOCOLS[source]
        total = protocol.base + protocol.sessions * WAYS
        for method in METHODS:
            settings = chosen[f"{source} {backbone} {method}"]
            for seed in range(seeds):
                head = based(method, data, protocol.base, total, seed)
                found = run(data, head, protocol.sessions, seed, steps=settings["steps"], rate=settings["rate"])
                cell = {"data": source, "backbone": backbone, "method": method, "seed": seed, **found}
                append(RESULTS / "sessions.jsonl", cell)
                print(cell, flush=True)


def append(file: Path, entry: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


def table() -> str:
    """Means over seeds, and their standard deviation at the end."""
    cells = [json.loads(line) for line in (RESULTS / "sessions.jsonl").read_text().splitlines()]
    lines = ["| data, backbone | head | base | end | drop | average | base classes at the end | new ones | seeds |"]
    lines += ["|---" * 9 + "|"]
    for source, backbone in dict.fromkeys((c["data"], c["backbone"]) for c in cells):
        for method in METHODS:
            own = [c for c in cells if (c["data"], c["backbone"], c["method"]) == (source, backbone, method)]
            if not own:
                continue
            ends = [c["top1"][-1] for c in own]
            base = statistics.mean(c["top1"][0] for c in own)
            mean = statistics.mean(statistics.mean(c["top1"]) for c in own)
            old, new = (statistics.mean(c[key] for c in own) for key in ("old", "new"))
            spread = f" ± {statistics.stdev(ends):.1f}" if len(ends) > 1 else ""
            end = statistics.mean(ends)
            lines.append(
                f"| {source}, {backbone} | {method} | {base:.1f} | {end:.1f}{spread} | {base - end:.1f} | {mean:.1f} | "
                f"{old:.1f} | {new:.1f} | {len(own)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("base", "photos", "choose", "sessions"))
    parser.add_argument("--features", type=Path)
    parser.add_argument("--loss", choices=("cross_entropy", "dot_regression"), default="cross_entropy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.part == "base":
        train_base(args.loss, args.seed, args.features)
    elif args.part == "photos":
        photo_features(args.features)
    elif args.part == "choose":
        choose(args.features)
    elif args.part == "sessions":
        sessions(args.features, args.seeds)
    if args.table:
        (RESULTS / "sessions.md").write_text(table())
        print(table())


if __name__ == "__main__":
    main()
