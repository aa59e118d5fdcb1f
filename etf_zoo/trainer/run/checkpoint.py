"""Checkpoints of a run: folders that appear whole, the last few kept; a damaged one is passed over.

A checkpoint holds safetensors files and `state.json`, which has the sha256 of each and of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from etf_zoo.errors import EtfZooError, StorageError
from etf_zoo.weights.native import sha256

from .state_file import write_state

__all__ = ["CHECKPOINTS", "CheckpointError", "exists", "names", "newest", "save"]

CHECKPOINTS = "checkpoints"  # folder of a run
STATE = "state.json"
FORMAT = 2  # 1 had pickles


class CheckpointError(StorageError):
    """A checkpoint could not be written."""


def save(
    folder: Path,
    accelerator: Accelerator,
    state: dict[str, Any],
    keep: int,
    files: Mapping[str, Any],
) -> Path:
    """Write a checkpoint. Every process has to call it.

    It is written beside its place and renamed into it when all of it is on the disk.

    Args:
        folder: Where the run's checkpoints are. Processes on several machines must see the same folder.
        accelerator: The processes.
        state: For JSON; `step` names the checkpoint. The main process's counts.
        keep: How many checkpoints to keep, this one included.
        files: What this process writes, by name: a state for `write_state`, or the path of a file to link to.

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
            part.mkdir(parents=True)
        accelerator.wait_for_everyone()
        for name, content in files.items():
            if isinstance(content, Path):
                _link(content, part / name)
            else:
                write_state(content, part / name)
            _to_disk(part / name)
        accelerator.wait_for_everyone()
        if main:
            listed = {file.name: [file.stat().st_size, sha256(file)] for file in sorted(part.iterdir())}
            whole = {**state, "format": FORMAT, "files": listed}
            (part / STATE).write_text(json.dumps({"sha256": _digest(whole), "state": whole}))
            _to_disk(part / STATE)
            shutil.rmtree(final, ignore_errors=True)  # one of the same step that was found damaged
            os.replace(part, final)
            earlier = [old for old in _folders(folder) if old.name < final.name and not _fault(old, contents=False)]
            for old in set(_folders(folder)) - {final, *earlier[: keep - 1]}:  # damaged and later ones among them
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors has errors of its own
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(
            f"Could not write the checkpoint of step {state['step']} into {folder}: {reason(error)}. "
            f"{_what_is_left(folder)}"
        ) from error
    accelerator.wait_for_everyone()
    return final


def newest(folder: Path, accelerator: Accelerator) -> tuple[Path, dict[str, Any]]:
    """The last checkpoint that is as it was written, and its state. Damaged ones are named; every process has to call.

    Raises:
        EtfZooError: If there is none.
    """
    sound: tuple[Path, dict[str, Any]] | None = None
    faults: list[str] = []
    if accelerator.is_main_process:
        for checkpoint in _folders(folder):
            if fault := _fault(checkpoint):
                faults.append(f"{checkpoint} is passed over: {fault}.")
                continue
            sound = checkpoint, json.loads((checkpoint / STATE).read_text())["state"]
            break
    sound, faults = broadcast_object_list([sound, faults])
    if sound is None:
        if faults:
            raise EtfZooError(f"{' '.join(faults)} No other checkpoint is left: start again with another --output.")
        raise EtfZooError(f"There is no checkpoint in {folder} to resume from. Start without --resume.")
    for fault in faults:
        accelerator.print(fault)
    return sound


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint, be it damaged."""
    return bool(_folders(folder))


def names(folder: Path) -> list[str]:
    """Names of the checkpoints, the last first."""
    return [path.name for path in _folders(folder)]


def reason(error: Exception) -> str:
    """The system's words rather than a library's, without a period."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        if isinstance(cause, SafetensorError) and (words := re.search(r"I/O error: (.*?) \(os error", str(cause))):
            return words[1]
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0].rstrip(".")


def _folders(folder: Path) -> list[Path]:
    """Checkpoints, damaged or not, the last first."""
    return sorted((f for f in folder.glob("step_*") if f.suffix != ".part"), reverse=True)


def _fault(checkpoint: Path, contents: bool = True) -> str:
    """What is wrong with a checkpoint; empty for nothing. Its files are read only if asked for."""
    try:
        whole = json.loads((checkpoint / STATE).read_text())
        state, said = (whole["state"], whole["sha256"]) if "state" in whole else (whole, None)
        version, files = state.get("format", 1), state["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"it has no readable {STATE}"
    if version != FORMAT:
        return f"it has format {version}, of another version of etf-zoo, where this one reads format {FORMAT}"
    if said != _digest(state):
        return f"its {STATE} was changed or damaged"
    for name, (size, _) in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    for name, (_, said) in files.items() if contents else ():
        if sha256(checkpoint / name) != said:
            return f"{name} was changed or damaged"
    return ""


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _link(file: Path, place: Path) -> None:
    """The same file at a second place; a copy where the disk has no links."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def _to_disk(file: Path) -> None:
    """After a power failure, a renamed folder must not hold empty files."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _what_is_left(folder: Path) -> str:
    last = next((path for path in _folders(folder) if not _fault(path, contents=False)), None)
    if last is None:
        return "There is no checkpoint yet. Make room, or choose another --output, and start again."
    return f"{last.name} is intact: make room, then go on with --resume."
