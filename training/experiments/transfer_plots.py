"""Plots of a transfer table, see `training/experiments/transfer_report.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from etf_zoo.trainer.plots import COLORS, GRID, INK

__all__ = ["plot_accuracy", "plot_nc1"]

Record = dict[str, Any]
MARKERS = "osD^vPX*<>"


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
    """Accuracy by data set, a panel for each method; bars are the intervals of the table."""
    methods, data = (list(dict.fromkeys(r[key] for r in table)) for key in ("method", "data"))
    figure, axes = _panels(len(methods), min(3, len(methods)), 3.0, shared=True)
    for ax, method in zip(axes, methods, strict=False):
        for i, weights in enumerate(order):
            mine = [r for r in table if (r["method"], r["weights"]) == (method, weights)]
            at = [data.index(r["data"]) + 0.12 * (i - (len(order) - 1) / 2) for r in mine]
            top1 = np.array([r["top1"] for r in mine])
            errors = np.nan_to_num([top1 - [r["low"] for r in mine], [r["high"] for r in mine] - top1])
            ax.errorbar(at, top1, errors, fmt="o", color=_color(weights, order), label=weights, capsize=2)
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
