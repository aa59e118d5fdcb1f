"""Images in memory: a split decoded once to a uint8 array on disk, which processes map and share."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from etf_zoo.errors import EtfZooError, StorageError
from etf_zoo.images import UnreadableImageError, read_image

from ..recipe.config import Data
from .decode import Corrupt, decoders, end_with_parent
from .layouts import Found
from .loader import INTERPOLATION, eval_transform
from .places import cache_root
from .sources import Chosen, Rows

__all__ = ["Split", "cache", "read_prepared", "write_prepared"]

META = "meta.json"  # written last: a folder that has it is complete
PIECE = 512  # images that a worker process decodes and sends at a time


class _Checks:
    """CRC-32 of each image of an array on disk, compared when an image is first read: nobody waits for all of them."""

    def __init__(self, folder: Path, values: np.ndarray):
        self.folder, self.values, self.done = folder, values, np.zeros(len(values), dtype=bool)

    def check(self, at: np.ndarray, images: np.ndarray) -> None:
        """Raise ValueError if any of these images, `(B, H, W, 3)`, is not what was stored at these places."""
        for i in np.flatnonzero(~self.done[at]):
            if zlib.crc32(images[i].tobytes()) != self.values[at[i]]:
                raise EtfZooError(
                    f"{self.folder / 'images.npy'} is damaged at image {at[i]}. Delete that folder: the images are "
                    f"decoded anew when they are needed, and a run goes on with --resume."
                )
        self.done[at] = True


@dataclass
class Split(Chosen):
    """Images `(N, H, W, 3)` uint8, labels `(N,)` int64, the names of the classes, and where they came from.

    Attributes:
        images: The array.
        labels: Class numbers.
        label_names: Names of the classes.
        source: Folder or Hub name.
        name: Of the split.
        corrupt: What was left out as unreadable: where -> why.
        index: Rows of `images` that belong to the split, in its order; None for all.
        content: Hash of what the array was made from; empty where it is not known.
        checks: What notices damage on disk; None for an array that was never stored.
        files: What the images were decoded from, in the order of the array; None where that is not known.
        shares: What a teacher says of each image of the array, shares of the classes `(M, K)`; None without one.
    """

    images: np.ndarray
    labels: np.ndarray
    label_names: list[str]
    source: str
    name: str = ""
    corrupt: dict[str, str] = field(default_factory=dict)
    index: np.ndarray | None = None
    content: str = ""
    checks: _Checks | None = field(default=None, repr=False, compare=False)
    files: Rows | None = field(default=None, repr=False, compare=False)
    shares: np.ndarray | None = field(default=None, repr=False, compare=False)
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def found(self) -> Found | None:
        """What a walk through the source found, where there was one."""
        return self.files.found if self.files else None

    def where(self, row: int) -> str:
        """How a message names an image: its file, where that is known."""
        return self.files.where(self._at(row)) if self.files else f"image {self._at(row)} of {self.name}"

    def readable(self) -> np.ndarray:
        """Numbers of the images that evaluation gives, in its order: all of them."""
        return np.arange(len(self))

    def picture(self, row: int) -> np.ndarray:
        """An image as `(H, W, 3)` uint8."""
        return self.images[self._at(row)]

    def take(self, rows: np.ndarray, device: torch.device, shares: bool = False) -> tuple[Tensor, Tensor]:
        """Images `(B, 3, H, W)` uint8 and labels `(B,)` of some rows, on a device; or a teacher's shares `(B, K)`."""
        at = rows if self.index is None else self.index[rows]
        found = self.labels[rows] if not shares or self.shares is None else np.float32(self.shares[at])
        labels = torch.from_numpy(found).to(device, non_blocking=True)
        if device.type == "cuda" and (whole := self._whole(device)) is not None:
            return whole[torch.from_numpy(at).to(device, non_blocking=True)].permute(0, 3, 1, 2), labels
        order = np.argsort(at)  # a memory map reads forward faster than back and forth
        images = np.empty((len(at), *self.images.shape[1:]), np.uint8)
        images[order] = self.images[at[order]]
        if self.checks is not None:
            self.checks.check(at, images)
        return torch.from_numpy(images).to(device).permute(0, 3, 1, 2), labels

    def _add_images(self, found: Any) -> None:
        if self.content:
            found.update(self.content.encode() + (b"" if self.index is None else self.index.tobytes()))
        else:
            for row in range(len(self)):
                found.update(self.picture(row).tobytes())

    def _whole(self, device: torch.device) -> Tensor | None:
        """The array on an accelerator, copied there once if it takes less than a quarter of what is free."""
        if device not in self._on_device and self.images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            whole = torch.empty(self.images.shape, dtype=torch.uint8, device=device)
            for start in range(0, len(whole), 4096):
                part = np.array(self.images[start : start + 4096])  # torch wants a writable array
                if self.checks is not None:
                    self.checks.check(np.arange(start, start + len(part)), part)
                whole[start : start + 4096] = torch.from_numpy(part).to(device)
            self._on_device[device] = whole
        return self._on_device.get(device)


def cache(rows: Rows, size: int, crop_pct: float = 1.0) -> Split:
    """The decoded split, kept in $ETF_ZOO_CACHE (default ~/.cache/etf_zoo) under the hash of its content and size.

    Args:
        rows: The split.
        size: Side in pixels.
        crop_pct: Share of the short side that the images show.

    Raises:
        ValueError: If too many images cannot be read.
        OSError: If the disk is full.
    """
    content = rows.content()
    shown = "" if crop_pct == 1 else f" {crop_pct}"
    key = hashlib.sha256(f"{content} {size} {INTERPOLATION}{shown}".encode()).hexdigest()[:16]
    folder = cache_root() / f"{Path(rows.source).name}-{rows.name}-{key}"
    if not (folder / META).is_file():
        write_prepared(rows, size, folder, content, crop_pct)
    split = read_prepared(folder, replace(rows.settings, size=size), rows.source)
    if rows.found is None:  # rows of a table with the images in it: nothing to name, and too large to keep
        return split
    return replace(split, files=rows.subset(np.array([rows.where(i) not in split.corrupt for i in range(len(rows))])))


def read_prepared(folder: Path, data: Data, source: str = "") -> Split:
    """A split that `write_prepared` wrote; numpy is all it takes.

    Args:
        folder: Its folder.
        data: What is wanted; its size and label column have to be those of the folder.
        source: Where it came from, if that is known better than when it was written.

    Raises:
        ValueError: If the folder is damaged, was written for another size or label column, or too many of its images
            could not be read.
    """
    try:
        meta = json.loads((folder / META).read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy")
        names, kept, corrupt = list(meta["names"]), meta["settings"], dict(meta["corrupt"])
        checks = np.load(folder / "checks.npy") if (folder / "checks.npy").is_file() else None
        content, of_labels = str(meta.get("content", "")), meta.get("labels_crc32")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EtfZooError(f"{folder} holds no complete images ({error}): delete it and prepare it again.") from error
    fits = images.ndim == 4 and images.shape[3] == 3 and images.dtype == np.uint8 and labels.shape == images.shape[:1]
    fits = fits and (of_labels is None or zlib.crc32(labels.tobytes()) == of_labels)
    if not fits or (checks is not None and checks.shape != labels.shape):
        raise EtfZooError(f"{folder} holds no complete images: delete it and prepare it again.")
    for name, value in kept.items():
        if value != getattr(data, name):
            raise EtfZooError(
                f"{folder} was prepared with data.{name} {value!r}, not {getattr(data, name)!r}: give --data.{name} "
                f"{value}, or prepare it again."
            )
    check = None if checks is None else _Checks(folder, checks)
    split = Split(images, labels, names, source or meta["source"], meta["split"], corrupt, None, content, check)
    left_out = Corrupt(data.max_corrupt, meta["rows"], split.source, corrupt)
    left_out.check()
    left_out.warn()
    return split


def write_prepared(rows: Rows, size: int, folder: Path, content: str = "", crop_pct: float = 1.0) -> None:
    """Decode into a folder beside the final one and rename it: another process sees all of it or nothing.

    Args:
        rows: What to decode.
        size: Side in pixels.
        folder: Where to.
        content: `rows.content()`, where it was computed before.
        crop_pct: Share of the short side that the images show.

    Raises:
        ValueError: If too many images cannot be read.
        OSError: If the disk is full. Nothing is left behind.
    """
    needed = len(rows) * size * size * 3
    full = f"No room in {folder.parent} for {needed / 1e9:.2f} GB of images: make some, choose another folder "
    full += "($ETF_ZOO_CACHE, or --out) or a smaller --data.size."
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for rest in folder.parent.glob(".writing-*"):  # of processes that were killed, a day and longer ago
            if time.time() - rest.stat().st_mtime > 86400:
                shutil.rmtree(rest, ignore_errors=True)
        if shutil.disk_usage(folder.parent).free < needed:
            raise StorageError(errno.ENOSPC, full)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
            made = Path(temporary) / "split"
            made.mkdir()
            _write(rows, size, made, content or rows.content(), crop_pct)
            try:
                os.rename(made, folder)
            except OSError:  # another process was first
                if not (folder / META).is_file():
                    raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(error.errno, full) from error
        raise


def _write(rows: Rows, size: int, folder: Path, content: str, crop_pct: float) -> None:
    kept, checks = [], []
    # plain writes, not a memory map: on a full disk a map ends the process with a signal
    with open(folder / "images.npy", "wb") as file:
        _write_header(file, len(rows), size)
        decoded, what = _decoded(rows, size, crop_pct), f"Decoding {rows.name}"
        for row, found in tqdm(decoded, total=len(rows), desc=what, unit="image", delay=5, mininterval=5):
            if isinstance(found, UnreadableImageError):
                rows.corrupt.add(rows.where(row), str(found))
            else:
                pixels = found.tobytes()
                file.write(pixels)
                kept.append(row)
                checks.append(zlib.crc32(pixels))
        rows.corrupt.check()
        file.seek(0)
        _write_header(file, len(kept), size)  # as long as the first: numpy leaves room for more rows
        file.flush()
        os.fsync(file.fileno())
    np.save(folder / "checks.npy", np.array(checks, dtype=np.uint32))
    labels = rows.labels[np.array(kept, dtype=np.int64)]
    np.save(folder / "labels.npy", labels)
    meta = {
        "source": Path(rows.source).name if Path(rows.source).exists() else rows.source,
        "split": rows.name,
        "settings": {"size": size, "label_column": rows.settings.label_column},
        "names": rows.label_names,
        "rows": len(rows),
        "corrupt": rows.corrupt.found,
        "content": content,
        "labels_crc32": zlib.crc32(labels.tobytes()),
    }
    (folder / META).write_text(json.dumps(meta, indent=1) + "\n")


def _write_header(file: Any, count: int, size: int) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    np.lib.format.write_array_header_1_0(file, header)


class _Pieces(Dataset):
    """A split decoded in pieces: for each row of one its image `(size, size, 3)` or what is wrong with it."""

    def __init__(self, rows: Rows, size: int, crop_pct: float):
        self.rows, self.transform = rows, eval_transform(size, crop_pct)

    def __len__(self) -> int:
        return -(-len(self.rows) // PIECE)

    def __getitem__(self, piece: int) -> list[tuple[int, np.ndarray | UnreadableImageError]]:
        start = piece * PIECE
        return [(row, self._one(row)) for row in range(start, min(start + PIECE, len(self.rows)))]

    def _one(self, row: int) -> np.ndarray | UnreadableImageError:
        try:
            image = self.transform(read_image(self.rows.encoded(row)))
            return np.ascontiguousarray(np.asarray(image).transpose(1, 2, 0))
        except UnreadableImageError as error:
            return error


def _as_they_are(piece: Any) -> Any:
    return piece


def _decoded(rows: Rows, size: int, crop_pct: float) -> Iterator[tuple[int, np.ndarray | UnreadableImageError]]:
    pieces = _Pieces(rows, size, crop_pct)
    workers = decoders(min(8, len(pieces) - 1))  # processes: Pillow holds the lock for much of the work
    loader = DataLoader(
        pieces,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_they_are,
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),
    )
    for piece in loader:
        yield from piece
