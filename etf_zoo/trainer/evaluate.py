"""Recompute a model's figures: `accelerate launch training/evaluate.py --model NAME_OR_FOLDER --data.source SOURCE`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from tqdm import tqdm

import etf_zoo  # noqa: F401  registers the twins
from etf_zoo.errors import EtfZooError
from etf_zoo.evaluation.measure import format_table, measure
from etf_zoo.frames import Hierarchy

from .data.augment import colors_of
from .data.batches import eval_batches, find_source, load_split
from .plots import plot_collapse, plot_confusion, plot_cosines
from .recipe.config import Data, parse
from .run.launching import make_accelerator, process_state


@dataclass
class Evaluation:
    """What to evaluate.

    Attributes:
        model: timm name with a tag, or a model folder.
        data: The data; `val_split` is read.
        size: Pixels; 0 for the model's own.
        batch_size: Images per step and process.
        hierarchy: JSON file {child: parent} over the label names, for the severity of mistakes. By default
            `hierarchy.json` in the data's folder, where there is one.
        output: JSON file to put the figures into (`results`, `dataset`, `command`; what else it holds stays).
        pictures: Folder for pictures: cosines of class means, confusion matrix, and collapse over epochs where the
            model's folder has a `metrics.jsonl`.
    """

    model: str = ""
    data: Data = field(default_factory=Data)
    size: int = 0
    batch_size: int = 256
    hierarchy: str = ""
    output: str = ""
    pictures: str = ""


def evaluate_model(settings: Evaluation) -> dict[str, Any]:
    """Figures of a stored model on a split, with what they were measured on; pictures if asked for."""
    accelerator = make_accelerator()
    folder = Path(settings.model)
    model: Any = timm.create_model(f"local-dir:{folder}" if folder.is_dir() else settings.model, pretrained=True)
    model = model.to(accelerator.device).eval()
    size = settings.size or model.pretrained_cfg["input_size"][-1]
    data = dataclasses.replace(settings.data, size=settings.data.size or size)
    split = load_split(data, data.report_split)
    if len(split.label_names) != model.num_classes:
        raise EtfZooError(f"{settings.model} has {model.num_classes} classes, {split.source} {len(split.label_names)}.")
    own = model.pretrained_cfg.get("label_names")
    if own and list(own) != list(split.label_names):
        name, other = next(pair for pair in zip(own, split.label_names, strict=True) if pair[0] != pair[1])
        raise EtfZooError(
            f"{settings.model} knows other classes, or in another order, than {split.source}: {name!r} is where that "
            f"has {other!r}. Rename or reorder the classes of the data; etf-zoo evaluate matches them by name."
        )
    tree = (
        Path(settings.hierarchy) if settings.hierarchy else Path(find_source(settings.data.source)) / "hierarchy.json"
    )
    if settings.hierarchy and not tree.is_file():
        raise EtfZooError(f"There is no hierarchy file {tree}.")
    distances = Hierarchy.from_json(tree).distances(split.label_names) if tree.is_file() else None
    batches = eval_batches(
        split,
        size=size,
        batch_size=settings.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        colors=colors_of(model),
        device=accelerator.device,
    )
    shown = tqdm(batches, disable=not accelerator.is_main_process, unit="batch", mininterval=2)
    found = measure(
        model,
        shown,
        distances=distances,
        confusion=bool(settings.pictures),
        processes=accelerator,  # and no autocast: float32, whatever the model was trained in
    )
    if settings.pictures and found.confusion is not None and accelerator.is_main_process:
        pictures = Path(settings.pictures)
        pictures.mkdir(parents=True, exist_ok=True)
        names = list(split.label_names)
        plot_cosines(found.class_means, pictures / "cosines.png", distances=distances, names=names)
        plot_confusion(found.confusion, pictures / "confusion.png", distances=distances, names=names)
        if (folder / "metrics.jsonl").is_file():
            plot_collapse(folder / "metrics.jsonl", pictures / "collapse.png")
    return {
        "results": {key: value for key, value in found.figures.items() if key not in ("images", "images_per_second")},
        "dataset": {
            "name": Path(split.source).name if Path(split.source).exists() else split.source,
            "split": split.name or data.report_split,
            "images": found.figures["images"],
            "size": size,
        },
        "images_per_second": found.figures["images_per_second"],
    }


def command_line(settings: Evaluation) -> str:
    """The command that measures the same again."""
    data = settings.data
    options = ["--model", settings.model, "--data.source", data.source, "--data.val_split", data.report_split]
    options += ["--data.size", str(data.size)] + (["--size", str(settings.size)] if settings.size else [])
    if settings.hierarchy:
        options += ["--hierarchy", settings.hierarchy]
    for name in (
        *("config", "train_split", "image_column", "label_column", "resident", "crop_pct", "streaming"),
        *("num_classes", "max_corrupt", "test_share", "class_level", "image_root"),
    ):
        if getattr(data, name) != getattr(Data(), name):
            value = getattr(data, name)
            options += [f"--data.{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(["accelerate", "launch", "training/evaluate.py", *options])


def main() -> None:
    settings = parse(Evaluation)
    if settings.output and not Path(settings.output).resolve().parent.is_dir():
        raise EtfZooError(f"There is no folder for --output {settings.output}: make it first.")
    figures = evaluate_model(settings)
    if not process_state().is_main_process:
        return
    shown = {
        "images": figures["dataset"]["images"],
        **figures["results"],
        "images_per_second": figures["images_per_second"],
    }
    print(format_table(shown))
    if settings.output:
        path = Path(settings.output)
        kept = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**kept, **figures, "command": command_line(settings)}, indent=1) + "\n")
