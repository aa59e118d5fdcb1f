"""Splits by recipe, and their batches: of images in memory here, of all others by `loader`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from etf_zoo.errors import EtfZooError
from etf_zoo.frames import Hierarchy
from etf_zoo.frames.build import OF_A_TREE

from ..data import loader
from ..recipe.config import Augment, Data, Recipe
from .augment import IMAGENET, Colors, augment, erase, mix, normalize, views
from .layouts import DatasetsReader, find_reader
from .photos import Photos, keep_photos
from .places import find_source
from .resident import Split, cache, read_prepared
from .sealed import refuse_test
from .sources import Rows, Stream, choose_split, open_rows, open_stream
from .stored import StoredInputs

__all__ = [
    "AnySplit",
    "Rows",
    "Split",
    "Stream",
    "augment",
    "batch_generator",
    "eval_batches",
    "find_source",
    "frame_tree",
    "limited",
    "limited_rows",
    "load_hierarchy",
    "load_split",
    "mix",
    "normalize",
    "split_names",
    "train_batches",
    "view_batches",
]

AnySplit = Split | Rows | Stream | StoredInputs
DEFAULT_SIZE = 64
RESIDENT_SIZE = 128  # what `resident: auto` takes for small


def load_split(data: Data, split: str) -> Split | Rows | Stream:
    """One split of a data set: an array (see `resident`), photographs in memory (see `photos`), rows, or a stream.

    With `data.label` `instance` each image is a class of its own, named by its number; with `teacher` see
    `teacher.taught`.

    Args:
        data: Where the images are.
        split: Name of the split.

    Raises:
        ValueError: On a missing data set, split or column, labels that make no classes, or too many broken images; on
            any split but that of training while something is chosen, see `sealed`.
        OSError: If the disk is full.
    """
    refuse_test(split, data.train_split)
    found = _load_split(data, split)
    if data.label == "teacher":
        from .teacher import taught  # which runs a model

        return taught(found, data.teacher, data.teacher_size)
    if data.label == "class" or isinstance(found, Stream):
        return found
    return replace(found, labels=np.arange(len(found)), label_names=[str(i) for i in range(len(found))])


def _load_split(data: Data, split: str) -> Split | Rows | Stream:
    if not data.source:
        raise EtfZooError("No data: give --data.source a folder, a Hub name or digits.")
    if not data.size:  # a recipe has filled it in
        data = replace(data, size=DEFAULT_SIZE)
    if data.source == "digits":
        return _digits(data.size, split)
    if prepared := prepared_splits(data.source):
        return read_prepared(prepared[choose_split(list(prepared), split, data.source)], data)
    if data.streaming:
        return open_stream(data, split)
    resident = data.size <= RESIDENT_SIZE if data.resident == "auto" else data.resident
    rows = open_rows(data, split, resident=resident)
    if resident:
        return cache(rows, data.size)
    return keep_photos(rows, for_training=split == data.train_split) if data.resident == "auto" else rows


def split_names(data: Data) -> list[str]:
    """Splits of a data set, by their own names."""
    if data.source == "digits":
        return ["train", "test"]
    if prepared := prepared_splits(data.source):
        return list(prepared)
    return list(DatasetsReader(data).splits if data.streaming else find_reader(data, resident=True).splits)


def prepared_splits(source: str) -> dict[str, Path]:
    """Splits that `training/prepare.py` left in a folder, by name."""
    return {file.parent.name: file.parent for file in sorted(Path(find_source(source)).glob("*/images.npy"))}


def load_hierarchy(data: Data, label_names: list[str]) -> Tensor:
    """Distances `(K, K)` between classes by the `hierarchy.json` ({child: parent}) in the data's folder.

    Raises:
        ValueError: If there is none, or it does not hold the classes.
    """
    file = Path(find_source(data.source)) / "hierarchy.json"
    if not file.is_file():
        raise EtfZooError(f"A hierarchy frame needs {file}: a JSON object {{child: parent}} over the label names.")
    return Hierarchy.from_json(file).distances(label_names)


def frame_tree(recipe: Recipe, label_names: list[str]) -> Tensor | None:
    """Distances `(K, K)` that a recipe's `frame: hierarchy` or `subspaces` is made from; None for any other frame."""
    of_a_tree = recipe.model_args.get("frame") in OF_A_TREE
    return load_hierarchy(recipe.data, label_names) if of_a_tree else None


def _digits(size: int, split: str) -> Split:
    """scikit-learn's 1,797 handwritten digits, three quarters for training, by a fixed stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    if split not in ("train", "test"):
        raise EtfZooError(f"digits has the splits train and test, not {split!r}.")
    keep = train if split == "train" else test
    gray = (255 - pixels[keep] * (255 / 16)).clip(0, 255).astype(np.uint8).reshape(-1, 8, 8)
    images = [
        np.asarray(Image.fromarray(g).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")) for g in gray
    ]
    names = [str(i) for i in range(10)]
    return Split(np.stack(images), labels[keep].astype(np.int64), names, "scikit-learn digits", split)


# --------------------------------------------------------------------------------------------------------- batches


def batch_generator(seed: int, epoch: int, step: int, stream: int = 2) -> torch.Generator:
    """Randomness of one batch, on the CPU so that every device draws the same.

    Args:
        seed: Of the run.
        epoch: Number of the epoch.
        step: Of the epoch.
        stream: Tells different uses within a step apart.
    """
    return torch.Generator().manual_seed(int(np.random.default_rng([seed, stream, epoch, step]).integers(2**62)))


def train_batches(
    split: AnySplit,
    settings: Augment,
    *,
    size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    limit: int = 0,
    colors: Colors = IMAGENET,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor | list[Tensor], Tensor]]:
    """Augmented, normalized batches of one epoch, from step `start` on; `mix` is left to the caller.

    Order and augmentation depend on (seed, epoch, step) and the place in the batch alone: a resumed run sees what it
    would have seen, and several processes see together what one would. (Streams: only the former, see
    `loader.stream_batches`.) The last, short batch is left out. Unreadable images that are not resident make a batch
    shorter.

    Args:
        split: The images.
        settings: The augmentation.
        size: Pixels of a side.
        batch_size: Images per step over all processes.
        seed: Of the run.
        epoch: Number of the epoch.
        start: First step to give.
        rank: Of this process.
        world: Number of processes.
        limit: Use only so many images of a fixed shuffle; 0 for all.
        colors: What to normalize by.
        device: Where the batch goes.

    Yields:
        Images `(B, 3, size, size)` float32, or of several views of each image what `augment.views` gives; labels
        `(B,)`, or a teacher's shares of the classes `(B, K)`.

    Raises:
        EtfZooError: On several views of images that are not resident.
    """
    device = torch.device(device)
    if isinstance(split, Stream):
        batches = loader.stream_batches(
            split,
            settings,
            size=size,
            batch_size=batch_size,
            seed=seed,
            epoch=epoch,
            start=start,
            rank=rank,
            world=world,
        )
    else:
        rows = limited_rows(len(split), limit, seed)
        rows = rows[np.random.default_rng([seed, 1, epoch]).permutation(len(rows))]
        parts = [
            rows[step * batch_size : (step + 1) * batch_size][rank::world]
            for step in range(start, len(rows) // batch_size)
        ]
        if isinstance(split, StoredInputs):
            yield from split.train_batches(parts, seed=seed, epoch=epoch, start=start, device=device)
            return
        batches = _pictures(split, settings, parts, size, (seed, epoch), device)
    in_memory = isinstance(split, Split | Photos)
    if settings.views > 1 and not in_memory:
        raise EtfZooError("Several views of an image are for resident images: set data.resident to true.")

    def finished(images: Tensor) -> Tensor:
        images = normalize(images, colors)
        return erase(images, settings.erase, generator, rank=rank, world=world) if settings.erase else images

    for step, (images, labels) in enumerate(batches, start):
        generator = batch_generator(seed, epoch, step)
        if settings.views > 1:
            groups = views(images, settings, size, generator, rank=rank, world=world)
            yield [finished(group.flatten(0, 1)).unflatten(0, group.shape[:2]) for group in groups], labels
        elif in_memory:
            yield finished(augment(images, settings, size, generator, rank=rank, world=world)), labels
        else:
            yield finished(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)


def _pictures(
    split: Split | Rows,
    settings: Augment,
    parts: list[np.ndarray],
    size: int,
    key: tuple[int, ...],
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of some rows at a time: those in memory as they are, others through the training transform."""
    if isinstance(split, Split):
        return (split.take(part, device, shares=True) for part in parts)
    if isinstance(split, Photos):
        return split.training_batches(parts, device)
    return loader.row_batches(split, loader.train_transform(settings, size), parts, key, train=True)


def view_batches(
    split: Split | Rows,
    settings: Augment,
    *,
    size: int,
    batch_size: int,
    seed: int,
    view: int,
    colors: Colors = IMAGENET,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """All images in order, `(B, 3, size, size)` at a time: in view 0 as evaluation has them, in others augmented."""
    device = torch.device(device)
    if view == 0:
        yield from (
            images for images, _ in eval_batches(split, size=size, batch_size=batch_size, colors=colors, device=device)
        )
        return
    parts = np.split(np.arange(len(split)), range(batch_size, len(split), batch_size))
    for step, (images, _) in enumerate(_pictures(split, settings, parts, size, (seed, view, 7), device)):
        generator = batch_generator(seed, view, step, stream=7)
        if isinstance(split, Split | Photos):
            images = augment(images, settings, size, generator)
        images = normalize(images.to(device, non_blocking=True), colors)
        yield erase(images, settings.erase, generator) if settings.erase else images


def limited(split: AnySplit, limit: int, seed: int) -> AnySplit:
    """What `data.limit` leaves of a split."""
    return split.subset(limited_rows(len(split), limit, seed)) if limit else split


def limited_rows(count: int, limit: int, seed: int) -> np.ndarray:
    """Rows that `data.limit` leaves of so many: the first of a fixed shuffle; with 0 all of it."""
    return np.random.default_rng([seed, 0]).permutation(count)[: limit or None]


def eval_batches(
    split: AnySplit,
    *,
    size: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    colors: Colors = IMAGENET,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once over all processes, those of an array in order: no sample dropped or doubled."""
    device = torch.device(device)
    if isinstance(split, Stream):
        batches = loader.stream_batches(split, None, size=size, batch_size=batch_size, rank=rank, world=world)
    else:
        rows = np.arange(len(split))[rank::world]
        parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        if isinstance(split, StoredInputs):
            yield from split.batches(parts, device)
            return
        if isinstance(split, Split):
            batches = (split.take(part, device) for part in parts)
        elif isinstance(split, Photos):
            batches = split.eval_batches(parts, size, device)
        else:
            transform = loader.eval_transform(size, split.settings.crop_pct)
            batches = loader.row_batches(split, transform, parts, (0, 0), train=False)
    for images, labels in batches:
        images = images.to(device, non_blocking=True).float()
        if images.shape[-1] != size:
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True).clamp_(0, 255)
        yield normalize(images, colors), labels.to(device, non_blocking=True)
