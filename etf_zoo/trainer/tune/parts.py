"""The images of a fine-tuning: to train on, to choose by, to test on; and what to say of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from etf_zoo.errors import EtfZooError
from etf_zoo.text import printable

from ..data.batches import Rows, split_names
from ..data.duplicates import group_rows
from ..data.layouts import role
from ..data.report import describe_found, describe_shared, describe_split, is_imbalanced
from ..data.sources import HELD_OUT, choose_split
from ..data.subsets import Images, check_classes, load_images
from ..recipe.config import Data, Recipe
from ..run.launching import make_accelerator
from .settle import MANY, settle

__all__ = ["Parts", "load_data"]


@dataclass
class Parts:
    """The images of a fine-tuning.

    Attributes:
        data: The recipe's data; `test_split` is set where `val_split` is there to choose by.
        train: To train on; a share may be held out of it.
        test: Opened once, at the end.
        watched: To choose by, where the data have a split for it.
        groups: `(N,)` numbers of training images that look the same, which a holdout keeps together; None for none.
        lines: What to say of them.
    """

    data: Data
    train: Images
    test: Images
    watched: Images | None = None
    groups: np.ndarray | None = None
    lines: list[str] = field(default_factory=list)


def load_data(settings: Recipe) -> Parts:
    """Training images, test images, and those of a split to choose by, checked against each other.

    With splits for training, validation and test, the validation images are chosen by and the test is opened once.

    Raises:
        EtfZooError: On data that cannot be read, classes that do not fit, or a test on the training images.
    """
    accelerator = make_accelerator(settings.precision)
    with accelerator.local_main_process_first():  # one process decodes, its neighbors find the array
        data = _with_test_split(settings.data)
        train = load_images(data, data.train_split)
        test = load_images(data, data.report_split)
        watched = load_images(data, data.val_split) if data.report_split != data.val_split else None
        _check_apart(train, test)
        check_classes(train, test)
        if watched is not None:
            _check_apart(train, watched)
            check_classes(train, watched)
        parts = Parts(data, train, test, watched)
        is_photos = data.source != "digits"  # of which many look the same to a hash
        parts.groups = group_rows(train) if is_photos else None
        parts.lines = [printable(line) for line in _describe(settings, parts, is_photos)]
        _leave_out_unreadable(parts)
    return parts


def _leave_out_unreadable(parts: Parts) -> None:
    """Take out the few that a look at all images found, which `max_corrupt` allows: features want every image."""
    if isinstance(parts.train, Rows) and parts.train.corrupt.found and parts.groups is not None:
        parts.groups = parts.groups[parts.train.readable()]
    parts.train, parts.test = _readable(parts.train), _readable(parts.test)
    parts.watched = parts.watched and _readable(parts.watched)


def _readable(split: Images) -> Images:
    if not isinstance(split, Rows) or not split.corrupt.found:
        return split
    split.corrupt.warn()
    return split.subset(split.readable())


def _with_test_split(data: Data) -> Data:
    """The data with their test split named, where there are one to choose by and one to test on."""
    if data.test_split or role(data.val_split) != "val":
        return data
    names = split_names(data)
    tests = [name for name in names if role(name) == "test"]
    has_val = any(role(name) == "val" for name in names)
    if not has_val or len(tests) != 1:
        return data
    return dataclasses.replace(data, val_split=choose_split(names, data.val_split, data.source), test_split=tests[0])


def _check_apart(train: Images, other: Images) -> None:
    if train.name == other.name or train.digest == other.digest:
        raise EtfZooError(
            f"The images to test on or to choose by are the training images of {train.source} (split {other.name!r}): "
            f"what is measured on them says nothing. Leave --data.val_split and --data.test_split out: a share of the "
            f"training images is held out where there are no others."
        )


def _describe(settings: Recipe, parts: Parts, is_photos: bool) -> list[str]:
    lines = [*describe_found(parts.train), *describe_split(f"training ({parts.train.name})", parts.train)]
    test = f"test ({parts.test.name})"
    others = [(f"to choose by ({parts.watched.name})", parts.watched)] if parts.watched else []
    for what, part in [*others, (test, parts.test)]:
        lines += describe_split(what, part)
        lines += describe_shared(parts.train, part, what) if is_photos else []
    if parts.test.name == HELD_OUT:
        share = f"{100 * float(parts.data.test_share):g} % of each class"
        lines.append(
            f"  The data have no split to test on: {share} are held out, images that look the same on one side "
            f"(--data.test_share)"
        )
    settled: Any = settle(settings, parts.train, parts.watched)
    if getattr(settings, "head", "") == "auto" and settled.head == "warm":
        lines.append(f"  Fewer than {MANY} images of most classes: the frame lies by their means (--head)")
    if getattr(settings, "freeze_bn", "") == "auto" and settled.freeze_bn:
        lines.append("  Very few images of a class: batch norms keep the statistics of their pretraining (--freeze_bn)")
    holdout = getattr(settled, "holdout", 0.0)
    if holdout == 0 and getattr(settings, "holdout", 0.0) == "auto":
        lines.append("  Few images of a class: all are trained on, and nothing is held out to choose by (--holdout)")
    if holdout and not parts.watched:
        lines.append(
            f"  To choose by, {100 * holdout:g} % of each class of the training images are held out (--holdout)"
        )
    if is_imbalanced(parts.train) and not settings.loss.class_weights:
        lines.append(
            "  The largest class has ten times the images of the smallest: --loss.class_weights true weighs each class "
            "by the inverse of its number"
        )
    return lines
