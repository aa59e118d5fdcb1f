"""Which data a run is trained on, so that it does not go on with others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.batches import AnySplit, Stream

__all__ = ["data_differences", "data_identity"]


def data_identity(train: AnySplit, val: AnySplit) -> dict[str, Any]:
    """What tells the data of a run from others, for JSON: classes, images, and a digest of them, which a stream lacks.

    Example:
        >>> data_identity(train, test)["training"]["images"]  # doctest: +SKIP
        1347
    """
    return {"training": _identity(train), "validation": _identity(val)}


def _identity(split: AnySplit) -> dict[str, Any]:
    # a stream may not know how long it is
    count, digest = (split.count, "") if isinstance(split, Stream) else (len(split), split.digest)
    return {"label_names": list(split.label_names), "images": count, "digest": digest}


def data_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, for people; empty for nothing."""
    differences = []
    for kind in before.keys() & now.keys():
        old, new = before[kind], now[kind]
        what = f"the {kind} images"
        if old["label_names"] != new["label_names"]:
            differences.append(f"{what} have {_renamed(old['label_names'], new['label_names'])}")
        elif old["images"] != new["images"]:
            differences.append(f"{what} were {old['images']:,} and are {new['images']:,}")
        elif old["digest"] != new["digest"]:
            differences.append(f"{what} are as many, but not the same (or not in the same order)")
    return sorted(differences)


def _renamed(old: list[str], new: list[str]) -> str:
    if len(old) != len(new):
        return f"{len(new)} classes, which were {len(old)}"
    number, pair = next((k, pair) for k, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
    return f"another class {number}: it was {pair[0]!r} and is {pair[1]!r}"
