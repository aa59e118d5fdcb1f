"""One runner of grids: cells that several processes share, each finished one a line of a file.

A cell is one thing to measure. Its `key` says all that its figures depend on: a changed recipe, other weights or other
data are another cell. Several processes of a script share the cells, each taking the next one that no other holds, and
a rerun goes on where the last one stopped. A cell that fails is told; the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import timm

from etf_zoo.errors import EtfZooError
from etf_zoo.trainer.run.launching import side_by_side
from etf_zoo.trainer.run.locks import acquire
from etf_zoo.trainer.run.model import find_model
from etf_zoo.trainer.run.script import is_deliberate

__all__ = [
    "CELLS",
    "Cell",
    "Results",
    "digest",
    "fill_table",
    "lock_file",
    "raise_failed",
    "run_grid",
    "run_jobs",
    "settings_digest",
    "weights_digest",
]

CELLS = "cells.jsonl"
CHECK = "check"  # field of a line: digest of the rest of it
# Fields of a recipe that a figure does not depend on.
PLACES = ("output", "model", "train_split", "val_split", "source", "config", "workers")
RUNNING = ("save_every", "save_steps", "save_minutes", "keep_checkpoints", "time_budget", "resume")
WORDS = ("tensorboard", "log_every", "tag", "notes")
T = TypeVar("T")
Record = dict[str, Any]


class Cell(Protocol):
    """What a grid consists of."""

    @property
    def key(self) -> str:
        """Names, and digests of all that the figures depend on."""
        ...


# ------------------------------------------------------------------------------------------------------------ digests


def digest(*parts: Any) -> str:
    """Twelve hexadecimal digits that stand for some values of JSON's types."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def settings_digest(settings: Any, *more: Any) -> str:
    """Digest of what a recipe says: of a recipe as it was written, or of what it has otherwise than by default.

    A new field of recipes, whose default is what was done before, leaves it as it is. Where weights and images are
    is left out: digests of their own say what they are.

    Args:
        settings: Fields and their values as a file has them; or a dataclass.
        more: What else the figures depend on, of JSON's types.
    """
    return digest(_said(settings), *more)


def _said(settings: Any) -> Record:
    found: Record = {}
    entries = settings.items() if isinstance(settings, Mapping) else _changed(settings)
    for name, value in entries:
        if name in (*PLACES, *RUNNING, *WORDS):
            continue
        nested = dataclasses.is_dataclass(value) or (isinstance(value, Mapping) and not name.endswith("args"))
        found |= {f"{name}.{inner}": v for inner, v in _said(value).items()} if nested else {name: value}
    return found


def _changed(settings: Any) -> list[tuple[str, Any]]:
    """Fields of a dataclass that have not their default, and those that are dataclasses themselves."""
    found = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found += [(field.name, value)] if dataclasses.is_dataclass(value) or value != default else []
    return found


@cache
def weights_digest(model: str, pretrained: bool = True) -> str:
    """Digest of a model's weights as they are loaded, wherever they come from; without any, the architecture's name.

    Raises:
        ValueError: If there is no such model.
    """
    source = find_model(model, pretrained)
    if not pretrained:
        return f"random {source.architecture}"
    found = hashlib.sha256(source.identity.encode())
    for name, value in sorted(timm.create_model(source.name, pretrained=True).state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------------ results


class Results:
    """A file of finished cells, one a line, that several processes add to.

    Args:
        file: The file; made by the first line, its folder too.
        locks: Folder of locks.
    """

    def __init__(self, file: Path, locks: Path):
        self.file = file
        self.locks = locks

    def read(self) -> dict[str, Record]:
        """Finished cells by key. A damaged line is told and not believed: its cell is measured again."""
        found, damaged = {}, []
        if not self.file.is_file():
            return found
        *lines, _ = self.file.read_bytes().split(b"\n")  # what follows the last end of a line was cut short
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                whole = record.pop(CHECK) == _check(record)
            except (ValueError, KeyError, TypeError, AttributeError):
                whole = False
            if whole:
                found[record["key"]] = record
            else:
                damaged.append(number)
        if damaged:
            where = ", ".join(map(str, damaged))
            print(f"{self.file}: damaged and not believed: line {where}.", file=sys.stderr, flush=True)
        return found

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a finished cell; a line that a kill cut short goes."""
        line = json.dumps({**record, CHECK: _check(record)}) + "\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(self.locks, str(self.file.resolve()))
        with acquire(lock, wait=True), open(self.file, "ab+") as opened:
            opened.seek(0)
            opened.truncate(opened.read().rfind(b"\n") + 1)
            opened.write(line.encode())
            opened.flush()
            os.fsync(opened.fileno())


def _check(record: Mapping[str, Any]) -> str:
    return digest(record)[:8]


def lock_file(locks: Path, name: str) -> Path:
    """Where the lock of something is.

    Args:
        locks: Folder of locks.
        name: Of the thing.
    """
    return locks / f"{digest(name)}.lock"


# ------------------------------------------------------------------------------------------------------------- runner


def run_grid(
    cells: Sequence[Cell], measure: Callable[[Any], Record], results: Results, locks: Path, jobs: int = 1
) -> list[str]:
    """Measure the cells that are not finished and that no other process has.

    Args:
        cells: All cells.
        measure: Gives a cell's figures; a function of a module, or a `partial` of one, for several jobs.
        results: Where finished cells go.
        locks: Folder of locks.
        jobs: Processes that measure, each on its share of the cores.

    Returns:
        Keys of the cells that failed.
    """
    done = results.read()
    left = [cell for cell in cells if cell.key not in done]
    return [cell.key for cell in run_jobs(partial(_finish, measure, results.file, locks), left, jobs)]


def raise_failed(failed: Sequence[str]) -> None:
    """Raise EtfZooError if cells failed; to be called when what the others gave is written."""
    if failed:
        raise EtfZooError(f"{len(failed)} cells failed, see above: {', '.join(failed)}.")


def fill_table(
    folder: Path,
    locks: Path,
    cells: Callable[[], Sequence[Cell]],
    measure: Callable[[Any], Record],
    table: Callable[[Iterable[Record]], str],
    *,
    jobs: int = 1,
    table_only: bool = False,
) -> None:
    """Measure what is missing, and write `table.md` from all that is there.

    Args:
        folder: Of the cells and the table.
        locks: Folder of locks.
        cells: Gives all cells; asked only where some are to be measured.
        measure: See `run_grid`.
        table: Finished cells to text.
        jobs: See `run_grid`.
        table_only: Whether to measure nothing.

    Raises:
        EtfZooError: If cells failed, once the table is written.
    """
    results = Results(folder / CELLS, locks)
    failed = [] if table_only else run_grid(cells(), measure, results, locks, jobs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table(results.read().values()), encoding="utf-8")
    raise_failed(failed)


def _finish(measure: Callable[[Any], Record], file: Path, locks: Path, cell: Cell) -> None:
    results = Results(file, locks)
    with acquire(lock_file(locks, cell.key)) as free:
        if free and cell.key not in results.read():
            print(cell.key, flush=True)
            results.append({"key": cell.key, **measure(cell)})


def run_jobs(run: Callable[[T], None], items: Sequence[T], jobs: int = 1) -> list[T]:
    """Run something for each item, several at a time.

    Args:
        run: What to run; for several jobs, a function of a module or a `partial` of one.
        items: What for, in this order.
        jobs: Processes; 1 for this one.

    Returns:
        Items that failed; each failure is told on standard error, and the others go on.
    """
    if jobs == 1:
        return [item for item in items if not _succeeds(run, item)]
    context = side_by_side(jobs)
    waiting, busy, failed = list(items), {}, []

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, run))
        process.start()
        theirs.close()  # the pipe then ends with the process
        give(ours, process)

    def give(pipe: connection.Connection, process: Any) -> None:
        if waiting:
            item = waiting.pop(0)
            busy[pipe] = process, item
            with contextlib.suppress(OSError):  # of a process that died: its pipe has ended, which the loop sees
                pipe.send(item)
        else:
            pipe.close()
            process.join()

    for _ in range(min(jobs, len(waiting))):
        start()
    while busy:
        for pipe in cast(list[connection.Connection], connection.wait(list(busy))):
            process, item = busy.pop(pipe)
            try:
                failed += [] if pipe.recv() else [item]
                give(pipe, process)
            except (EOFError, ConnectionError):
                process.join()
                print(f"{_name(item)} failed: its process ended ({process.exitcode}).", file=sys.stderr, flush=True)
                failed.append(item)
                if waiting:
                    start()
    return failed


def _work(pipe: connection.Connection, run: Callable[[T], None]) -> None:
    """A process of `run_jobs`: an item comes, whether it succeeded goes."""
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        pipe.send(_succeeds(run, item))


def _succeeds(run: Callable[[T], None], item: T) -> bool:
    try:
        run(item)
    except Exception as error:
        if not is_deliberate(error):
            traceback.print_exc()
        print(f"{_name(item)} failed: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _name(item: Any) -> str:
    return str(getattr(item, "key", item))
