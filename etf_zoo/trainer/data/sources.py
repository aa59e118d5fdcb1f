"""Splits whose images are not decoded yet: rows at hand, or a stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from etf_zoo.errors import EtfZooError
from etf_zoo.images import UnreadableImageError, read_image

from ..recipe.config import Data
from .decode import Corrupt, encoded, ending
from .holdout import holdout_indices
from .layouts import DatasetsReader, Found, find_reader, role, shown

__all__ = ["Chosen", "HELD_OUT", "Rows", "Stream", "choose_split", "open_rows", "open_stream"]

C = TypeVar("C", bound="Chosen")
HELD_OUT = "held out"  # name of what is tested on where the data have no split for it


class Chosen:
    """What splits at hand have in common, however they hold their images: rows chosen by `index`, labels, names."""

    labels: np.ndarray
    label_names: list[str]
    index: np.ndarray | None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self: C, indices: np.ndarray) -> C:
        """The images with these numbers, or where a mask is true, in this order; nothing is copied."""
        at = np.arange(len(self))[indices]
        index = at if self.index is None else self.index[at]
        return replace(self, labels=self.labels[at], index=index)  # type: ignore[type-var]

    def class_counts(self) -> list[int]:
        """Images of each class."""
        return np.bincount(self.labels, minlength=len(self.label_names)).tolist()

    @property
    def digest(self) -> str:
        """Hash of the classes' names, the labels and the images, in this order: other data have another.

        Of images that are still encoded only the length and the end are read, which takes a moment, not an epoch.
        """
        found = hashlib.sha256(json.dumps(self.label_names).encode() + self.labels.tobytes())
        self._add_images(found)
        return found.hexdigest()

    def picture(self, row: int) -> np.ndarray:
        """An image as `(H, W, 3)` uint8."""
        raise NotImplementedError

    def where(self, row: int) -> str:
        """How a message names an image."""
        raise NotImplementedError

    def _add_images(self, found: Any) -> None:
        """Put what tells images apart into a hash."""
        raise NotImplementedError

    def _at(self, row: int) -> int:
        return int(row if self.index is None else self.index[row])


@dataclass
class Rows(Chosen):
    """A split whose images are still encoded.

    Attributes:
        images: A sequence of what `encoded` reads.
        labels: `(N,)` int64.
        label_names: Names of the classes.
        source: Folder or Hub name.
        name: Of the split.
        settings: How it was asked for.
        corrupt: What could not be read so far.
        index: Rows of `images` that belong to it; None for all.
        below: Where paths in rows may lead, see `encoded`.
        found: What a walk through the source found, where there was one.
    """

    images: Any
    labels: np.ndarray
    label_names: list[str]
    source: str
    name: str
    settings: Data
    corrupt: Corrupt
    index: np.ndarray | None = None
    below: tuple[str, ...] = ()
    found: Found | None = None

    def encoded(self, row: int) -> bytes:
        """Bytes of an image file."""
        return encoded(self.images[self._at(row)], self.below)

    def where(self, row: int) -> str:
        """How a message names a row."""
        item = self.images[self._at(row)]
        return str(item) if isinstance(item, Path) else f"row {self._at(row)} of {self.name}"

    def readable(self) -> np.ndarray:
        """Numbers of the rows that a finished evaluation gave, in its order."""
        return np.array([row for row in range(len(self)) if self.where(row) not in self.corrupt.found], dtype=np.int64)

    def picture(self, row: int) -> np.ndarray:
        """An image as `(H, W, 3)` uint8."""
        return np.asarray(read_image(self.encoded(row)))

    def content(self) -> str:
        """Hash of all images and labels, to the last byte."""
        found = hashlib.sha256(json.dumps(self.label_names).encode() + self.labels.tobytes())
        for row in range(len(self)):
            try:
                data = self.encoded(row)
            except UnreadableImageError:
                data = b""
            found.update(len(data).to_bytes(8, "little") + data)
        return found.hexdigest()

    def _add_images(self, found: Any) -> None:
        for row in range(len(self)):
            size, end = ending(self.images[self._at(row)], self.below)
            found.update(size.to_bytes(8, "little") + end)


@dataclass
class Stream:
    """A split that is read while it is used.

    Attributes:
        rows: `datasets.IterableDataset` of encoded images.
        label_names: Names of the classes.
        source: Hub name or folder.
        name: Of the split.
        settings: How it was asked for.
        count: Images, if known, else 0.
        corrupt: What could not be read so far.
    """

    rows: Any
    label_names: list[str]
    source: str
    name: str
    settings: Data
    count: int
    corrupt: Corrupt
    below: tuple[str, ...] = ()

    def __len__(self) -> int:
        if not self.count:
            raise EtfZooError(f"{self.source} does not state how many images an epoch has: set --data.train_images.")
        return self.count

    @property
    def digest(self) -> str:
        """Hash of the source, the split and the classes' names: what else a stream holds is not known before."""
        return hashlib.sha256(json.dumps([self.source, self.name, self.label_names]).encode()).hexdigest()

    def class_counts(self) -> list[int]:
        """Unknown: empty."""
        return []

    @property
    def labels(self) -> np.ndarray:
        """Not known, which raises ValueError, as do all choices of images."""
        raise EtfZooError(
            "What needs all labels or a choice of images cannot use a stream: set --data.streaming false."
        )

    def subset(self, indices: np.ndarray) -> Stream:
        raise EtfZooError("A stream has no subsets: set --data.streaming false.")

    def readable(self) -> np.ndarray:
        return np.arange(len(self.labels))

    def picture(self, row: int) -> np.ndarray:
        raise EtfZooError("A stream has no numbered images: set --data.streaming false.")


def open_rows(data: Data, split: str, *, resident: bool) -> Rows:
    """A split of a data set, not decoded.

    Of data with a training split alone, `data.test_share` of each class is held out, whatever name of a held-out split
    is asked for; near-duplicates stay together.

    Args:
        data: Where it is.
        split: Its name; another name of a held-out split will do if there is only one.
        resident: Whether rows are read once, in order: parquet files then need no copy as Arrow files.

    Raises:
        ValueError: On a missing data set, split or column, or labels that make no classes.
    """
    reader = find_reader(data, resident)
    share = 0.0 if data.test_share == "auto" else data.test_share
    is_cut = share > 0 and [role(name) for name in reader.splits] == ["train"] and bool(role(split))
    name = reader.splits[0] if is_cut else choose_split(reader.splits, split, reader.source)
    images, values, names = reader.read(name)
    train: Sequence[Any] = values
    trained = _of_role(reader.splits, data.train_split)
    if names is None and len(trained) == 1 and trained != [name]:
        train = reader.read(trained[0])[1]
    labels, names = _classes(values, names, train, f"{data.label_column!r} of split {name!r} of {reader.source}")
    corrupt = Corrupt(data.max_corrupt, len(labels), reader.source)
    rows = Rows(*(images, labels, names, reader.source, name, data, corrupt), below=reader.below, found=reader.found)
    return _cut(rows, share, role(split) == "train") if is_cut else rows


def _cut(rows: Rows, share: float, for_training: bool) -> Rows:
    """What trains, or what is held out, of the only split that there is; the same in every run."""
    from .duplicates import group_rows  # which needs the rows of this file

    try:
        kept, held = holdout_indices(rows.labels, share, 0, group_rows(rows))
    except EtfZooError as error:
        raise EtfZooError(
            f"{rows.source} has no images to test on, and none can be held out ({error}) Add some to a folder val/."
        ) from error
    chosen = replace(rows.subset(kept if for_training else held), name=rows.name if for_training else HELD_OUT)
    return replace(chosen, corrupt=Corrupt(rows.corrupt.share, len(chosen), rows.source))


def open_stream(data: Data, split: str) -> Stream:
    """A split of a data set as a stream; arguments and errors as for `open_rows`."""
    reader = DatasetsReader(data)
    name = choose_split(reader.splits, split, reader.source)
    rows = reader.load(name, streaming=True)
    feature = rows.features[data.label_column]
    names = getattr(feature, "names", None) or [str(i) for i in range(data.num_classes)]
    if not names:
        raise EtfZooError(
            f"{data.label_column!r} of {reader.source} has no class names, and a stream cannot be searched for them: "
            f"set --data.num_classes if it holds numbers, or --data.streaming false."
        )
    stated = rows.info.splits[name].num_examples if rows.info.splits and name in rows.info.splits else 0
    count = (data.train_images if split == data.train_split else 0) or stated or 0
    corrupt = Corrupt(data.max_corrupt, count, reader.source)
    return Stream(rows, names, reader.source, name, data, count, corrupt, reader.below)


def choose_split(splits: list[str], wanted: str, source: str) -> str:
    """The wanted split: by its name, by another name of the same, or, of held-out ones, the only one there is.

    Example:
        >>> choose_split(["Train", "val"], "train", "photos"), choose_split(["train", "val"], "validation", "photos")
        ('Train', 'val')

    Raises:
        ValueError: If there is none, or several would do.
    """
    if wanted in splits:
        return wanted
    same = _of_role(splits, wanted)
    held_out = [name for name in splits if role(name) in ("val", "test")]
    for names in (same, held_out if role(wanted) in ("val", "test") else []):
        if len(names) == 1:
            return names[0]
    hold_out = (
        " Or hold a share of it out: --data.test_share 0.2." if len(splits) == 1 and role(splits[0]) == "train" else ""
    )
    raise EtfZooError(
        f"Cannot load split {wanted!r} of {source!r}: it has {', '.join(splits) or 'none'}. "
        f"Set --data.train_split and --data.val_split.{hold_out}"
    )


def _of_role(splits: list[str], wanted: str) -> list[str]:
    """Splits of the same name, or that name the same."""
    return [name for name in splits if name == wanted] or [
        name for name in splits if role(name) and role(name) == role(wanted)
    ]


def _classes(
    values: Sequence[Any], names: list[str] | None, train: Sequence[Any], what: str
) -> tuple[np.ndarray, list[str]]:
    """Class numbers and names from a column of numbers, or of texts in sorted order; `train` says which there are."""
    if any(value is None for value in values):
        raise EtfZooError(f"{what}: rows without a label.")
    if all(isinstance(value, str) for value in values):
        names = sorted(set(train)) if names is None else names
        number = {name: i for i, name in enumerate(names)}
        if unknown := sorted(set(values) - set(number)):
            raise EtfZooError(
                f"{what}: the training split has no class {shown(unknown)}. Add training images of these, or take them "
                f"out; names count with their case."
            )
        return np.array([number[value] for value in values], dtype=np.int64), names
    labels = np.asarray(values)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise EtfZooError(f"{what}: expected class numbers or names, got {values[0]!r}. Set --data.label_column.")
    size = int(max(train)) + 1 if names is None else len(names)
    if len(labels) and (labels.min() < 0 or labels.max() >= size):
        found = f"{labels.min()} to {labels.max()}"
        raise EtfZooError(f"{what}: labels {found}, but the training split has classes 0 to {size - 1}.")
    return labels.astype(np.int64), names or [str(i) for i in range(size)]
