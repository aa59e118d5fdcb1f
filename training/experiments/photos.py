"""Accuracy over the number of images a class: the tables and the picture of `docs/results/photos.md`.

`python training/experiments/photos.py`, after the grids of `training/recipes/photos*.yaml`: it reads their
`cells.jsonl`, writes `short.md`, `summary.md`, `heads.md`, `defaults.md`, `table.md` (with all that was tried) and
`shots.png` into `training/results/photos`, and measures nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from etf_zoo.trainer.plots import COLORS, GRID, INK
from training.experiments.choices import CHOICES, read_choices
from training.experiments.grid import CELLS, Results
from training.experiments.intervals import Estimate, estimate, paired_difference, stacked, unpack
from training.experiments.transfer_report import markdown

RESULTS = Path("training/results")
FOLDERS = (
    "photos",
    "photos_layer",
    "photos_layer_more",
    "photos_layer_few",
    "photos_top",
    "photos_top_more",
    "photos_full",
    "photos_full_more",
    "photos_full_few",
    "photos_plain",
    "photos_defaults",
    "photos_lite2",
)
CHOSEN = (*FOLDERS, "photos_few", "photos_epochs", "photos_decay", "photos_all")  # those with choices
DEFAULT = "finetune twin"  # what is measured as a twin's fine-tuning is when nothing else is said
SHOTS = (1, 5, 10, 0)  # images a class; 0 for all
# What the picture shows, of all rows.
SHOWN = (
    "ncm",
    "linear_probe",
    "head learned",
    "head learned cosine",
    "top learned",
    "layer warm frame, default steps",
    "full learned",
    DEFAULT,
)
NOTE = """Top-1 (%) with its 95 % interval over training subsets and test images, and the number of subsets. A
difference is paired: the same training images, the same test images; \\* tells from zero. Rates were chosen on held-out
training images."""
Record = dict[str, Any]
Key = tuple[str, str, str, int]  # weights, data, method, images a class


def split_shots(method: str) -> tuple[str, int]:
    """A method's name without its number of images a class, and that number.

    Example:
        >>> split_shots("layer warm frame 5-shot")
        ('layer warm frame', 5)
    """
    found = re.fullmatch(r"(.*) (\d+)-shot", method)
    return (found[1], int(found[2])) if found else (method, 0)


def read(folders: Sequence[Path]) -> dict[Key, dict[int, Record]]:
    """Finished cells of several grids: seed -> cell, by weights, data, method and images a class."""
    found: dict[Key, dict[int, Record]] = {}
    for folder in folders:
        for record in Results(folder / CELLS, folder).read().values():
            method, shots = split_shots(record["method"])
            found.setdefault((record["weights"], record["data"], method, shots), {})[record["seed"]] = record
    return found


def hits(cells: dict[int, Record]) -> dict[tuple[str, int], np.ndarray]:
    """(run, seed) -> for each test image whether it was right."""
    return {("one", seed): unpack(r["correct"], r["test_images"]) for seed, r in cells.items()}


def estimates(cells: dict[Key, dict[int, Record]]) -> dict[Key, Estimate]:
    """Accuracy of each, with its interval."""
    return {key: estimate(stacked(hits(some))) for key, some in cells.items()}


def tables(cells: dict[Key, dict[int, Record]]) -> str:
    """A table for each weights and data set: a row for each method, a column for each number of images a class."""
    found, lines = estimates(cells), []
    for weights, data in dict.fromkeys((weights, data) for weights, data, _, _ in found):
        mine = {key[2:]: value for key, value in found.items() if key[:2] == (weights, data)}
        methods = dict.fromkeys(method for method, _ in mine)
        test = next(iter(mine.values())).images
        body = [[method, *(_shown(mine.get((method, shots))) for shots in SHOTS)] for method in methods]
        best = ["best", *(_best(mine, shots) for shots in SHOTS)]
        head = ["", *(f"{shots} a class" if shots else "all" for shots in SHOTS)]
        lines += [f"**{data}**, {weights}, {test} test images:", "", *markdown(head, [*body, best]), ""]
    return "\n".join(lines)


def short(cells: dict[Key, dict[int, Record]]) -> str:
    """Means of the first weights: a row for each method of `SHOWN` that all data sets have, a column for each set."""
    found = estimates(_of_first_weights(cells))
    places = list(dict.fromkeys(key[:2] for key in found))
    body = []
    for method in SHOWN:
        row = [[found.get((*place, method, shots)) for shots in SHOTS] for place in places]
        if all(any(some) for some in row):
            body.append([method, *(" / ".join(f"{one.mean:.1f}" if one else "-" for one in some) for some in row)])
    return "\n".join(markdown(["1 / 5 / 10 / all images a class", *(f"{data}, {w}" for w, data in places)], body))


def _of_first_weights(cells: dict[Key, dict[int, Record]]) -> dict[Key, dict[int, Record]]:
    first = next(iter(cells), ("",))[0]
    return {key: some for key, some in cells.items() if key[0] == first}


def _shown(found: Estimate | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:.1f} [{found.low:.1f}, {found.high:.1f}] ({found.subsets})"


def _best(mine: dict[tuple[str, int], Estimate], shots: int) -> str:
    some = {method: value.mean for (method, number), value in mine.items() if number == shots}
    return max(some, key=lambda method: some[method]) if some else ""


def control_of(method: str) -> str:
    """What a method is compared with: the learned head tuned in the same way.

    A learned head of `layer` and `scl` with that of `full`; that of `full` and of `top` (the last convolution) with the
    frozen backbone's.

    Example:
        >>> control_of("full warm frame"), control_of("full learned"), control_of("ncm")
        ('full learned', 'head learned', '')
    """
    kind, _, head = method.partition(" ")
    if kind not in ("head", "layer", "scl", "top", "full"):
        return ""
    if head == "learned":
        return "full learned" if kind in ("layer", "scl") else "head learned"
    return f"{kind} learned"


def differences(cells: dict[Key, dict[int, Record]]) -> str:
    """Every method minus its control, see `control_of`, on the same images."""
    body = []
    for (weights, data, method, shots), some in cells.items():
        control = cells.get((weights, data, control_of(method), shots))
        if control is None or control is some:
            continue
        found = paired_difference(hits(some), hits(control))
        tells = " \\*" if found.tells else ""
        number = f"{shots} a class" if shots else "all"
        shown = f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]{tells}"
        body.append([data, weights, number, method, control_of(method), shown, f"{found.subsets} x {found.images}"])
    return "\n".join(markdown(["data", "weights", "images", "method", "control", "minus control", "n"], body))


def _by_shots(key: Key) -> tuple[str, int]:
    return key[0], SHOTS.index(key[3])


def beside_defaults(cells: dict[Key, dict[int, Record]]) -> str:
    """`finetune` at its defaults beside the others that were measured on the same training images.

    Which of the others is best is known from the test images alone, so that is more than anybody could choose.
    """
    body = []
    for weights, data, method, shots in sorted((key for key in cells if key[2] == DEFAULT), key=_by_shots):
        own = cells[weights, data, method, shots]
        both = {  # on the draws that both have
            m: [{seed: side[seed] for seed in own.keys() & some.keys()} for side in (own, some)]
            for (w, d, m, s), some in cells.items()
            if (w, d, s) == (weights, data, shots) and m != DEFAULT and own.keys() & some.keys()
        }
        found = {m: paired_difference(hits(ours), hits(theirs)) for m, (ours, theirs) in both.items()}
        number = f"{shots} a class" if shots else "all"
        row = [data, weights, number, method, f"{estimate(stacked(hits(own))).mean:.1f}"]
        for which in (min(found, key=lambda m: found[m].mean, default=""), "linear_probe", "ncm"):
            if which not in found:
                row.append("")
                continue
            gap, mean = found[which], estimate(stacked(hits(both[which][1]))).mean
            tells = " \\*" if gap.tells else ""
            shown = f"{gap.mean:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]{tells} ({gap.subsets})"
            row.append(f"{which}: {mean:.1f}, {shown}")
        body.append([*row, str(len(own))])
    header = [
        "data",
        "weights",
        "images",
        "defaults",
        "top-1 (%)",
        "best other: its figure, difference (draws of both)",
        "",
        "",
        "draws",
    ]
    return "\n".join(markdown(header, body))


def tried(folders: Sequence[Path]) -> str:
    """What each value that was tried gave on held-out training images."""
    body = []
    for folder in folders:
        for (weights, data, method), gave in read_choices(folder).items():
            shown = ", ".join(f"{_value(value)}: {top1:.1f}" for value, top1 in sorted(gave.items()))
            body.append([data, weights, method, shown])
    return "\n".join(markdown(["data", "weights", "method", "what was tried: top-1 (%)"], body))


def _value(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def draw(cells: dict[Key, dict[int, Record]], path: Path) -> None:
    """Accuracy over the number of images a class, of the first weights; bars are intervals."""
    found = {key: value for key, value in estimates(_of_first_weights(cells)).items() if key[2] in SHOWN}
    panels = list(dict.fromkeys(key[:2] for key in found))
    shown = [method for method in SHOWN if any(key[2] == method for key in found)]
    figure = Figure(figsize=(4.2 * len(panels) + 1, 3.6), layout="constrained")
    for ax, (weights, data) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for color, method in zip(COLORS, shown, strict=False):
            at = [i for i, shots in enumerate(SHOTS) if (weights, data, method, shots) in found]
            if not at:
                continue
            mine = [found[weights, data, method, SHOTS[i]] for i in at]
            ends = [[one.mean - one.low for one in mine], [one.high - one.mean for one in mine]]
            place = np.array(at) + 0.06 * (shown.index(method) - (len(shown) - 1) / 2)
            ax.errorbar(
                place, [one.mean for one in mine], ends, marker="o", ms=4, lw=1.2, capsize=2, color=color, label=method
            )
        ax.set_xticks(range(len(SHOTS)), [str(shots or "all") for shots in SHOTS])
        ax.set_title(f"{data}, {weights}", loc="left", fontsize=10, color=INK)
        ax.set(xlabel="images a class", ylabel="top-1 (%)")
        ax.grid(axis="y", color=GRID, linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    labels = {label: h for ax in figure.axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    folders = [RESULTS / name for name in FOLDERS if (RESULTS / name / CELLS).is_file()]
    cells = read(folders)
    chosen = [RESULTS / name for name in CHOSEN if (RESULTS / name / CHOICES).is_file()]
    summary, heads, defaults = tables(cells), differences(cells), beside_defaults(cells)
    text = [
        "# Real photographs",
        NOTE,
        summary,
        "## Differences",
        heads,
        "## Defaults",
        defaults,
        "## Chosen on held-out training images",
        tried(chosen),
    ]
    tables_of = {"summary": summary, "short": short(cells), "heads": heads, "defaults": defaults}
    files = {**tables_of, "table": "\n\n".join(text)}
    for name, content in files.items():
        (folders[0] / f"{name}.md").write_text(f"{content.strip()}\n", encoding="utf-8")
    draw(cells, folders[0] / "shots.png")
    print(f"Table: {folders[0] / 'table.md'}")


if __name__ == "__main__":
    main()
