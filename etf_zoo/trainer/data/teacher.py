"""A teacher's opinion of a data set: shares of its own classes for each image, computed once (1503.02531)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from etf_zoo.errors import EtfZooError
from etf_zoo.models.find import find_model, load_model
from etf_zoo.models.names import class_names

from ..run.launching import make_accelerator
from .augment import colors_of
from .batches import eval_batches
from .places import cache_root
from .resident import Split

__all__ = ["taught"]


def taught(split: Any, teacher: str, size: int, *, batch_size: int = 128) -> Split:
    """The same images with a teacher's classes: shares of them to train on, and the largest as the label.

    The shares are those of the whole image, not augmented, and are kept in float16 in `$ETF_ZOO_CACHE` under the digest
    of images and teacher.

    Args:
        split: Resident images.
        teacher: A classifier with weights, by timm's name.
        size: Pixels of a side that it sees them at.
        batch_size: Images at a time.

    Raises:
        EtfZooError: If the images are not resident, or there is no such model.
    """
    if not isinstance(split, Split):
        raise EtfZooError("A teacher sees resident images: set data.resident to true.")
    source = find_model(teacher, True)
    model = load_model(source.name)
    key = hashlib.sha256(f"{split.digest} {source.name} {source.identity} {size}".encode()).hexdigest()[:16]
    file = cache_root() / f"teacher-{key}.npy"
    if not file.is_file():
        _store(_shares(model, split, size, batch_size), file)
    shares = np.load(file, mmap_mode="r")
    if shares.shape != (len(split), model.num_classes):
        raise EtfZooError(f"{file} is damaged: delete it, and it is computed anew.")
    labels = shares.argmax(1).astype(np.int64)
    whole = shares
    if split.index is not None:  # shares lie by the rows of the array
        whole = np.zeros((len(split.images), model.num_classes), np.float16)
        whole[split.index] = shares
    return replace(split, labels=labels, label_names=class_names(model), shares=whole)


@torch.no_grad()
def _shares(model: Any, split: Split, size: int, batch_size: int) -> np.ndarray:
    device = make_accelerator().device
    model = model.to(device, memory_format=torch.channels_last).eval()
    batches = eval_batches(split, size=size, batch_size=batch_size, colors=colors_of(model), device=device)
    shown = tqdm(batches, total=-(-len(split) // batch_size), desc="teacher", mininterval=5, disable=None)
    return np.concatenate([model(images).softmax(1).half().cpu().numpy() for images, _ in shown])


def _store(shares: np.ndarray, file: Path) -> None:
    """Write beside the final place and rename: another process sees all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".writing-", delete=False) as opened:
        np.save(opened, shares)
    os.replace(opened.name, file)
