"""Checkpoints of a run: folders that appear whole, the last few kept; a half-written one is passed over."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

__all__ = ["CheckpointError", "save", "newest", "exists"]

STATE = "state.json"


class CheckpointError(OSError):
    """A checkpoint could not be written."""


def save(folder: Path, accelerator: Accelerator, state: dict[str, Any], keep: int) -> Path:
    """Write everything that accelerate holds, and `state`. Every process has to call it.

    The checkpoint is written beside its place and renamed into it when all of it is on the disk.

    Args:
        folder: Where the run's checkpoints are. Processes on several machines must see the same folder.
        accelerator: Holds model, optimizer, random states, and what is registered with it.
        state: What else to keep; `step` names the checkpoint.
        keep: How many checkpoints to keep, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: If it cannot be written, on a full disk for one; those before it are intact.
    """
    final = folder / f"step_{state['step']:08d}"
    part = final.with_suffix(".part")
    main = accelerator.is_main_process
    try:
        if main:
            for rest in folder.glob("*.part"):  # of a save that was killed
                shutil.rmtree(rest)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(part))
        accelerator.wait_for_everyone()
        if main:
            files = sorted(file for file in part.rglob("*") if file.is_file())
            for file in files:
                _to_disk(file)
            sizes = {str(file.relative_to(part)): file.stat().st_size for file in files}
            (part / STATE).write_text(json.dumps({**state, "files": sizes}))
            _to_disk(part / STATE)
            shutil.rmtree(final, ignore_errors=True)  # one of the same step that was found incomplete
            os.replace(part, final)
            earlier = [old for old in _folders(folder) if old.name < final.name and _read(old)[0] is not None]
            for old in set(_folders(folder)) - {final, *earlier[: keep - 1]}:  # incomplete and later ones among them
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(
            f"Could not write the checkpoint of step {state['step']} into {folder}: {_reason(error)}. "
            f"{_what_is_left(folder)}"
        ) from error
    accelerator.wait_for_everyone()
    return final


def newest(folder: Path, accelerator: Accelerator) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint that is complete, and its state; None if there is none. Incomplete ones are named."""
    for found in _folders(folder):
        state, fault = _read(found)
        if state is not None:
            return found, state
        accelerator.print(f"{found} is passed over, it is incomplete: {fault}.")
    return None


def exists(folder: Path) -> bool:
    """Whether there is a complete checkpoint."""
    return any(_read(found)[0] is not None for found in _folders(folder))


def _folders(folder: Path) -> list[Path]:
    """Checkpoints, complete or not, the last first."""
    return sorted((f for f in folder.glob("step_*") if f.suffix != ".part"), reverse=True)


def _read(checkpoint: Path) -> tuple[dict[str, Any] | None, str]:
    """State, or None and what is wrong."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        sizes = state["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, f"no readable {STATE}"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return None, f"{name} is missing"
        if file.stat().st_size != size:
            return None, f"{name} has {file.stat().st_size} bytes, not {size}"
    return state, ""


def _to_disk(file: Path) -> None:
    """After a power failure, a renamed folder must not hold empty files."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _reason(error: Exception) -> str:
    """The system's words rather than a library's: torch says of a full disk that an unexpected position was met."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0].rstrip(".")


def _what_is_left(folder: Path) -> str:
    last = next((found for found in _folders(folder) if _read(found)[0] is not None), None)
    if last is None:
        return "There is no checkpoint yet. Make room, or choose another --output, and start again."
    return f"{last.name} is intact: make room, then go on with --resume."
