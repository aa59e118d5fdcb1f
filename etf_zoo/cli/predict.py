"""`etf-zoo predict`: the most probable classes of any number of images, in batches, whatever some of them are."""

from __future__ import annotations

import argparse
import csv
import glob
import itertools
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from tqdm import tqdm

from ..errors import EtfZooError
from ..images import UnreadableImageError, read_image
from ..models.find import find_model, load_model
from ..models.names import class_names
from ..ood import familiarity, read_threshold
from ..text import printable

__all__ = ["answered", "check_output", "image_files", "on_device", "predict", "progress", "said"]

_NAMED = 20  # unreadable files that are named one by one
NONE = "none of these"
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image.

    Attributes:
        classes: Class and probability, the most probable first.
        rejected: Whether the image is less familiar than `--reject` asks for.
    """

    classes: list[tuple[str, float]]
    rejected: bool = False


def predict(args: argparse.Namespace) -> int:
    """Print, or write to `--output`, the most probable classes of each image.

    Images are read while the model works, a few batches ahead: memory does not grow with their number.

    Returns:
        0; 1 if an image could not be read. The others are predicted all the same.
    """
    skipped: list[str] = []
    files = image_files(args.images, skipped)
    first = next(files, None)
    if first is None:
        raise EtfZooError(f"There is no image in {', '.join(args.images)}{_ignored(skipped)}.")
    writer, bad, count = _writer(args), {}, 0
    limit = -math.inf if args.reject is None else read_threshold(find_model(args.model).folder, args.reject)
    model = on_device(load_model(args.model))
    top, names = min(args.top, model.num_classes), class_names(model)

    def answer(images: Tensor) -> list[Prediction]:
        return _most_probable(model, images, names, top, limit)

    with _opened(args.output) as stream:
        writer.open(stream, top)
        answers = answered(model, itertools.chain([first], files), args.batch_size, answer)
        for file, found in tqdm(answers, **progress(args.output)):
            writer.write(file, found)
            count += 1
            if isinstance(found, UnreadableImageError):
                bad[file] = str(found)
        writer.close()
    if args.output:
        print(f"{count - len(bad)} images: {args.output}")
    if skipped:
        print(f"etf-zoo: {len(skipped)} files are no images by their names{_ignored(skipped)}.", file=sys.stderr)
    if bad:
        print("etf-zoo:", said(bad, count), file=sys.stderr)
    return 1 if bad else 0


def said(bad: dict[str, str], count: int) -> str:
    """Which images cannot be read, and why: one line for one image."""
    lines = [f"{printable(file)} cannot be read: {printable(why)}" for file, why in bad.items()]
    if len(bad) == 1:
        return lines[0]
    more = [f"and {len(bad) - _NAMED} more"] if len(bad) > _NAMED else []
    return "\n  ".join([f"{len(bad)} of {count} images cannot be read:", *lines[:_NAMED], *more])


def _ignored(skipped: list[str]) -> str:
    return f" (such as {printable(skipped[0])})" if skipped else ""


def progress(output: str | None) -> dict[str, Any]:
    """Arguments of a progress bar, which shows only where the answers do not."""
    return {"unit": "image", "disable": None if output else True, "mininterval": 1, "leave": False}


# --------------------------------------------------------------------------------------------------------------- files


def image_files(names: Iterable[str], skipped: list[str] | None = None) -> Iterator[str]:
    """Paths of image files, one after the other.

    Args:
        names: Files, folders, patterns, or `-` for such names on standard input. A name that is none of these is
            given back as it is: reading it says what is wrong.
        skipped: Gets the files in folders whose names say that they are no images; hidden files and what macOS leaves
            in archives are never looked at.
    """
    for name in names:
        if name == "-":
            yield from image_files((line.rstrip("\r\n") for line in sys.stdin if line.strip()), skipped)
        elif os.path.isdir(name):
            yield from _images_below(name, [] if skipped is None else skipped)
        elif glob.has_magic(name) and not os.path.exists(name):
            found = sorted(glob.glob(name, recursive=True))
            yield from image_files(found, skipped) if found else [name]
        else:
            yield name


def _images_below(folder: str, skipped: list[str]) -> Iterator[str]:
    extensions = Image.registered_extensions()
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        for file in sorted(name for name in files if not name.startswith(".")):
            path = os.path.join(root, file)
            if os.path.splitext(file)[1].lower() in extensions:
                yield path
            else:
                skipped.append(path)


# --------------------------------------------------------------------------------------------------------- predictions


def answered(
    model: Any, files: Iterable[str], batch_size: int, answer: Callable[[Tensor], Iterable[Answer]]
) -> Iterator[tuple[str, Answer | UnreadableImageError]]:
    """Each file with what is found of it, or with what is wrong with it, in order.

    Args:
        model: Says how images are prepared and on which device.
        files: Image files.
        batch_size: Images at a time.
        answer: Gets a batch `(B, 3, H, W)`, gives an answer an image.
    """
    device = next(model.parameters()).device
    waiting: list[tuple[str, Tensor | UnreadableImageError]] = []

    def of_waiting() -> Iterator[tuple[str, Answer | UnreadableImageError]]:
        images = [image for _, image in waiting if isinstance(image, Tensor)]
        found = iter(answer(torch.stack(images).to(device)) if images else [])
        for file, image in waiting:
            yield file, image if isinstance(image, UnreadableImageError) else next(found)
        waiting.clear()

    for file, image in _read_ahead(files, _preparation(model), ahead=2 * batch_size):
        waiting.append((file, image))
        if sum(isinstance(image, Tensor) for _, image in waiting) == batch_size:
            yield from of_waiting()
    yield from of_waiting()


def on_device(model: Any) -> Any:
    """The model, on an accelerator where there is one."""
    return model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")


@torch.inference_mode()
def _most_probable(model: Any, images: Tensor, names: list[str], top: int, limit: float) -> list[Prediction]:
    logits = model(images).float()
    best = logits.softmax(dim=1).topk(top, dim=1)
    rejected = (familiarity(logits) < limit).tolist()
    rows = zip(best.values.tolist(), best.indices.tolist(), rejected, strict=True)
    return [
        Prediction([(names[i], p) for p, i in zip(values, indices, strict=True)], none)
        for values, indices, none in rows
    ]


def _preparation(model: Any) -> Any:
    """From a file to the model's input `(3, H, W)`, or to what is wrong with the file."""
    transform: Any = create_transform(**resolve_data_config(model=model), is_training=False)

    def prepared(file: str) -> Tensor | UnreadableImageError:
        try:
            return transform(read_image(file))
        except UnreadableImageError as error:
            return error

    return prepared


def _read_ahead(files: Iterable[str], prepared: Any, ahead: int) -> Iterator[tuple[str, Any]]:
    """Files with what `prepared` makes of them, by threads: Pillow decodes without Python's lock."""
    queue: deque[tuple[str, Future]] = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for file in files:
            queue.append((file, pool.submit(prepared, file)))
            if len(queue) > ahead:
                file, done = queue.popleft()
                yield file, done.result()
        while queue:
            file, done = queue.popleft()
            yield file, done.result()


# -------------------------------------------------------------------------------------------------------------- output


def _writer(args: argparse.Namespace) -> _Writer:
    if not args.output:
        return _JsonArray() if args.json else _Text()
    kinds = {".csv": _Csv, ".jsonl": _JsonLines, ".json": _JsonArray, ".txt": _Text}
    kind = kinds.get(Path(args.output).suffix.lower())
    if kind is None:
        raise EtfZooError(f"--output {args.output} has to end in {', '.join(kinds)}, which says how it is written.")
    check_output(args.output)
    return kind()


def check_output(file: str) -> None:
    """Raise EtfZooError on a file that has no folder, before the work."""
    if not Path(file).resolve().parent.is_dir():
        raise EtfZooError(f"There is no folder for --output {file}: make it first.")


@contextmanager
def _opened(path: str | None) -> Iterator[TextIO]:
    if not path:
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8", newline="") as stream:
        yield stream


class _Writer:
    """Writes one prediction after the other."""

    stream: TextIO

    def open(self, stream: TextIO, top: int) -> None:
        self.stream = stream

    def write(self, file: str, found: Prediction | UnreadableImageError) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class _Text(_Writer):
    def write(self, file: str, found: Prediction | UnreadableImageError) -> None:
        if isinstance(found, Prediction):
            lines = [f"  {100 * probability:6.2f} %  {printable(name)}" for name, probability in found.classes]
            lines = [f"  {NONE}"] if found.rejected else lines
            print(printable(file), *lines, sep="\n", file=self.stream)


def _entry(file: str, found: Prediction | UnreadableImageError) -> dict[str, Any]:
    if isinstance(found, UnreadableImageError):
        return {"image": file, "error": str(found)}
    entry = {"image": file, "predictions": [{"label": name, "probability": p} for name, p in found.classes]}
    return {**entry, "none_of_these": True} if found.rejected else entry


class _JsonLines(_Writer):
    def write(self, file: str, found: Prediction | UnreadableImageError) -> None:
        self.stream.write(json.dumps(_entry(file, found)) + "\n")


class _JsonArray(_Writer):
    opened = False

    def write(self, file: str, found: Prediction | UnreadableImageError) -> None:
        self.stream.write((",\n" if self.opened else "[\n") + json.dumps(_entry(file, found)))
        self.opened = True

    def close(self) -> None:
        self.stream.write("\n]\n")


class _Csv(_Writer):
    """A row for each image that can be read: `image,label_1,probability_1,label_2,...`."""

    def open(self, stream: TextIO, top: int) -> None:
        self.rows = csv.writer(stream)
        self.rows.writerow(["image", *(f"{name}_{i}" for i in range(1, top + 1) for name in ("label", "probability"))])

    def write(self, file: str, found: Prediction | UnreadableImageError) -> None:
        if isinstance(found, Prediction):
            values = [value for name, p in found.classes for value in (name, f"{p:.6f}")]
            self.rows.writerow([file, *([NONE] + [""] * (len(values) - 1) if found.rejected else values)])
