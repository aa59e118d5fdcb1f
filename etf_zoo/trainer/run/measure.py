"""Measuring a model on a split, with all processes of a run."""

from __future__ import annotations

from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from etf_zoo.evaluation.measure import measure
from etf_zoo.models.names import timm_classifier_names

from ..data.augment import Colors
from ..data.batches import AnySplit, eval_batches
from ..data.stored import StoredInputs
from .launching import Repeatable, in_float32, in_step, is_sharded

__all__ = ["measure_split"]


def measure_split(
    model: nn.Module,
    split: AnySplit,
    *,
    size: int,
    batch_size: int,
    colors: Colors,
    accelerator: Accelerator,
    distances: Tensor | None = None,
    fast: bool = False,
) -> dict[str, float]:
    """Figures of a model on a split, see `etf_zoo.evaluation.evaluate`; every process has to call it.

    They are computed in float32, whatever the model was trained in: figures of probes, of runs and of stored models
    are then of one precision.

    Args:
        model: A timm model without the wrappers of accelerate, on the accelerator's device.
        split: The images.
        size: Pixels of a side.
        batch_size: Images per step and process.
        colors: What pixels are centered and scaled by.
        accelerator: The processes.
        distances: LCA heights of the classes `(K, K)`, where mistakes are to be weighed by them.
        fast: Collapse to five digits, in float32.

    Example:
        >>> measure_split(model, test, size=64, batch_size=256, colors=IMAGENET, accelerator=Accelerator())["top1"]
        ... # doctest: +SKIP
    """
    batches = partial(
        eval_batches,
        split,
        size=size,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        colors=colors,
        device=accelerator.device,
    )
    if is_sharded(accelerator):
        batches = partial(in_step, batches, (0, 3, size, size), accelerator)
    if (
        accelerator.num_processes > 1
    ):  # batch norm's statistics are each process's own: the main one's are what is saved
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
    forward = _classify if isinstance(split, StoredInputs) else None
    with in_float32(model):
        found = measure(
            model, Repeatable(batches), distances=distances, processes=accelerator, forward=forward, fast=fast
        )
    return found.figures


def _classify(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Features `(B, d)` and logits `(B, K)` from stored inputs, in one pass: the classifier's input is the features."""
    seen: list[Tensor] = []
    classifier = model.get_submodule(timm_classifier_names(model)[0])
    with classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        logits = model(inputs)
    return seen[0].flatten(1), logits
