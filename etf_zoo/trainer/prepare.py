"""Decode a data set once: `python training/prepare.py --data.source X --out DIR`.

For machines without network or `datasets`, and for those who keep the arrays at a place of their own. The folder holds
a numpy array per split and, if there is one, `hierarchy.json`; give it as `--data.source`, with the same size and label
column.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from etf_zoo.errors import EtfZooError

from .data.batches import DEFAULT_SIZE
from .data.places import find_source
from .data.resident import read_prepared, write_prepared
from .data.sources import open_rows
from .recipe.config import TEST_SHARE, Data, parse


@dataclass
class Preparation:
    """What to prepare.

    Attributes:
        data: The data; both splits are read.
        out: Folder to write, one folder for each split in it.
    """

    data: Data = field(default_factory=Data)
    out: str = ""


def prepare(settings: Preparation) -> None:
    """Write both splits, each all or nothing; those that are there already are left as they are.

    Raises:
        ValueError: On wrong data, or a folder prepared otherwise.
        OSError: If the disk is full.
    """
    data, out = settings.data, Path(settings.out)
    if not settings.out:
        raise EtfZooError("Give --out a folder to write.")
    if data.streaming or data.source == "digits":
        raise EtfZooError("Only data sets that are at hand as a whole are prepared, and digits needs none of it.")
    share = TEST_SHARE if data.test_share == "auto" else data.test_share  # as a recipe has it
    data = dataclasses.replace(data, size=data.size or DEFAULT_SIZE, test_share=share)
    for name in (data.train_split, data.val_split):
        rows = open_rows(data, name, resident=True)
        folder = out / rows.name
        if not folder.exists():
            write_prepared(rows, data.size, folder)
        split = read_prepared(folder, data)
        print(f"{folder}: {len(split)} images of {data.size} pixels, {len(split.label_names)} classes")
    tree = Path(find_source(data.source)) / "hierarchy.json"
    if tree.is_file():
        shutil.copy(tree, out / tree.name)


def main() -> None:
    prepare(parse(Preparation))
