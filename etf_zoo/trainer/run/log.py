"""What a run leaves to read while it goes on: `metrics.jsonl`, TensorBoard's files, a progress bar."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from etf_zoo.errors import MissingPackageError, StorageError

__all__ = ["METRICS", "Log", "forget_after", "progress"]

METRICS = "metrics.jsonl"


class Log:
    """Figures of steps and epochs, by the main process.

    Args:
        folder: Of the run.
        tensorboard: Whether to write TensorBoard's files.
        step: First step of this session; TensorBoard drops what an earlier one wrote from there on.

    Raises:
        ImportError: If TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, tensorboard: bool, step: int):
        self.file = folder / METRICS
        self.writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingPackageError(
                    "TensorBoard is not installed: `pip install tensorboard`, or set --tensorboard false."
                ) from error
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def step(self, figures: dict[str, float], step: int) -> None:
        """Figures of the last few steps."""
        self._scalars("train", figures, step)

    def epoch(self, record: dict[str, Any], step: int) -> None:
        """A line of `metrics.jsonl`.

        Raises:
            OSError: If it cannot be written.
        """
        try:
            with open(self.file, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise StorageError(
                f"Cannot write {self.file}: {error.strerror}. The checkpoints beside it are intact: make room, then go "
                f"on with --resume."
            ) from error
        self._scalars("val", {k.removeprefix("val_"): v for k, v in record.items() if k.startswith("val_")}, step)
        if self.writer is not None:
            self.writer.flush()

    def _scalars(self, group: str, figures: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def forget_after(folder: Path, epoch: int) -> None:
    """Drop the records of epochs that a kill undid, so that each epoch stands in `metrics.jsonl` once."""
    file = folder / METRICS
    if file.is_file():
        records = [record for record in map(_record, file.read_text().splitlines()) if record is not None]
        new = file.with_suffix(".new")
        new.write_text("".join(json.dumps(r) + "\n" for r in records if r["epoch"] <= epoch))
        os.replace(new, file)


def _record(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:  # the kill came while the line was written
        return None


def progress(total: int, done: int, batch_size: int, shown: bool) -> tqdm:
    """Progress bar of a run in images: how many, time left, images a second."""
    return tqdm(
        total=total * batch_size,
        initial=done * batch_size,
        unit=" images",
        unit_scale=True,
        smoothing=0.05,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        dynamic_ncols=True,
        disable=not shown,
    )
