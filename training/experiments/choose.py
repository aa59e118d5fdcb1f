"""Try the values that a transfer table leaves to be chosen, on held-out training images.

`python training/experiments/choose.py --config training/recipes/NAME.yaml`, before the table itself.

A method says `choose: {field: optim.lr, values: [0.0005, 0.001, 0.002]}`. Each value is tried for each weights and data
set of the method: every head has its own rate from the same grid. What each gave is a line of `choices.jsonl` beside
the table; `transfer_table.py` takes the best.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from etf_zoo.errors import EtfZooError
from etf_zoo.trainer.recipe.config import parse
from etf_zoo.trainer.run.launching import refuse_processes
from etf_zoo.trainer.run.script import run_script
from training.experiments.choices import CHOICES, Candidate, Choice, TrainingImages, held_out_figures
from training.experiments.grid import Results, run_grid, weights_digest
from training.experiments.transfer_table import OF_METHOD, Table, available, entries_of, settings_of


def candidates(table: Table) -> list[Candidate]:
    """All values to try."""
    found, here = [], available(table)
    for method, entry in table.methods.items():
        if "choose" not in entry:
            continue
        choice = Choice.of(method, entry)
        own = {"method": method, **{k: v for k, v in entry.items() if k not in OF_METHOD}}
        for data in entry.get("data", table.data):
            fields = {k: v for k, v in table.data[data].items() if k != "per_class"}
            for weights in (name for name in entry.get("weights", table.weights) if name in here):
                settings = settings_of(entries_of(table, here[weights], fields, own))
                images = TrainingImages(settings.data)
                settings = dataclasses.replace(settings, data=images.data)
                identity = f"{weights_digest(settings.model, settings.pretrained)}|{images.load().digest}"
                found += [
                    Candidate(weights, data, method, value, choice.with_value(settings, value), identity)
                    for value in choice.values
                ]
    return found


def main() -> None:
    refuse_processes()
    table = parse(Table)
    folder, locks = Path(table.results), Path(table.work) / "locks"
    measure = partial(held_out_figures, table.work)
    failed = run_grid(candidates(table), measure, Results(folder / CHOICES, locks), locks, table.jobs)
    if failed:
        raise EtfZooError(f"{len(failed)} trials failed, see above: {', '.join(failed)}.")


if __name__ == "__main__":
    run_script(main)
