"""SIGTERM and the first Ctrl-C, which ask a run to save and stop; and worker processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Interrupt", "end_with_parent", "note_interrupts"]


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
    """While the block lasts, the first SIGTERM or Ctrl-C is noted; a second one acts as ever.

    In another thread than the main one, where signals cannot be caught, nothing is noted.

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

    def restore() -> None:
        for number in caught:
            signal.signal(number, before[number] or signal.SIG_DFL)

    def note(number: int, frame: object) -> None:
        interrupt.number = number
        restore()

    for number in caught:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        restore()


def end_with_parent(worker: int = 0) -> None:
    """Have this worker process end within a second of its parent, be that killed; Ctrl-C is the parent's to answer.

    Args:
        worker: Its number, as `worker_init_fn` of torch's `DataLoader` is given.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    known = multiprocessing.parent_process()
    parent = known.pid if known else os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
