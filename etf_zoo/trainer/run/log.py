"""What a run leaves to read while it goes on: `metrics.jsonl`, TensorBoard's files, a progress bar."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from etf_zoo.errors import LoadError, MissingPackageError, StorageError

__all__ = ["METRICS", "Log", "progress", "read_records"]

METRICS = "metrics.jsonl"


class Log:
    """Figures of steps and epochs, written by the main process.

    Args:
        folder: Of the run.
        main: Whether this is the main process.
        tensorboard: Whether to write TensorBoard's files.
        step: Steps done in earlier sessions; TensorBoard drops what those wrote from there on.
        records: Of the epochs done, from the checkpoint: `metrics.jsonl` is written anew from them, so that each epoch
            stands in it once, whatever became of the file. New ones are added to the list.

    Raises:
        MissingPackageError: If TensorBoard is asked for and not installed.
        StorageError: If the file cannot be written.
    """

    def __init__(self, folder: Path, main: bool, tensorboard: bool, step: int, records: list[dict[str, Any]]):
        self.file, self.main, self.records = folder / METRICS, main, records
        self.writer = None
        if not main:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingPackageError(
                    "TensorBoard is not installed: `pip install tensorboard`, or set --tensorboard false."
                ) from error
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        new = self.file.with_suffix(".new")
        try:
            new.write_text("".join(json.dumps(record) + "\n" for record in records))
            os.replace(new, self.file)
        except OSError as error:
            raise self._full(error) from error

    def step(self, figures: dict[str, float], step: int) -> None:
        """Figures of the last few steps."""
        self._scalars("train", figures, step)

    def epoch(self, record: dict[str, Any], step: int) -> None:
        """A line of `metrics.jsonl`.

        Raises:
            StorageError: If it cannot be written.
        """
        self.records.append(record)
        if not self.main:
            return
        try:
            with open(self.file, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise self._full(error) from error
        self._scalars("val", {k.removeprefix("val_"): v for k, v in record.items() if k.startswith("val_")}, step)
        if self.writer is not None:
            self.writer.flush()

    def _scalars(self, group: str, figures: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def _full(self, error: OSError) -> StorageError:
        return StorageError(
            f"Cannot write {self.file}: {error.strerror}. The checkpoints beside it are intact: make room, then go "
            f"on with --resume."
        )

    def close(self) -> None:
        """Write out what TensorBoard's writer still has."""
        if self.writer is not None:
            self.writer.close()


def read_records(file: Path) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`, one an epoch.

    Raises:
        LoadError: If a line is no record.
    """
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            records.append({**json.loads(line)})
            records[-1]["epoch"] = int(records[-1]["epoch"])
        except (ValueError, TypeError, KeyError) as error:
            raise LoadError(
                f"Line {number} of {file} is no record of an epoch: delete the line; a run that is resumed writes the "
                f"file anew."
            ) from error
    return records


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
