"""Images with masks, decoded once into memory; batches of them, augmented together."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from etf_zoo.errors import EtfZooError
from etf_zoo.images import UnreadableImageError, read_image

from ..data.augment import Draws, crop_matrix, jitter
from ..data.batches import batch_generator, find_source
from ..data.sealed import refuse_test
from ..recipe.config import Augment
from .recipe import Segmentation

__all__ = ["MaskSplit", "augment_pairs", "eval_pairs", "load_masks", "train_pairs"]


@dataclass
class MaskSplit:
    """Images `(N, H, W, 3)` and masks `(N, H, W)`, uint8.

    Attributes:
        images: The images.
        masks: Class numbers.
        label_names: Names of the classes.
        source: Folder or Hub name.
        name: Of the split.
        ignore_index: Number of pixels that belong to no class.
    """

    images: np.ndarray
    masks: np.ndarray
    label_names: list[str]
    source: str
    name: str
    ignore_index: int = 255

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: np.ndarray) -> MaskSplit:
        """Some of the images."""
        return replace(self, images=self.images[rows], masks=self.masks[rows])

    def class_counts(self) -> list[int]:
        """Pixels of each class."""
        counts = np.bincount(self.masks.ravel(), minlength=256)
        return counts[: len(self.label_names)].tolist()

    @property
    def digest(self) -> str:
        """Hash of names, images and masks."""
        found = hashlib.sha256("\n".join(self.label_names).encode())
        found.update(self.images.tobytes())
        found.update(self.masks.tobytes())
        return found.hexdigest()[:16]


def load_masks(recipe: Segmentation, split: str) -> MaskSplit:
    """Decode a split of a data set with columns of images and masks.

    Args:
        recipe: Says where it is and what size to store.
        split: Its name.

    Raises:
        EtfZooError: If there is no such split or column, an image cannot be read, image and mask differ in size, or a
            mask holds a number that is no class.
    """
    import datasets  # slow to import
    from datasets.exceptions import DatasetsError

    refuse_test(split, recipe.data.train_split)
    source = find_source(recipe.data.source)
    try:
        table: Any = datasets.load_dataset(source, recipe.data.config or None, split=split)
    except (ValueError, OSError, DatasetsError) as error:
        words = str(error).splitlines()[0].rstrip(".")
        raise EtfZooError(f"Cannot read the split {split!r} of {recipe.data.source}: {words}.") from error
    columns = (recipe.data.image_column, recipe.data.label_column)
    for column in columns:
        if column not in table.column_names:
            raise EtfZooError(
                f"{recipe.data.source} has no column {column!r}, but {', '.join(table.column_names)}: set "
                f"data.image_column and data.label_column."
            )
        table = table.cast_column(column, datasets.Image(decode=False))
    height, width = recipe.image_size
    images = np.empty((len(table), height, width, 3), np.uint8)
    masks = np.empty((len(table), height, width), np.uint8)
    for i, row in enumerate(table):
        try:
            image, mask = read_image(_bytes(row[columns[0]])), _read_mask(_bytes(row[columns[1]]))
        except (UnreadableImageError, OSError) as error:
            raise EtfZooError(f"Row {i} of {split} cannot be read: {error}.") from error
        if image.size != mask.size:
            raise EtfZooError(f"Row {i} of {split}: the image has {image.size} pixels and its mask {mask.size}.")
        images[i] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        masks[i] = np.asarray(mask.resize((width, height), Image.Resampling.NEAREST))
    known = (masks < len(recipe.class_names)) | (masks == recipe.ignore_index)
    if not known.all():
        raise EtfZooError(
            f"Masks of {split} hold the number {masks[~known].max()}, which is neither one of the "
            f"{len(recipe.class_names)} class_names nor ignore_index {recipe.ignore_index}."
        )
    return MaskSplit(images, masks, list(recipe.class_names), source, split, recipe.ignore_index)


def _bytes(value: dict[str, Any]) -> bytes:
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def _read_mask(data: bytes) -> Image.Image:
    mask = Image.open(io.BytesIO(data))
    if mask.mode not in ("L", "P", "1"):
        raise UnreadableImageError(f"a mask holds class numbers in 8 bits, not {mask.mode}")
    return mask if mask.mode != "1" else mask.convert("L")


def augment_pairs(
    images: Tensor,
    masks: Tensor,
    settings: Augment,
    generator: torch.Generator,
    *,
    rank: int = 0,
    world: int = 1,
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor]:
    """The same random crop and flip of images and masks, resized back; changes of color of the images alone.

    Args:
        images: `(B, 3, H, W)` uint8.
        masks: `(B, H, W)` uint8.
        settings: The augmentation.
        generator: Source of randomness, see `Draws`, as are the next two.
        rank: Of this process.
        world: Number of processes.
        ignore_index: Of masks, beyond the image's edge.

    Returns:
        Images `(B, 3, H, W)` float32 in 0..255, bilinear, and masks `(B, H, W)` int64, nearest.
    """
    draws = Draws(generator, len(images), rank, world)
    theta = crop_matrix(settings, draws)[:, :2].to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    # of the shifted numbers, zero is what lies outside
    shifted = masks[:, None].float() - ignore_index
    moved = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    if settings.color_jitter:
        out = jitter(out, settings.color_jitter, draws)
    return out, (moved[:, 0] + ignore_index).round().long()


def train_pairs(
    split: MaskSplit,
    recipe: Segmentation,
    epoch: int,
    *,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of an epoch's batches; order and augmentation depend on (seed, epoch, step) alone.

    Args:
        split: The images.
        recipe: Augmentation, batch size and seed.
        epoch: Number of the epoch.
        start: First step to give.
        rank: Of this process.
        world: Number of processes.
        device: Where the batch goes.

    Yields:
        Images `(B, 3, H, W)` in 0..255 and masks `(B, H, W)`.
    """
    size = recipe.batch_size
    rows = np.random.default_rng([recipe.seed, 1, epoch]).permutation(len(split))
    for step in range(start, len(rows) // size):
        part = rows[step * size : (step + 1) * size][rank::world]
        images, masks = _take(split, part, device)
        generator = batch_generator(recipe.seed, epoch, step)
        yield augment_pairs(
            images, masks, recipe.augment, generator, rank=rank, world=world, ignore_index=split.ignore_index
        )


def eval_pairs(
    split: MaskSplit, batch_size: int, *, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once over all processes, as they are, and masks; see `train_pairs`."""
    rows = np.arange(len(split))[rank::world]
    for start in range(0, len(rows), batch_size):
        images, masks = _take(split, rows[start : start + batch_size], device)
        yield images, masks.long()


def _take(split: MaskSplit, rows: np.ndarray, device: torch.device | str) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(split.images[rows]).to(device).permute(0, 3, 1, 2)
    return images, torch.from_numpy(split.masks[rows]).to(device)
