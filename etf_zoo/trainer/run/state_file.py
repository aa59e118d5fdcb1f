"""Nested states (of an optimizer, of generators) as one safetensors file: tensors as such, all else as JSON.

Nothing in such a file is ever unpickled: reading it runs no code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from etf_zoo.errors import LoadError

__all__ = ["read_state", "write_state"]

TREE = "tree"  # the file's metadata under this name is the state, with names in the place of tensors


def write_state(state: Any, file: Path) -> None:
    """Write a state of dicts with text or integer keys, lists, tuples, tensors, numbers, texts, booleans and None.

    Tensors keep their order in memory, such as channels last: what is read is as fast as what was written.

    Raises:
        TypeError: On anything else in it.
        SafetensorError, OSError: If the file cannot be written.

    Example:
        >>> write_state({"step": 3, "mean": torch.ones(2)}, Path("state.safetensors"))  # doctest: +SKIP
        >>> read_state(Path("state.safetensors"))  # doctest: +SKIP
        {'step': 3, 'mean': tensor([1., 1.])}
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "", tensors, set())
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt", TREE: json.dumps(tree)})


def read_state(file: Path) -> Any:
    """What `write_state` wrote, on the CPU.

    Raises:
        LoadError: If it is no such file, a pickle for one.
    """
    try:
        with safetensors.safe_open(file, "pt") as opened:
            tree = json.loads(opened.metadata()[TREE])
            return _decode(tree, opened.get_tensor)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"{file} is no state that etf-zoo wrote ({error}). Nothing else is read.") from error


def _encode(value: Any, name: str, tensors: dict[str, Tensor], storages: set[int]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        order = sorted(range(value.ndim), key=lambda axis: -value.stride(axis))  # the slowest first
        stored = value.detach().permute(order).cpu().contiguous()
        shared = stored.untyped_storage().data_ptr() in storages  # which safetensors refuses
        storages.add(stored.untyped_storage().data_ptr())
        tensors[name] = stored.clone() if shared else stored
        return {"tensor": name, "order": order}
    if isinstance(value, dict):
        if any(type(key) not in (str, int) for key in value):
            raise TypeError(f"Keys of a state are texts or integers, not {list(value)[:3]}.")
        pairs = [[key, _encode(item, f"{name}.{key}".lstrip("."), tensors, storages)] for key, item in value.items()]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{name}.{i}".lstrip("."), tensors, storages) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"A state holds tensors, numbers and texts; {name} is {type(value).__name__}.")


def _decode(tree: Any, tensor: Any) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensor) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "tuple" in tree:
        return tuple(_decode(item, tensor) for item in tree["tuple"])
    if "dict" in tree:
        return {key: _decode(item, tensor) for key, item in tree["dict"]}
    order = tree["order"]
    return tensor(tree["tensor"]).permute([order.index(axis) for axis in range(len(order))])
