"""Classes that come later: base classes, then sessions of five classes with five images each (2302.03004's protocol).

What `training/incremental.py` runs. All heads are fitted on the same frozen features, and have one mean of each class
seen before for a memory. One more, "frame, with its backbone", is the head that the backbone was trained with.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from etf_zoo import FrameClassifier
from etf_zoo.layers.cosine import learn_prototypes
from etf_zoo.layers.necks import mlp_neck
from etf_zoo.losses import DotRegressionLoss
from etf_zoo.trainer.tune.incremental import fit_neck
from training.experiments.fscil_features import BATCH, LENGTH, PROTOCOLS, RESULTS, append

__all__ = ["METHODS", "best_rate", "choose", "run", "sessions", "table"]

SHOTS, WAYS = 5, 5
STEPS = 100  # of a session
HIDDEN, NECK = 512, 256  # width within the neck, and of its output
TRIALS = (100, 101)  # seeds that are chosen by
DOT, TOGETHER = "frame, dot regression", "frame, with its backbone"
COMMAND, COMMAND_RATE = "frame, neck of finetune", 1e-3  # as etf-zoo has it, and the rate of its fit to base classes
FRAMES = ("frame", DOT)  # by what fits the neck to the base classes; the first by cross-entropy over all directions
FITTED = (*FRAMES, "learned linear", "learned cosine")  # on frozen features; each has rates of its own
METHODS = (*FRAMES, TOGETHER, "nearest mean", "learned linear", "learned cosine")


# ------------------------------------------------------------------------------------------------------------- methods


class Head:
    """A classifier on frozen features that learns base classes, then sessions, by one of `METHODS`."""

    def __init__(self, method: str, width: int, base: int, total: int, seed: int):
        torch.manual_seed(seed)
        self.method, self.base = method, base
        self.means = torch.zeros(0, width)
        self.shift, self.scale = torch.zeros(width), torch.ones(width)
        self.net: Any = None
        room: dict[str, Any] = {"num_classes": base, "reserve": total - base}
        if method in (TOGETHER, COMMAND):
            self.net = FrameClassifier(width, **room, neck="mlp")
        elif method in (*FRAMES, "learned cosine"):
            neck: Any = mlp_neck(width, NECK, hidden_features=HIDDEN)
            neck.out_features = NECK  # where the head looks for its frame's width
            self.net = FrameClassifier(width, **room, neck=neck)
            if method == "learned cosine":
                self.net = learn_prototypes(nn.Sequential(self.net))[0]  # type: ignore[index]
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

    def fit_base(self, x: Tensor, y: Tensor, rate: float) -> None:
        """Two epochs over the base classes' images, or 200 steps; and their means for the memory."""
        if self.method in FITTED:
            self.shift, self.scale = x.mean(0), x.std(0).clamp(min=1e-6)
        x = self.scaled(x)
        self.means = means_of(x, y, self.base)
        if self.method not in (*FITTED, COMMAND):
            return
        order = torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=rate, weight_decay=0.05)
        count = max(1, len(x) // BATCH)
        epochs = max(2, 200 // count)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * count)
        self.net.train()
        for _ in range(epochs):
            rows = torch.randperm(len(x), generator=order)[: count * BATCH]
            for part in rows.chunk(count):
                loss = self._base_loss(x[part], y[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self.net.eval()

    def _base_loss(self, x: Tensor, y: Tensor) -> Tensor:
        if not isinstance(self.net, FrameClassifier):
            return F.cross_entropy(self.net(x), y)
        embeddings = self.net.embed(x)
        if self.method == DOT:
            return DotRegressionLoss(feature_length=LENGTH)(embeddings, y, self.net.weight)
        return F.cross_entropy(self.net.scale() * embeddings @ self.net.weight.T, y)  # of classes to come, too

    def add(self, x: Tensor, y: Tensor, steps: int, rate: float) -> None:
        """A session: images of five classes that are numbered on."""
        x = self.scaled(x)
        old, count = len(self.means), int(y.max()) + 1
        before, self.means = self.means, torch.cat([self.means, means_of(x, y - old, count - old)])
        if isinstance(self.net, FrameClassifier):
            self.net.add_classes(count - old)
        if self.method in (*FRAMES, TOGETHER, COMMAND):
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


def based(method: str, data: dict[str, Tensor], base: int, total: int, seed: int, rate: float) -> Head:
    """A head that knows the base classes.

    One that was trained with its backbone may know more classes than `base`: their prototypes then come last, and those
    that no class had come next.
    """
    head = Head(method, data["train"].shape[1], base, total, seed)
    if method == TOGETHER:
        state = {k.removeprefix("head."): v for k, v in data.items() if k.startswith("head.")}
        rows, known = torch.arange(total), PROTOCOLS["cifar100"].base
        state["weight"] = state["weight"][torch.cat([rows[:base], rows[known:], rows[base:known]])]
        head.net.load_state_dict(state)
        head.net.eval()
    rows = data["train_labels"] < base
    head.fit_base(data["train"][rows], data["train_labels"][rows], rate)
    return head


# ------------------------------------------------------------------------------------------------------------ protocol


def run(data: dict[str, Tensor], head: Head, sessions: int, seed: int, *, steps: int = STEPS, rate: float) -> Any:
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


def sets(folder: Path) -> Iterator[tuple[str, str, int, dict[str, Tensor]]]:
    """Name of the data, of the backbone, the backbone's seed, and its features."""
    for file in sorted(folder.glob("*.safetensors")):
        source, backbone, seed = file.stem.split("-")
        if source in PROTOCOLS:
            yield source, backbone, int(seed), load_file(file)


def choosing_part(data: dict[str, Tensor], base: int) -> dict[str, Tensor]:
    """Base classes' training images alone: those held out of the backbone's training are what is judged by."""
    known = data["train_labels"] < base
    fitted, held = known & ~data["held"].bool(), known & data["held"].bool()
    x, y = data["train"], data["train_labels"]
    head = {key: value for key, value in data.items() if key.startswith("head.")}
    return {"train": x[fitted], "train_labels": y[fitted], "test": x[held], "test_labels": y[held], **head}


def best_rate(score: Callable[[float], float], start: float) -> tuple[float, float]:
    """The best of rates half a decade apart, and its score; tried are more until the best has a worse one on each side.

    Args:
        score: Of a rate; higher is better. Of equal ones the first tried counts, from the start outward.
        start: The rate to begin at. Seven decades about it are the limit.
    """
    tried = {step: score(start * 10 ** (step / 2)) for step in (0, -1, 1)}
    while True:
        best = max(tried, key=lambda step: tried[step])
        step = best - 1 if best == min(tried) else best + 1
        if step in tried or abs(step) > 7:
            return start * 10 ** (best / 2), tried[best]
        tried[step] = score(start * 10 ** (step / 2))


def rates_of(method: str, part: dict[str, Tensor], base: int, total: int) -> dict[str, float]:
    """Rates of a head's fit to the base classes and of its sessions, each with the top-1 that speaks for it."""

    def of_base(rate: float) -> float:
        head = based(method, part, base, total, TRIALS[0], rate)
        return accuracy(head, part["test"], part["test_labels"], base)

    found = {"base_rate": COMMAND_RATE} if method == COMMAND else {}
    if method in FITTED:  # of the others one is fitted already
        found["base_rate"], found["base_top1"] = best_rate(of_base, 1e-3)
    base_rate = found.get("base_rate", 0.0)
    heads = {seed: based(method, part, base - 15, total, seed, base_rate) for seed in TRIALS}

    def of_sessions(rate: float) -> float:
        found = [run(part, head, 3, seed, rate=rate)["top1"] for seed, head in heads.items()]
        return statistics.mean(top1 for stages in found for top1 in stages)

    found["rate"], found["top1"] = best_rate(of_sessions, 1e-3)
    return {key: float(f"{value:.4g}") for key, value in found.items()}


def choose(folder: Path) -> None:
    """Rates of each head: of its fit to the base classes by their held-out images; of sessions by sessions of base
    classes, of which fifteen take the part of new ones, by the mean accuracy of all stages over two draws.

    The head that was trained with its backbone knows those fifteen: they come with prototypes that were in reserve. On
    backbones that brought no head the one that `etf-zoo finetune --reserve` builds is chosen for too: what the default
    rate of `etf-zoo add-classes` rests on.
    Backbones of other seeds take what was chosen on the first. What was chosen before is not chosen again.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "sessions_chosen.json"
    chosen: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for source, backbone, number, data in sets(folder):
        if number:
            continue
        base = PROTOCOLS[source].base
        total, part = base + PROTOCOLS[source].sessions * WAYS, choosing_part(data, base)
        for method in (*FITTED, TOGETHER if "head.weight" in data else COMMAND):
            key = f"{source} {backbone} {method}"
            if key not in chosen:
                chosen[key] = rates_of(method, part, base, total)
                file.write_text(json.dumps(chosen, indent=1) + "\n")
                print(key, chosen[key], flush=True)


def measured() -> list[dict[str, Any]]:
    """Cells of `sessions`."""
    file = RESULTS / "sessions.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def sessions(folder: Path, seeds: int) -> None:
    """The protocol, by method and seed: of the images drawn, of the heads' start, and of a backbone trained here.

    Cells that are there are not measured again.
    """
    chosen = json.loads((RESULTS / "sessions_chosen.json").read_text())
    there = {(cell["data"], cell["backbone"], cell["method"], cell["seed"]) for cell in measured()}
    for source, backbone, number, data in sets(folder):
        protocol = PROTOCOLS[source]
        total = protocol.base + protocol.sessions * WAYS
        for method in METHODS:
            if method == TOGETHER and "head.weight" not in data:
                continue
            rates = chosen[f"{source} {backbone} {method}"] if method != "nearest mean" else {}
            for seed in range(seeds) if backbone == "imagenet" else [number]:
                if (source, backbone, method, seed) in there:
                    continue
                head = based(method, data, protocol.base, total, seed, rates.get("base_rate", 0.0))
                found = run(data, head, protocol.sessions, seed, rate=rates.get("rate", 1.0))
                cell = {"data": source, "backbone": backbone, "method": method, "seed": seed, **found}
                append(RESULTS / "sessions.jsonl", cell)
                print(cell, flush=True)


# --------------------------------------------------------------------------------------------------------------- table


def interval(values: list[float]) -> str:
    """Mean and, of more than one, the half width of its 95 % interval by Student's t."""
    mean, count = statistics.mean(values), len(values)
    if count < 2:
        return f"{mean:.1f}"
    half = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return f"{mean:.1f} ± {half:.1f}"


def table() -> str:
    """Means over seeds with 95 % intervals, then paired differences at the end: frames minus their rivals."""
    cells: dict[tuple[str, str], dict[str, dict[int, Any]]] = {}
    for cell in sorted(measured(), key=lambda cell: (cell["data"], cell["backbone"], METHODS.index(cell["method"]))):
        methods = cells.setdefault((cell["data"], cell["backbone"]), {})
        methods.setdefault(cell["method"], {})[cell["seed"]] = cell
    shown = ["| data, backbone | head | base | end | drop | average | old | new | seeds | after each session |"]
    shown += ["|---" * 10 + "|"]
    rivals = [method for method in METHODS if method not in FRAMES]
    pairs = ["| at the end, data, backbone: head | " + " | ".join(f"minus {m}" for m in rivals) + " |"]
    pairs += ["|---" * (1 + len(rivals)) + "|"]
    for (source, backbone), methods in cells.items():
        name, ends = f"{source}, {backbone.replace('_', ' ')}", {}
        for method, found in methods.items():
            own = list(found.values())
            ends[method] = {seed: cell["top1"][-1] for seed, cell in found.items()}
            stages = [statistics.mean(stage) for stage in zip(*(c["top1"] for c in own), strict=True)]
            average = interval([statistics.mean(c["top1"]) for c in own])
            old, new = (statistics.mean(c[key] for c in own) for key in ("old", "new"))
            columns = [name, method, interval([c["top1"][0] for c in own]), interval([*ends[method].values()])]
            columns += [f"{stages[0] - stages[-1]:.1f}", average, f"{old:.1f}", f"{new:.1f}", str(len(own))]
            shown.append("| " + " | ".join([*columns, " ".join(f"{stage:.1f}" for stage in stages)]) + " |")
        for frame in FRAMES:
            differences = [
                interval([ends[frame][seed] - end for seed, end in ends[m].items()]) if m in ends else "-"
                for m in rivals
            ]
            pairs.append("| " + " | ".join([f"{name}: {frame}", *differences]) + " |")
    return "\n".join([*shown, "", *pairs]) + "\n"
