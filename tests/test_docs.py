"""README and docs: commands parse, snippets run, links lead somewhere."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from etf_zoo.trainer.evaluate import Evaluation
from etf_zoo.trainer.prepare import Preparation
from etf_zoo.trainer.recipe.config import Recipe
from etf_zoo.trainer.recipe.parsing import read_arguments
from etf_zoo.trainer.segment.recipe import Segmentation
from etf_zoo.trainer.tune.tuning import Finetune
from etf_zoo_cli import SCRIPTS, build_parser, main
from training.experiments.comparison import Comparison
from training.experiments.pixels import Pixels
from training.experiments.transfer_table import Table

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
RECIPES: dict[str, type] = {
    "pretrain": Recipe,
    "finetune": Finetune,
    "evaluate": Evaluation,
    "prepare": Preparation,
    "segment": Segmentation,
    "comparison": Comparison,
    "pixels": Pixels,
    "transfer_table": Table,
    "choose": Table,
}
# What needs more than this repository: timm's weights from the Hub.
NETWORK = ("pretrained=True, num_classes=102", "local-dir:runs", 'load_segmenter("runs')


def blocks(language: str) -> list[Any]:
    """Code blocks of a language, on all pages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for i, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)):
            found.append(pytest.param(block, id=f"{page.relative_to(ROOT)}-{i}"))
    return found


def commands() -> list[Any]:
    """Commands of the shell blocks, without comments; those joined by && apart."""
    found = []
    for block in blocks("bash"):
        lines = [shlex.split(line, comments=True) for line in block.values[0].replace("\\\n", " ").splitlines()]
        for words in filter(None, lines):
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                found.append(pytest.param(words[:end], id=f"{block.id}-{' '.join(words[:end])[:60]}"))
                words = words[end + 1 :]
    return found


def test_there_is_something_to_check():
    assert len(commands()) > 30
    assert len(blocks("python")) > 4


@pytest.mark.parametrize("words", commands())
def test_a_command_parses(words, monkeypatch):
    """Programs and files exist, and their options are what they take."""
    monkeypatch.chdir(ROOT)
    for option, value in itertools.pairwise(words):
        if option in ("--config", "--config_file", "--list"):
            assert (ROOT / value).is_file() or value == "recipe.yaml", value
    program, *rest = words
    if program in ("pip", "pytest", "ruff", "pyright", "pre-commit", "export"):
        return
    if program == "etf-zoo":
        check_etf_zoo(rest)
        return
    assert program in ("python", "accelerate"), program
    if program == "accelerate":
        assert rest.pop(0) == "launch"
        rest = [word for word in rest if word != "--quiet"]
        if rest[0] == "--config_file":
            rest = rest[2:]
    script, *options = rest
    assert (ROOT / script).is_file(), script
    if Path(script).stem in RECIPES:
        read_arguments(RECIPES[Path(script).stem], options)
    else:  # a script of argparse or without options
        text = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{option}"' in text for option in options if option.startswith("--"))


OFFLINE = ("list", "info", "evaluate", "predict", "export", "card", "embed", "search", "publish", "add-classes")
# Files that a reader has and this repository has not, or what a command before would have left.
ABSENT = ("hierarchy.json", "resnet50.a1_in1k", "my_test_photos")


@pytest.mark.slow
def test_commands_run_on_a_folder_of_photos(tmp_path, monkeypatch):
    """Every command of the pages that needs no network, one after the other, as a reader with a few photos would."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder, names in (("my_photos", ("red", "green")), ("new_photos", ("blue", "gray"))):
        for tone, name in enumerate(names):
            for split in ("train", "val") if folder == "my_photos" else ("",):
                for i in range(24):
                    file = Path(folder, split, name, f"{i}.jpg")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    pixels = rng.integers(0, 90, (40, 40, 3)) + 120 * (np.arange(3) == tone + 1)
                    Image.fromarray(pixels.astype(np.uint8)).save(file)
    shutil.copy("my_photos/val/red/0.jpg", "PHOTO.jpg")
    wanted = [words for program, *words in (param.values[0] for param in commands()) if program == "etf-zoo"]
    wanted = [words for words in wanted if words[0] in OFFLINE and not any(word in ABSENT for word in words)]
    wanted = [words for words in wanted if words[0] != "publish" or "--dry-run" in words]
    assert len(wanted) > 10
    tune = "finetune --data my_photos --model mobilenetv3_small_100_etf --epochs 1 --batch_size 8 --holdout 0.5"
    for grows, more in ((False, []), (True, ["--reserve", "8"])):  # a model with room for classes has no plain form
        shutil.rmtree("runs", ignore_errors=True)
        assert main([*tune.split(), "--sizes", "[[0, 32]]", *more]) == 0
        for words in wanted:
            if (words[0] == "add-classes") == grows:
                assert main(words) == 0, words


def check_etf_zoo(words: list[str]) -> None:
    """Options of the command line, without doing anything."""
    command, *rest = words
    if command in SCRIPTS:
        read_arguments(RECIPES[command], [option for option in rest if option != "--all-options"])
    else:
        build_parser().parse_args(words)


@pytest.mark.parametrize("code", blocks("python"))
def test_a_snippet_runs(code, monkeypatch, tmp_path):
    if any(mark in code for mark in NETWORK):
        compile(code, "snippet", "exec")
        pytest.skip("needs a network or a trained model")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{page.name}: {target}, there are {sorted(slugs)}"


def test_the_readme_is_short_and_names_are_american():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    for page in PAGES:
        text = page.read_text(encoding="utf-8").lower()
        for word in ("colou" + "r", "normali" + "s", "optimi" + "s", "cent" + "re", "behavio" + "ur", "licen" + "ce"):
            assert word not in text, f"{page.name}: {word}"
