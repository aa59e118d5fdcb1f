"""One image: its bytes, its pixels, and what becomes of those that cannot be read."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from etf_zoo.errors import EtfZooError

__all__ = ["Corrupt", "Unreadable", "decode", "decoders", "encoded", "ending"]


class Unreadable(ValueError):
    """An image that cannot be decoded."""


def encoded(item: Any) -> bytes:
    """Bytes of an image file from a path, bytes, or a row `{"bytes", "path"}` as `datasets` stores them.

    Raises:
        Unreadable: If there is nothing to read.
    """
    item = item.as_py() if hasattr(item, "as_py") else item
    if isinstance(item, dict):
        item = item["bytes"] or item["path"]
    if isinstance(item, bytes):
        return item
    if item is None:
        raise Unreadable("no image")
    try:
        if "://" in str(item):  # a stream names files inside archives and on the Hub so
            import fsspec

            with fsspec.open(str(item), "rb") as file:
                return file.read()  # type: ignore
        return Path(item).read_bytes()
    except OSError as error:
        raise Unreadable(str(error)) from error


def ending(item: Any, count: int = 4096) -> tuple[int, bytes]:
    """Length in bytes of what `encoded` reads, and its last bytes; the beginnings of image files are much alike."""
    if isinstance(item, Path):
        try:
            with open(item, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - count))
                return size, file.read()
        except OSError:
            return 0, b""
    try:
        data = encoded(item)
    except Unreadable:
        data = b""
    return len(data), data[-count:]


def decode(data: bytes) -> Image.Image:
    """RGB image, upright by its EXIF tag.

    Raises:
        Unreadable: If it is no image, or a broken one.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # what Pillow's decoders are seen to raise on damaged files
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise Unreadable(str(error).replace("<_io.BytesIO object at ", "<")) from error


def decoders(most: int) -> int:
    """How many worker processes are of use, up to so many: one for each core that this process may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(most, cores), 0)


@dataclass
class Corrupt:
    """Unreadable images of a split: counted, named, and refused above a share.

    Attributes:
        share: How many of all images may be.
        total: All images; 0 if not known, then the share is one of a thousand.
        source: For the messages.
        found: Where -> what was wrong.
    """

    share: float
    total: int
    source: str
    found: dict[str, str] = field(default_factory=dict)

    def add(self, where: str, why: str) -> None:
        """Note an unreadable image.

        Raises:
            ValueError: If there are too many.
        """
        self.found[where] = why
        self.check()

    def check(self) -> None:
        """Raise ValueError if there are too many."""
        if len(self.found) > self.share * (self.total or 1000):
            raise EtfZooError(
                f"{self.text()} That is more than --data.max_corrupt {self.share:g} allows: mend or remove them, or "
                f"raise the share."
            )

    def text(self) -> str:
        """Which and how many."""
        shown = [f"{where} ({why})" for where, why in list(self.found.items())[:5]]
        more = f" and {len(self.found) - 5} more" if len(self.found) > 5 else ""
        count = f"{len(self.found)} of {self.total}" if self.total else str(len(self.found))
        return f"{count} images of {self.source} cannot be read: {', '.join(shown)}{more}."

    def warn(self) -> None:
        """Say what was left out, if anything was."""
        if self.found:
            warnings.warn(f"{self.text()} They are left out.", stacklevel=3)
