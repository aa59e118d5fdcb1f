"""Where data and decoded images are kept."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root", "find_source"]


def cache_root() -> Path:
    """$ETF_ZOO_CACHE, or ~/.cache/etf_zoo where that is not set or empty."""
    return Path(os.environ.get("ETF_ZOO_CACHE") or Path.home() / ".cache" / "etf_zoo").expanduser()


def find_source(source: str) -> str:
    """Folder or file of a data source: a path as it is, a name below $ETF_ZOO_DATA, else the text itself (a Hub name).

    A `~` stands for the home folder, quoted or not.
    """
    source = str(Path(source).expanduser()) if source.startswith("~") else source
    root = os.environ.get("ETF_ZOO_DATA")
    if not Path(source).exists() and root and (Path(root) / source).exists():
        return str(Path(root) / source)
    return source
