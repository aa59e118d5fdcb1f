"""Sums over processes, by whatever the caller runs them with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch import distributed as dist

from ..errors import EtfZooError

__all__ = ["sum_over_processes"]


def sum_over_processes(tensor: Tensor, processes: Any = None) -> Tensor:
    """Sum of a tensor over all processes, the same on each. A collective call: every process has to make it.

    Args:
        tensor: Any shape, the same on every process.
        processes: A `torch.distributed` process group; an object like accelerate's `Accelerator` (with `reduce`,
            `num_processes` and `device`); or None for the default group, which is no group at all where
            `torch.distributed` is not initialized.

    Returns:
        A tensor on the device of `tensor`; `tensor` itself where there is one process.

    Raises:
        ValueError: If `processes` is none of these.
    """
    if processes is None and not (dist.is_available() and dist.is_initialized()):
        return tensor
    if processes is None or (dist.is_available() and isinstance(processes, dist.ProcessGroup)):
        nccl = dist.get_backend(processes) == "nccl"  # knows tensors on a GPU only
        summed = tensor.to("cuda" if nccl else tensor.device, copy=True).contiguous()
        dist.all_reduce(summed, group=processes)
        return summed.to(tensor.device)
    if not (hasattr(processes, "reduce") and hasattr(processes, "num_processes")):
        raise EtfZooError(
            f"Cannot sum over processes with {type(processes).__name__}. Pass accelerate's Accelerator, a "
            f"torch.distributed process group, or None for the default group."
        )
    if processes.num_processes == 1:  # its device may know no float64
        return tensor
    return processes.reduce(tensor.to(processes.device), reduction="sum").to(tensor.device)
