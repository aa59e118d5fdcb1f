"""Table, CSV and plots of finished transfer cells, see `training/experiments/transfer_table.py`."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.experiments.intervals import (
    Estimate,
    estimate,
    paired_difference,
    rank_correlation,
    stacked,
    unpack,
)
from training.experiments.transfer_plots import plot_accuracy, plot_nc1

__all__ = ["NOTE", "Names", "head_rows", "over_runs", "rank_correlations", "rows", "summary", "write_report"]

Record = dict[str, Any]
Hits = dict[int, NDArray[np.bool_]]  # seed -> for each test image whether it was right
NC1 = "nc1_pinv"
NATURE = {NC1: "NC1", "mean_energy_share": "mean share", "participation_ratio": "participation"}
TELLS = " \\*"
NOTE = f"""Top-1 (%) on the test images with its 95 % interval, and the difference to the control with its interval.
A difference marked{TELLS} tells from zero: its interval lies on one side. Of twenty that are nothing, one is marked.

- n is pretraining runs x training subsets x test images. An interval holds each of them that is more than one, by the
  hierarchical bootstrap of `training/experiments/intervals.py`. With *one* pretraining run it says nothing of how
  another one would do.
- A difference is paired: the same training subset, the same test image. Its n is given where it is not the row's.
- A seed chooses the training subset and is that of the fine-tuning. Where each subset is a share of the same training
  images, they have most in common: an interval is about that choice, not about other training images. Random weights
  are drawn anew for each seed; their figures at the source are seed 0's.
- NC1 is tr(Σ_W pinv(Σ_B))/K (0: collapsed): at the source on its validation images, at the target on the training
  images with the features that classify, frozen or tuned. The mean share is that of the features' energy in their
  common mean, participation is the participation ratio of their covariance; both at the target.
- A rank correlation over fewer than 5 weights cannot be significant: the smallest two-sided p is 1/3 over 3 weights,
  0.083 over 4."""


@dataclass(frozen=True)
class Names:
    """What a report has to know of the recipe.

    Attributes:
        order: Names of the weights in the order to show.
        controls: Name of weights -> name of those that they are compared with.
        kinds: Name of weights -> what other pretraining runs of the same recipe share with them.
        methods: Name of a method -> the method that it is compared with, on the same weights.
    """

    order: Sequence[str]
    controls: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)


def _groups(records: Sequence[Record]) -> dict[tuple[str, str, str], dict[int, Record]]:
    """(data, method, weights) -> seed -> cell, without those at the source."""
    groups: dict[tuple[str, str, str], dict[int, Record]] = {}
    for r in records:
        if r["method"]:
            groups.setdefault((r["data"], r["method"], r["weights"]), {})[r["seed"]] = r
    return groups


def _hits(cells: Mapping[int, Record]) -> Hits:
    return {seed: unpack(r["correct"], r["test_images"]) for seed, r in cells.items()}


def _by_run(runs: Sequence[Hits]) -> dict[tuple[str, int], NDArray[np.bool_]]:
    return {(str(i), seed): hits for i, cells in enumerate(runs) for seed, hits in cells.items()}


def _figures(own: Sequence[Hits], control: Sequence[Hits]) -> Record:
    """Accuracy, and what it has over a control, of one or several pretraining runs."""
    return {
        **_fields("top1", "", estimate(stacked(_by_run(own)))),
        **_fields("minus_control", "minus_", paired_difference(_by_run(own), _by_run(control))),
    }


def _fields(name: str, prefix: str, found: Estimate) -> Record:
    units = {f"{prefix}{unit}": getattr(found, unit) for unit in ("runs", "subsets", "images", "tells")}
    return {name: found.mean, f"{prefix}low": found.low, f"{prefix}high": found.high, **units}


def rows(records: Sequence[Record], names: Names) -> list[Record]:
    """One row for each data set, method and weights."""
    source = {r["weights"]: r.get(NC1, math.nan) for r in records if not r["method"]}
    groups = _groups(records)
    hits = {key: _hits(cells) for key, cells in groups.items()}
    places = {kind: list(dict.fromkeys(key[i] for key in groups)) for i, kind in enumerate(("data", "method"))}
    found = []
    for data, method, weights in sorted(
        groups, key=lambda k: (places["data"].index(k[0]), places["method"].index(k[1]), list(names.order).index(k[2]))
    ):
        mine = list(groups[data, method, weights].values())
        control = names.controls.get(weights, "")
        row: Record = {"data": data, "method": method, "weights": weights, "control": control}
        row |= _figures([hits[data, method, weights]], [hits.get((data, method, control), {})])
        row["tuned_percent"] = float(np.mean([100 * r["tuned"] / r["total"] for r in mine]))
        row["nc1_source"] = source.get(weights, math.nan)
        row["nc1_target"] = float(np.mean([r.get(NC1, math.nan) for r in mine]))
        row |= {name: float(np.mean([r.get(name, math.nan) for r in mine])) for name in NATURE if name != NC1}
        found.append(row)
    return found


def over_runs(records: Sequence[Record], names: Names) -> list[Record]:
    """One row for each data set, method and kind of weights, over its pretraining runs."""
    groups = _groups(records)
    found = []
    for data, method, kind in dict.fromkeys((d, m, names.kinds[w]) for d, m, w in groups if w in names.kinds):
        mine = [w for w in names.order if names.kinds.get(w) == kind and (data, method, w) in groups]
        own, control = (
            [_hits(groups.get((data, method, weights), {})) for weights in side]
            for side in (mine, [names.controls.get(w, "") for w in mine])
        )
        found.append({"data": data, "method": method, "weights": kind, **_figures(own, control)})
    return found


def head_rows(records: Sequence[Record], names: Names) -> list[Record]:
    """One row for each data set, method with a control among the methods, and weights."""
    groups = _groups(records)
    found = []
    for data, method, weights in groups:
        other = groups.get((data, names.methods.get(method, ""), weights))
        if other:
            figures = _figures([_hits(groups[data, method, weights])], [_hits(other)])
            row = {"data": data, "method": method, "control": names.methods[method], "weights": weights}
            found.append({**row, **figures})
    return found


def rank_correlations(table: Sequence[Record]) -> list[Record]:
    """Spearman's rank correlation of NC1 with accuracy over the weights, for each data set and method."""
    found = []
    for data, method in dict.fromkeys((r["data"], r["method"]) for r in table):
        some = [r for r in table if (r["data"], r["method"]) == (data, method)]
        entry: Record = {"data": data, "method": method}
        for side in ("source", "target"):
            pairs = [(r[f"nc1_{side}"], r["top1"]) for r in some if math.isfinite(r[f"nc1_{side}"])]
            entry[side], entry[f"n_{side}"] = rank_correlation(pairs), len(pairs)
        found.append(entry)
    return found


def write_report(records: Sequence[Record], folder: Path, names: Names, *, left: int = 0) -> None:
    """Write `table.md`, `summary.md` for the docs, `table.csv`, `accuracy.png` and `nc1.png`.

    Args:
        records: Finished cells.
        folder: Where to.
        names: What the recipe says of weights and methods.
        left: Cells that have not been run.
    """
    table = rows(records, names)
    if not table:
        return
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in table)
    (folder / "table.md").write_text(report(records, names, left=left), encoding="utf-8")
    (folder / "summary.md").write_text(f"{summary(records, names)}\n", encoding="utf-8")
    plot_accuracy(table, folder / "accuracy.png", names.order)
    plot_nc1(table, folder / "nc1.png", names.order)


def report(records: Sequence[Record], names: Names, *, left: int = 0) -> str:
    """The text of `table.md`, see `write_report`."""
    table = rows(records, names)
    lines = ["# Transfer", "", NOTE, ""]
    if left:
        lines += [f"{left} cells of the recipe were not run.", ""]
    if names.controls:
        lines += [f"Controls: {'; '.join(f'of {weights}: {c}' for weights, c in names.controls.items())}.", ""]
    nature = {k: title for k, title in NATURE.items() if k != NC1 and any(math.isfinite(r[k]) for r in table)}
    head = ["data", "method", "weights", "n", "top-1 (%)", "minus control", "tuned (%)", "NC1 source", "NC1 target"]
    shown = ["tuned_percent", "nc1_source", "nc1_target", *nature]
    lines += markdown([*head, *nature.values()], [[*_cells(r), *(_short(r[k]) for k in shown)] for r in table])
    if heads := head_rows(records, names):
        lines += ["", "Methods on the same weights, each minus its control:", ""]
        columns = ["data", "method", "weights", "n", "top-1 (%)", "minus control", "control"]
        lines += markdown(columns, [[*_cells(r), r["control"]] for r in heads])
    if kinds := over_runs(records, names):
        lines += ["", "Over the pretraining runs of a recipe:", ""]
        lines += markdown(["data", "method", "weights", "n", "top-1 (%)", "minus control"], [_cells(r) for r in kinds])
    correlations = [r for r in rank_correlations(table) if math.isfinite(r["source"]) or math.isfinite(r["target"])]
    if correlations:
        lines += ["", "Rank correlation (Spearman) of NC1 with accuracy over weights; negative: more collapse, better."]
        entries = [
            [r["data"], r["method"], *(f(r) for side in ("source", "target") for f in _side(side))]
            for r in correlations
        ]
        lines += ["", *markdown(["data", "method", "NC1 source", "weights", "NC1 target", "weights"], entries)]
    return "\n".join(lines) + "\n"


def _side(side: str):
    return lambda r: _short(r[side]), lambda r: str(r[f"n_{side}"])


def summary(records: Sequence[Record], names: Names) -> str:
    """A Markdown table with a column for each weights: accuracy; what it has over the control."""
    table = rows(records, names)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    most = max(r["subsets"] for r in table)
    for r in table:
        subsets = f" ({r['subsets']} of {most} subsets)" if r["subsets"] < most else ""
        difference = f"; {_difference(r)}" if r["minus_images"] else ""
        cells.setdefault((r["data"], r["method"]), {})[r["weights"]] = f"{r['top1']:.2f}{subsets}{difference}"
    body = [[d, m, *(c.get(w, "") for w in names.order)] for (d, m), c in cells.items()]
    return "\n".join(markdown(["data", "method", *names.order], body))


def mean_of_seeds(values: Sequence[float], each: bool = False) -> str:
    """The mean of what is a number, with each seed's figure in brackets where asked for; empty for no values."""
    mean = f"{np.nanmean(values):.2f}" if values else ""
    return f"{mean} ({', '.join(f'{value:.2f}' for value in values)})" if each and len(values) > 1 else mean


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


def _cells(row: Record) -> list[str]:
    """What all tables show of a row."""
    top1 = f"{row['top1']:.2f}{_interval(row['low'], row['high'], '')}"
    return [row["data"], row["method"], row["weights"], _units(row, ""), top1, _difference(row)]


def _units(row: Record, prefix: str) -> str:
    return " x ".join(str(row[f"{prefix}{unit}"]) for unit in ("runs", "subsets", "images"))


def _interval(low: float, high: float, sign: str) -> str:
    return f" [{low:{sign}.1f}, {high:{sign}.1f}]" if math.isfinite(low) else ""


def _difference(row: Record) -> str:
    """Of a row to its control, with its n where that is not the row's; empty without a control."""
    if not row["minus_images"]:
        return ""
    interval = _interval(row["minus_low"], row["minus_high"], "+")
    own, pairs = _units(row, ""), _units(row, "minus_")
    tells = TELLS if row["minus_tells"] else ""
    return f"{row['minus_control']:+.2f}{interval}{tells}{f' (n = {pairs})' if pairs != own else ''}"


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ""
