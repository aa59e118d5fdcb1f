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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from timm.data import create_transform, resolve_data_config
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
from etf_zoo.sharing.card import METRICS_NAME
from etf_zoo.text import printable

from .data.augment import colors_of, normalize
from .data.batches import DEFAULT_SIZE, Split, find_source, load_split, prepared_splits
from .data.layouts import find_reader, role
from .data.loader import row_batches, stream_batches
from .data.resident import META
from .data.sealed import refuse_test
from .data.sources import HELD_OUT, Rows, Stream, choose_split, open_rows
from .plots import plot_collapse, plot_confusion, plot_cosines
from .recipe.config import Data, parse
from .recipe.fields import Probability
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
class TestData(Data):
    """Data to measure on, all that can be read of it.

    Attributes:
        val_split: Split to measure on. If empty, it is the test split, else the held-out one there is, else the only
            one.
        max_corrupt: Share of the images that may be unreadable. They are left out, counted and named.
    """

    __test__ = False  # no test of pytest's

    val_split: str = ""
    max_corrupt: Probability = 1.0


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


# ---------------------------------------------------------------------------------------------------------------- data


def open_split(data: Data, size: int) -> Split | Rows | Stream:
    """The split to measure on, encoded where it can be.

    Args:
        data: The data; an empty `val_split` is chosen as `TestData` says.
        size: Side of the model's images, at which scikit-learn's digits are made.

    Raises:
        EtfZooError: On a missing data set, split or column.
    """
    if not data.source:
        raise EtfZooError("No data: give a folder, a Hub name or digits.")
    refuse_test(data.val_split, data.train_split)
    prepared = prepared_splits(data.source)
    if data.source == "digits":
        return load_split(replace(data, size=size or DEFAULT_SIZE), data.val_split or "test")
    if not data.val_split:
        splits = list(prepared) or find_reader(data, resident=True).splits
        data = replace(data, val_split=_default_split(splits, data.source))
    if prepared:  # at whatever size they were stored
        folder = prepared[choose_split(list(prepared), data.val_split, data.source)]
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        return load_split(replace(data, size=meta["settings"]["size"]), data.val_split)
    if data.streaming:
        return load_split(data, data.val_split)
    return open_rows(data, data.val_split, resident=data.resident is not False)


def _default_split(splits: Sequence[str], source: str) -> str:
    for wanted in ("test", "val"):
        if found := [name for name in splits if role(name) == wanted]:
            return found[0]
    if len(splits) == 1:
        return splits[0]
    raise EtfZooError(f"{source} has the splits {', '.join(splits) or 'none'}: name one with --split.")


def as_trained(data: TestData, folder: Path | None) -> TestData:
    """Settings that find in a data set what a model was trained and tested on, if it was on one of this name.

    Which folders name the classes, which columns hold images and labels, and which share was held out for the test are
    taken from the model's `metrics.json`, each unless `data` says something of it.
    """
    file = folder / METRICS_NAME if folder else None
    metrics = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
    recorded = metrics.get("training", {}).get("recipe", {}).get("data", {})
    if recorded.get("source") != public_name(data.source):
        return data
    usual = TestData()
    names = ("config", "image_column", "label_column", "class_level", "test_share")
    changes = {n: recorded[n] for n in names if n in recorded and getattr(data, n) == getattr(usual, n)}
    if data.val_split or metrics["dataset"]["split"] != HELD_OUT:
        changes.pop("test_share", None)
    elif "test_share" in changes:
        changes["val_split"] = "validation"  # any name of a held-out split will do
    return replace(data, **changes)


class ModelBatches:
    """Images of a split as a model wants them, with the model's own label numbers; can be read again.

    Args:
        model: A timm model.
        split: The images.
        size: Side in pixels; 0 for the model's own.
        batch_size: Images at a time.
        rank: Of this process, which gets each `world`-th image.
        world: Number of processes.

    Attributes:
        names: Names of the model's classes; the data's where the model has none.

    Raises:
        EtfZooError: If the model does not know the classes.
    """

    def __init__(
        self,
        model: Any,
        split: Split | Rows | Stream,
        *,
        size: int = 0,
        batch_size: int = 256,
        rank: int = 0,
        world: int = 1,
    ):
        config: dict[str, Any] = resolve_data_config(model=model)
        self.size = size or config["input_size"][-1]
        self.transform: Any = create_transform(
            **{**config, "input_size": (3, self.size, self.size)},
            use_prefetcher=True,  # ends in uint8: a quarter of what workers would have to send as float
        )
        self.names, self.numbers = match_classes(model, split)
        self.split, self.batch_size, self.rank, self.world = split, batch_size, rank, world
        self.colors = colors_of(model)
        self.device = next(model.parameters()).device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._decoded():
            images = normalize(images.to(self.device, non_blocking=True).float(), self.colors)
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.numbers):
                raise EtfZooError(
                    f"Label {int(labels.min())} is none of 0 to {len(self.numbers) - 1}: some images have no label, as "
                    f"in many test splits on the Hub. Name another with --split."
                )
            yield images, self.numbers[labels].to(self.device, non_blocking=True)

    def __len__(self) -> int:
        return -(-len(self._rows()) // self.batch_size)

    def _rows(self) -> np.ndarray:
        return np.arange(len(self.split))[self.rank :: self.world]

    def _decoded(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.split, Stream):
            return stream_batches(
                self.split,
                None,
                size=self.size,
                batch_size=self.batch_size,
                rank=self.rank,
                world=self.world,
                transform=self.transform,
            )
        rows = self._rows()
        parts = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        if isinstance(self.split, Split):
            return (self._of_array(self.split, part) for part in parts)
        return row_batches(self.split, self.transform, parts, (0, 0), train=False)

    def _of_array(self, split: Split, part: np.ndarray) -> tuple[Tensor, Tensor]:
        images = [torch.as_tensor(self.transform(Image.fromarray(split.picture(row)))) for row in part]
        return torch.stack(images), torch.from_numpy(split.labels[part])

    def seen(self) -> np.ndarray:
        """Rows of the split that were given, in order, once all have been: the unreadable ones are left out."""
        rows = self._rows()
        return rows[np.isin(rows, self.split.readable())] if isinstance(self.split, Rows) else rows


def match_classes(model: Any, split: Split | Rows | Stream) -> tuple[list[str], Tensor]:
    """Names of a model's classes, and its number for each of the data's labels.

    They are matched by name; by order where the model has no names.

    Raises:
        EtfZooError: If the model does not know a class, or has no names and another number of classes.
    """
    own, theirs = model.pretrained_cfg.get("label_names"), split.label_names
    if not own:
        if len(theirs) != model.num_classes:
            raise EtfZooError(
                f"The model has {model.num_classes} classes without names, {split.source} has {len(theirs)}."
            )
        return list(theirs), torch.arange(len(theirs))
    number = {name: i for i, name in enumerate(own)}
    missing = [name for name in theirs if name not in number]
    if missing:
        raise EtfZooError(
            f"The model does not know {len(missing)} of the data's {len(theirs)} classes, such as {missing[0]!r}; it "
            f"knows {', '.join(repr(name) for name in own[:3])} and so on. Fine-tune it on this data first."
        )
    return list(own), torch.tensor([number[name] for name in theirs])


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


def is_path(name: str) -> bool:
    """Whether a model or data set is named by a path, which says something of this machine only."""
    return Path(name).is_absolute() or name.startswith((".", "~", "local-dir:")) or Path(name).exists()


def public_name(source: str) -> str:
    """A model, run or data set by its name alone, if it is named by a path; the model of a run by the run's."""
    if not is_path(source):
        return source
    path = Path(source.removeprefix("local-dir:")).expanduser().resolve()
    return path.parent.name if path.name == "model" else path.name


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
