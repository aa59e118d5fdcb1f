"""Table, CSV and plots of finished transfer cells, see `training/experiments/transfer_table.py`."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy import stats

from etf_zoo.trainer.plots import COLORS, GRID, INK

__all__ = ["over_runs", "paired_difference", "rank_correlations", "rows", "summary", "write_report"]

Record = dict[str, Any]
NC1 = "nc1_pinv"
MARKERS = "osD^vPX*<>"
NOTE = """Top-1 on the test images, mean over n seeds; difference to the control seed by seed, with its 95 % interval
(t) where the differences vary, and the number of pairs where that is not n.

- A seed chooses the training images and is that of the fine-tuning. All seeds share the test images and, where each
  takes a share of the training images, most of these: an interval is about that choice and the fine-tuning's own
  chance, not about another sample of images.
- Each row of pretrained weights is *one* pretraining run, so an interval says nothing of how another one would do.
  Random weights are drawn anew for each seed; their NC1 at the source is seed 0's.
- NC1 is tr(Σ_W pinv(Σ_B))/K (0: collapsed): at the source on its validation images, at the target on the training
  images with the features that classify, frozen or tuned.
- A rank correlation over fewer than 5 weights cannot be significant: the smallest two-sided p is 1/3 over 3 weights,
  0.083 over 4."""


def paired_difference(own: dict[int, float], control: dict[int, float]) -> tuple[float, float, int]:
    """Mean difference over common seeds, half the width of its 95 % t interval, and the number of seeds.

    The half width is nan where there is no interval: for one seed, or differences that are all the same.
    """
    seeds = sorted(own.keys() & control.keys())
    if not seeds:
        return math.nan, math.nan, 0
    differences = np.array([own[s] - control[s] for s in seeds])
    n = len(seeds)
    varied = n > 1 and np.ptp(differences) > 1e-9  # more than rounding
    half = stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n) if varied else math.nan
    return float(differences.mean()), float(half), n


def _compared(own: dict[int, float], control: dict[int, float]) -> Record:
    return dict(zip(("minus_control", "half_interval", "pairs"), paired_difference(own, control), strict=True))


def rows(records: Sequence[Record], controls: Mapping[str, str], order: Sequence[str]) -> list[Record]:
    """One row for each data set, method and weights, which `controls` gives the weights to compare with."""
    source = {r["weights"]: r.get(NC1, math.nan) for r in records if not r["method"]}
    groups: dict[tuple[str, str, str], dict[int, Record]] = {}
    for r in records:
        if r["method"]:
            groups.setdefault((r["data"], r["method"], r["weights"]), {})[r["seed"]] = r
    places = {kind: list(dict.fromkeys(key[i] for key in groups)) for i, kind in enumerate(("data", "method"))}
    found = []
    for data, method, weights in sorted(
        groups, key=lambda k: (places["data"].index(k[0]), places["method"].index(k[1]), list(order).index(k[2]))
    ):
        mine = groups[data, method, weights]
        top1 = {seed: r["top1"] for seed, r in mine.items()}
        row = {
            "data": data,
            "method": method,
            "weights": weights,
            "n": len(top1),
            "top1": float(np.mean(list(top1.values()))),
            "top1_std": float(np.std(list(top1.values()), ddof=1)) if len(top1) > 1 else math.nan,
        }
        row["control"] = controls.get(weights, "")
        other = groups.get((data, method, row["control"]), {})
        row |= _compared(top1, {s: r["top1"] for s, r in other.items()})
        row["tuned_percent"] = float(np.mean([100 * r["tuned"] / r["total"] for r in mine.values()]))
        row["nc1_source"] = source.get(weights, math.nan)
        row["nc1_target"] = float(np.mean([r.get(NC1, math.nan) for r in mine.values()]))
        found.append(row)
    return found


def over_runs(table: Sequence[Record], kinds: Mapping[str, str]) -> list[Record]:
    """One row for each data set, method and kind of weights, over its pretraining runs, `kinds` of whose weights it is.

    A run's own row is a mean over seeds; here the interval of the difference is one over runs.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for r in table:
        if r["weights"] in kinds:
            groups.setdefault((r["data"], r["method"], kinds[r["weights"]]), []).append(r)
    found = []
    for (data, method, kind), mine in groups.items():
        differences = {i: r["minus_control"] for i, r in enumerate(mine) if r["pairs"]}
        row = {"data": data, "method": method, "weights": kind, "n": len(mine)}
        row["top1"] = float(np.mean([r["top1"] for r in mine]))
        found.append(row | _compared(differences, dict.fromkeys(differences, 0)))
    return found


def rank_correlations(table: Sequence[Record]) -> list[Record]:
    """Spearman's rank correlation of NC1 with accuracy over the weights, for each data set and method."""
    found = []
    for data, method in dict.fromkeys((r["data"], r["method"]) for r in table):
        some = [r for r in table if (r["data"], r["method"]) == (data, method)]
        entry: Record = {"data": data, "method": method}
        for side in ("source", "target"):
            pairs = [(r[f"nc1_{side}"], r["top1"]) for r in some if math.isfinite(r[f"nc1_{side}"])]
            varied = len(pairs) > 2 and all(len(set(column)) > 1 for column in zip(*pairs, strict=True))
            entry[side] = _spearman(pairs) if varied else math.nan
            entry[f"n_{side}"] = len(pairs)
        found.append(entry)
    return found


def _spearman(pairs: list[tuple[float, float]]) -> float:
    found: Any = stats.spearmanr([x for x, _ in pairs], [y for _, y in pairs])
    return float(found.statistic)


def write_report(
    records: Sequence[Record],
    folder: Path,
    *,
    controls: Mapping[str, str],
    kinds: Mapping[str, str],
    order: Sequence[str],
    left: int = 0,
) -> None:
    """Write `table.md`, `summary.md` for the README, `table.csv`, `accuracy.png` and `nc1.png`.

    Args:
        records: Finished cells.
        folder: Where to.
        controls: Name of weights -> name of those that they are compared with.
        kinds: Name of weights -> what other pretraining runs of the same recipe share with them.
        order: Names of the weights in the order to show.
        left: Cells that have not been run.
    """
    table = rows(records, controls, order)
    if not table:
        return
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in table)
    lines = ["# Transfer", "", NOTE, ""]
    if left:
        lines += [f"{left} cells of the recipe were not run.", ""]
    if controls:
        pairs = "; ".join(f"of {weights}: {control}" for weights, control in controls.items())
        lines += [f"Controls: {pairs}.", ""]
    head = ["data", "method", "weights", "n", "top-1 (%)", "minus control", "tuned (%)", "NC1 source", "NC1 target"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in table:
        cells = [*_cells(r), _short(r["tuned_percent"]), _short(r["nc1_source"]), _short(r["nc1_target"])]
        lines.append(f"| {' | '.join(cells)} |")
    if kinds:
        lines += ["", "Over pretraining runs, each a mean over its seeds; an interval is over the runs.", ""]
        lines += ["| data | method | weights | runs | top-1 (%) | minus control |", "|---" * 6 + "|"]
        lines += [f"| {' | '.join(_cells(r))} |" for r in over_runs(table, kinds)]
    correlations = [r for r in rank_correlations(table) if math.isfinite(r["source"]) or math.isfinite(r["target"])]
    if correlations:
        lines += [
            "",
            "Rank correlation (Spearman) of NC1 with accuracy over weights; negative: more collapse, better.",
            "",
        ]
        lines += ["| data | method | NC1 source | weights | NC1 target | weights |", "|---|---|---|---|---|---|"]
        for r in correlations:
            sides = [f"{_short(r[side])} | {r[f'n_{side}']}" for side in ("source", "target")]
            lines.append(f"| {r['data']} | {r['method']} | {' | '.join(sides)} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "summary.md").write_text("\n".join(summary(table, order)) + "\n", encoding="utf-8")
    plot_accuracy(table, folder / "accuracy.png", order)
    plot_nc1(table, folder / "nc1.png", order)


def summary(table: Sequence[Record], order: Sequence[str]) -> list[str]:
    """Lines of a Markdown table with a column for each weights: accuracy; what it has over the control."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    most = max(r["n"] for r in table)
    for r in table:
        seeds = f" (n = {r['n']})" if r["n"] < most else ""
        difference = f"; {_difference(r)}" if r["pairs"] else ""
        cells.setdefault((r["data"], r["method"]), {})[r["weights"]] = f"{r['top1']:.2f}{seeds}{difference}"
    lines = [f"| data | method | {' | '.join(order)} |", "|---" * (2 + len(order)) + "|"]
    return lines + [f"| {d} | {m} | {' | '.join(c.get(w, '') for w in order)} |" for (d, m), c in cells.items()]


def _cells(row: Record) -> list[str]:
    """What the table of weights and that of their kinds both show of a row."""
    return [row["data"], row["method"], row["weights"], str(row["n"]), f"{row['top1']:.2f}", _difference(row)]


def _difference(row: Record) -> str:
    """Of a row to its control, with the number of pairs where that is not the row's n; empty without a control."""
    if not row["pairs"]:
        return ""
    interval = f" ± {row['half_interval']:.2f}" if math.isfinite(row["half_interval"]) else ""
    pairs = f" (n = {row['pairs']})" if row["pairs"] != row["n"] else ""
    return f"{row['minus_control']:+.2f}{interval}{pairs}"


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ""


def _panels(count: int, columns: int, height: float, shared: bool = False):
    figure = Figure(figsize=(4.4 * columns + 1, height * -(-count // columns)), layout="constrained")
    axes = figure.subplots(-(-count // columns), columns, squeeze=False, sharex=shared, sharey=shared).ravel()
    for ax in axes[count:]:
        ax.set_visible(False)
    for ax in axes[:count]:
        ax.grid(axis="y", color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[max(0, count - columns) : count]:  # the lowest of each column, also above a hidden one
        ax.tick_params(labelbottom=True)
    return figure, axes


def _color(weights: str, order: Sequence[str]) -> str:
    return COLORS[list(order).index(weights) % len(COLORS)]


def plot_accuracy(table: Sequence[Record], path: Path, order: Sequence[str]) -> None:
    """Accuracy by data set, a panel for each method; bars are one standard deviation over seeds."""
    methods, data = (list(dict.fromkeys(r[key] for r in table)) for key in ("method", "data"))
    figure, axes = _panels(len(methods), min(3, len(methods)), 3.0, shared=True)
    for ax, method in zip(axes, methods, strict=False):
        for i, weights in enumerate(order):
            mine = [r for r in table if (r["method"], r["weights"]) == (method, weights)]
            at = [data.index(r["data"]) + 0.12 * (i - (len(order) - 1) / 2) for r in mine]
            errors = [0 if math.isnan(r["top1_std"]) else r["top1_std"] for r in mine]
            ax.errorbar(
                at, [r["top1"] for r in mine], errors, fmt="o", color=_color(weights, order), label=weights, capsize=2
            )
        ax.set_xticks(range(len(data)), data)
        ax.set_title(method, loc="left", fontsize=10, color=INK)
        ax.set_ylabel("top-1 (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(order), frameon=False)
    figure.savefig(path, dpi=130)


def plot_nc1(table: Sequence[Record], path: Path, order: Sequence[str]) -> None:
    """NC1 against accuracy, for each method a panel at the source, where known, and one at the target beside it.

    Color: weights; marker: data set.
    """
    methods, data = (list(dict.fromkeys(r[key] for r in table)) for key in ("method", "data"))
    sides = [side for side in ("source", "target") if any(math.isfinite(r[f"nc1_{side}"]) for r in table)]
    panels = [(method, side) for method in methods for side in sides]
    if not panels:
        return
    figure, axes = _panels(len(panels), min(len(panels), 4 if len(sides) == 2 else 3), 3.2)
    spans = {side: [r[f"nc1_{side}"] for r in table if math.isfinite(r[f"nc1_{side}"])] for side in sides}
    for ax, (method, side) in zip(axes, panels, strict=False):
        for r in table:
            if r["method"] == method and math.isfinite(r[f"nc1_{side}"]):
                marker = MARKERS[data.index(r["data"]) % len(MARKERS)]
                label = f"{r['weights']}, {r['data']}"
                ax.plot(r[f"nc1_{side}"], r["top1"], marker, color=_color(r["weights"], order), label=label)
        ax.set_xscale("log")
        ax.set_xlim(min(spans[side]) / 1.3, max(spans[side]) * 1.3)  # narrow spans of one's own get crowded ticks
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_title(method, loc="left", fontsize=10, color=INK)
        ax.set(xlabel=f"NC1 at the {side}", ylabel="top-1 (%)")
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
