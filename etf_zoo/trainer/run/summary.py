"""What a model folder's `metrics.json` says of how the model came about."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.batches import AnySplit
from ..recipe.config import Recipe
from .watch import Score

__all__ = ["summarize"]


def summarize(
    recipe: Recipe,
    train: AnySplit,
    accelerator: Accelerator,
    *,
    images: int,
    steps: int = 0,
    seconds: float = 0.0,
    commit: str = "",
    best: Score | None = None,
) -> dict[str, Any]:
    """Recipe, data and cost of a training, for JSON.

    Args:
        recipe: That would train the same model from the start.
        train: The training images.
        accelerator: The processes.
        images: How many training images were used.
        steps: Optimizer steps.
        seconds: Wall-clock time.
        commit: Of the code.
        best: The epoch that was chosen; None for the last.
    """
    summary = {
        "recipe": dataclasses.asdict(recipe),
        "data_source": Path(train.source).name,
        "train_images": images,
        "steps": steps,
        "hours": round(seconds / 3600, 2),
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        "processes": accelerator.num_processes,
        "commit": commit,
    }
    return summary if best is None else summary | {"best_epoch": best.epoch, "best_top1_held_out": round(best.top1, 2)}
