"""Locks between processes of one machine: a file that one process has, till its block or the process ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from etf_zoo.errors import StorageError

__all__ = ["acquire"]


@contextmanager
def acquire(file: Path, *, wait: bool = False) -> Iterator[bool]:
    """Try to get a lock; yields whether this process has it till the end of the block.

    Args:
        file: The lock's file, made if need be, its folder too. What a link points to is never touched.
        wait: Whether to wait until it is free; then it is always yielded as true.

    Raises:
        StorageError: If the file cannot be made, or is a link.

    Example:
        >>> with acquire(Path("run/.lock")) as alone:  # doctest: +SKIP
        ...     if not alone:
        ...         raise EtfZooError("Another process trains in run: choose another --output.")
    """
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "It is a link: delete it" if file.is_symlink() else "Choose a folder that you can write to (--output)"
        raise StorageError(f"Cannot lock {file}: {reason}. {fix}.") from error
    try:
        yield True
    finally:
        lock.release()
