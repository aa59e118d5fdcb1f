"""A split of a data set as a model wants it: prepared as its config says, numbered as it numbers its classes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from etf_zoo.errors import EtfZooError
from etf_zoo.sharing.card import METRICS_NAME

from ..recipe.config import Data
from ..recipe.fields import Probability
from .augment import colors_of, normalize
from .batches import DEFAULT_SIZE, Split, load_split, prepared_splits
from .layouts import find_reader, role
from .loader import row_batches, stream_batches
from .resident import META
from .sealed import refuse_test
from .sources import HELD_OUT, Rows, Stream, choose_split, open_rows

__all__ = ["ModelBatches", "TestData", "as_trained", "is_path", "match_classes", "open_split", "public_name"]


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
    tested = metrics.get("base", metrics).get("dataset", {})  # base: of a model that classes were added to
    if data.val_split or tested.get("split") != HELD_OUT:
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


def is_path(name: str) -> bool:
    """Whether a model or data set is named by a path, which says something of this machine only."""
    return Path(name).is_absolute() or name.startswith((".", "~", "local-dir:")) or Path(name).exists()


def public_name(source: str) -> str:
    """A model, run or data set by its name alone, if it is named by a path; the model of a run by the run's."""
    if not is_path(source):
        return source
    path = Path(source.removeprefix("local-dir:")).expanduser().resolve()
    return path.parent.name if path.name == "model" else path.name
