"""Signals that ask a run to stop."""

import signal
import threading

import pytest

from etf_zoo.trainer.run import interrupt
from etf_zoo.trainer.run.interrupt import note_interrupts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_is_noted_and_a_later_one_acts(number, code, monkeypatch):
    def acts(*_):
        raise InterruptedError

    before = signal.signal(number, acts)
    try:
        with note_interrupts() as noted:
            assert not noted.number
            signal.raise_signal(number)
            assert (noted.number, noted.exit_code) == (number, code)
            signal.raise_signal(signal.SIGINT)  # a launcher hands on the same wish
            assert noted.number == number
            monkeypatch.setattr(interrupt, "REPEATS", -1)
            with pytest.raises(InterruptedError):
                signal.raise_signal(number)
        assert signal.getsignal(number) is acts
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and background jobs have it
    try:
        with note_interrupts() as noted:
            signal.raise_signal(signal.SIGINT)
            assert not noted.number
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_notes_nothing():
    numbers = []

    def run():
        with note_interrupts() as noted:
            numbers.append(noted.number)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert numbers == [0]
