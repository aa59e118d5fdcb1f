"""What a fine-tuning leaves beside its model for later: how familiar held-out images look to it."""

from __future__ import annotations

from pathlib import Path

import torch

from etf_zoo.models.find import load_model
from etf_zoo.ood import FAMILIARITY_NAME, familiarity, write_familiarity

from ..data.subsets import Images
from ..evaluate import ModelBatches

__all__ = ["store_familiarity"]


@torch.inference_mode()
def store_familiarity(folder: Path, held: Images | None, batch_size: int) -> None:
    """Write what `etf-zoo predict --reject` needs beside a stored model, in one process.

    Args:
        folder: Model folder.
        held: Training images that the model was not fitted on. With None, what was there of an earlier model goes.
        batch_size: Images at a time.
    """
    if held is None:
        (folder / FAMILIARITY_NAME).unlink(missing_ok=True)
        return
    model = load_model(str(folder))
    batches = ModelBatches(model, held, batch_size=batch_size)
    write_familiarity(folder, torch.cat([familiarity(model(images)) for images, _ in batches]))
