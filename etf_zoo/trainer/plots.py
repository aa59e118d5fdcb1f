"""Three pictures: cosines of class means in the order of the tree, the confusion matrix, collapse over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

from etf_zoo.errors import EtfZooError

from .run.log import read_records

__all__ = ["tree_order", "plot_cosines", "plot_confusion", "plot_collapse"]

INK, MUTED, GRID = "#1f2328", "#6b7280", "#e5e7eb"
# told apart by color-blind readers
COLORS = ("#2563a8", "#c2571a", "#3a7d44", "#8a4f9e", "#1f2328", "#c9a227", "#6ec1f0", "#d98cb8")
SHADE = 0.4  # exponent from share to shade: one mistake in a hundred has to be seen
NAMED_CLASSES = 40  # more class names than this would not be readable
# Panels of plot_collapse: title, log scale, (name in metrics.jsonl, label) of its curves.
PANELS: tuple[tuple[str, bool, tuple[tuple[str, str], ...]], ...] = (
    ("Accuracy (%)", False, (("top1", "top-1"),)),
    (
        "NC1: spread within classes",
        True,
        (("nc1_cdnv", "CDNV"), ("nc1_quotient", "quotient of traces"), ("nc1_pinv", "with pinv"), ("vci", "VCI")),
    ),
    (
        "NC2: class means apart from an ETF",
        True,
        (
            ("nc2_equinorm", "norms"),
            ("nc2_equiangularity", "cosines"),
            ("nc2_maximal_angle", "maximal angle"),
            ("nc2_etf_distance", "Gram matrix"),
        ),
    ),
    (
        "NC3: class means apart from the head",
        True,
        (
            ("nc3_self_duality", "self-duality"),
            ("nc3_etf_distance", "product from an ETF"),
            ("nc3_self_duality_after_neck", "self-duality, after neck"),
            ("nc3_etf_distance_after_neck", "product from an ETF, after neck"),
        ),
    ),
    ("NC4: agreement with nearest class mean", False, (("nc4_agreement", "agreement"),)),
    ("Effective rank", False, (("effective_rank", "features"), ("effective_rank_means", "class means"))),
)
RUNS = (("", "-"), ("val_", "-"), ("train_", "--"))  # prefixes in metrics.jsonl


# --------------------------------------------------------------------------------------------------------- ordering


def tree_order(distances: Tensor) -> list[int]:
    """Order of classes in which every subtree stands together, the larger subtrees first.

    Args:
        distances: LCA heights `(K, K)`.

    Returns:
        Numbers of the classes.
    """

    def arrange(classes: list[int]) -> list[int]:
        if len(classes) < 3:
            return classes
        top = distances[classes][:, classes].max()
        parts, left = [], list(classes)
        while left:
            near = [c for c in left if c == left[0] or distances[left[0], c] < top]
            parts.append(near)
            left = [c for c in left if c not in set(near)]
        if len(parts) == len(classes):
            return classes
        return [c for part in sorted(parts, key=len, reverse=True) for c in arrange(part)]

    return arrange(list(range(len(distances))))


def _runs(groups: Sequence[str], order: Sequence[int]) -> list[tuple[int, int, str]]:
    """Start, stop and name of each run of equal groups in the order."""
    runs: list[tuple[int, int, str]] = []
    for position, c in enumerate(order):
        if runs and runs[-1][2] == groups[c]:
            runs[-1] = (runs[-1][0], position + 1, groups[c])
        else:
            runs.append((position, position + 1, groups[c]))
    return runs


def _order(count: int, distances: Tensor | None, groups: Sequence[str] | None) -> list[int]:
    order = list(range(count)) if distances is None else tree_order(distances)
    if groups is not None:  # the tree may hold levels above the groups; a group stays in one piece anyway
        first = {name: i for i, name in reversed(list(enumerate(groups[c] for c in order)))}
        order.sort(key=lambda c: first[groups[c]])
    return order


# --------------------------------------------------------------------------------------------------------- matrices


def _matrix_figure(
    matrix: np.ndarray,
    order: Sequence[int],
    names: Sequence[str] | None,
    groups: Sequence[str] | None,
    *,
    colorbar: dict | None = None,
    **kwargs,
) -> tuple[Figure, Axes]:
    k = len(matrix)
    named = names is not None and k <= NAMED_CLASSES
    figure = Figure(figsize=(9.6, 8.2) if groups is not None or k > 20 else (7.6, 6.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
    axes = figure.add_subplot()
    image = axes.imshow(matrix[np.ix_(order, order)], interpolation="nearest" if k < 400 else "antialiased", **kwargs)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02, **(colorbar or {}))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    if named:
        labels, size = [names[c] for c in order], 9 if k <= 20 else 7  # type: ignore[index]
        axes.set_yticks(range(k), labels, fontsize=size)
        axes.set_xticks(range(k), labels, fontsize=size, rotation=90 if max(map(len, labels)) > 3 else 0)
    if groups is not None:
        runs = _runs(groups, order)
        for start, _, _ in runs[1:]:
            for line in (axes.axhline, axes.axvline):
                line(start - 0.5, color=INK, linewidth=0.4, alpha=0.25)
        if not named:
            # a run of few rows has no room for its name
            shown = [(s, e, name) for s, e, name in runs if (e - s) / k > 0.017]
            axes.set_yticks([(s + e - 1) / 2 for s, e, _ in shown], [name for _, _, name in shown], fontsize=7.5)
    return figure, axes


def _title(axes: Axes, title: str, note: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=24)
    axes.text(0, 1.012, note, transform=axes.transAxes, fontsize=9, color=MUTED)


def plot_cosines(
    class_means: Tensor,
    path: str | Path,
    *,
    distances: Tensor | None = None,
    names: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    title: str = "Cosines of class means",
) -> None:
    """Cosines between the centered class means, classes ordered by the tree.

    Args:
        class_means: `(K, d)`.
        path: Of the PNG.
        distances: LCA heights `(K, K)`, for the order.
        names: Of the classes, shown up to 40.
        groups: Name of each class's group (its coarse class), shown beside the matrix.
        title: Of the picture.
    """
    means = class_means.double().cpu()
    centered = torch.nn.functional.normalize(means - means.mean(0), dim=1)
    cosines = (centered @ centered.T).numpy()
    k = len(cosines)
    others = cosines[~np.eye(k, dtype=bool)]
    limit = max(0.1, float(np.quantile(np.abs(others), 0.995)))  # the diagonal is 1 anyway and would hide the rest
    figure, axes = _matrix_figure(
        cosines,
        _order(k, distances, groups),
        names,
        groups,
        colorbar={"extend": "both"},
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
    )
    note = (
        f"{k} classes, mean {others.mean():+.3f}, standard deviation {others.std():.3f}; an ETF has {-1 / (k - 1):+.4f}"
    )
    _title(axes, title, note)
    figure.savefig(path, dpi=150)


def plot_confusion(
    confusion: Tensor,
    path: str | Path,
    *,
    distances: Tensor | None = None,
    names: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    title: str = "Confusion matrix",
) -> None:
    """Share of each true class (row) that is predicted as each class (column), the rare ones shaded up.

    Args:
        confusion: Samples `(K, K)` by true and predicted class.
        path: Of the PNG.
        distances: LCA heights `(K, K)`, for the order.
        names: Of the classes, shown up to 40.
        groups: Name of each class's group, shown beside the matrix.
        title: Of the picture.
    """
    counts = confusion.double().cpu()
    shares = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    k = len(shares)
    order, ticks = _order(k, distances, groups), [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    bar = {"ticks": ticks, "format": lambda share, _: f"{100 * share:g} %"}
    figure, axes = _matrix_figure(shares, order, names, groups, colorbar=bar, cmap="Blues", norm=PowerNorm(SHADE, 0, 1))
    if k <= 20:
        for i, j in zip(*np.nonzero(shares[np.ix_(order, order)]), strict=True):
            share, count = shares[order[i], order[j]], int(counts[order[i], order[j]])
            axes.text(j, i, str(count), ha="center", va="center", fontsize=8, color="white" if share > 0.25 else INK)
    note = f"{int(counts.sum()):,} samples, {100 * (counts.trace() / counts.sum()).item():.1f} % right"
    if groups is not None:
        same = torch.tensor([[a == b for b in groups] for a in groups])
        wrong = counts.sum() - counts.trace()
        inside = ((counts * same).sum() - counts.trace()) / wrong.clamp_min(1)
        note += f"; {100 * inside.item():.0f} % of the mistakes stay in their group"
    axes.set_xlabel("predicted", fontsize=9, color=MUTED)
    axes.set_ylabel("true", fontsize=9, color=MUTED)
    _title(axes, title, note)
    figure.savefig(path, dpi=150)


# ----------------------------------------------------------------------------------------------------------- curves


def plot_collapse(metrics: str | Path, path: str | Path, *, title: str = "Collapse over epochs") -> None:
    """Accuracy, NC1 to NC4 and effective rank over the epochs of a run.

    Args:
        metrics: `metrics.jsonl` of a run: a record per line with `epoch` and figures of `etf_zoo.evaluation.evaluate`,
            plain or with the prefix `val_` (drawn solid) or `train_` (dashed). Panels without figures are left out.
        path: Of the PNG.
        title: Of the picture.

    Raises:
        EtfZooError: If no record has a figure to draw, or a line is no record.
    """
    records = read_records(Path(metrics))
    names = {name for record in records for name in record}
    panels = []
    for heading, log, curves in PANELS:
        present = [
            (prefix + name, label, style, COLORS[i % len(COLORS)])
            for i, (name, label) in enumerate(curves)
            for prefix, style in RUNS
            if prefix + name in names
        ]
        if present:
            panels.append((heading, log, present))
    if not panels:
        raise EtfZooError(f"{metrics} has no figures of etf_zoo.evaluation.evaluate, only {', '.join(sorted(names))}.")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.2 * rows + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for ax, (heading, log, present) in zip(axes, panels, strict=False):
        _panel(ax, records, heading, log, present)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel("epoch", fontsize=9, color=MUTED)
        ax.tick_params(labelbottom=True)
    both = any(name.startswith("train_") for _, _, present in panels for name, *_ in present)
    note = "\nsolid: held-out data, dashed: training data" if both else ""
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    if note:
        figure.text(0.99, 0.985, note.strip(), ha="right", va="top", fontsize=9, color=MUTED)
    figure.savefig(path, dpi=150)


def _panel(ax: Axes, records: list[dict], heading: str, log: bool, present: list[tuple[str, str, str, str]]) -> None:
    labeled = set()
    for name, label, style, color in present:
        points = [(r["epoch"], r[name]) for r in records if name in r]
        marker = "o" if len(points) < 15 else None
        own_label = None if label in labeled else label
        labeled.add(label)
        ax.plot(
            *zip(*points, strict=True),
            style,
            color=color,
            linewidth=1.8,
            marker=marker,
            markersize=3.5,
            label=own_label,
        )
    if log and any(r.get(name, 0) > 0 for r in records for name, *_ in present):
        ax.set_yscale("log")
        for axis_set, subs in ((ax.yaxis.set_major_locator, (1, 2, 5)), (ax.yaxis.set_minor_locator, ())):
            axis_set(LogLocator(subs=subs, numticks=12))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_title(heading, loc="left", fontsize=10, color=INK)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(GRID)
    ax.tick_params(labelsize=8, colors=MUTED, length=0, which="both")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(labeled) > 1:
        ax.legend(fontsize=8, frameon=False, labelcolor=INK, handlelength=1.4)
