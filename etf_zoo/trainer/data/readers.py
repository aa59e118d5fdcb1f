"""Where rows come from: image folders, parquet files, and whatever `datasets` reads, on the Hub or here.

A reader has `source`, `splits`, and `read(split)`, which gives encoded images, labels, and the names of the classes
where those are stated.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from etf_zoo.errors import EtfZooError

from ..recipe.config import Data

__all__ = ["DatasetsReader", "FolderReader", "HELD_OUT", "ParquetReader", "find_reader", "find_source"]

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"}
HELD_OUT = ("validation", "val", "valid", "dev", "test")  # names that a held-out split goes by
SPLITS = ("train", *HELD_OUT)


def find_source(source: str) -> str:
    """Folder for a data source: a path as it is, a name below $ETF_ZOO_DATA, else the text itself (a Hub name)."""
    root = os.environ.get("ETF_ZOO_DATA")
    if not Path(source).exists() and root and (Path(root) / source).exists():
        return str(Path(root) / source)
    return source


def find_reader(data: Data, resident: bool) -> FolderReader | ParquetReader | DatasetsReader:
    """What reads a source; `resident` as for `open_rows`."""
    source = find_source(data.source)
    path = Path(source)
    if folders := _split_folders(path):
        return FolderReader(source, folders)
    if files := _parquet_files(path):
        # a single pass needs no library but pyarrow, and no second copy of the data
        return ParquetReader(source, data, files) if resident else DatasetsReader(data)
    if any(next(_images(folder), None) for folder in _folders(path)):
        return FolderReader(source, {"train": path})
    return DatasetsReader(data)


def _check_columns(columns: list[str], data: Data, source: str) -> None:
    for column in (data.image_column, data.label_column):
        if column not in columns:
            raise EtfZooError(
                f"{source} has no column {column!r} but {', '.join(columns)}. "
                f"Set --data.image_column and --data.label_column."
            )


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")) if path.is_dir() else []


def _images(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)


def _split_folders(path: Path) -> dict[str, Path]:
    """Splits of a folder with `train/CLASS/x.jpg`; empty if it is none."""
    splits = {folder.name: folder for folder in _folders(path) if folder.name in SPLITS}
    return {name: split for name, split in splits.items() if any(next(_images(c), None) for c in _folders(split))}


@dataclass
class FolderReader:
    """Images in a folder for each class, `CLASS/x.jpg` or deeper, in a folder for each split."""

    source: str
    folders: dict[str, Path]

    @property
    def splits(self) -> list[str]:
        return list(self.folders)

    def read(self, split: str) -> tuple[Any, Sequence[Any], None]:
        found = [(image, folder.name) for folder in _folders(self.folders[split]) for image in sorted(_images(folder))]
        return [image for image, _ in found], [name for _, name in found], None


def _parquet_files(path: Path) -> dict[str, list[Path]]:
    """Parquet files by split: `data/train-00000-of-00008.parquet`, `train.parquet`, `train/0000.parquet`."""
    if path.is_file():
        return {"train": [path]} if path.suffix == ".parquet" else {}
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")) if path.is_dir() else []:
        stem = re.sub(r"([-_.]|^)\d+(-of-\d+)?(-[0-9a-f]+)?$", "", file.stem)
        name = stem or ("train" if file.parent == path else file.parent.name)
        splits.setdefault(name, []).append(file)
    for name, files in splits.items():
        if len(folders := {str(file.parent) for file in files}) > 1:
            raise EtfZooError(
                f"{path} holds several data sets with a split {name!r}: set --data.source to one of "
                f"{', '.join(sorted(folders))}."
            )
    return splits


@dataclass
class ParquetReader:
    """Parquet files as `datasets` writes them, in memory, encoded."""

    source: str
    data: Data
    files: dict[str, list[Path]]

    @property
    def splits(self) -> list[str]:
        return list(self.files)

    def read(self, split: str) -> tuple[Any, Sequence[Any], list[str] | None]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        image, label = self.data.image_column, self.data.label_column
        try:
            schema = pq.read_schema(self.files[split][0])
            _check_columns(schema.names, self.data, self.source)
            table = pa.concat_tables(pq.read_table(file, columns=[image, label]) for file in self.files[split])
        except pa.ArrowException as error:
            raise EtfZooError(f"Cannot load split {split!r} of {self.source!r}: {error}") from error
        if not (pa.types.is_struct(table[image].type) or pa.types.is_binary(table[image].type)):
            raise EtfZooError(f"Column {image!r} of {self.source} holds {table[image].type}, not images.")
        # `datasets` keeps the names of classes in the schema
        stated = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return table[image], table[label].to_pylist(), stated.get(label, {}).get("names")


class DatasetsReader:
    """Whatever `datasets` reads, on the Hub or here."""

    def __init__(self, data: Data):
        self.source, self.data = find_source(data.source), data
        self.path = self.source
        self.options: dict[str, Any] = {}
        if Path(self.source).is_file():
            self.path, self.options = "parquet", {"data_files": {"train": self.source}}

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[Any]:
        try:
            import datasets
        except ImportError as error:
            raise EtfZooError(
                f"Cannot load {what} of {self.source!r} without the package datasets: `pip install datasets`, or write "
                f"the images with training/prepare.py where it is and give --data.source that folder."
            ) from error
        try:
            yield datasets
        except (OSError, ValueError) as error:  # datasets' own errors are FileNotFoundError, ConnectionError and such
            raise EtfZooError(
                f"Cannot load {what} of {self.source!r}: {error} Give a folder or a Hub name; a bare name is looked up "
                f"in $ETF_ZOO_DATA ({os.environ.get('ETF_ZOO_DATA', 'not set')})."
            ) from error

    @cached_property
    def splits(self) -> list[str]:
        with self._explained(f"split {self.data.train_split!r}") as datasets:
            return list(datasets.get_dataset_split_names(self.path, self.data.config or None, **self.options))

    def load(self, split: str, streaming: bool) -> Any:
        """The two columns, images not decoded."""
        with self._explained(f"split {split!r}") as datasets:
            rows: Any = datasets.load_dataset(
                self.path, self.data.config or None, split=split, streaming=streaming, **self.options
            )
            if rows.features is None:  # a stream that does not state them
                rows = rows._resolve_features()
        image, label = self.data.image_column, self.data.label_column
        _check_columns(list(rows.features), self.data, self.source)
        return rows.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))

    def read(self, split: str) -> tuple[Any, Sequence[Any], list[str] | None]:
        rows = self.load(split, streaming=False)
        label = self.data.label_column
        return _Mapped(rows, self.data.image_column), rows[label][:], getattr(rows.features[label], "names", None)


class _Mapped:
    """A column of a `datasets.Dataset`; a worker process opens its files anew instead of getting a copy."""

    def __init__(self, rows: Any, column: str):
        self.rows, self.column = rows.with_format("arrow"), column

    @cached_property
    def values(self) -> Any:
        return self.rows[:][self.column]  # memory-mapped, as chunks: an item of `rows` itself takes 50 times as long

    def __getitem__(self, row: int) -> Any:
        return self.values[row]

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "column": self.column}
