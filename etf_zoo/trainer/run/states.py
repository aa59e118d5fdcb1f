"""What a checkpoint holds of the objects in training, gathered from all processes and put back."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .launching import is_sharded
from .state_file import read_state

__all__ = ["WholeModel", "collect_states", "collect_weights", "restore_states", "restore_weights"]

MODEL, OPTIMIZER, AVERAGE, RANDOM = "model.safetensors", "optimizer.safetensors", "average.safetensors", "random_{}"


class WholeModel:
    """A model in one piece. Under FSDP it is a copy on the main process's CPU, which takes the weights of all.

    Args:
        accelerator: The processes.
        model: On the CPU, before accelerate prepares it.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module):
        self.accelerator = accelerator
        self.copy = copy.deepcopy(model) if is_sharded(accelerator) and accelerator.is_main_process else None
        self.step = -1  # of the weights that the copy has

    def gather(self, model: nn.Module, step: int) -> nn.Module:
        """The prepared model as a plain one; under FSDP all processes have to call it, and the main one alone gets one.

        Args:
            model: As accelerate prepared it.
            step: Of its weights: they are gathered once a step.
        """
        if is_sharded(self.accelerator) and self.step != step:
            weights = collect_weights(self.accelerator, model)
            if self.copy is not None:
                self.copy.load_state_dict(weights)
            self.step = step
        return self.accelerator.unwrap_model(model) if self.copy is None else self.copy

    def forget(self) -> None:
        """Gather anew when next asked: the weights were changed without a step."""
        self.step = -1


def collect_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """State dict of a prepared model, in one piece; every process has to call it.

    Under FSDP it is on the CPU, and empty on all processes but the main one.
    """
    weights: Any = accelerator.get_state_dict(model)
    return {name: value.contiguous() for name, value in weights.items()}


def restore_weights(accelerator: Accelerator, model: nn.Module, weights: Any) -> None:
    """The reverse; under FSDP the main process's weights count."""
    if not is_sharded(accelerator):
        accelerator.unwrap_model(model).load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import set_model_state_dict  # slow to import, and few need it

    set_model_state_dict(model, weights, options=_whole(broadcast_from_rank0=True))


def collect_states(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, average: ModelEmaV3 | None
) -> dict[str, Any]:
    """Files of a checkpoint that this process writes, by name, as `write_state` takes them; all have to call it."""
    weights, states = collect_weights(accelerator, model), _optimizer_state(accelerator, model, optimizer)
    files = {RANDOM.format(accelerator.process_index) + ".safetensors": _random_state(accelerator.device)}
    if accelerator.is_main_process:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        files |= {MODEL: weights, OPTIMIZER: {"optimizer": states, "scaler": scaler}}
        if average is not None:
            files[AVERAGE] = {name: value.contiguous() for name, value in average.module.state_dict().items()}
    return files


def restore_states(
    folder: Path, accelerator: Accelerator, model: nn.Module, optimizer: Any, average: ModelEmaV3 | None
) -> None:
    """Put back what a checkpoint's folder holds.

    Raises:
        LoadError: If a file in it is no such state.
    """
    sharded = is_sharded(accelerator)
    reads = accelerator.is_main_process or not sharded
    restore_weights(accelerator, model, read_state(folder / MODEL) if reads else {})
    states = read_state(folder / OPTIMIZER)
    if accelerator.scaler is not None and states["scaler"] is not None:
        accelerator.scaler.load_state_dict(states["scaler"])
    if sharded:
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        options = _whole(broadcast_from_rank0=True)
        set_optimizer_state_dict(model, optimizer, states["optimizer"] if reads else {}, options=options)
    else:
        optimizer.load_state_dict(states["optimizer"])
    if average is not None:
        average.module.load_state_dict(read_state(folder / AVERAGE))
    own = folder / (RANDOM.format(accelerator.process_index) + ".safetensors")
    if own.is_file():  # not of a process that there was not before
        _restore_random(read_state(own), accelerator.device)


def _whole(**options: Any) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, **options)


def _optimizer_state(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    if not is_sharded(accelerator):
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=_whole(cpu_offload=True))


def _random_state(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *map(_plain_number, rest)),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def _plain_number(value: Any) -> int | float:
    return value.item() if isinstance(value, np.generic) else value


def _restore_random(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])
