"""Images that are not resident: decoded and augmented by timm's transforms in worker processes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from etf_zoo.errors import EtfZooError
from etf_zoo.images import UnreadableImageError, read_image

from ..recipe.config import Augment
from .decode import Corrupt, decoders, encoded, end_with_parent
from .sources import Rows, Stream

__all__ = ["INTERPOLATION", "eval_transform", "row_batches", "stream_batches", "train_transform"]

INTERPOLATION = "bicubic"  # of all images, those that are trained on and those that are measured
Transform = Callable[[Any], Any]  # a PIL image to (3, H, W) uint8
Batch = tuple[Tensor, Tensor, list[tuple[str, str]]]  # images, labels, (where, why) of those that cannot be read


def train_transform(settings: Augment, size: int) -> Transform:
    """timm's crop, flip, color jitter and RandAugment; erasing and mixing come later, on the device."""
    s = settings
    rand = f"rand-n{s.randaug_ops}-m{s.randaug_magnitude}-mstd{s.randaug_std}-inc1" if s.randaug_ops else None
    transform: Any = create_transform(
        size,
        is_training=True,
        scale=(s.crop_scale[0], s.crop_scale[1]),
        ratio=(s.crop_ratio[0], s.crop_ratio[1]),
        hflip=0.5 if s.flip else 0.0,
        color_jitter=tuple(s.color_jitter) or None,  # type: ignore[arg-type]
        auto_augment=rand,
        interpolation=INTERPOLATION,
        use_prefetcher=True,  # ends in uint8: a quarter of what workers would have to send as float
    )
    for op in [op for step in transform.transforms for op in getattr(step, "ops", ())]:
        if op.name.startswith("Posterize"):  # at the highest level timm asks Pillow for no bits, which it refuses
            op.magnitude_max = 9.99
    return transform


def eval_transform(size: int, crop_pct: float) -> Transform:
    """Resize and center crop: timm's own, so that a saved config can say what was done."""
    transform: Any = create_transform(size, crop_pct=crop_pct, interpolation=INTERPOLATION, use_prefetcher=True)
    return transform


@contextlib.contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """timm's transforms draw from three global generators: seed them for one image, and put them back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seeds = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])  # noqa: NPY002
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def _collate(items: list[tuple[Any, int] | tuple[str, str]]) -> Batch:
    bad = [(str(where), str(why)) for where, why in items if isinstance(where, str)]
    good = [(image, label) for image, label in items if not isinstance(image, str)]
    images = torch.stack([torch.as_tensor(image) for image, _ in good]) if good else torch.empty(0, 3, 1, 1)
    return images, torch.tensor([int(label) for _, label in good], dtype=torch.long), bad


def _readable(batches: Any, corrupt: Corrupt, train: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without what they say of unreadable images, which is noted and, at the end, said."""
    before = len(corrupt.found)
    for images, labels, bad in batches:
        for where, why in bad:
            if where not in corrupt.found:
                corrupt.add(where, why)
        corrupt.check()
        if len(images):
            yield images, labels
        elif train:
            raise EtfZooError(f"None of a batch's images of {corrupt.source} can be read. Mend them.")
    if len(corrupt.found) > before:
        corrupt.warn()


# ------------------------------------------------------------------------------------------------------------- rows


class _Images(Dataset):
    def __init__(self, rows: Rows, transform: Transform, key: tuple[int, ...]):
        self.rows, self.transform, self.key = rows, transform, key

    def __getitem__(self, row: int) -> tuple[Any, int] | tuple[str, str]:
        try:
            image = read_image(self.rows.encoded(row))
        except UnreadableImageError as error:
            return self.rows.where(row), str(error)
        with _seeded(*self.key, row):
            return self.transform(image), self.rows.labels[row]


def row_batches(
    rows: Rows, transform: Transform, parts: list[np.ndarray], key: tuple[int, ...], *, train: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of given rows; what happens to an image depends on the key and its row alone.

    Yields:
        Images `(B, 3, H, W)` uint8, labels `(B,)`. Unreadable images are left out.

    Raises:
        ValueError: If there are too many of those.
    """
    batches = DataLoader(
        _Images(rows, transform, key),
        batch_sampler=[part.tolist() for part in parts],
        num_workers=decoders(min(rows.settings.workers, len(parts))),
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),  # else it draws from the global one, and a resumed run draws once more
    )
    return _readable(batches, rows.corrupt, train)


# ----------------------------------------------------------------------------------------------------------- streams


class _Stream(IterableDataset):
    """Batches of one process from one pass over a stream; worker processes divide its shards among themselves.

    Args:
        stream: What to read.
        rows: Its rows, divided among processes and shuffled.
        transform: From a PIL image to uint8.
        batch_size: Of this process.
        skip: How many of the pass's batches nobody will look at; they are read, but not decoded.
        key: What the augmentation depends on, beside the place in the stream.
        keep_short: Whether to give the last, short batch of each worker.
    """

    def __init__(
        self,
        stream: Stream,
        rows: Any,
        transform: Transform,
        batch_size: int,
        skip: int,
        key: tuple[int, ...],
        keep_short: bool,
    ):
        self.stream, self.rows, self.transform, self.batch_size = stream, rows, transform, batch_size
        self.skip, self.key, self.keep_short = skip, key, keep_short

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # Workers take turns. One that runs dry leaves its turns to the others, so that those that a worker would have
        # had among the first `skip` are never too many: all of them come before the first that is wanted.
        skip = len(range(worker, self.skip, workers))
        rows = iter(self.rows)
        for number in itertools.count():
            batch = list(itertools.islice(rows, self.batch_size))
            if not batch or (len(batch) < self.batch_size and not self.keep_short):
                return
            yield _collate(
                []
                if number < skip
                else [self._one(row, worker, number * self.batch_size + i) for i, row in enumerate(batch)]
            )

    def _one(self, row: dict[str, Any], worker: int, number: int) -> tuple[Any, int] | tuple[str, str]:
        data = self.stream.settings
        item, label = row[data.image_column], row[data.label_column]
        raw = b""
        try:
            raw = encoded(item, self.stream.below)
            image = read_image(raw)
        except UnreadableImageError as error:
            path = item.get("path") if isinstance(item, dict) else None
            named = path or f"sha256 {hashlib.sha256(raw).hexdigest()[:12]}"
            return f"{named}, number {number} of reader {worker}", str(error)
        names = self.stream.label_names
        label = names.index(label) if isinstance(label, str) and label in names else label
        if not isinstance(label, int) or not 0 <= label < len(names):
            raise EtfZooError(f"{self.stream.source}: label {label!r} is none of 0 to {len(names) - 1}.")
        with _seeded(*self.key, worker, number):
            return self.transform(image), label


def stream_batches(
    stream: Stream,
    settings: Augment | None,
    *,
    size: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    transform: Transform | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a stream for one process.

    In training an epoch has `len(stream) // batch_size` steps on every process, from shards and a buffer shuffled by
    seed and epoch; what does not fill a batch is left out, and a process whose part is too short begins it anew. The
    order depends on `data.workers` too. In evaluation every image comes once, `batch_size` per process.

    Args:
        stream: The images.
        settings: The augmentation; None to evaluate.
        size: Pixels of a side.
        batch_size: Images per step, over all processes in training, on this one in evaluation.
        rank: Of this process.
        world: Number of processes.
        seed: Of the run.
        epoch: Number of the epoch.
        start: First step to give.
        transform: From a PIL image to uint8; by default what `settings` and `size` say.

    Yields:
        Images `(B, 3, size, size)` uint8, labels `(B,)`. Unreadable images are left out.

    Raises:
        ValueError: If there are too many of those, labels out of range, or less than a batch.
    """
    from datasets.distributed import split_dataset_by_node

    data, train = stream.settings, settings is not None
    transform = transform or (train_transform(settings, size) if settings else eval_transform(size, data.crop_pct))

    def batches(turn: int, skip: int) -> DataLoader:
        rows = stream.rows
        if train:
            shuffle = int(np.random.default_rng([seed, 3, epoch, turn]).integers(2**31))
            rows = rows.shuffle(seed=shuffle, buffer_size=data.shuffle_buffer)
        rows = split_dataset_by_node(rows, rank, world)
        part = batch_size // world if train else batch_size
        key = (seed, epoch, turn, rank)
        return DataLoader(
            _Stream(stream, rows, transform, part, skip, key, keep_short=not train),
            batch_size=None,
            num_workers=min(data.workers, rows.num_shards),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=end_with_parent,
            generator=torch.Generator(),
        )

    stream.corrupt.found.clear()  # they are counted by their place, which is another in each epoch
    passes = _passes(batches, start, len(stream) // batch_size, stream.source) if train else batches(0, 0)
    return _readable(passes, stream.corrupt, train)


def _passes(batches: Callable[[int, int], DataLoader], start: int, steps: int, source: str) -> Iterator[Batch]:
    step = 0
    for turn in itertools.count():
        before = step
        for batch in batches(turn, max(0, start - step)):
            step += 1
            if step > start:
                yield batch
            if step >= steps:
                return
        if step == before:
            raise EtfZooError(f"{source}: a process has less than a batch. Take a smaller batch_size or data.workers.")
