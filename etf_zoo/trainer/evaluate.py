"""Measure a stored model: `etf-zoo evaluate MODEL DATA`, or `accelerate launch training/evaluate.py --model MODEL
--data DATA`.

Images are prepared as the model's `config.json` says, classes are matched by name. Training measures what it exports
in the same way, so that its figures are found again.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from etf_zoo.errors import EtfZooError
from etf_zoo.evaluation.measure import Measurement, format_table, measure
from etf_zoo.evaluation.mistakes import (
    Mistake,
    Predictions,
    accuracy_by_class,
    draw_mistakes,
    format_mistakes,
    worst_confusions,
    write_mistakes,
)
from etf_zoo.frames import Hierarchy
from etf_zoo.models.find import find_model, load_model
from etf_zoo.text import printable

from .data.batches import Split, find_source
from .data.sources import HELD_OUT, Rows, Stream
from .data.testing import ModelBatches, TestData, as_trained, is_path, open_split, public_name
from .plots import plot_collapse, plot_confusion, plot_cosines
from .recipe.config import parse
from .run.launching import make_accelerator, process_state

__all__ = [
    "Evaluated",
    "Evaluation",
    "ModelBatches",
    "TestData",
    "command_line",
    "evaluate_model",
    "open_split",
    "public_name",
]

CONFUSION_CLASSES = 2000  # of more the matrix would be larger than any picture of it


@dataclass
class Evaluation:
    """What to evaluate.

    Attributes:
        model: timm or `_etf` name, model folder, folder of a run, or `hf-hub:` id.
        data: The data; its `val_split` is measured on.
        size: Pixels; 0 for the model's own.
        batch_size: Images per step and process.
        hierarchy: JSON file {child: parent} over the label names, for the severity of mistakes. By default
            `hierarchy.json` in the data's folder, where there is one.
        output: JSON file to put the figures into (`results`, `dataset`, `command`; what else it holds stays).
        errors: CSV file to list the wrong images in.
        pictures: Folder for pictures: wrong images, cosines of class means, confusion matrix, and collapse over epochs
            where the model's folder has a `metrics.jsonl`.
        json: Print JSON instead of a table.
    """

    model: str = ""
    data: TestData = field(default_factory=TestData)
    size: int = 0
    batch_size: int = 256
    hierarchy: str = ""
    output: str = ""
    errors: str = ""
    pictures: str = ""
    json: bool = False


# ------------------------------------------------------------------------------------------------------------- measure


@dataclass
class Evaluated:
    """What `evaluate_model` finds.

    Attributes:
        record: `results`, `dataset` (name, split, images, size) and `images_per_second`, as JSON takes them.
        names: Of the model's classes.
        predictions: Of all samples of all processes.
        mistakes: Images that are wrong, the surest first; empty of a stream, whose images have no numbers.
        unreadable: What could not be read, by name, and why.
    """

    record: dict[str, Any]
    names: list[str]
    predictions: Predictions
    mistakes: list[Mistake]
    unreadable: dict[str, str]

    def by_class(self) -> dict[str, Any]:
        """Accuracy by class and worst confusions, as JSON takes them."""
        return {
            "by_class": [asdict(row) for row in accuracy_by_class(self.predictions, self.names)],
            "confusions": [asdict(row) for row in worst_confusions(self.predictions, self.names)],
        }


def evaluate_model(settings: Evaluation) -> Evaluated:
    """Figures of a stored model on a split; lists and pictures where asked for. All processes have to call it."""
    accelerator = make_accelerator()
    source = find_model(settings.model)
    model = load_model(settings.model).to(accelerator.device)
    data = as_trained(settings.data, source.folder)
    split = open_split(data, settings.size or source.input_size)
    if isinstance(split, Stream) and settings.errors:
        raise EtfZooError("A stream has no numbered images to list: set --data.streaming false for --errors.")
    batches = ModelBatches(
        model,
        split,
        size=settings.size,
        batch_size=settings.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    distances = _distances(settings, batches.names)
    found = measure(
        model,
        _shown(batches, accelerator),
        distances=distances,
        confusion=bool(settings.pictures) and len(batches.names) <= CONFUSION_CLASSES,
        predictions=True,
        processes=accelerator,  # and no autocast: float32, whatever the model was trained in
    )
    predictions, mistakes = _gathered(found, batches, split)
    done = Evaluated(
        {
            "results": {
                key: value for key, value in found.figures.items() if key not in ("images", "images_per_second")
            },
            "dataset": {
                "name": public_name(split.source),
                "split": split.name or data.val_split,
                "images": found.figures["images"],
                "size": batches.size,
                **({} if distances is None else {"tree_height": distances.max().item()}),
            },
            "images_per_second": found.figures["images_per_second"],
        },
        batches.names,
        predictions,
        mistakes,
        _unreadable(split),
    )
    if accelerator.is_main_process:
        _report(settings, done, found, distances, split, source.folder)
    return done


def _shown(batches: ModelBatches, accelerator: Any) -> Any:
    total = None if isinstance(batches.split, Stream) else len(batches)
    return tqdm(
        batches, total=total, disable=None if accelerator.is_main_process else True, unit="batch", mininterval=2
    )


def _distances(settings: Evaluation, names: list[str]) -> Tensor | None:
    tree = Path(settings.hierarchy or Path(find_source(settings.data.source)) / "hierarchy.json")
    if not tree.is_file():
        if settings.hierarchy:
            raise EtfZooError(f"There is no hierarchy file {tree}.")
        return None
    try:
        return Hierarchy.from_json(tree).distances(names)
    except EtfZooError:  # the model may know more classes than the data and its tree
        if settings.hierarchy:
            raise
        return None


def _gathered(
    found: Measurement, batches: ModelBatches, split: Split | Rows | Stream
) -> tuple[Predictions, list[Mistake]]:
    """Predictions and mistakes of all processes."""
    own: Any = found.predictions
    wrong = [] if isinstance(split, Stream) else (own.labels != own.predicted).nonzero().flatten().tolist()
    rows = batches.seen() if wrong else []
    mistakes = [
        Mistake(
            split.where(int(rows[at])) if isinstance(split, Rows) else f"row {rows[at]} of {split.name}",
            batches.names[own.labels[at]],
            batches.names[own.predicted[at]],
            float(own.confidence[at]),
            int(rows[at]),
        )
        for at in wrong
    ]
    predictions = Predictions.joined(gather_object([(own.labels, own.predicted, own.confidence)]))
    return predictions, sorted(gather_object(mistakes), key=lambda m: (-m.probability, m.row))


def _unreadable(split: Split | Rows | Stream) -> dict[str, str]:
    """What no process could read, and why."""
    own = split.corrupt if isinstance(split, Split) else split.corrupt.found
    return dict(gather_object(list(own.items())))


def _report(
    settings: Evaluation,
    done: Evaluated,
    found: Measurement,
    distances: Tensor | None,
    split: Split | Rows | Stream,
    folder: Path | None,
) -> None:
    """Write the list of mistakes and the pictures that were asked for."""
    if settings.errors:
        write_mistakes(done.mistakes, settings.errors)
    if not settings.pictures:
        return
    pictures = Path(settings.pictures)
    pictures.mkdir(parents=True, exist_ok=True)
    plot_cosines(found.class_means, pictures / "cosines.png", distances=distances, names=done.names)
    if found.confusion is not None:
        plot_confusion(found.confusion, pictures / "confusion.png", distances=distances, names=done.names)
    if not isinstance(split, Stream):
        draw_mistakes(
            done.mistakes, lambda row: Image.fromarray(np.asarray(split.picture(row))), pictures / "mistakes.png"
        )
    if folder and (folder / "metrics.jsonl").is_file():
        with suppress(EtfZooError):  # a training whose epochs were not measured has no such picture
            plot_collapse(folder / "metrics.jsonl", pictures / "collapse.png")


# -------------------------------------------------------------------------------------------------------- command line


def command_line(settings: Evaluation, split: str = "") -> str:
    """The command that measures the same again: names only, with MODEL and DATA in the place of paths.

    Args:
        settings: What was measured.
        split: Name of the split that it was found to be.
    """
    data, usual = settings.data, TestData()
    is_cut = split == HELD_OUT
    split = data.val_split if split in ("", HELD_OUT) else split
    words = ["MODEL" if is_path(settings.model) else settings.model]
    words += ["DATA" if is_path(data.source) else data.source]
    words += ["--split", split] if split else []
    words += ["--size", str(settings.size)] if settings.size else []
    words += ["--hierarchy", Path(settings.hierarchy).name] if settings.hierarchy else []
    for name in (
        *("config", "image_column", "label_column", "streaming", "num_classes"),
        *("class_level", "image_root", *(["test_share"] if is_cut else [])),
    ):
        value = getattr(data, name)
        if value != getattr(usual, name):
            value = Path(value).name if name == "image_root" else value
            words.append(f"--data.{name}={str(value).lower() if isinstance(value, bool) else value}")
    return shlex.join(["etf-zoo", "evaluate", *words])


def main() -> None:
    arguments = [re.sub(r"^--split(=|$)", r"--data.val_split\1", arg) for arg in sys.argv[1:]]
    settings = parse(Evaluation, arguments)
    for option, file in (("output", settings.output), ("errors", settings.errors)):
        if file and not Path(file).resolve().parent.is_dir():
            raise EtfZooError(f"There is no folder for --{option} {file}: make it first.")
    warnings.filterwarnings("ignore", message=".*They are left out")  # said below, in full
    done = evaluate_model(settings)
    if not process_state().is_main_process:
        return
    record = {**done.record, **done.by_class()}
    if settings.output:
        path = Path(settings.output)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        text = (
            json.dumps({**kept, **record, "command": command_line(settings, record["dataset"]["split"])}, indent=1)
            + "\n"
        )
        path.write_text(text, encoding="utf-8")
    if settings.json:
        print(json.dumps(record, indent=1))
    else:
        _print(done)
    if done.unreadable:
        _print_unreadable(done.unreadable)


def _print(done: Evaluated) -> None:
    dataset = done.record["dataset"]
    print(f"split {dataset['split']} of {printable(dataset['name'])}, {dataset['size']} pixels")
    speed = {"images_per_second": done.record["images_per_second"]}
    print(format_table({"images": dataset["images"], **done.record["results"], **speed}))
    classes = accuracy_by_class(done.predictions, done.names)
    if mistakes := format_mistakes(classes, worst_confusions(done.predictions, done.names)):
        print(mistakes)


def _print_unreadable(found: dict[str, str], most: int = 20) -> None:
    lines = [f"  {printable(where)}: {printable(why)}" for where, why in list(found.items())[:most]]
    more = [f"  and {len(found) - most} more"] if len(found) > most else []
    head = f"{len(found)} images cannot be read and are left out:"
    print("\n".join([head, *lines, *more]), file=sys.stderr)
