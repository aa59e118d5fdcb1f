"""Tables of paths and labels: `labels.csv`, a parquet file without images, `metadata.csv` beside the images."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etf_zoo.errors import EtfZooError
from etf_zoo.images import image_extensions

from .folder import Walk
from .found import Found, role, shown

__all__ = ["TABLES", "index_tables", "table_files"]

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
PATHS = ("file_name", "filename", "filepath", "file_path", "path", "image", "image_path", "img_path", "img", "file")
PATHS += ("image_id", "id", "name")
LABELS = ("label", "labels", "class", "class_name", "classname", "category", "target", "species", "breed", "y")
SPLITS = ("split", "set", "subset", "partition")
Row = dict[str, Any]


def table_files(looked: Walk, classes: bool) -> dict[str, list[Path]]:
    """Tables that label the images of a folder: `metadata.csv` and such, or, where no folder is a class, any table.

    Args:
        looked: What `walk` found.
        classes: Whether folders name classes.

    Returns:
        Name of the split -> tables; the name is empty where a column or nothing says it.

    Raises:
        EtfZooError: If there are several tables, and their names are none of splits.
    """
    tables = [parts for parts in looked.files if Path(parts[-1]).suffix.lower() in TABLES]
    named = [parts for parts in tables if Path(parts[-1]).stem.lower() == "metadata"]
    if named:
        found: dict[str, list[Path]] = {}
        for parts in named:
            split = next((name for name in parts[:-1] if role(name)), "")
            found.setdefault(split, []).append(looked.folder.joinpath(*parts))
        return found
    top = [Path(parts[0]) for parts in tables if len(parts) == 1]
    if classes or not top:
        return {}
    splits = {_split_of(path.stem): [looked.folder / path] for path in top if _split_of(path.stem)}
    if splits:
        return splits
    if len(top) > 1:
        raise EtfZooError(
            f"{looked.folder} has no class folders but several tables ({shown([str(path) for path in top])}): give "
            f"--data the one of paths and labels."
        )
    return {"": [looked.folder / top[0]]}


def _split_of(stem: str) -> str:
    """`train` for train, train_labels or labels_train."""
    return next((part for part in stem.replace("-", "_").split("_") if role(part)), "")


def index_tables(
    source: str, tables: dict[str, list[Path]], *, image_column: str, label_column: str, root: Path | None = None
) -> Found:
    """Images and classes by tables with a column of paths and one of labels.

    Paths are relative to the table's folder, or to a folder `images` there; only what lies below `root` is opened.

    Args:
        source: What to call it.
        tables: Name of the split, or an empty text, -> tables.
        image_column: Column of paths, if there is one of this name; else one with a usual name is taken.
        label_column: Likewise, of labels.
        root: Folder that all images lie below; by default that of the table.

    Raises:
        EtfZooError: On no such column, paths outside the folder, or missing files, all of which are named.
    """
    found = Found(source)
    missing: list[str] = []
    for split, files in tables.items():
        for file in files:
            folder = (root or file.parent).resolve()
            rows = _read(file)
            columns = list(rows[0]) if rows else []
            paths = _column(columns, (image_column, *PATHS), rows, file, is_path=True)
            labels = _column([c for c in columns if c != paths], (label_column, *LABELS), rows, file, is_path=False)
            splits = next((c for c in columns if c.lower() in SPLITS and c not in (paths, labels)), None)
            found.notes.append(f"{file.name}: paths in column {paths!r}, labels in {labels!r}.")
            for number, row in enumerate(rows, 2):
                label, name = row[labels], split or (str(row[splits] or "") if splits else "") or "train"
                if label is None or not str(label).strip():
                    found.skip("rows without a label", f"row {number} of {file.name}")
                    continue
                path = _place(str(row[paths]), folder, file)
                if path is None:
                    missing.append(str(row[paths]))
                else:
                    found.splits.setdefault(name, []).append((path, str(label).strip()))
    if missing:
        raise EtfZooError(
            f"{source} names {len(missing)} images that are not there, such as {shown(missing, 20)}. Paths are "
            f"relative to the table's folder, or below --data.image_root."
        )
    found.layout = "a table of paths and labels"
    return found.check()


def _read(file: Path) -> list[Row]:
    """Rows as dictionaries; a table without a heading gets the names `path` and `label`."""
    try:
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(file).to_pylist()
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors
        raise EtfZooError(f"Cannot read the table {file}: {error}") from error
    first = text.partition("\n")[0]
    delimiter = max(",;\t|", key=first.count)
    rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if any(cell.strip() for cell in row)]
    if not rows:
        raise EtfZooError(f"The table {file} is empty.")
    if any(Path(cell.strip()).suffix.lower() in image_extensions() for cell in rows[0]):
        rows.insert(0, ["path", "label"] if len(rows[0]) == 2 else [f"column {i}" for i in range(len(rows[0]))])
    heading, width = [cell.strip() for cell in rows[0]], len(rows[0])
    if short := [number for number, row in enumerate(rows, 1) if len(row) != width]:
        raise EtfZooError(f"Row {short[0]} of {file} has {len(rows[short[0] - 1])} cells, the heading {width}.")
    return [dict(zip(heading, row, strict=True)) for row in rows[1:]]


def _column(columns: list[str], names: Sequence[str], rows: list[Row], file: Path, *, is_path: bool) -> str:
    for name in names:
        for column in columns:
            if column.lower() == name.lower():
                return column
    if is_path:  # whatever holds names of image files
        for column in columns:
            if all(Path(str(row[column])).suffix.lower() in image_extensions() for row in rows[:20]):
                return column
    elif len(columns) == 1:
        return columns[0]
    what = "paths of images, set --data.image_column" if is_path else "labels, set --data.label_column"
    raise EtfZooError(f"{file} has no column of {what}: it has {', '.join(columns) or 'none'}.")


def _place(text: str, folder: Path, file: Path) -> Path | None:
    """Where an image lies; None where there is none.

    Raises:
        EtfZooError: On an address, or a path outside the folder.
    """
    if "://" in text:
        raise EtfZooError(f"{file} names {text!r}: only files below {folder} are opened, nothing is fetched.")
    plain = Path(text.strip().replace("\\", "/"))
    for path in (folder / plain, folder / "images" / plain, file.parent / plain):
        for ending in ("", ".jpg", ".jpeg", ".png"):  # tables of contests name images without it
            whole = path if not ending else path.with_name(path.name + ending)
            # what a link in the folder points to is the user's affair; what the table says is not
            inside = Path(os.path.normpath(whole))
            if not inside.is_relative_to(folder):
                raise EtfZooError(
                    f"{file} names {text!r}, which lies outside {folder}: set --data.image_root to the folder that "
                    f"all images lie below."
                )
            if inside.is_file():
                return inside
    return None
