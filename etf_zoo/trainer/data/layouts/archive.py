"""A zip file of photos: unpacked once into the cache, images and tables alone, and never outside it."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from etf_zoo.errors import EtfZooError, StorageError

from ..places import cache_root

__all__ = ["unpack"]


def unpack(file: Path) -> Path:
    """The folder in $ETF_ZOO_CACHE that a zip file was unpacked to, now or before.

    Links, absolute paths and those that lead out of it are left out, as is what takes more room than there is.

    Raises:
        EtfZooError: If it is no zip file, or a damaged or encrypted one.
        StorageError: If there is no room.
    """
    status = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_root() / f"{file.stem}-unzipped-{key}"
    if folder.is_dir():
        return folder
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if _is_safe(member)]
            needed = sum(member.file_size for member in members)
            folder.parent.mkdir(parents=True, exist_ok=True)
            if needed > shutil.disk_usage(folder.parent).free:
                raise StorageError(f"No room in {folder.parent} for the {needed / 1e9:.1f} GB of {file}.")
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
                made = Path(temporary) / "files"
                made.mkdir()
                for member in members:
                    archive.extract(member, made)
                try:
                    os.rename(made, folder)
                except OSError:  # another process was first
                    if not folder.is_dir():
                        raise
    except StorageError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise EtfZooError(f"Cannot unpack {file}: {error}") from error
    except OSError as error:
        raise StorageError(f"Cannot unpack {file} into {folder.parent}: {error.strerror or error}") from error
    return folder


def _is_safe(member: zipfile.ZipInfo) -> bool:
    """Whether an entry is a plain file below the folder that it is unpacked to."""
    path = PurePosixPath(member.filename.replace("\\", "/"))
    plain = not member.is_dir() and not stat.S_ISLNK(member.external_attr >> 16)
    return plain and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]
