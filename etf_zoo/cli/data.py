"""Images for the command line, read by the `datasets` library and numbered as a model numbers its classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from ..errors import EtfZooError, MissingPackageError

__all__ = ["Images"]


class Images:
    """One split of a data set with class names.

    Args:
        data: Folder of images by class or of parquet files, or a Hub name.
        split: Name of the split.
        image_column: Column of the images.
        label_column: Column of the class labels.
        batch_size: Images at a time.

    Raises:
        RuntimeError: If the `datasets` library is missing.
        ValueError: If the data cannot be read or lacks a column or class names.
    """

    def __init__(self, data: str, split: str, image_column: str, label_column: str, batch_size: int):
        try:
            import datasets
            import tqdm  # noqa: F401
        except ImportError as error:
            raise MissingPackageError(f"Reading --data needs {error.name}: pip install 'etf-zoo[training]'.") from None
        folder = Path(data)
        try:
            is_images = folder.is_dir() and not any(folder.rglob("*.parquet"))
            where: Any = {"path": "imagefolder", "data_dir": data} if is_images else {"path": data}
            rows: Any = datasets.load_dataset(**where, split=split)
        except (FileNotFoundError, ValueError, ConnectionError) as error:
            raise EtfZooError(f"Cannot read split {split!r} of {data!r}: {error}") from None
        for column in (image_column, label_column):
            if column not in rows.column_names:
                raise EtfZooError(f"{data} has no column {column!r} but {', '.join(rows.column_names)}.")
        self.names: list[str] | None = getattr(rows.features[label_column], "names", None)
        if self.names is None:
            raise EtfZooError(f"Column {label_column!r} has no class names; name a column of class labels.")
        self.rows = rows.cast_column(image_column, datasets.Image(mode="RGB"))
        self.image_column, self.label_column, self.batch_size = image_column, label_column, batch_size

    def batches(self, model: nn.Module) -> Any:
        """(images, labels) for a timm model, as it wants them, with a progress bar; can be read again.

        Raises:
            ValueError: If the model does not know the classes.
        """
        from tqdm import tqdm

        cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        numbers = _label_numbers(cfg.get("label_names"), self.names or [], int(model.num_classes))  # type: ignore
        transform = create_transform(**resolve_data_config(model=model), is_training=False)
        return tqdm(_Batches(self, transform, numbers), unit="batch", disable=None)


class _Batches:
    """Batches of a data set, as often as they are asked for: transformed images and the model's own label numbers."""

    def __init__(self, images: Images, transform: Any, numbers: list[int]):
        self.images, self.transform, self.numbers = images, transform, numbers

    def __len__(self) -> int:
        return -(-len(self.images.rows) // self.images.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        source = self.images
        for batch in source.rows.iter(source.batch_size):
            images = [self.transform(image.convert("RGB")) for image in batch[source.image_column]]
            own = batch[source.label_column]
            if wrong := [label for label in own if label is None or not 0 <= label < len(self.numbers)]:
                raise EtfZooError(
                    f"Label {wrong[0]} is none of 0 to {len(self.numbers) - 1}: some images have no label, as "
                    f"in many test splits on the Hub. Name another with --split."
                )
            labels = [self.numbers[label] for label in own]
            yield torch.stack(images), torch.tensor(labels)


def _label_numbers(own: Sequence[str] | None, theirs: Sequence[str], num_classes: int) -> list[int]:
    """Model's number for each of the data's labels, by name; by position only where the model has no names."""
    if own is None:
        if len(theirs) != num_classes:
            raise EtfZooError(f"The model has {num_classes} classes, the data {len(theirs)}.")
        return list(range(num_classes))
    missing = [name for name in theirs if name not in own]
    if missing:
        raise EtfZooError(
            f"The model does not know {len(missing)} of the data's {len(theirs)} classes, such as {missing[0]!r}; it "
            f"knows {', '.join(repr(name) for name in own[:3])} and so on. Fine-tune it on this data first."
        )
    return [list(own).index(name) for name in theirs]
