"""`etf-zoo evaluate`: the trainer's evaluation, in this process or in several."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import EtfZooError
from .train import require_training, train

if TYPE_CHECKING:
    from ..trainer.evaluate import ModelBatches

__all__ = ["SplitImages", "evaluate"]

# Options of ours that the trainer's evaluation knows by another name.
_NAMES = {"split": "data.val_split", "image_column": "data.image_column", "label_column": "data.label_column"}
_OPTIONS = (*_NAMES, "batch_size", "size", "hierarchy", "errors", "pictures", "output")


def evaluate(args: argparse.Namespace) -> int:
    """Measure a model on a split, as `training/evaluate.py` does."""
    data = args.data or args.data_option
    if not data:
        raise EtfZooError("Name the data to measure on: etf-zoo evaluate MODEL DATA.")
    arguments = ["--model", args.model, "--data.source", data]
    for option in _OPTIONS:
        if getattr(args, option) is not None:
            arguments += [f"--{_NAMES.get(option, option)}", str(getattr(args, option))]
    return train("evaluate", args, [*arguments, *(["--json"] if args.json else []), *args.rest])


class SplitImages:
    """Images of one split for a model, see `ModelBatches`.

    Args:
        args: `data`, and where given `image_column`, `label_column` and `batch_size`.
        split: Its name; by default as for `etf-zoo evaluate`.

    Raises:
        MissingPackageError: Without the extra `training`.
        EtfZooError: If there is no such data.
    """

    def __init__(self, args: argparse.Namespace, split: str | None):
        require_training("etf-zoo convert --data")
        from ..trainer.evaluate import Evaluation, TestData, open_split, public_name

        given = {"val_split": split, "image_column": args.image_column, "label_column": args.label_column}
        data = TestData(args.data, **{name: value for name, value in given.items() if value is not None})
        self.split = open_split(data, size=0)
        self.batch_size: int = args.batch_size or Evaluation().batch_size
        self.data_name, self.split_name = public_name(self.split.source), self.split.name

    def batches(self, model: Any) -> ModelBatches:
        """(images, labels) for a timm model, as it wants them; can be read again."""
        from ..trainer.evaluate import ModelBatches

        return ModelBatches(model, self.split, batch_size=self.batch_size)
