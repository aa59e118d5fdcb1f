"""Fine-tune a model: `accelerate launch training/finetune.py --data FOLDER`, or with `--config RECIPE`.

The folder holds `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, or parquet files; a Hub name works too. The result is a
Hub-ready folder, `<output>/model`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .recipe.config import parse
from .run import checkpoint
from .run.checkpoint import CHECKPOINTS
from .run.export import check_storable
from .run.launching import process_state
from .tune.picture import plot
from .tune.probes import PROBES
from .tune.tuning import Finetune, Tuned, fine_tune, load_data


def plan(settings: Finetune) -> dict[str, Finetune]:
    """What to run, by the name it gets in the table; the first is the one asked for."""
    found = {_name(settings): settings}
    references = {"random_weights": {"pretrained": False}, "learned_head": {"head": "learned"}}
    for folder, change in references.items() if settings.compare else ():
        output = Path(settings.output) / folder
        # a kill may have come before this one began
        resume = settings.resume and checkpoint.exists(output / CHECKPOINTS)
        recipe = dataclasses.replace(settings, **change, output=str(output), resume=resume)  # type: ignore[arg-type]
        found.setdefault(_name(recipe), recipe)  # not if it is what was asked for
    return found


def _name(settings: Finetune) -> str:
    heads = {
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


def main() -> None:
    settings = parse(Finetune)
    if settings.method not in PROBES:
        check_storable(settings)
    train, test = load_data(settings)
    done: dict[str, Tuned] = {}
    for name, recipe in plan(settings).items():
        print(f"{name}:", flush=True)
        tuned = fine_tune(recipe, train, test)
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
    print(f"\n{'top-1 on ' + test.source:<40}{'%':>8}")
    for name, values in {own: results, **figures}.items():
        print(f"{name:<40}{values['top1']:8.2f}")
    if first.probe is None:
        picture = first.folder / "picture.png"
        runs = {name: tuned.run for name, tuned in done.items() if tuned.run}
        plot(runs, test, picture, curve="Held out" if settings.holdout else "Test")
        print(f"\nPicture: {picture}")
    if first.no_folder:
        print(f"There is no model folder: {first.no_folder}.")
    else:
        print(f"Wrong images: {first.folder / 'errors.csv'}, {first.folder / 'pictures'}")
        print(f"Model:   {folder}   (try: etf-zoo predict {folder} IMAGE)")
