"""`--lr auto`: short trainings at several learning rates, judged on held-out training images."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from etf_zoo.errors import DivergedError, EtfZooError

__all__ = ["FACTORS", "pick_rate", "search_rate"]

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the recipe's rate
SHARE = 0.2  # of the epochs that a short training has, at least one and at most five
RATES = "rates.json"


def pick_rate(tried: list[dict[str, float]]) -> float:
    """The rate with the best accuracy, of equal ones with the smallest loss.

    Args:
        tried: `lr`, `top1` in percent and `loss` of each rate.

    Example:
        >>> pick_rate([{"lr": 0.1, "top1": 50.0, "loss": 1.0}, {"lr": 0.2, "top1": 50.0, "loss": 0.9}])
        0.2
    """
    return max(tried, key=lambda one: (one["top1"], -one["loss"]))["lr"]


def search_rate(settings: Any, train: Callable[[Any], Any], say: Callable[[str], None] = print) -> float:
    """Try rates around the recipe's, and write what came of each to `rates.json` and `rates.png` in its folder.

    A search that was finished before is not done again.

    Args:
        settings: A `Finetune` recipe.
        train: Trains a recipe and gives its `Tuned`, whose run watched held-out images; None if time ran out.
        say: Takes a line for people.

    Returns:
        The best rate.

    Raises:
        EtfZooError: If no rate gave a figure.
    """
    folder = Path(settings.output)
    key = {"center": settings.optim.lr, "seed": settings.seed, "model": settings.model, "method": settings.method}
    if settings.resume and (folder / RATES).is_file():
        kept = json.loads((folder / RATES).read_text())
        if kept["search"] == key:
            return pick_rate(kept["tried"])
    tried = []
    for factor in FACTORS:
        rate = settings.optim.lr * factor
        recipe = short(settings, rate)
        shutil.rmtree(recipe.output, ignore_errors=True)  # of a search that was killed
        try:
            tuned = train(recipe)
        except DivergedError:
            tuned = None
        score = tuned.run.best.score if tuned is not None else None
        if score is None or not math.isfinite(score.loss):
            say(f"lr {rate:g}: no figure (it diverged, or the time ran out)")
            continue
        tried.append({"lr": rate, "top1": score.top1, "loss": score.loss})
        say(f"lr {rate:g}: {score.top1:.2f} % on held-out images after {recipe.epochs} epochs")
    shutil.rmtree(folder / "rates", ignore_errors=True)
    if not tried:
        raise EtfZooError("No learning rate gave a figure: give --optim.lr a smaller one to search around.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RATES).write_text(json.dumps({"search": key, "epochs": recipe.epochs, "tried": tried}, indent=1) + "\n")
    _draw(tried, folder / "rates.png")
    best = pick_rate(tried)
    at_end = best in (tried[0]["lr"], tried[-1]["lr"]) and len(tried) > 1
    say(f"Taken: lr {best:g}{', at the end of those tried: others may be better' if at_end else ''}; {folder / RATES}")
    return best


def short(settings: Any, rate: float) -> Any:
    """The recipe of a short training at a rate."""
    optim = dataclasses.replace(settings.optim, lr=rate, min_lr=min(settings.optim.min_lr, rate))
    return dataclasses.replace(
        settings,
        lr="",
        keep="best",
        optim=optim,
        epochs=min(max(1, round(SHARE * settings.epochs)), 5),
        output=str(Path(settings.output) / "rates" / f"{rate:g}"),
        eval_every=1,
        tensorboard=False,
        compare=False,
        resume=False,
    )


def _draw(tried: list[dict[str, float]], picture: Path) -> None:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([one["lr"] for one in tried], [one["top1"] for one in tried], marker="o")
    axes.set(xscale="log", xlabel="learning rate", ylabel="top-1 on held-out images (%)", title="Rate search")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
