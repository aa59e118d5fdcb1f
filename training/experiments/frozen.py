"""What a frozen backbone gives for the images of a data set, computed once for all cells of a grid.

Features for the probes, and the inputs of a layer for the methods that tune only what follows it (`cache_views`).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from etf_zoo.errors import EtfZooError
from etf_zoo.trainer.data.augment import colors_of
from etf_zoo.trainer.data.batches import eval_batches, frame_tree, view_batches
from etf_zoo.trainer.data.stored import StoredInputs
from etf_zoo.trainer.data.subsets import Images
from etf_zoo.trainer.recipe.config import final_size
from etf_zoo.trainer.run.launching import in_float32, make_accelerator
from etf_zoo.trainer.run.locks import acquire
from etf_zoo.trainer.run.model import find_model, make_model
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.tune.depth import stage_features
from etf_zoo.trainer.tune.methods import first_tuned, prepare, tuned_share
from etf_zoo.trainer.tune.settle import completed, settle
from etf_zoo.trainer.tune.trunk import replayed, store_inputs
from etf_zoo.trainer.tune.tuning import Finetune, features_of, start_head, strip_head
from training.experiments.grid import digest, lock_file, weights_digest

__all__ = ["frozen_features", "hits", "predictions", "stored_inputs", "tune_stored"]

VIEW_SEED = 0  # of the augmented views, which all seeds share


def frozen_features(settings: Finetune, split: Images, work: Path, stage: str = "") -> Tensor:
    """Features of a split, computed once; two processes do not compute the same.

    Args:
        settings: Says which backbone, and at which size.
        split: The images.
        work: Folder that they are kept in.
        stage: Of the backbone, such as `layer3`; empty for the last features.

    Raises:
        EtfZooError: If there is no such stage.
    """
    settings = strip_head(settings)
    file = work / "features" / f"{_name(settings, split, *(['stages'] * bool(stage)))}.safetensors"
    with acquire(lock_file(work / "locks", file.name), wait=True):
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            model = make_model(settings, len(split.label_names))
            if stage:
                found = stage_features(model, split, size=final_size(settings), device=make_accelerator().device)
            else:
                found = {"features": features_of(settings, model, split)}
            found = {name: value.contiguous() for name, value in found.items()}
            safetensors.torch.save_file(found, file.with_suffix(".new"))
            os.replace(file.with_suffix(".new"), file)
    found = safetensors.torch.load_file(file)
    if (stage or "features") not in found:
        raise EtfZooError(f"{settings.model} has no stage {stage!r}, only {', '.join(found)}.")
    return found[stage or "features"]


def stored_inputs(settings: Finetune, split: Images, work: Path, views: int = 1) -> StoredInputs:
    """Inputs of the first layer that a recipe tunes, for a whole split, computed once.

    Args:
        settings: Says which backbone, layer, size and augmentation.
        split: The images.
        work: Folder that they are kept in.
        views: Of each image: that of evaluation, then augmented ones.
    """
    frozen = strip_head(settings)
    model = make_model(frozen, len(split.label_names)).eval()
    layer = first_tuned(model, settings.method, settings.layer)
    said = [layer, views] + ([dataclasses.asdict(settings.augment)] if views > 1 else [])
    file = work / "frozen" / f"{_name(frozen, split, *said)}.npy"
    with acquire(lock_file(work / "locks", file.name), wait=True):
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            look = {"size": final_size(settings), "batch_size": 64, "seed": VIEW_SEED, "colors": colors_of(model)}
            batches = [view_batches(split, settings.augment, view=view, **look) for view in range(views)]
            store_inputs(model, layer, batches, len(split), file.with_suffix(".new"))
            os.replace(file.with_suffix(".new"), file)
    return StoredInputs(split, np.load(file, mmap_mode="r"))


def _name(settings: Finetune, split: Images, *more: Any) -> str:
    source = find_model(settings.model, settings.pretrained)
    weights = weights_digest(settings.model) if settings.pretrained else settings.seed
    parts = [split.digest, final_size(settings), settings.model_args, source.architecture, source.identity, weights]
    return digest(*parts, *more)


def tune_stored(
    settings: Finetune, train: StoredInputs, test: StoredInputs, features: Tensor
) -> tuple[np.ndarray, int, int]:
    """Train on stored inputs as `fine_tune` does with `cache_views`.

    Args:
        settings: The recipe.
        train: To train on.
        test: To measure on.
        features: Of the training images `(N, d)`, frozen, for heads that start from them.

    Returns:
        For each test image whether it is right; parameters that were tuned; all parameters.
    """
    names = train.label_names
    settings = completed(settle(settings, train.images), len(train))
    model = make_model(settings, len(names), frame_tree(settings, names))
    start_head(model, settings, features, torch.from_numpy(train.labels), names)
    layer = first_tuned(model, settings.method, settings.layer)
    prepare(model, settings.method, settings.layer, settings.freeze_bn is True)
    tuned, total = tuned_share(model)
    with replayed(model, layer, _some_images(settings, model)):
        if tuned:
            run = Run(settings, train, test, model)
            run.fit()
            model = run.plain_model()
        return hits(model, settings, test), tuned, total


def _some_images(settings: Finetune, model: nn.Module) -> Tensor:
    size = final_size(settings)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def hits(model: nn.Module, settings: Finetune, test: Images | StoredInputs) -> np.ndarray:
    """For each test image whether a model is right, in float32 as probes are."""
    return predictions(model, test, final_size(settings)).numpy() == test.labels


@torch.no_grad()
def predictions(model: nn.Module, split: Images | StoredInputs, size: int) -> Tensor:
    """Classes `(N,)` that a model predicts in float32, on the CPU; images are normalized as its weights were.

    Args:
        model: Moved to the accelerator and left in evaluation mode.
        split: The images.
        size: Pixels of a side.
    """
    device = make_accelerator().device
    model = model.to(device).eval()
    batches = eval_batches(split, size=size, batch_size=256, colors=colors_of(model), device=device)
    with in_float32(model):
        return torch.cat([model(images).argmax(1).cpu() for images, _ in batches])
