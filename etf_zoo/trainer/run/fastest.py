"""Which of several ways to compute the same is the fastest on this machine: measured once, kept on disk.

Which it is depends on the processor and on the libraries' versions. Ways differ in rounding, so a choice is kept: a run
that is resumed on the machine that it began on gives the same bits. `ETF_ZOO_MEASURE=0` measures nothing and takes
fixed rules: then the bits depend on no clock.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..data.places import cache_root

__all__ = ["fastest", "may_measure"]

ROUNDS = (3, 9)  # in which the ways take turns: at least, at most
PATIENCE = 0.5  # seconds of processor time after which no more rounds than the least are begun
MARGIN = 0.95  # of the first way's time: what another has to stay below

_known: dict[Path, dict[str, dict[str, float]]] = {}  # milliseconds of the ways, by file and key


def may_measure() -> bool:
    """Whether the environment allows a choice by the clock."""
    return os.environ.get("ETF_ZOO_MEASURE", "1") != "0"


def fastest(key: str, ways: Mapping[str, Callable[[], Any]]) -> str:
    """The way that takes the least time, measured at the first call on this machine.

    Args:
        key: Names what is computed: sizes, precision.
        ways: Name -> what to run; the first is taken unless another saves a twentieth of its time.

    Returns:
        Its name.

    Example:
        >>> fastest("sum of 1000", {"sum": lambda: sum(range(1000)), "formula": lambda: 999 * 500})  # doctest: +SKIP
        'formula'
    """
    file = _file()
    if file not in _known:
        _known[file] = _read(file)
    kept = _known[file].get(key, {})
    if kept.keys() != ways.keys():
        kept = _known[file][key] = _milliseconds(ways)
        _write(file, key, kept)
    first = next(iter(ways))
    best = min(ways, key=lambda name: kept[name])
    return best if kept[best] < MARGIN * kept[first] else first


def _milliseconds(ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Least time of each way. They take turns, so that what else the machine does disturbs all of them.

    Other processes slow a way down, by the caches and the memory that they share, and never speed it up: the least of
    some rounds is the nearest to what a way takes alone. It is the processor's time that is limited, as on a busy
    machine the clock on the wall would leave a single round.
    """
    for way in ways.values():
        way()  # what is made at a first call is not counted
    best, began = dict.fromkeys(ways, float("inf")), time.process_time()
    for number in range(1, ROUNDS[1] + 1):
        for name, way in ways.items():
            start = _clock()
            way()
            spent = max(b - a for a, b in zip(start, _clock(), strict=True))
            best[name] = min(best[name], round(1000 * spent, 4))
        if number >= ROUNDS[0] and time.process_time() - began > PATIENCE * torch.get_num_threads():
            break
    return best


def _clock() -> tuple[float, float]:
    """Processor time of this thread, and of all by their number: the longer tells how long it would take undisturbed.

    The clock on the wall would choose by what other processes do at that moment, and the choice is kept.
    """
    return time.thread_time(), time.process_time() / torch.get_num_threads()


def _file() -> Path:
    """Where choices of this processor, these libraries and this number of threads are kept."""
    what = (_processor(), torch.backends.cpu.get_cpu_capability(), torch.__version__, torch.get_num_threads())
    return cache_root() / "fastest" / f"{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.json"


@functools.cache  # else it is read at each layer of each step
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = ("vendor_id", "cpu family", "model", "model name", "CPU part")
    return " ".join(sorted({line for line in lines if line.split("\t")[0].strip() in named}))


def _read(file: Path) -> dict[str, dict[str, float]]:
    """What is kept; nothing where the file is damaged: it is measured again."""
    try:
        found = json.loads(file.read_text())
        return {str(key): {str(n): float(ms) for n, ms in ways.items()} for key, ways in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(file: Path, key: str, kept: dict[str, float]) -> None:
    """Add to what other processes have written meanwhile; without a disk to write to it is kept in memory only."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({**_read(file), key: kept}, indent=0, sort_keys=True) + "\n")
        os.replace(new, file)
    except OSError:
        pass
