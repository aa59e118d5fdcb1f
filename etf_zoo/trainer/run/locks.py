"""Locks between processes of one machine: a file that one process holds, till its block or the process ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["held"]


@contextmanager
def held(file: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether no other process holds a lock file; then this one does till the end of the block.

    Args:
        file: Made if need be, its folder too.
        wait: Whether to wait until it is free.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as lock:
        free = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            free = False
        yield free
