"""`--lr auto`: short trainings at several learning rates, judged on held-out training images."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from etf_zoo.errors import DivergedError, EtfZooError

from ..recipe.config import seconds
from ..run import checkpoint
from ..run.checkpoint import CHECKPOINTS
from ..run.launching import process_state

__all__ = ["FACTORS", "pick_rate", "search_rate"]

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the recipe's rate
SHARE = 0.2  # of the epochs that a short training has, at least one and at most five
RATES = "rates.json"


def pick_rate(tried: list[dict[str, float]]) -> float:
    """The rate with the best accuracy, of equal ones with the smallest loss.

    Args:
        tried: `lr`, `top1` in percent and `loss` of each rate that gave figures.

    Example:
        >>> pick_rate([{"lr": 0.1, "top1": 50.0, "loss": 1.0}, {"lr": 0.2, "top1": 50.0, "loss": 0.9}])
        0.2
    """
    return max(tried, key=lambda one: (one["top1"], -one["loss"]))["lr"]


def search_rate(settings: Any, train: Callable[[Any], Any], say: Callable[[str], None] = print) -> Any:
    """Try rates around the recipe's, and write what came of each to `rates.json` and `rates.png` in its folder.

    With `resume` a rate that was tried before is not tried again, and one that was interrupted goes on.

    Args:
        settings: A `Finetune` recipe; its time budget is for the search and the training together.
        train: Trains a recipe and gives its `Tuned`, whose run watched held-out images; None if time ran out.
        say: Takes a line for people.

    Returns:
        The recipe with the best rate, and what is left of its time; None if time ran out.

    Raises:
        EtfZooError: If no rate gave a figure.
    """
    folder = Path(settings.output)
    until = time.monotonic() + seconds(settings.time_budget)
    key = {"center": settings.optim.lr, "seed": settings.seed, "model": settings.model, "method": settings.method}
    tried = _tried_before(folder / RATES, key) if settings.resume else []
    rates = [settings.optim.lr * factor for factor in FACTORS]
    for rate in rates[len(tried) :]:  # in this order they were tried
        recipe = short(settings, rate, until)
        if not recipe.resume:
            shutil.rmtree(recipe.output, ignore_errors=True)  # of another search
        score = None
        try:
            tuned = train(recipe)
            if tuned is None:
                return None
            score = tuned.run.best.score
        except DivergedError:
            pass
        if score is None or not math.isfinite(score.loss):
            tried.append({"lr": rate, "top1": None, "loss": None})
            say(f"lr {rate:g}: no figure, it diverged")
        else:
            tried.append({"lr": rate, "top1": score.top1, "loss": score.loss})
            say(f"lr {rate:g}: {score.top1:.2f} % on held-out images after {recipe.epochs} epochs")
        if process_state().is_main_process:
            _write({"search": key, "epochs": recipe.epochs, "tried": tried}, folder / RATES)
    figures = [one for one in tried if one["top1"] is not None]
    if not figures:
        raise EtfZooError("No learning rate gave a figure: give --optim.lr a smaller one to search around.")
    best = pick_rate(figures)
    if process_state().is_main_process:
        shutil.rmtree(folder / "rates", ignore_errors=True)
        _draw(figures, folder / "rates.png")
    at_end = best in (figures[0]["lr"], figures[-1]["lr"]) and len(figures) > 1
    say(f"Taken: lr {best:g}{', at the end of those tried: others may be better' if at_end else ''}; {folder / RATES}")
    return dataclasses.replace(
        settings,
        lr="",
        optim=_at(settings, best),
        time_budget=_left(settings, until),
        resume=settings.resume and checkpoint.exists(folder / CHECKPOINTS),
    )


def _tried_before(file: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    kept = json.loads(file.read_text()) if file.is_file() else {}
    return kept["tried"] if kept.get("search") == key else []


def _write(found: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(new, file)  # a kill leaves the one that was there


def _left(settings: Any, until: float) -> str:
    return f"{max(until - time.monotonic(), 0):.1f}s" if settings.time_budget else ""


def _at(settings: Any, rate: float) -> Any:
    return dataclasses.replace(settings.optim, lr=rate, min_lr=min(settings.optim.min_lr, rate))


def short(settings: Any, rate: float, until: float = math.inf) -> Any:
    """The recipe of a short training at a rate, which ends by `until` (by `time.monotonic`)."""
    output = Path(settings.output) / "rates" / f"{rate:g}"
    return dataclasses.replace(
        settings,
        lr="",
        keep="best",
        optim=_at(settings, rate),
        epochs=min(max(1, round(SHARE * settings.epochs)), 5),
        output=str(output),
        eval_every=1,
        tensorboard=False,
        compare=False,
        time_budget=_left(settings, until),
        resume=settings.resume and checkpoint.exists(output / CHECKPOINTS),
    )


def _draw(tried: list[dict[str, float]], picture: Path) -> None:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([one["lr"] for one in tried], [one["top1"] for one in tried], marker="o")
    axes.set(xscale="log", xlabel="learning rate", ylabel="top-1 on held-out images (%)", title="Rate search")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
