"""What reads a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etf_zoo.errors import EtfZooError

from ...recipe.config import Data
from ..places import find_source
from .archive import unpack
from .folder import Walk, class_names, index_folder, walk
from .found import Found
from .hub import DatasetsReader, ParquetReader, holds_images, parquet_files
from .table import TABLES, index_tables, table_files

__all__ = ["FilesReader", "Reader", "find_files", "find_reader"]


@dataclass
class FilesReader:
    """Image files that a walk or a table found."""

    found: Found
    below: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        return self.found.source

    @property
    def splits(self) -> list[str]:
        return list(self.found.splits)

    def read(self, split: str) -> tuple[Any, Sequence[Any], None]:
        rows = self.found.splits[split]
        return [path for path, _ in rows], [name for _, name in rows], None


Reader = FilesReader | ParquetReader | DatasetsReader


def find_reader(data: Data, resident: bool) -> Reader:
    """What reads a source; `resident` as for `open_rows`.

    Raises:
        EtfZooError: If there is no such source, or nothing in it can be read.
    """
    source = find_source(data.source)
    path = Path(source)
    if not path.exists():
        if source.startswith(("/", "./", "../", "~")) or path.suffix.lower() in (*TABLES, ".zip"):
            raise EtfZooError(f"There is no folder or file {source}.")
        return DatasetsReader(data)
    looked = walk(path) if path.is_dir() else None
    endings = {Path(parts[-1]).suffix.lower() for parts in looked.files} if looked else set()
    files = parquet_files(path, looked)
    if files and holds_images(files, data.image_column):
        # a single pass needs no library but pyarrow, and no second copy of the data
        return ParquetReader(source, data, files) if resident else DatasetsReader(data)
    if endings & {".arrow", ".tar"}:
        return DatasetsReader(data)
    return FilesReader(
        find_files(
            path,
            image_column=data.image_column,
            label_column=data.label_column,
            class_level=data.class_level,
            root=data.image_root,
            looked=looked,
        )
    )


def find_files(
    path: Path,
    *,
    image_column: str = "image",
    label_column: str = "label",
    class_level: int = 0,
    root: str = "",
    looked: Walk | None = None,
) -> Found:
    """Images and classes of a folder, a table or a zip file.

    Args:
        path: Where it is.
        image_column: Column of paths in a table; if there is none of this name, usual names are tried.
        label_column: Column of labels, likewise.
        class_level: See `index_folder`.
        root: Folder that the paths of a table lie below; by default that of the table.
        looked: What `walk` found there, if it was done before.

    Raises:
        EtfZooError: If no image is found, or what is found makes no classes.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("rose", "iris"):
        ...     (folder / name).mkdir()
        ...     Image.new("RGB", (8, 8)).save(folder / name / "1.png")
        >>> [(file.name, label) for file, label in find_files(folder).splits["train"]]
        [('1.png', 'iris'), ('1.png', 'rose')]
    """
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    below = Path(root).expanduser() if root else None
    if path.is_file() and path.suffix.lower() == ".zip":
        found = find_files(unpack(path), class_level=class_level, root=root, **columns)
        found.source, found.layout = str(path), f"a zip file: {found.layout}"
        return found
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise EtfZooError(
                f"{path} is no folder, and no table ({', '.join(TABLES)}) or zip file: give one of these."
            )
        return index_tables(str(path), {"": [path]}, root=below, **columns)
    looked = looked or walk(path)
    has_classes = len(class_names(looked)) > 1
    tables = table_files(looked, has_classes)
    if not tables:
        return index_folder(looked, class_level)
    try:
        return index_tables(str(path), tables, root=below, **columns)
    except EtfZooError as error:
        if not has_classes:
            raise
        found = index_folder(looked, class_level)
        found.notes.append(f"The folders name the classes, and not the table: {error}")
        return found
