"""Rows with images in them: parquet files, and whatever `datasets` reads, on the Hub or here."""

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

from huggingface_hub.constants import HF_HUB_CACHE

from etf_zoo.errors import EtfZooError

from ...recipe.config import Data
from ..places import find_source
from .folder import Walk

__all__ = ["DatasetsReader", "ParquetReader", "parquet_files"]


def _check_columns(columns: list[str], data: Data, source: str) -> None:
    for column in (data.image_column, data.label_column):
        if column not in columns:
            raise EtfZooError(
                f"{source} has no column {column!r} but {', '.join(columns)}. "
                f"Set --data.image_column and --data.label_column."
            )


def parquet_files(path: Path, looked: Walk | None) -> dict[str, list[Path]]:
    """Parquet files by split: `data/train-00000-of-00008.parquet`, `train.parquet`, `train/0000.parquet`.

    Args:
        path: A folder or a file.
        looked: What was found in the folder; None for a file.
    """
    if looked is None:
        return {"train": [path]} if path.suffix == ".parquet" else {}
    splits: dict[str, list[Path]] = {}
    for parts in looked.files:
        file = path.joinpath(*parts)
        if file.suffix == ".parquet" and file.stem != "metadata":  # which labels images in a folder
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


def holds_images(files: dict[str, list[Path]], column: str) -> bool:
    """Whether parquet files hold the images themselves, and not their paths; so too if they cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(next(iter(files.values()))[0])
    except (pa.ArrowException, OSError):
        return True
    texts = [field for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    if column in schema.names:
        return schema.field(column) not in texts
    nested = any(pa.types.is_struct(field.type) or pa.types.is_binary(field.type) for field in schema)
    return nested or not texts


@dataclass
class ParquetReader:
    """Parquet files as `datasets` writes them, in memory, encoded."""

    source: str
    data: Data
    files: dict[str, list[Path]]
    found: None = None

    @property
    def below(self) -> tuple[str, ...]:
        return (self.source,) if Path(self.source).is_dir() else (str(Path(self.source).parent),)

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
        self.source, self.data, self.found = find_source(data.source), data, None
        self.path = self.source
        # paths in rows are followed below the data set alone
        self.below: tuple[str, ...] = (
            (self.source,) if Path(self.source).exists() else (f"hf://datasets/{self.source}@",)
        )
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
        if getattr(rows, "builder_name", "") == "imagefolder":  # its paths are those of the files it fetched
            self.below += (str(datasets.config.HF_DATASETS_CACHE), HF_HUB_CACHE)
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
