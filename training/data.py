"""Images in memory: a split decoded once to a uint8 array on disk, and augmentation of whole batches on the device."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from etf_zoo.frames import Hierarchy

from .config import Augment, Data

__all__ = [
    "Split",
    "load_split",
    "load_hierarchy",
    "train_batches",
    "eval_batches",
    "augment",
    "normalise",
    "find_source",
    "MEAN",
    "STD",
]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # timm's ImageNet defaults, written into the model's cfg


@dataclass
class Split:
    """Images `(N, H, W, 3)` uint8, labels `(N,)` int64, the names of the classes, and where they came from."""

    images: np.ndarray
    labels: np.ndarray
    label_names: list[str]
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, rows: np.ndarray) -> Split:
        """Some of the images, in the order given; read into memory."""
        return Split(self.images[rows], self.labels[rows], self.label_names, self.source)


def find_source(source: str) -> str:
    """Folder for a data source: a path as it is, a name below $ETF_ZOO_DATA, else the text itself (a Hub name)."""
    root = os.environ.get("ETF_ZOO_DATA")
    if not Path(source).exists() and root and (Path(root) / source).exists():
        return str(Path(root) / source)
    return source


def load_split(data: Data, split: str) -> Split:
    """One split, decoded once and kept as a memory map in $ETF_ZOO_CACHE (default ~/.cache/etf_zoo).

    Args:
        data: Where the images are.
        split: Name of the split.

    Raises:
        ValueError: On a missing data set, split or column, or labels that are not class numbers.
    """
    if not data.source:
        raise ValueError("No data: give --data.source a folder, a Hub name or digits.")
    if data.source == "digits":
        return _digits(data.size, split)
    # datasets is imported late: digits and prepared arrays need none of it
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    source = find_source(data.source)
    try:
        rows = datasets.load_dataset(source, split=split)
    except (FileNotFoundError, DatasetNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(
            f"Cannot load split {split!r} of {source!r}: {error}. Give a folder or a Hub name; a bare name is looked "
            f"up in $ETF_ZOO_DATA ({os.environ.get('ETF_ZOO_DATA', 'not set')})."
        ) from error
    for column in (data.image_column, data.label_column):
        if column not in rows.column_names:
            raise ValueError(
                f"{source} has no column {column!r} but {', '.join(rows.column_names)}. "
                f"Set --data.image_column and --data.label_column."
            )
    names = getattr(rows.features[data.label_column], "names", None)
    labels = np.asarray(rows[data.label_column], dtype=np.int64)
    if names is None:
        names = [str(i) for i in range(labels.max() + 1)]
    rows = rows.select_columns([data.image_column]).cast_column(data.image_column, datasets.Image(mode="RGB"))
    key = hashlib.sha256(f"{rows._fingerprint} {data.size}".encode()).hexdigest()[:16]
    folder = (
        Path(os.environ.get("ETF_ZOO_CACHE", Path.home() / ".cache" / "etf_zoo")) / f"{Path(source).name}-{split}-{key}"
    )
    if not (folder / "meta.json").is_file():
        _store(rows, data, folder)
    return Split(np.load(folder / "images.npy", mmap_mode="r"), labels, list(names), source)


def load_hierarchy(data: Data, label_names: list[str]) -> Tensor:
    """Distances `(K, K)` between classes by the `hierarchy.json` ({child: parent}) in the data's folder.

    Raises:
        ValueError: If there is none, or it does not hold the classes.
    """
    file = Path(find_source(data.source)) / "hierarchy.json"
    if not file.is_file():
        raise ValueError(f"A hierarchy frame needs {file}: a JSON object {{child: parent}} over the label names.")
    return Hierarchy.from_json(file).distances(label_names)


def _store(rows, data: Data, folder: Path) -> None:
    """Decode into a folder beside the final one and rename it: another process sees all of it or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        shape = (len(rows), data.size, data.size, 3)
        images = np.lib.format.open_memmap(Path(temporary) / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        for i, row in enumerate(rows):
            images[i] = _square(row[data.image_column], data.size)
        images.flush()
        (Path(temporary) / "meta.json").write_text(json.dumps({"shape": shape}))
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was first
            if not (folder / "meta.json").is_file():
                raise
        else:
            os.mkdir(temporary)  # for the context manager to remove


def _square(image: Image.Image, size: int) -> np.ndarray:
    """Short side to `size`, then the centre."""
    if image.size != (size, size):
        scale = size / min(image.size)
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def _digits(size: int, split: str) -> Split:
    """scikit-learn's 1,797 handwritten digits, three quarters for training, by a fixed stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    if split not in ("train", "test"):
        raise ValueError(f"digits has the splits train and test, not {split!r}.")
    keep = train if split == "train" else test
    grey = (255 - pixels[keep] * (255 / 16)).clip(0, 255).astype(np.uint8).reshape(-1, 8, 8)
    images = [
        np.asarray(Image.fromarray(g).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")) for g in grey
    ]
    return Split(np.stack(images), labels[keep].astype(np.int64), [str(i) for i in range(10)], "scikit-learn digits")


# --------------------------------------------------------------------------------------------------------- batches


def _take(split: Split, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    order = np.argsort(rows)  # a memory map reads forward faster than back and forth
    images = np.empty((len(rows), *split.images.shape[1:]), np.uint8)
    images[order] = split.images[rows[order]]
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2), torch.from_numpy(split.labels[rows]).to(device)


def train_batches(
    split: Split,
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
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented, normalised batches of one epoch, from step `start` on.

    Order and augmentation depend on (seed, epoch, step, rank) alone, so a resumed run sees what it would have seen.
    The last, short batch is left out.

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
        device: Where the batch goes.

    Yields:
        Images `(B, 3, size, size)` float32, labels `(B,)`.
    """
    device = torch.device(device)
    rows = np.random.default_rng([seed, 0]).permutation(len(split))[: limit or None]
    rows = rows[np.random.default_rng([seed, 1, epoch]).permutation(len(rows))]
    for step in range(start, len(rows) // batch_size):
        batch = rows[step * batch_size : (step + 1) * batch_size][rank::world]
        images, labels = _take(split, batch, device)
        generator = torch.Generator().manual_seed(
            int(np.random.default_rng([seed, 2, epoch, step, rank]).integers(2**62))
        )
        yield normalise(augment(images, settings, size, generator)), labels


def eval_batches(
    split: Split, *, size: int, batch_size: int, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, in order, over all processes: no sample dropped or doubled."""
    device = torch.device(device)
    rows = np.arange(len(split))[rank::world]
    for start in range(0, len(rows), batch_size):
        images, labels = _take(split, rows[start : start + batch_size], device)
        images = images.float()
        if images.shape[-1] != size:
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True).clamp_(0, 255)
        yield normalise(images), labels


def normalise(images: Tensor) -> Tensor:
    """Pixels from 0..255 to timm's ImageNet mean and standard deviation."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    return (images - mean) / std


def augment(images: Tensor, settings: Augment, size: int, generator: torch.Generator) -> Tensor:
    """Random resized crop and flip of a batch, each image its own, in one bilinear sampling.

    Args:
        images: `(B, 3, H, W)` uint8.
        settings: The augmentation.
        size: Pixels of a side of the result.
        generator: Source of randomness, on the CPU so that every device draws the same.

    Returns:
        `(B, 3, size, size)` float32, values 0..255.
    """
    batch = len(images)
    low, high = settings.crop_scale
    area = torch.empty(batch).uniform_(low, high, generator=generator)
    log_ratio = torch.tensor(settings.crop_ratio).log()
    ratio = torch.empty(batch).uniform_(log_ratio[0].item(), log_ratio[1].item(), generator=generator).exp()
    width, height = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    shift = torch.rand(batch, 2, generator=generator) * 2 - 1
    mirror = (
        torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0) if settings.flip else torch.ones(batch)
    )
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
    theta[:, 0, 2], theta[:, 1, 2] = shift[:, 0] * (1 - width), shift[:, 1] * (1 - height)
    grid = F.affine_grid(theta.to(images.device), [batch, 3, size, size], align_corners=False)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
