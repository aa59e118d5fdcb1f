"""Photographs in memory: evaluated as timm's transform shows them, trained on in crops of larger ones."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from etf_zoo.errors import EtfZooError

from ..recipe.config import Data
from ..run.locks import acquire
from .places import cache_root
from .resident import Split, cache
from .sources import Rows

__all__ = ["Photos", "keep_photos"]

STORED = 1.15  # side of the images that training crops are drawn from, in units of `data.size`
MEMORY_SHARE = 0.25  # of this machine's memory, that the decoded images of a split may take


@dataclass
class Photos(Rows):
    """Rows that are decoded once, into arrays that are kept on disk, mapped into memory, and augmented in batches.

    There is an array for each use, made when it is first asked for. Training crops are drawn from the center squares of
    the images, their short side resized to 1.15 times `data.size`. Evaluation has what timm's transform makes of each
    file (`data.crop_pct` of the short side), at the size that is evaluated at. All else is as for `Rows`.

    Attributes:
        base: The split that these are images of. At least half of it shares its array; fewer have one of their own.
    """

    base: Rows | None = None
    _arrays: dict[tuple[int, float, str], Split] = field(default_factory=dict, repr=False, compare=False)

    def training_batches(self, parts: Sequence[np.ndarray], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Images `(B, 3, S, S)` uint8 to draw crops from, and labels `(B,)`, of some rows at a time.

        Unreadable images are left out.

        Raises:
            EtfZooError: If there are too many of those, or none of a batch's images can be read.
        """
        for images, labels in self._batches(parts, stored_size(self.settings), 1.0, device):
            if not len(labels):
                raise EtfZooError(f"None of a batch's images of {self.source} can be read. Mend them.")
            yield images, labels

    def eval_batches(
        self, parts: Sequence[np.ndarray], size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images `(B, 3, size, size)` uint8 by timm's evaluation transform, and labels `(B,)`.

        Raises:
            EtfZooError: If too many images cannot be read. The others are left out.
        """
        for images, labels in self._batches(parts, size, self.settings.crop_pct, device):
            if len(labels):
                yield images, labels

    def _batches(
        self, parts: Sequence[np.ndarray], size: int, crop_pct: float, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        split, places = self._stored(size, crop_pct)
        for part in parts:
            part = part[places[part] >= 0]
            images, _ = split.take(places[part], device)
            yield images, torch.from_numpy(self.labels[part]).to(device, non_blocking=True)

    def _stored(self, size: int, crop_pct: float) -> tuple[Split, np.ndarray]:
        """An array, and the place in it of each row of this split; -1 for one that cannot be read."""
        base = self.base
        if base is None or 2 * len(self) < len(base):  # few: no reason to decode all
            base = replace(self, settings=replace(self.settings, max_corrupt=1.0))  # it is checked for the whole split
        index = np.arange(len(base)) if base.index is None else base.index
        key = (size, crop_pct, hashlib.sha256(index.tobytes()).hexdigest()[:16])
        if key not in self._arrays:
            name = f"{Path(self.source).name}-{self.name}-{key[2]}-{size}.lock"
            with acquire(cache_root() / "locks" / name, wait=True):  # one process decodes, others find the array
                self._arrays[key] = cache(base, size, crop_pct)
        split = self._arrays[key]
        self.corrupt.found.update(split.corrupt)
        self.corrupt.check()
        kept = np.array([not split.corrupt or base.where(row) not in split.corrupt for row in range(len(base))], bool)
        places = np.full(index.max(initial=-1) + 1, -1)
        places[index[kept]] = np.arange(kept.sum())
        return split, places if self.index is None else places[self.index]


def stored_size(data: Data) -> int:
    """Side of the images that training crops are drawn from."""
    return round(STORED * data.size)


def keep_photos(rows: Rows, *, for_training: bool) -> Rows:
    """Rows with their images in memory if those take at most a quarter of it; says which, and why, in a line.

    It goes by all of the machine's memory, not by what is free at the moment, so that a run that is resumed, and all of
    its processes, decide alike. The arrays are files that the system maps: where memory gets short it drops pages of
    theirs, and reads them again.

    Args:
        rows: The split.
        for_training: Whether crops are drawn from it.
    """
    data = rows.settings
    size = stored_size(data) if for_training else data.size
    count = min(len(rows), data.limit or len(rows)) if for_training else len(rows)
    needed, allowed = 3 * count * size * size, MEMORY_SHARE * memory()
    what = f"{Path(rows.source).name}, {rows.name}: {count} images decoded at {size} pixels take {needed / 1e6:.0f} MB"
    room = shutil.disk_usage(_present(cache_root())).free
    fits = needed <= allowed and needed < room
    limit = f"{allowed / 1e6:.0f} MB, a quarter of this machine's memory"
    if fits:
        why = f"(allowed: {limit}). They are decoded once."
    else:
        why = f"where there are {limit}" if needed > allowed else f"on a disk with room for {room / 1e6:.0f}"
        why += ". Worker processes decode them in each epoch."
    if os.environ.get("RANK", "0") == "0":
        print(what, why, file=sys.stderr)
    return Photos(**{f.name: getattr(rows, f.name) for f in fields(Rows)}, base=rows) if fits else rows


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or what its container is given."""
    total = psutil.virtual_memory().total
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return total


def _present(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
