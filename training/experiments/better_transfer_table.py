"""Tables of the cells of `better_transfer.py`: every candidate beside the better of the two controls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etf_zoo.errors import EtfZooError
from training.experiments.intervals import Correct, Estimate, paired_difference, unpack
from training.experiments.transfer_report import markdown
from training.experiments.transfer_score import METHODS

__all__ = ["CONTROLS", "best_runs", "mean_score", "table", "write_tables"]

CONTROLS = ("learned", "learned cosine")
Record = dict[str, Any]


def mean_score(record: Record, methods: Sequence[str] = METHODS) -> float:
    """Mean over sets and methods, in percent."""
    return statistics.mean(by[method] for by in record["scores"].values() for method in methods)


def of_budget(records: Sequence[Record], stage: int, budget: str = "") -> list[Record]:
    """Cells of a stage, at its own budget or at another."""
    return [r for r in records if (r["stage"], r.get("budget", "")) == (stage, budget)]


def best_runs(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Name -> runs at the rate that has the best mean score of seed 0, by seed; none that diverged."""
    found, scored = {}, [r for r in records if "scores" in r]
    for name in dict.fromkeys(r["name"] for r in scored):
        own = [r for r in scored if r["name"] == name]
        rate = max((r for r in own if r["seed"] == min(o["seed"] for o in own)), key=mean_score)["lr"]
        found[name] = sorted((r for r in own if r["lr"] == rate), key=lambda r: r["seed"])
    return found


def partners(name: str, runs: Mapping[str, Any]) -> list[str]:
    """Learned heads among the runs that have a frame's additions, behind its MLP or without one."""
    if not name.startswith("frame, "):
        return []
    additions = name.removeprefix("frame")
    pairs = [f"{control}{rest}" for control in CONTROLS for rest in (additions, additions.replace(", MLP", "", 1))]
    return [pair for pair in pairs if pair in runs and pair not in CONTROLS]


def hits(runs: Sequence[Record], method: str, name: str) -> Correct:
    """Which images of a set were right, by run and draw."""
    return {
        (str(run["seed"]), draw): unpack(packed, run["scores"][name]["images"])
        for run in runs
        for draw, packed in enumerate(run["scores"][name]["hits"][method])
    }


def difference(own: Sequence[Record], control: Sequence[Record], method: str) -> tuple[float, list[Estimate]]:
    """What one has over another by a method: the mean over sets, and each set's with its interval.

    Raises:
        EtfZooError: If they were judged by other images.
    """
    for name in own[0]["scores"]:
        judged = {r["scores"][name].get("judged") for r in (*own, *control)} - {None}  # earlier cells do not say
        if len(judged) > 1:
            raise EtfZooError(f"Cells were judged by different images of {name}: measure those of one side again.")
    by_set = [paired_difference(hits(own, method, s), hits(control, method, s)) for s in own[0]["scores"]]
    return statistics.mean(one.mean for one in by_set), by_set


def table(records: Sequence[Record], order: Sequence[str]) -> str:
    """Cells of a budget in Markdown, each candidate less the better control of the same seeds; empty without any."""
    runs = best_runs(records)
    if not runs:
        return ""
    tried: dict[str, dict[float, str]] = {name: {} for name in runs}
    for r in records:
        if r["name"] in runs:
            tried[r["name"]][r["lr"]] = f"{r['lr']:g}" + (" (diverged)" if "diverged" in r else "")
    references = [runs[name] for name in CONTROLS if name in runs]
    columns = ["pretraining", "runs", "rates tried", "rate", "source", *METHODS, "mean", "less the better control"]
    columns.append("less the better learned head with the same additions")
    body = []
    for name in sorted(runs, key=list(order).index):
        own = runs[name]
        source = [r["source_top1"] for r in own if r["source_top1"] is not None]
        row = [name, str(len(own)), ", ".join(tried[name][rate] for rate in sorted(tried[name])), f"{own[0]['lr']:g}"]
        row.append(f"{statistics.mean(source):.1f}" if source else "")
        row += [_with_gap(f"{mean_of(own, [m]):.1f}", _gap(own, references, [m])) for m in METHODS]
        each = [f"{mean_score(run):.2f}" for run in own]
        row.append(f"{mean_of(own, METHODS):.2f}" + (f" ({', '.join(each)})" if len(each) > 1 else ""))
        gap = math.nan if name in CONTROLS else _gap(own, references, METHODS)
        alike = _gap(own, [runs[pair] for pair in partners(name, runs)], METHODS)
        body.append([*row, *("" if math.isnan(value) else f"{value:+.2f}" for value in (gap, alike))])
    return "\n".join(markdown(columns, body)) + "\n"


def mean_of(runs: Sequence[Record], methods: Sequence[str]) -> float:
    """Mean over runs, sets and methods."""
    return statistics.mean(mean_score(run, methods) for run in runs)


def _gap(own: Sequence[Record], references: Sequence[Sequence[Record]], methods: Sequence[str]) -> float:
    """What runs have over the better of others, over the seeds that both have; no number without any."""
    gaps = []
    for reference in references:
        seeds = {r["seed"] for r in own} & {r["seed"] for r in reference}
        if seeds:
            sides = ([r for r in side if r["seed"] in seeds] for side in (own, reference))
            ours, theirs = (mean_of(side, methods) for side in sides)
            gaps.append(ours - theirs)
    return min(gaps, default=math.nan)


def _with_gap(text: str, gap: float) -> str:
    return text if math.isnan(gap) else f"{text} ({gap:+.1f})"


def by_set(records: Sequence[Record], order: Sequence[str]) -> str:
    """Each set's difference to both controls, and to learned heads with the same additions, with its interval."""
    runs, body = best_runs(records), []
    for name in sorted(runs, key=list(order).index):
        for control in (*CONTROLS, *partners(name, runs)):
            if name in CONTROLS or control not in runs:
                continue
            for method in METHODS:
                _, sets = difference(runs[name], runs[control], method)
                shown = [f"{e.mean:+.1f} [{e.low:+.1f}, {e.high:+.1f}]" for e in sets]
                body.append([name, control, method, str(sets[0].runs), *shown])
    names = list(next(iter(runs.values()))[0]["scores"]) if runs else []
    return "\n".join(markdown(["pretraining", "control", "method", "runs", *names], body)) + "\n"


def write_tables(records: Sequence[Record], folder: Path, order: Sequence[str]) -> None:
    """Write `stageN.md` and `stageN_sets.md` of the stages that have cells, and such of each other budget."""
    for stage, budget in sorted({(r["stage"], r.get("budget", "")) for r in records}):
        own, name = of_budget(records, stage, budget), f"stage{stage}"
        name += f"_{budget.replace(', ', '_').replace(' ', '_')}" if budget else ""
        (folder / f"{name}.md").write_text(table(own, order), encoding="utf-8")
        (folder / f"{name}_sets.md").write_text(by_set(own, order), encoding="utf-8")
