"""A folder of photos as people have it: one walk, then splits and classes from the names of the folders."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from etf_zoo.errors import EtfZooError
from etf_zoo.images import image_extensions

from .found import Found, role, shown

__all__ = ["Walk", "class_names", "index_folder", "walk"]

JUNK = {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "lost+found"}
DOCUMENTS = {
    *(".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".xml", ".html", ".pdf", ".log"),
    *(".py", ".ipynb", ".parquet", ".npy", ".npz", ".mat", ".zip", ".tar", ".gz", ".xlsx", ".cache", ".db", ".lock"),
}
HINTS = {
    ".heic": "pip install pillow-heif",
    ".heif": "pip install pillow-heif",
    ".avif": "needs Pillow 11.3 or later",
    ".jxl": "convert them to JPEG",
    **dict.fromkeys(
        (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"), "raw photos: convert them to JPEG"
    ),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".mpg", ".mpeg"), "videos"),
}
NO_CLASS = "images in no class folder"

Parts = tuple[str, ...]


@dataclass
class Walk:
    """All files below a folder, by the parts of their paths from there.

    Attributes:
        folder: Where it began.
        files: In sorted order; what is hidden or a system's own is none.
        folders: Likewise.
        skipped: Why something was left out -> which.
    """

    folder: Path
    files: list[Parts] = field(default_factory=list)
    folders: list[Parts] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)


def walk(folder: Path) -> Walk:
    """Look through a folder once. Links are followed, except to a folder that they lie in.

    Names that begin with one dot are hidden.
    """
    found = Walk(folder)
    _walk(found, folder, (), frozenset())
    return found


def _walk(found: Walk, folder: Path, parts: Parts, above: frozenset[tuple[int, int]]) -> None:
    try:
        status = os.stat(folder)
        key = (status.st_dev, status.st_ino)
        if key in above:
            found.skipped.setdefault("links to a folder that they lie in", []).append("/".join(parts))
            return
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        found.skipped.setdefault(f"folders that cannot be read ({error.strerror})", []).append("/".join(parts) or ".")
        return
    if parts:
        found.folders.append(parts)
    for entry in entries:
        own = (*parts, entry.name)
        if entry.name in JUNK or (entry.name.startswith(".") and not entry.name.startswith("..")):
            continue
        if entry.is_dir():
            _walk(found, Path(entry.path), own, above | {key})
        elif entry.is_file():
            found.files.append(own)
        else:
            found.skipped.setdefault("broken links", []).append("/".join(own))


def class_names(looked: Walk) -> set[str]:
    """Names of the first folders above images that are none of splits: two of them, and they may be classes."""
    found = set()
    for parts in looked.files:
        if os.path.splitext(parts[-1])[1].lower() in image_extensions():
            found.add(next((name for name in parts[:-1] if not role(name)), ""))
    return found - {""}


def index_folder(looked: Walk, class_level: int = 0) -> Found:
    """Splits and classes by the names of folders: `SPLIT/CLASS/x.jpg`, `CLASS/x.jpg`, or `CLASS/SPLIT/x.jpg`.

    Names of splits count without case, and are never classes. A folder that wraps all others is looked through.

    Args:
        looked: What `walk` found.
        class_level: Which folder below that of the split names the class: 1 for the first, -1 for the innermost; 0 for
            the first, with a note if there are others.

    Raises:
        EtfZooError: On no image, a class folder whose files are none, classes named as splits, or no such level.
    """
    found = Found(str(looked.folder), skipped={why: list(names) for why, names in looked.skipped.items()})
    images, others = _sorted_out(looked, found)
    wrapper = _wrapper(images, looked.folders)
    if wrapper:
        found.notes.append(f"All images are taken from {'/'.join(wrapper)}/.")
    place = _split_place([parts[len(wrapper) :] for parts in images if _below(parts, wrapper)], found.source)
    rows: list[tuple[str, Parts, Parts]] = []  # split, folders that may name the class, path
    for parts in images:
        placed = _placed(parts[len(wrapper) : -1], place) if _below(parts, wrapper) else None
        if placed is None:
            outside = f"{'/'.join(wrapper)}/" if not _below(parts, wrapper) else "the folders of splits"
            found.skip(f"images outside {outside}", "/".join(parts))
        else:
            rows.append((*placed, parts))
    level = _level([folders for _, folders, _ in rows], class_level, found)
    names = _names([folders for _, folders, _ in rows], level)
    for split, folders, parts in rows:
        if folders in names:
            found.splits.setdefault(split, []).append((looked.folder.joinpath(*parts), names[folders]))
        else:
            found.skip(NO_CLASS, "/".join(parts))
    if place is None:
        found.layout = "a folder for each class"
    else:
        found.layout = ("a folder for each split, in it one for each class", "a folder for each class and split")[place]
    _check_class_folders(looked, found, others, wrapper, place, level)
    return found.check()


def _below(parts: Parts, folder: Parts) -> bool:
    return parts[: len(folder)] == folder and len(parts) > len(folder)


def _sorted_out(looked: Walk, found: Found) -> tuple[list[Parts], list[Parts]]:
    """Images, and all other files; what lies beside the folders and is no photo is not worth a word."""
    images, others = [], []
    for parts in looked.files:
        ending = os.path.splitext(parts[-1])[1].lower()
        if ending in image_extensions() or (ending not in DOCUMENTS and _opens(looked.folder.joinpath(*parts))):
            images.append(parts)
            continue
        others.append(parts)
        if len(parts) > 1 or ending in HINTS:
            hint = f" ({HINTS[ending]})" if ending in HINTS else ""
            found.skip(f"{ending or 'other'} files{hint}", "/".join(parts))
    return images, others


def _opens(file: Path) -> bool:
    """Whether Pillow knows what a file is, whatever it is called."""
    try:
        with Image.open(file):
            return True
    except Exception:  # a file of any kind meets decoders of all kinds
        return False


def _wrapper(images: list[Parts], folders: list[Parts]) -> Parts:
    """The folder that holds everything, such as the one that a zip file makes, or the one with the splits."""
    wrapper: Parts = ()
    while True:
        depth = len(wrapper)
        tops = {parts[depth] for parts in images if _below(parts, wrapper) and len(parts) > depth + 1}
        beside = {parts[depth] for parts in folders if _below(parts, wrapper)}
        if any(role(name) for name in beside):
            return wrapper
        inside = [parts[depth:] for parts in images if _below(parts, wrapper)]
        holding = {parts[0] for parts in inside if len(parts) > 3 and role(parts[1]) == "train"}
        if len(holding) == 1:
            wrapper = (*wrapper, *holding)
        elif len(tops) == len(beside) == 1 and any(len(parts) > 2 for parts in inside):
            wrapper = (*wrapper, *tops)
        else:
            return wrapper


def _split_place(images: list[Parts], source: str) -> int | None:
    """Which folder of a path names its split: the first or the second; None for neither.

    Raises:
        EtfZooError: Where some do and others do not.
    """
    for place in (0, 1):
        named = {parts[place] for parts in images if len(parts) > place + 1}
        splits = sorted(name for name in named if role(name))
        plain = sorted(named - set(splits))
        if place == 1:
            plain += sorted({parts[0] for parts in images if len(parts) == 2})  # classes without folders of splits
        if not splits:
            continue
        if not plain or (place == 0 and any(role(name) == "train" and _has_class(images, name) for name in splits)):
            return place
        raise EtfZooError(
            f"{source}: {splits[0]!r} is the name of a split and never a class, but {plain[0]!r} is none. If it is a "
            f"class, rename it; else put the class folders into train/."
        )
    return None


def _has_class(images: list[Parts], split: str) -> bool:
    return any(parts[0] == split and len(parts) > 2 for parts in images)


def _placed(folders: Parts, place: int | None) -> tuple[str, Parts] | None:
    """Split, and the folders that may name the class; None outside all splits."""
    if place is None:
        return "train", folders
    if place >= len(folders) or not role(folders[place]):
        return None
    # folders of one split in several classes may be spelled in several ways
    return (folders[0], folders[1:]) if place == 0 else (role(folders[1]), (folders[0], *folders[2:]))


def _level(rows: list[Parts], wanted: int, found: Found) -> int:
    """Which of the folders names the class; says so where there is a choice."""
    deepest = max((len(folders) for folders in rows), default=0)
    if abs(wanted) > max(deepest, 1):
        raise EtfZooError(
            f"data.class_level {wanted}: {found.source} has {deepest} levels of folders below its splits."
        )
    level = wanted or 1
    if deepest > 1 and any(len(folders) < deepest for folders in rows) and not wanted:
        found.notes.append(f"Images lie 1 to {deepest} folders deep.")
    for other in range(1, deepest + 1) if not wanted else ():
        names = sorted({folders[other - 1] for folders in rows if len(folders) >= other})
        if other == 1 and deepest > 1:
            found.notes.append(f"Classes are the outer folders, {len(names)}: {shown(names)}.")
        elif other > 1 and len(names) > 1:
            found.notes.append(
                f"Level {other} has {len(names)} folders: {shown(names)}. To take these: --data.class_level {other}."
            )
    return level


def _names(rows: list[Parts], level: int) -> dict[Parts, str]:
    """Name of the class for each path of folders that has one: that of a folder, or its path where names repeat."""
    paths = {f: f[:level] if level > 0 else f[: len(f) + level + 1] for f in set(rows) if len(f) >= abs(level)}
    repeated = len(set(paths.values())) > len({path[-1] for path in paths.values()})
    return {folders: "/".join(path) if repeated else path[-1] for folders, path in paths.items()}


def _check_class_folders(
    looked: Walk, found: Found, others: list[Parts], wrapper: Parts, place: int | None, level: int
) -> None:
    """Name class folders without an image; stop at those that hold files, but none that can be read."""
    holding = {row[0].parent for rows in found.splits.values() for row in rows}
    filled = {
        parts[:i] for parts in (p.relative_to(looked.folder).parts for p in holding) for i in range(len(parts) + 1)
    }
    parents = {folder[:-1] for folder in looked.folders}
    empty, documents, unreadable = [], [], []
    for folder in looked.folders:
        placed = _placed(folder[len(wrapper) :], place) if _below(folder, wrapper) else None
        is_class = placed is not None and (
            len(placed[1]) == level if level > 0 else placed[1] and folder not in parents
        )
        if not is_class or folder in filled:
            continue
        inside = [parts for parts in others if _below(parts, folder)]
        endings = Counter(os.path.splitext(parts[-1])[1].lower() for parts in inside)
        name = "/".join(folder)
        if not inside:
            empty.append(name)
        elif set(endings) <= {*DOCUMENTS, ""}:
            documents.append(name)
        else:
            kinds = [
                f"{n} {end or 'without ending'}{': ' + HINTS[end] if end in HINTS else ''}"
                for end, n in endings.items()
            ]
            unreadable.append(f"{name} ({'; '.join(kinds)})")
    if unreadable:
        raise EtfZooError(
            f"{found.source}: of {len(unreadable)} class folders no file can be read as an image: {shown(unreadable)}. "
            f"Convert the files, or take these folders out."
        )
    if empty:
        found.notes.append(f"Empty folders, which are no classes: {shown(empty)}.")
    if documents:
        found.notes.append(f"Folders without images, which are no classes: {shown(documents)}.")
