"""Fine-tune a model: `accelerate launch training/finetune.py --data FOLDER`, or with `--config RECIPE`.

The folder holds photos by class, with or without folders of splits; tables of paths and labels, zip files, parquet
files and Hub names work too. What is found is said first. The result is a Hub-ready folder, `<output>/model`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from etf_zoo.text import printable

from .recipe.config import parse
from .run import checkpoint
from .run.checkpoint import CHECKPOINTS
from .run.export import check_storable
from .run.launching import make_accelerator, process_state
from .run.model import find_model
from .tune.parts import load_data
from .tune.picture import plot
from .tune.probes import PROBES
from .tune.settle import settle
from .tune.tuning import Finetune, Tuned, fine_tune


def plan(settings: Finetune) -> dict[str, Finetune]:
    """What to run, by the name it gets in the table; the first is the one asked for."""
    found = {_name(settings): settings}
    other_head = "frame" if settings.head == "warm" else settings.head  # means of random features say nothing
    random_weights = {"pretrained": False, "head": other_head, "freeze_bn": False}
    # every other loss, as a target cosine, is for frames
    loss = dataclasses.replace(settings.loss, name="cross_entropy", args={}, class_scaling=False)
    learned = {"head": "learned", "reserve": 0, "target_cosine": [], "loss": loss}
    references = {"random_weights": random_weights, "learned_head": learned}
    for folder, change in references.items() if settings.compare else ():
        output = Path(settings.output) / folder
        # a kill may have come before this one began
        resume = settings.resume and checkpoint.exists(output / CHECKPOINTS)
        recipe = dataclasses.replace(settings, **change, output=str(output), resume=resume)  # type: ignore[arg-type]
        note = "" if recipe.loss.name == settings.loss.name else ", cross-entropy"
        found.setdefault(_name(recipe) + note, recipe)  # not if it is what was asked for
    return found


def _name(settings: Finetune) -> str:
    heads = {
        "auto": "fixed frame",
        "frame": "fixed frame",
        "random": "random frame",
        "learned": "learned head",
        "learned_cosine": "learned cosine head",
        "warm": "warm frame",
        "warm_learned": "warm learned head",
    }
    what = settings.method if settings.method in PROBES else heads[settings.head]
    weights = "pretrained" if settings.pretrained else "random weights"
    method = "" if settings.method in ("full", *PROBES) else f", {settings.method}"
    return f"{what}, {weights}{method}"


def license_note(settings: Finetune) -> list[str]:
    """A line on the terms of the weights that a fine-tuning starts from, where they allow no commercial use."""
    terms = find_model(settings.model, settings.pretrained).license if settings.pretrained else ""
    if "nc" not in terms.lower().split("-"):
        return []
    return [
        f"License: the weights of {settings.model} are under {terms.upper()}, without commercial use; so is the result."
    ]


def main() -> None:
    settings = parse(Finetune)
    if settings.method not in PROBES:
        check_storable(settings)
    say = make_accelerator(settings.precision).print  # of the main process alone
    parts = load_data(settings)
    settings = settle(dataclasses.replace(settings, data=parts.data), parts.train, parts.watched)
    terms = license_note(settings)
    say("\n".join([*parts.lines, *terms]), flush=True)
    test = parts.test
    done: dict[str, Tuned] = {}
    for name, recipe in plan(settings).items():
        say(f"{name}:", flush=True)
        tuned = fine_tune(recipe, parts.train, test, watched=parts.watched, groups=parts.groups)
        if tuned is None:
            return
        done[name] = tuned
    (own, first), *others = done.items()
    figures: dict[str, dict[str, Any]] = {name: tuned.figures() for name, tuned in others}
    folder = first.folder / "model"
    references = [{"model": name, "results": values} for name, values in figures.items()]
    results = {"top1": first.top1} if first.no_folder else first.export(folder, references, first.folder)
    if not process_state().is_main_process:
        return
    print(f"\n{printable(f'top-1 on {test.source}, {test.name}'):<40}{'%':>8}")
    for name, values in {own: results, **figures}.items():
        print(f"{name:<40}{values['top1']:8.2f}")
    if first.probe is None:
        picture = first.folder / "picture.png"
        is_held_out = settings.holdout != 0 or parts.watched is not None
        runs = {name: tuned.run for name, tuned in done.items() if tuned.run}
        plot(runs, test, picture, curve="Held out" if is_held_out else "Test")
        print(f"\nPicture: {picture}")
    if terms:
        print(*terms, sep="\n")
    if first.no_folder:
        print(f"There is no model folder: {first.no_folder}.")
    else:
        print(f"Wrong images: {first.folder / 'errors.csv'}, {first.folder / 'pictures'}")
        print(f"Model:   {folder}   (try: etf-zoo predict {folder} IMAGE)")
