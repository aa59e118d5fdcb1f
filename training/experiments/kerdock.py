"""Does a Kerdock frame learn? Real images, beside a learned matrix and random unit vectors.

    python training/experiments/kerdock.py --part choose
    python training/experiments/kerdock.py --part instances --seeds 0 1
    python training/experiments/kerdock.py --part features --seeds 0 1 2
    python training/experiments/kerdock.py --part choose_classes
    python training/experiments/kerdock.py --part classes
    python training/experiments/kerdock.py --table

`instances`: every training image is a class of its own, which is a self-supervised pretraining; the backbone's features
are then probed, beside those of supervised pretraining on the same images for as many steps, and of the untrained
network. `choose` finds rate and scale for it on fewer images, by nearest neighbors among training images that nothing
was trained on. `features`: the 200 classes of Tiny ImageNet in 16 and 64 dimensions, where no simplex fits: an MLP
neck and a head are trained on the features of a trained model, which saw these classes; so the figures say how well the
dimensions serve the classes, not how well a backbone learns. `classes`: the same in 16 dimensions, with the backbone
trained too, on a quarter of the images, each head at the rate and scale that `choose_classes` found for it on fewer
images, by training images that nothing was trained on.

Each cell is one training run, appended to `cells.jsonl`; one that is there is not run again, a stopped one goes on.
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
from etf_zoo.trainer.run import checkpoint
from etf_zoo.trainer.run.checkpoint import CHECKPOINTS
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.tune.probes import backbone_features, fit_probe
from training.experiments.transfer_report import markdown

RESULTS = Path("training/results/kerdock")
SETS = {"flowers17": 64, "cub50": 64, "grocery": 64, "tiny_imagenet": 32, "cifar100": 32}  # size they are probed at
BY_PROBE = {"linear_probe": ("flowers17", "cub50", "grocery"), "knn_20": tuple(SETS)}
HELD_OUT = {"tiny_imagenet": "validation"}  # elsewhere `test`
STRENGTH = 1e-2  # scikit-learn's C, for all models and sets alike
JUDGES = {"choose": "held_out_knn", "choose_classes": "held_out_top1"}
BANK, JUDGED = range(80_000, 90_000), range(94_000, 100_000)  # training images, shuffled, that nothing is trained on

MODEL = "resnet18"
ZOO = "local-dir:model_cards/resnet18_control.e23_tiny"  # whose features the heads of `features` are trained on
FEATURE_IMAGES, VAL_IMAGES = 20_000, 5_000

BASE = Recipe(
    model=MODEL,
    model_args={"channels": (32, 64, 128, 256)},  # half as wide, for a busy CPU
    data=Data(source="tiny_imagenet", size=64),
    augment=Augment(crop_scale=[0.2, 1.0], color_jitter=[0.4, 0.4, 0.4, 0.1]),
    optim=Optim(name="muon", lr=0.01, weight_decay=0.05, warmup_epochs=2),
    batch_size=128,
    sizes=[[0, 32]],
    precision="bf16",
    label_smoothing=0.0,
    tensorboard=False,
)
DEFAULTS: dict[str, dict[str, int]] = {
    "choose": {"dim": 256, "images": 2_048, "epochs": 15},
    "instances": {"dim": 256, "images": 6_000, "epochs": 25},
    "features": {"epochs": 5},
    "choose_classes": {"dim": 16, "images": 6_400, "epochs": 4},
    "classes": {"dim": 16, "images": 25_000, "epochs": 6},
}
GRID: dict[str, list[tuple[float, float | str | None]]] = {
    "Kerdock": [(0.01, 10.0), (0.02, 10.0), (0.04, 10.0), (0.01, "auto")],
    "learned": [(0.005, None), (0.01, None), (0.02, None)],
    "supervised": [(0.01, None), (0.02, None)],
}
INSTANCES: dict[str, dict[str, Any]] = {
    "Kerdock": {"head": "frame", "model_args": {"frame": "kerdock"}},
    "learned": {"head": "learned"},
    "untrained": {"head": "learned"},
    "supervised": {"head": "learned"},
    "random": {"head": "random"},
}
CLASSES: dict[str, dict[str, Any]] = {
    "learned": {"head": "learned"},
    "learned cosine": {"head": "learned_cosine", "model_args": {"frame": "random"}},
    "random": {"head": "random"},
    "Kerdock": {"head": "frame", "model_args": {"frame": "kerdock"}},
    "spherical code": {"head": "frame", "model_args": {"frame": "spherical_code"}},
}
SCALED: list[tuple[float, float | str | None]] = [(lr, scale) for lr in (0.01, 0.03) for scale in (5.0, 10.0)]
CLASS_GRID = dict.fromkeys(CLASSES, SCALED) | {"learned": [(0.003, None), (0.01, None), (0.03, None)]}
GRIDS = {"choose": GRID, "choose_classes": CLASS_GRID}
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


def recipe_of(head: dict[str, Any], folder: Path, args: argparse.Namespace, **changes: Any) -> Recipe:
    """The common recipe with a head behind an MLP neck of some width."""
    head_args = {**head.get("model_args", {}), "neck": "mlp", "neck_features": args.dim}
    return replace(
        BASE,
        head=head["head"],
        model_args={**BASE.model_args, **head_args, **changes.pop("model_args", {})},
        epochs=args.epochs,
        eval_every=args.epochs,
        save_every=max(1, args.epochs // 8),
        output=str(folder),
        resume=checkpoint.exists(folder / CHECKPOINTS),
        **changes,
    )


def train(recipe: Recipe, train_split: Any, val_split: Any) -> tuple[Any, dict[str, Any]]:
    """A trained model, and what is told of its training."""
    run = Run(recipe, train_split, val_split)
    if not run.fit():
        raise SystemExit("The time budget ended a run.")
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = {k: v for k, v in json.loads(lines[-1]).items() if k in ("train_loss", "train_top1", "val_top1", "val_loss")}
    return run.plain_model().eval(), {**last, "steps": run.step, "seconds": round(run.seconds())}


def scores(methods: list[str], model: Any, fit: Any, judged: Any, size: int) -> dict[str, float]:
    """Accuracy in percent of probes of the backbone's features, fitted to some images and judged on others."""
    features = [backbone_features(model, split, size=size) for split in (fit, judged)]
    labels = [torch.from_numpy(split.labels) for split in (fit, judged)]
    found = {}
    for method in methods:
        strength = STRENGTH if method == "linear_probe" else 0.0
        probe = fit_probe(method, features[0], labels[0], fit.label_names, strength=strength)
        found[method] = 100 * float((probe.predict(features[1].numpy()) == labels[1].numpy()).mean())
    return found


def probed(model: Any, shuffled: Any) -> dict[str, dict[str, float]]:
    """Accuracy in percent by data set and probe; `shuffled` are Tiny ImageNet's training images."""
    found = {}
    for name, size in SETS.items():
        label = "fine_label" if name == "cifar100" else "label"
        data = Data(source=name, label_column=label, size=64 if name == "tiny_imagenet" else size)
        judged = limited(load_split(data, HELD_OUT.get(name, "test")), 5000, 0)
        own = name == "tiny_imagenet"
        fit = shuffled.subset(np.array(BANK)) if own else limited(load_split(data, "train"), 10_000, 0)
        methods = [method for method, names in BY_PROBE.items() if name in names]
        found[name] = scores(methods, model, fit, judged, size)
    return found


def instance_cell(name: str, wanted: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One pretraining, and its probes."""
    shuffled: Any = limited(load_split(BASE.data, "train"), 100_000, 0)
    images = shuffled.subset(np.arange(wanted["images"]))
    torch.manual_seed(wanted["seed"])
    if name == "untrained":
        model, told = timm.create_model(MODEL, num_classes=200, **BASE.model_args).eval(), {}
    else:
        folder = args.runs / "-".join(str(value) for value in wanted.values())
        scaled = {} if wanted["scale"] is None else {"logit_scale": wanted["scale"]}
        optim = replace(BASE.optim, lr=wanted["lr"])
        recipe = recipe_of(INSTANCES[name], folder, args, optim=optim, seed=wanted["seed"], model_args=scaled)
        own = images if name == "supervised" else as_instances(images)
        model, told = train(recipe, own, own.subset(np.arange(min(2000, len(own)))))
        told["classes"] = len(own.label_names)
    if wanted["part"] == "choose":
        bank, judged = (shuffled.subset(np.array(rows)) for rows in (BANK, JUDGED))
        return {**told, "held_out_knn": scores(["knn_20"], model, bank, judged, 32)["knn_20"]}
    return {**told, "probe": probed(model, shuffled)}


def chosen(name: str, part: str = "choose") -> tuple[float, float | str | None]:
    """Rate and scale of a head, best by held-out training images; in `instances` random vectors take the frame's."""
    if name == "untrained":
        return 0.0, None
    name = "Kerdock" if (name, part) == ("random", "choose") else name
    cells = [cell for cell in read(part) if cell["name"] == name]
    if not cells:
        raise SystemExit(f"Choose first: --part {part}.")
    best = max(cells, key=lambda cell: cell[JUDGES[part]])
    return best["lr"], best["scale"]


def zoo_features() -> list[tuple[Tensor, Tensor]]:
    """Features and labels of the training and the validation images."""
    model: Any = timm.create_model(ZOO, pretrained=True)
    found = []
    for name, count in (("train", FEATURE_IMAGES), ("validation", VAL_IMAGES)):
        split: Any = limited(load_split(BASE.data, name), count, 0)
        found.append((backbone_features(model, split, size=64), torch.from_numpy(split.labels)))
    return found


def feature_cell(name: str, dim: int, seed: int, data: list[tuple[Tensor, Tensor]], args: Any) -> dict[str, Any]:
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


def class_cell(name: str, wanted: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A backbone, a neck and a head; accuracy on validation images or, to choose by, on held-out training images."""
    shuffled: Any = limited(load_split(BASE.data, "train"), 100_000, 0)
    images, trial = shuffled.subset(np.arange(args.images)), wanted["part"] == "choose_classes"
    val: Any = shuffled.subset(np.array(JUDGED)) if trial else load_split(BASE.data, "validation")
    folder = args.runs / "-".join(str(value) for value in wanted.values())
    scaled = {} if wanted["scale"] is None else {"logit_scale": wanted["scale"]}
    optim = replace(BASE.optim, lr=wanted["lr"], warmup_epochs=args.epochs // 3)
    augment = replace(BASE.augment, crop_scale=[0.35, 1.0], color_jitter=[])
    changes = {"optim": optim, "augment": augment, "seed": wanted["seed"], "model_args": scaled}
    model, told = train(recipe_of(CLASSES[name], folder, args, **changes), images, limited(val, VAL_IMAGES, 0))
    if trial:
        told["held_out_top1"] = told.pop("val_top1")
    told["cosine"] = [head.frame_report().largest_cosine for head in frame_heads(model).values()]
    return told


def read(part: str) -> list[dict[str, Any]]:
    """The cells of a part that are done."""
    file = RESULTS / "cells.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [cell for cell in map(json.loads, lines) if cell["part"] == part]


def spread(values: list[float], digits: int = 1) -> str:
    """Mean, and the range of several."""
    shown = f"{statistics.mean(values):.{digits}f}"
    return shown + (f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else "")


def grouped(part: str, *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Cells of a part that differ by nothing but the seed."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in read(part):
        groups.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    return groups


def choose_table(part: str) -> str:
    """Rates and scales, in Markdown."""
    columns = ["head", "rate", "scale", "loss", "training top-1", f"held-out {'kNN' if part == 'choose' else 'top-1'}"]
    body = [
        [cell["name"], f"{cell['lr']:g}", str(cell["scale"] or "")]
        + [f"{cell[key]:.2f}" for key in ("train_loss", "train_top1", JUDGES[part])]
        for cell in sorted(read(part), key=lambda cell: (cell["name"], cell["lr"]))
    ]
    return "\n".join(markdown(columns, body)) + "\n"


def instances_table() -> str:
    """Instance discrimination, in Markdown."""
    columns = ["head", "d", "images", "epochs", "runs", "loss", "training top-1"]
    columns += [
        f"{name}, {short}"
        for short, names in (("linear", "linear_probe"), ("kNN", "knn_20"))
        for name in BY_PROBE[names]
    ]
    body = []
    for (name, dim, images, epochs), runs in grouped("instances", "name", "dim", "images", "epochs").items():
        trained = name != "untrained"
        row = [name, *((str(dim), str(images), str(epochs)) if trained else ("", "", "")), str(len(runs))]
        row += [
            f"{statistics.mean(run[k] for run in runs):.2f}" if trained else "" for k in ("train_loss", "train_top1")
        ]
        for method, names in BY_PROBE.items():
            row += [spread([run["probe"][name][method] for run in runs]) for name in names]
        body.append(row)
    return "\n".join(markdown(columns, body)) + "\n"


def classes_table(part: str) -> str:
    """200 classes in few dimensions, in Markdown."""
    own = ["lr", "scale"] if part == "classes" else []
    body = []
    groups = grouped(part, "dim", "name", *own)
    for (dim, name, *settings), runs in sorted(groups.items(), key=lambda item: (*item[0][:2], str(item[0][2:]))):
        cosine = spread([value for run in runs for value in run["cosine"]], 3) if runs[0]["cosine"] else ""
        loss = statistics.mean(run["train_loss"] for run in runs)
        body.append(
            [str(dim), name, *(str(value or "") for value in settings), str(len(runs)), cosine, f"{loss:.3f}"]
            + [spread([run["val_top1"] for run in runs], 2)]
        )
    columns = ["d", "head", *["rate", "scale"][: len(own)], "runs", "largest cosine", "training loss"]
    return "\n".join(markdown([*columns, "validation top-1 (range)"], body)) + "\n"


def is_done(wanted: dict[str, Any]) -> bool:
    """Whether a cell with these settings is there."""
    return any(all(cell.get(k) == v for k, v in wanted.items()) for cell in read(wanted["part"]))


def keep(cell: dict[str, Any]) -> None:
    """Append a cell."""
    with (RESULTS / "cells.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(cell) + "\n")
    print(json.dumps(cell), flush=True)


def settings(name: str, args: argparse.Namespace, grid: dict | None, part: str) -> list[tuple[float, Any]]:
    """Rates and scales of a head's cells: those to try, those asked for, or what was chosen."""
    if grid or not args.at:
        return grid[name] if grid else [chosen(name, part)]
    rate, scale = args.at
    return [(float(rate), None if name == "learned" else scale if scale == "auto" else float(scale))]


def backbones(args: argparse.Namespace) -> None:
    """Cells of the parts that train a backbone, and of what chooses for them."""
    grid, labeled = GRIDS.get(args.part), args.part in ("classes", "choose_classes")
    for seed in args.seeds:
        for name in args.only or grid or (CLASSES if labeled else INSTANCES):
            for lr, scale in settings(name, args, grid, "choose_classes" if labeled else "choose"):
                wanted = {"part": args.part, "name": name, "dim": args.dim, "images": args.images}
                wanted |= {"epochs": args.epochs, "seed": seed, "lr": lr, "scale": scale}
                if not is_done(wanted):
                    keep({**wanted, **(class_cell if labeled else instance_cell)(name, wanted, args)})


def features(args: argparse.Namespace) -> None:
    """Cells of `features`."""
    data = zoo_features()
    for seed, dim in ((seed, dim) for seed in args.seeds for dim in ([args.dim] if args.dim else (16, 64))):
        for name in args.only or HEADS:
            wanted = {"part": args.part, "name": name, "dim": dim, "epochs": args.epochs, "seed": seed}
            if not is_done(wanted):
                keep({**wanted, **feature_cell(name, dim, seed, data, args)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(DEFAULTS))
    parser.add_argument("--dim", type=int, help="where it is not both of `features`")
    parser.add_argument("--images", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", help="names of cells")
    parser.add_argument("--at", nargs=2, metavar=("RATE", "SCALE"), help="in the place of what was chosen")
    parser.add_argument("--runs", type=Path, default=Path("runs/kerdock"))
    parser.add_argument("--table", action="store_true", help="write the tables of the cells that are done")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, value in DEFAULTS.get(args.part, {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.part:
        (features if args.part == "features" else backbones)(args)
    if args.table:
        tables: dict[str, Callable[[str], str]] = dict.fromkeys(GRIDS, choose_table)
        tables |= {"instances": lambda _: instances_table(), "features": classes_table, "classes": classes_table}
        for part, table in tables.items():
            if read(part):
                (RESULTS / f"{part}.md").write_text(table(part), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
