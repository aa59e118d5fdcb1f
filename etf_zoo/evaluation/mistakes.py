"""Where a model is wrong: accuracy by class, the classes it takes for one another, a list and a picture of the images.

Top-k, calibration error and confusion are counted here and in `measure.py`, not by torchmetrics: importing its
classification metrics (1.9) took 3.5 s of processor time, as much as torch and timm together, and its calibration error
keeps every sample's confidence, to be gathered over processes, where the 15 sums kept here are exact.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.Image import Resampling
from torch import Tensor

from ..errors import StorageError
from ..text import printable

__all__ = [
    "ClassAccuracy",
    "Confusion",
    "Mistake",
    "Predictions",
    "accuracy_by_class",
    "draw_mistakes",
    "format_mistakes",
    "worst_confusions",
    "write_mistakes",
]


@dataclass(frozen=True)
class Predictions:
    """What a model says of each of N samples.

    Attributes:
        labels: True classes `(N,)`.
        predicted: Most probable classes `(N,)`.
        confidence: Their probabilities `(N,)`.
    """

    labels: Tensor
    predicted: Tensor
    confidence: Tensor

    @staticmethod
    def joined(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Predictions:
        """One after the other; empty ones of none."""
        if not parts:
            return Predictions(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))
        return Predictions(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class ClassAccuracy:
    """How a class fares: its name, its images, and the share of them that is right, in percent."""

    name: str
    images: int
    top1: float


@dataclass(frozen=True)
class Confusion:
    """A class that is taken for another: how many images, and the share of the class, in percent."""

    label: str
    predicted: str
    images: int
    share: float


@dataclass(frozen=True)
class Mistake:
    """An image that is wrong.

    Attributes:
        image: Name of its file, or its row.
        label: Its class.
        predicted: The class that the model finds most probable.
        probability: Of that class.
        row: Number of the image in its split.
    """

    image: str
    label: str
    predicted: str
    probability: float
    row: int = -1


def accuracy_by_class(found: Predictions, names: Sequence[str]) -> list[ClassAccuracy]:
    """Accuracy of each class that has images, the worst first; of equal ones the larger first.

    Args:
        found: Of all samples.
        names: Of the K classes.

    Example:
        >>> found = Predictions(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.ones(3))
        >>> accuracy_by_class(found, ["cat", "dog"])[0]
        ClassAccuracy(name='cat', images=2, top1=50.0)
    """
    images = torch.bincount(found.labels, minlength=len(names)).tolist()
    right = torch.bincount(found.labels[found.labels == found.predicted], minlength=len(names)).tolist()
    rows = [ClassAccuracy(name, n, 100 * r / n) for name, n, r in zip(names, images, right, strict=True) if n]
    return sorted(rows, key=lambda row: (row.top1, -row.images))


def worst_confusions(found: Predictions, names: Sequence[str], most: int = 10) -> list[Confusion]:
    """Pairs of a class and the class it is most often taken for, those of most images first.

    Args:
        found: Of all samples.
        names: Of the K classes.
        most: How many pairs.
    """
    wrong = found.labels != found.predicted
    pairs, counts = torch.unique(found.labels[wrong] * len(names) + found.predicted[wrong], return_counts=True)
    images = torch.bincount(found.labels, minlength=len(names)).tolist()
    order = torch.argsort(counts, descending=True, stable=True)[:most]
    rows = []
    for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True):
        label, predicted = int(pair) // len(names), int(pair) % len(names)
        rows.append(Confusion(names[label], names[predicted], count, 100 * count / images[label]))
    return rows


def format_mistakes(classes: Sequence[ClassAccuracy], confusions: Sequence[Confusion], most: int = 10) -> str:
    """The worst classes and confusions as lines of text; empty where nothing is wrong.

    Args:
        classes: See `accuracy_by_class`.
        confusions: See `worst_confusions`.
        most: Lines of each.
    """
    worst = [row for row in classes[:most] if row.top1 < 100]
    lines = []
    if worst:
        lines += ["", "worst classes"]
        width = max(len(printable(row.name)) for row in worst)
        lines += [f"  {printable(row.name):<{width}}  {row.top1:6.2f} % of {row.images}" for row in worst]
    if confusions:
        lines += ["", "most often confused"]
        lines += [
            f"  {printable(c.label)} taken for {printable(c.predicted)}: {c.images} ({c.share:.1f} % of the class)"
            for c in confusions[:most]
        ]
    return "\n".join(lines)


def write_mistakes(mistakes: Iterable[Mistake], path: str | Path) -> Path:
    """Write images that are wrong as CSV: `image,label,predicted,probability`.

    Args:
        mistakes: In the order to write.
        path: Of the file.

    Raises:
        StorageError: If it cannot be written.
    """
    path = Path(path)
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "label", "predicted", "probability"])
            rows.writerows([m.image, m.label, m.predicted, f"{m.probability:.6f}"] for m in mistakes)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror}. Make its folder first.") from None
    return path


# ------------------------------------------------------------------------------------------------------------- picture

TILE, TEXT_LINES, LINE, GAP, COLUMNS = 160, 3, 15, 8, 6
INK, RIGHT, WRONG = "#1f2328", "#3a7d44", "#b3261e"


def draw_mistakes(
    mistakes: Sequence[Mistake], picture: Callable[[int], Image.Image], path: str | Path, most: int = 36
) -> Path:
    """Draw images that are wrong, the surest mistakes first, with file name, true and predicted class.

    Args:
        mistakes: Images that are wrong.
        picture: Gives the RGB image of a row.
        path: Of the PNG.
        most: How many images.
    """
    shown = sorted(mistakes, key=lambda m: -m.probability)[:most]
    columns = min(COLUMNS, max(1, len(shown)))
    rows = -(-len(shown) // columns)
    width, height = TILE + GAP, TILE + TEXT_LINES * LINE + GAP
    sheet = Image.new("RGB", (columns * width + GAP, max(1, rows) * height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, mistake in enumerate(shown):
        left, top = GAP + i % columns * width, GAP + i // columns * height
        image = picture(mistake.row)
        enlarged = max(image.size) < TILE  # small images show their pixels
        image = ImageOps.contain(image, (TILE, TILE), Resampling.NEAREST if enlarged else Resampling.LANCZOS)
        sheet.paste(image, (left + (TILE - image.width) // 2, top + (TILE - image.height) // 2))
        texts = [
            (Path(mistake.image).name, INK),
            (f"is {mistake.label}", RIGHT),
            (f"taken for {mistake.predicted} ({100 * mistake.probability:.0f} %)", WRONG),
        ]
        for line, (text, color) in enumerate(texts):
            draw.text((left, top + TILE + line * LINE), _fitting(printable(text), font), fill=color, font=font)
    sheet.save(path)
    return Path(path)


def _fitting(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """As much of a text as fits under a tile."""
    if font.getlength(text) <= TILE:
        return text
    while text and font.getlength(text + "…") > TILE:
        text = text[:-1]
    return text + "…"
