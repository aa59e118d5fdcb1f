"""Help, version and mistyped options: at once, and without torch."""

import argparse
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import etf_zoo_cli
from etf_zoo.cli import evaluate, later, models, predict, search, segment, share, train
from etf_zoo.trainer.evaluate import Evaluation
from etf_zoo.trainer.prepare import Preparation
from etf_zoo.trainer.recipe.config import Recipe
from etf_zoo.trainer.recipe.parsing import _dotted
from etf_zoo.trainer.tune.tuning import Finetune
from etf_zoo_cli import build_parser, main

ROOT = Path(__file__).parents[2]
SUBPARSERS = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
COMMANDS = list(SUBPARSERS)
MODULES = {
    "models": models,
    "predict": predict,
    "search": search,
    "segment": segment,
    "later": later,
    "evaluate": evaluate,
    "train": train,
    "share": share,
}


SCRIPT = """
import atexit, sys
atexit.register(lambda: print(sorted({name.split('.')[0] for name in sys.modules}), flush=True))
from etf_zoo_cli import main
sys.exit(main())
"""


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("command", [[], *[[name] for name in COMMANDS]])
def test_help_imports_nothing_heavy(command):
    done = run(*command, "--help")
    assert done.returncode == 0, done.stderr
    *text, modules = done.stdout.splitlines()
    assert not {"torch", "timm", "numpy", "etf_zoo", "accelerate"} & set(re.findall(r"'(\w+)'", modules))
    assert text[0].startswith("usage: etf-zoo")
    assert len(text[0]) < 100


def test_help_within_half_a_second():
    def used():
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # processor time: others may be at work here
        return children.ru_utime + children.ru_stime

    before = used()
    run("finetune", "--help")
    assert used() - before < 0.5


def test_version():
    done = run("--version")
    assert re.match(r"etf-zoo \S+ \(timm \d+\.\S+, torch \d", done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command):
    parser = SUBPARSERS[command]
    assert all(action.help for action in parser._actions)
    assert parser.usage
    assert len(parser.usage) < 100


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_function(command):
    module, _, function = SUBPARSERS[command].get_default("run").partition(":")
    assert callable(getattr(MODULES[module], function))


@pytest.mark.parametrize(
    ("command", "kind"),
    [("finetune", Finetune), ("pretrain", Recipe), ("prepare", Preparation), ("evaluate", Evaluation)],
)
def test_listed_options_are_fields(command, kind):
    own = {"help", "processes", "config_file", "all-options", "config", "data", "split"}
    options = {o[2:] for a in SUBPARSERS[command]._actions for o in a.option_strings if o.startswith("--")} - own
    columns = {"image-column", "label-column"}  # of the data
    assert {o.replace("-", "_") for o in options - columns} <= set(_dotted(kind))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "m", "i.png", "--top", "0"], "etf-zoo predict: argument --top: 0 is no number of at least 1"),
        (["predict", "m"], "etf-zoo predict: the following arguments are required: IMAGE"),
        (["info", "m", "--jsn"], "etf-zoo info: there is no option '--jsn'"),
        (["info", "m", "n"], "etf-zoo info: what is 'n'?"),
        (["nonsense"], "etf-zoo: argument COMMAND: invalid choice: 'nonsense'"),
        (["export", "m", "out", "--format", "pdf"], "invalid choice: 'pdf'"),
        (["evaluate", "m", "d", "--spilt", "x"], "there is no option '--spilt'"),
        ([], "etf-zoo: the following arguments are required: COMMAND"),
    ],
)
def test_a_mistyped_command_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_options_of_the_data_need_no_equals_sign():
    joined = etf_zoo_cli._joined(["evaluate", "m", "--data.max_corrupt", "1", "d", "--data.x=2", "--json"])
    assert joined == ["evaluate", "m", "--data.max_corrupt=1", "d", "--data.x=2", "--json"]
