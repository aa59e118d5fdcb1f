"""One image: its bytes, its pixels, and what becomes of those that cannot be read."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etf_zoo.errors import EtfZooError
from etf_zoo.images import UnreadableImageError

from .places import cache_root

__all__ = ["Corrupt", "decoders", "encoded", "end_with_parent", "ending"]

SHOWN = 20  # unreadable images that a message names


def encoded(item: Any, below: Sequence[str] = ()) -> bytes:
    """Bytes of an image file.

    Args:
        item: A `Path` that was found by looking, bytes, or a row `{"bytes", "path"}` as `datasets` stores them.
        below: Folders, or beginnings of addresses, that the paths in rows may lead to: whoever wrote a row does not
            choose which files of this machine are opened.

    Raises:
        UnreadableImageError: If there is nothing to read.
    """
    item = item.as_py() if hasattr(item, "as_py") else item
    if isinstance(item, dict):
        item = item["bytes"] or item["path"]
    if isinstance(item, bytes):
        return item
    if item is None:
        raise UnreadableImageError("no image")
    try:
        if isinstance(item, Path):
            return item.read_bytes()
        if "://" in (text := str(item)):  # a stream names files inside archives and on the Hub so
            if not text.rpartition("::")[2].startswith(tuple(b for b in below if "://" in b)):
                raise UnreadableImageError(f"its row gives the address {text!r}, which is not opened")
            import fsspec

            with fsspec.open(text, "rb") as file:
                return file.read()  # type: ignore[union-attr]
        for folder in (Path(b).resolve() for b in below if "://" not in b):
            if (path := (folder / text).resolve()).is_relative_to(folder):
                return path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error
    raise UnreadableImageError(f"its row names {text!r}, which lies outside the data and is not opened")


def ending(item: Any, below: Sequence[str] = (), count: int = 4096) -> tuple[int, bytes]:
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
        data = encoded(item, below)
    except UnreadableImageError:
        data = b""
    return len(data), data[-count:]


def decoders(most: int) -> int:
    """How many worker processes are of use, up to so many: one for each core that this process may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(most, cores), 0)


def end_with_parent(worker: int = 0) -> None:
    """Have this worker process end within a second of its parent, be that killed; Ctrl-C is the parent's to answer.

    Args:
        worker: Its number, as `worker_init_fn` of torch's `DataLoader` is given.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    known = multiprocessing.parent_process()
    parent = known.pid if known else os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


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
        """Note an unreadable image."""
        self.found[where] = why

    def check(self) -> None:
        """Raise EtfZooError, with all that are known, if there are too many."""
        if len(self.found) > self.share * (self.total or 1000):
            raise EtfZooError(
                f"{self.text()} That is more than --data.max_corrupt {self.share:g} allows: mend or remove them, or "
                f"raise the share."
            )

    def text(self) -> str:
        """Which and how many; a file has the list if it is long."""
        shown = ", ".join(f"{where} ({why})" for where, why in list(self.found.items())[:SHOWN])
        count = f"{len(self.found)} of {self.total}" if self.total else str(len(self.found))
        more = f" and {len(self.found) - SHOWN} more, all in {self._listed()}" if len(self.found) > SHOWN else ""
        return f"{count} images of {self.source} cannot be read: {shown}{more}."

    def _listed(self) -> Path:
        file = cache_root() / "unreadable" / f"{Path(self.source).name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{where}\t{why}\n" for where, why in self.found.items()), encoding="utf-8")
        return file

    def warn(self) -> None:
        """Say what was left out, if anything was."""
        if self.found:
            warnings.warn(f"{self.text()} They are left out.", stacklevel=3)
