"""SIGTERM and the first Ctrl-C, which ask a run to save and stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Interrupt", "note_interrupts"]


REPEATS = 2.0  # seconds


class Interrupt:
    """Whether the system or a person has asked this process to stop.

    Attributes:
        number: Of the signal; 0 for none.
    """

    number: int = 0

    @property
    def exit_code(self) -> int:
        """What a shell makes of a process that such a signal ends: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number


@contextmanager
def note_interrupts() -> Iterator[Interrupt]:
    """While the block lasts, the first SIGTERM or Ctrl-C is noted; one that comes later acts as ever.

    Repeats within two seconds are the same wish: a launcher hands on what its processes have got already. In another
    thread than the main one, where signals cannot be caught, nothing is noted.

    Example:
        >>> with note_interrupts() as interrupt:
        ...     for step in range(3):
        ...         if interrupt.number:
        ...             break  # after saving
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # nohup ignores some
    first = 0.0

    def restore() -> None:
        for number in caught:
            signal.signal(number, before[number] or signal.SIG_DFL)

    def note(number: int, frame: object) -> None:
        nonlocal first
        if not interrupt.number:
            interrupt.number, first = number, time.monotonic()
        elif time.monotonic() - first > REPEATS:
            restore()
            signal.raise_signal(number)

    for number in caught:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        restore()
