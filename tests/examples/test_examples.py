"""The examples run, and stay short."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "finetune_loop": ["--epochs", "1", "--images", "128"],
    "measure_collapse": ["--images", "128"],
    "class_tree": [],
}
WORDS = {"finetune_loop": "test top-1", "measure_collapse": "NC1", "class_tree": "mean height of a mistake"}


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_example(name, monkeypatch, capsys):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 60
    monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS[name]])
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert WORDS[name] in out
    assert "nan" not in out
