"""What depends on how a run was launched: accelerate's settings, FSDP, processes in step."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.context import SpawnContext
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from etf_zoo.errors import EtfZooError
from etf_zoo.metrics import sum_over_processes

from ..recipe.config import PRECISIONS

__all__ = [
    "Repeatable",
    "checkout_commit",
    "in_float32",
    "make_accelerator",
    "process_state",
    "refuse_processes",
    "side_by_side",
    "is_sharded",
    "gather_in",
    "in_step",
]

Batch = tuple[Tensor, Tensor]
PATIENCE = timedelta(hours=6)  # of processes with one another: the first may have a large data set to decode


def make_accelerator(precision: str = "") -> Accelerator:
    """accelerate's Accelerator, for the way that the script was launched.

    Args:
        precision: `fp32`, `bf16` or `fp16`. Empty where nothing is trained: then it is what a training before had,
            else `fp32`. Accelerators of another precision that were made before are not to be used after that.

    Raises:
        ValueError: On fp16 without a GPU.
    """
    process_state()
    mixed = PRECISIONS[precision] if precision else None if AcceleratorState._shared_state else "no"
    if precision and AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()  # accelerate allows a process one precision; a list of runs may have several
    accelerator = Accelerator(mixed_precision=mixed, cpu=not torch.accelerator.is_available())
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise EtfZooError("fp16 needs a GPU: set --precision bf16 or fp32.")
    torch.backends.cudnn.benchmark = accelerator.device.type == "cuda"  # sizes stay the same for many steps
    # Its gradients are not finite where attention logits are far below 0 and tokens are 64 more than a multiple of 128
    # (pytorch issue 196678, there with a mask). Two trainings of a ViT ended so at 64 pixels: an H200, torch 2.11.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate turns FSDP on for GPUs only; gloo shards as well, which is how FSDP is tried without one
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def process_state() -> PartialState:
    """The processes that the script was launched in; to be asked before accelerate is in any other way."""
    # several processes without `cpu` would each train alone: accelerate's launcher does not pass `use_cpu` on to them
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def refuse_processes() -> None:
    """Raise ValueError in a script that several processes would get into one another's way in."""
    if process_state().num_processes > 1:
        raise EtfZooError("Run this script as one process (--num_processes 1); started twice, it shares the work.")


def side_by_side(count: int) -> SpawnContext:
    """What starts processes of which so many run at a time, each on its share of the cores."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))  # read when a process starts
    return multiprocessing.get_context("spawn")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the model only."""
    return accelerator.distributed_type == DistributedType.FSDP


def gather_in(model: nn.Module) -> None:
    """Let a sharded timm model gather its weights in the parts of its forward pass too, as evaluation calls them."""
    from torch.distributed.fsdp import register_fsdp_forward_method  # slow to import, and few need it

    for name in ("forward_features", "forward_head"):
        register_fsdp_forward_method(model, name)


class Repeatable:
    """Batches that can be read again.

    Args:
        batches: Makes an iterator over them.
    """

    def __init__(self, batches: Callable[[], Iterable[Batch]]):
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches())


def in_step(
    batches: Callable[[], Iterable[Batch]], empty: tuple[int, ...], accelerator: Accelerator
) -> Iterator[Batch]:
    """Batches, and empty ones for the processes that have fewer, so that all make as many forward passes.

    A sharded model needs that: all processes gather its weights together.

    Args:
        batches: Makes an iterator over the batches of this process.
        empty: Shape of a batch of no images.
        accelerator: The processes.
    """
    device = accelerator.device
    iterator = iter(batches())
    while True:
        batch = next(iterator, None)
        if not sum_over_processes(torch.tensor([float(batch is not None)], device=device), accelerator).item():
            return
        yield batch or (torch.empty(empty, device=device), torch.empty(0, dtype=torch.int64, device=device))


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32 while the context lasts, though it is trained under autocast.

    accelerate puts autocast into the `forward` of a model that it prepares, where it stays when the wrappers are gone.
    """
    own, wrapped = model.__dict__.get("_original_forward"), model.__dict__.get("forward")
    if own is None or wrapped is None:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = wrapped


def checkout_commit() -> str:
    """Commit of the checkout that the script was launched from; empty outside one."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    if shutil.which("git") is None:
        return ""
    head = subprocess.run(git, capture_output=True, text=True, check=False)
    return head.stdout.strip()
