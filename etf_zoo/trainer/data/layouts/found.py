"""What a walk through a source found: splits of files and classes, what was left out, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from etf_zoo.errors import EtfZooError

__all__ = ["Found", "role", "shown"]

ROLES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "held out"),  # the last is what a share of the training images is called
}


def role(name: str) -> str:
    """`train`, `val` or `test` for the names, in any case, that such splits go by; else empty.

    Example:
        >>> role("Valid"), role("roses")
        ('val', '')
    """
    return next((key for key, names in ROLES.items() if name.strip().lower() in names), "")


def shown(names: list[str], most: int = 5) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass
class Found:
    """What a source holds.

    Attributes:
        source: Folder or file, as messages name it.
        splits: Name of a split -> its images: (path, name of the class).
        layout: How they lie there, in words.
        skipped: Why files or folders were left out -> which.
        notes: What else the user should know, in sentences.
    """

    source: str
    splits: dict[str, list[tuple[Path, str]]] = field(default_factory=dict)
    layout: str = ""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def skip(self, why: str, what: str) -> None:
        """Note that a file or folder was left out."""
        self.skipped.setdefault(why, []).append(what)

    def lines(self) -> list[str]:
        """What was found, for people; the numbers of images stand in `report.describe`."""
        lines = [f"  Skipped: {len(names)} {why}, such as {names[0]}" for why, names in self.skipped.items()]
        return [f"Data: {self.source}: {self.layout}", *lines, *(f"  {note}" for note in self.notes)]

    def check(self) -> Found:
        """Itself.

        Raises:
            EtfZooError: If there is no image.
        """
        self.splits = {name: rows for name, rows in self.splits.items() if rows}
        if not self.splits:
            what = "; ".join(f"{len(names)} {why}, such as {names[0]}" for why, names in self.skipped.items())
            raise EtfZooError(
                f"{self.source} has no image in a folder of its class{f' ({what})' if what else ''}. Put the images of "
                f"each class into a folder of their own (train/CLASS/x.jpg, or CLASS/x.jpg), or give --data a table "
                f"(CSV) of their paths and labels."
            )
        return self

    def counts(self, split: str) -> Counter[str]:
        """Images of each class."""
        return Counter(name for _, name in self.splits[split])
