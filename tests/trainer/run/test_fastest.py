"""The fastest way: what is kept, what is measured anew, and what a damaged file costs."""

import json
import time

import pytest

from etf_zoo.trainer.run import fastest as module
from etf_zoo.trainer.run.fastest import fastest


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of choices; nothing is known yet."""
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_known", {})
    return tmp_path / "fastest"


def busy(milliseconds, calls=None):
    def way():
        if calls is not None:
            calls.append(milliseconds)
        end = time.thread_time() + milliseconds / 1000
        while time.thread_time() < end:
            pass

    return way


def test_takes_the_fastest_and_measures_once(kept, monkeypatch):
    calls = []
    ways = {"slow": busy(6, calls), "quick": busy(1, calls)}
    assert fastest("a", ways) == "quick"
    assert calls.count(6) == calls.count(1) >= 2
    before = len(calls)
    assert fastest("a", ways) == "quick"
    monkeypatch.setattr(module, "_known", {})  # as another process would find it
    assert fastest("a", ways) == "quick"
    assert len(calls) == before
    (file,) = kept.glob("*.json")
    written = json.loads(file.read_text())
    assert written["a"]["quick"] < written["a"]["slow"]


def test_leaves_the_first_way_for_a_twentieth_only(kept, monkeypatch):
    for quick, wanted in ((9.6, "first"), (9.4, "other")):
        monkeypatch.setattr(module, "_milliseconds", lambda ways, ms=quick: {"first": 10.0, "other": ms})
        assert fastest(str(quick), {"first": busy(0), "other": busy(0)}) == wanted


def test_what_disturbs_a_round_changes_no_choice(kept, monkeypatch):
    """A way that another process slows down in one round is judged by the others, however short the patience."""
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    for disturbed in (1, 2, 3):  # the first call of each is not counted
        calls = []

        def quick(calls=calls, disturbed=disturbed):
            calls.append(1)
            busy(20 if len(calls) == 1 + disturbed else 1)()

        assert fastest(f"{disturbed}", {"slow": busy(4), "quick": quick}) == "quick"
        assert len(calls) == 1 + module.ROUNDS[0]


def test_measures_again_where_ways_changed(kept):
    assert fastest("a", {"one": busy(2), "two": busy(0.2)}) == "two"
    assert fastest("a", {"one": busy(2), "three": busy(0.2)}) == "three"


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3}', '{"a": {"one": "x"}}', "{"])
def test_a_damaged_file_is_measured_again(kept, monkeypatch, text):
    fastest("a", {"one": busy(1), "two": busy(0.1)})
    (file,) = kept.glob("*.json")
    file.write_text(text)
    monkeypatch.setattr(module, "_known", {})
    assert fastest("a", {"one": busy(1), "two": busy(0.1)}) == "two"
    assert "a" in json.loads(file.read_text())


def test_keeps_what_other_processes_wrote(kept, monkeypatch):
    fastest("a", {"one": busy(0), "two": busy(0)})
    monkeypatch.setattr(module, "_known", {file: {} for file in module._known})  # as of a process that began before
    fastest("b", {"one": busy(0), "two": busy(0)})
    (file,) = kept.glob("*.json")
    assert json.loads(file.read_text()).keys() == {"a", "b"}


def test_a_folder_that_cannot_be_written_costs_memory_only(kept):
    kept.parent.joinpath("fastest").write_text("a file in the way")
    assert fastest("a", {"one": busy(1), "two": busy(0.1)}) == "two"
