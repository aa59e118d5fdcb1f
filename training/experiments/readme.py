"""Write the tables of README and docs from the files of results: `python training/experiments/readme.py`.

A table stands wherever a Markdown file has its two marks, `<!-- NAME: python training/experiments/readme.py -->` and
`<!-- end of NAME -->`; the names are those of `TABLES`.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scipy import stats

from etf_zoo.errors import EtfZooError
from etf_zoo.sharing.card import top1_of_seeds
from etf_zoo.weights.native import WEIGHTS_NAME
from training.experiments.transfer_report import markdown

__all__ = ["ROOT", "TABLES", "pages", "rendered", "write_tables"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "training" / "results"
BENCHMARKS = ROOT / "training" / "benchmarks"
COMMAND = "python training/experiments/readme.py"
HEADS = {
    "frame": "fixed frame",
    "random": "fixed random frame",
    "learned": "learned (control)",
    "learned_cosine": "learned cosine (control)",
}


def source(page: Path, folder: Path = ROOT / "model_cards") -> str:
    """Accuracy of every model and control on the data that it was trained on, pairs together.

    Args:
        page: The file that the table is for; links lead from there.
        folder: Of model folders.
    """
    body = []
    for path in sorted(folder.glob("*/metrics.json"), key=_order):
        metrics = _read(path)
        results, training, recipe = metrics["results"], metrics["training"], metrics["training"]["recipe"]
        name, dataset = path.parent.name, metrics["dataset"]
        top1, every = f"{results['top1']:.2f}", top1_of_seeds(path.parent)
        if len(every) > 1:
            top1 += f" (mean of {len(every)} seeds {statistics.mean(every):.2f} ± {statistics.stdev(every):.2f})"
        head, scale = HEADS[recipe["head"]], recipe["model_args"].get("logit_scale")
        if recipe["head"] != "learned" and isinstance(scale, int | float):
            head += f", logit scale {scale:g}"
        kept = (path.parent / WEIGHTS_NAME).is_file()
        weights = ("embedded" if recipe["head"] == "frame" else "in this repository") if kept else "not kept"
        body.append(
            [
                f"[`{name}`]({os.path.relpath(path.parent, page.parent)})",
                head,
                weights,
                f"{dataset['name']}, {dataset['split']}",
                top1,
                f"{results['top5']:.2f}",
                f"{recipe['epochs']}, {dataset['size']} px",
                f"{training['hours']}, {training['device']}",
            ]
        )
    columns = ["model", "head", "weights", "data", "top-1 (%)", "top-5 (%)", "epochs, size", "hours, device"]
    return "\n".join(markdown(columns, body))


def _order(path: Path) -> tuple[str, str, bool]:
    name, _, tag = path.parent.name.partition(".")
    base = name.removesuffix("_control").removesuffix("_random").removesuffix("_etf")
    return base, tag, not name.endswith("_etf")


def pairs(page: Path) -> str:
    """Accuracy and calibration of each frame beside its learned head, both measured at the same size of images."""
    found = []
    for frame in sorted([*(ROOT / "model_cards").glob("*_etf.*"), *(RESULTS / "zoo_gpu").glob("*_etf")]):
        learned = frame.with_name(frame.name.replace("_etf", "_control").replace("e23s30", "e23"))
        recipe = _read(frame / "metrics.json")["training"]["recipe"]
        scale, size = recipe["model_args"].get("logit_scale", "auto"), recipe["sizes"][-1][1]
        found.append((frame, scale, size, *(sorted(side.glob("metrics*.json")) for side in (frame, learned))))
    small = RESULTS / "resnet18_64px"
    found.append((small, "auto", 64, [small / "resnet18_etf.json"], [small / "resnet18_control.json"]))
    body = []
    for folder, scale, size, *files in found:
        frame, learned = ([_read(file) for file in side] for side in files)
        measured = frame[0]["dataset"]["size"]
        sides = [[m["results"] for m in side if m["dataset"]["size"] == measured] for side in (frame, learned)]
        if all(sides):
            row = [f"[{folder.name}]({os.path.relpath(folder, page.parent)})"]
            row += ["default" if scale == "auto" else f"{scale:g}", f"{size}", f"{measured}", f"{len(sides[0])}"]
            row += [f"{statistics.mean(r[what] for r in side):.1f}" for what in ("top1", "ece") for side in sides]
            body.append(row)
    columns = ["model", "frame's scale", "trained at (px)", "measured at", "runs", "top-1: frame", "learned"]
    return "\n".join(markdown([*columns, "calibration error: frame", "learned"], body))


def standing(page: Path) -> str:
    """Where the frame is ahead, level and behind: ResNet-18, three pretraining runs of each head."""
    link = os.path.relpath(ROOT / "docs" / "results", page.parent)
    models = ROOT / "model_cards"
    frame, learned = (statistics.mean(top1_of_seeds(models / f"resnet18_{h}.e60_tiny")) for h in ("etf", "control"))
    rows = [
        [f"accuracy on the data it is trained on ([source]({link}/source.md))", f"{frame - learned:+.1f} (200 classes)"]
    ]
    asked = {
        "linear_probe": "frozen features, linear probe",
        "ncm": "frozen features, nearest mean",
        "full": "tuned in full",
    }
    file = RESULTS / "transfer_e60" / "earlier_cells.jsonl"
    cells = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    verdicts = ["ahead"]
    for method, words in asked.items():
        spans = [_span(cells, method, data) for data in ("flowers17", "cub50", "grocery")]
        rows.append(
            [
                f"{words} ([transfer]({link}/transfer.md))",
                ", ".join(f"{mean:+.1f} ± {half:.1f}" for mean, half in spans),
            ]
        )
        sides = [0 if abs(mean) <= half else math.copysign(1, mean) for mean, half in spans]
        verdicts.append("level" if not any(sides) else "ahead" if min(sides) >= 0 else "behind")
    head = _read(BENCHMARKS / "head_cost_cpu.json")["results"]
    rows.append([f"memory and time of the head in training ([speed]({link}/speed.md))",
                 f"{head[-1]['memory_ratio']:.2f} and {head[-1]['time_ratio']:.2f} times"])  # fmt: skip
    verdicts.append("ahead")
    table = [[what, points, f"**{verdict}**"] for (what, points), verdict in zip(rows, verdicts, strict=True)]
    return "\n".join(markdown(["", "frame minus learned head, top-1 points", "the frame is"], table))


def _span(cells: list[dict[str, Any]], method: str, data: str) -> tuple[float, float]:
    """Difference of frame and learned head over three runs, and half of its 95 % interval (t over runs)."""

    def of_run(run: int) -> float:
        here = [cell for cell in cells if (cell["data"], cell["method"]) == (data, method)]
        frame, learned = ([c["top1"] for c in here if c["weights"] == f"{h}, run {run}"] for h in ("frame", "learned"))
        return statistics.mean(frame) - statistics.mean(learned)

    runs = [of_run(run) for run in range(3)]
    return statistics.mean(runs), float(stats.t.ppf(0.975, 2)) * statistics.stdev(runs) / math.sqrt(3)


def _text(*parts: str) -> Callable[[Path], str]:
    """A table that a script wrote into `training/results`."""
    return lambda page: RESULTS.joinpath(*parts).read_text(encoding="utf-8").strip()


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------- benchmarks


def pretrain_speed(page: Path) -> str:
    """Images a second beside timm's training script, medians of the turns, and the ratios."""
    return _beside(_read(BENCHMARKS / "pretrain_speed_cpu.json"))


def photos_speed(page: Path) -> str:
    """The same of fine-tuning on photographs: in memory, by worker processes, and by timm's training script."""
    return _beside(_read(BENCHMARKS / "photos_speed_cpu.json"))


def _beside(report: dict[str, Any]) -> str:
    names = report["settings"].get("sides", ["ours", "timm", "timm, channels_last"])
    results = sorted(report["results"], key=lambda r: (r["size"], r["precision"] != "fp32"))
    ratios = {name: [r[f"ours / {name}"] for r in results] for name in names[1:]}
    body = []
    for i, r in enumerate(results):
        speeds = [f"{statistics.median(t['images_per_second'] for t in r['turns'][name]):.0f}" for name in names]
        own = [f"{values[i]:.2f}" for values in ratios.values()]
        body.append([f"{r['size']}", r["precision"], r["model"], *speeds, *own])
    for words, of in (("geometric mean", statistics.geometric_mean), ("least", min)):
        blank = [""] * len(names)
        body.append(["", "", words, *blank, *(f"{of(values):.2f}" for values in ratios.values())])
    return "\n".join(markdown(["pixels", "precision", "model", *names, *(f"ours / {n}" for n in names[1:])], body))


def step_profile(page: Path) -> str:
    """What a step's convolutions take, how fast they are, and what would be left to gain."""
    body = [
        [r["model"], f"{r['size']}", r["precision"], f"{100 * r['share']:.0f} %", f"{r['gflop_per_second']:.0f}"]
        + [f"{r['fastest_gflop_per_second']:.0f}", f"{r['bound']:.2f}"]
        for r in _read(BENCHMARKS / "step_profile_cpu.json")["results"]
    ]
    columns = ["model", "pixels", "precision", "convolutions", "GFLOP/s", "of the fastest", "times faster at most"]
    return "\n".join(markdown(columns, body))


def small_maps(page: Path) -> str:
    """Milliseconds of a training step with and without matrix products for small maps."""
    body = [
        [r["model"], f"{r['size']}", f"{r['products']:.0f}", f"{r['library']:.0f}", f"{r['ratio']:.2f}"]
        for r in _read(BENCHMARKS / "small_maps_cpu.json")["rows"]
    ]
    return "\n".join(markdown(["model", "pixels", "images a second", "the library's", "ratio"], body))


def cache_speed(page: Path) -> str:
    """Training on stored inputs of the first tuned layer beside training on images."""
    body = []
    for run in _read(BENCHMARKS / "cache_speed_cpu.json")["runs"]:
        speed, whole = run["images_per_second"], run["times_faster_20_epochs"]
        steps = [str(speed["images"]), str(speed["stored"]), f"{run['times_faster_steps']}"]
        body.append(
            [run["method"], run["layer"], f"{run['tuned_percent']} %", *steps, f"{whole['1']}", f"{whole['8']}"]
        )
    columns = ["method", "first tuned layer", "tuned", "images/s", "stored: images/s", "times faster"]
    return "\n".join(markdown([*columns, "20 epochs, 1 view", "20 epochs, 8 views"], body))


def head_cost(page: Path) -> str:
    """Milliseconds of a training step of the head alone, and what stays in memory, beside `nn.Linear`."""
    body = [
        [
            f"{r['classes']:,}",
            f"{r['dim']}",
            *(f"{r[head]['milliseconds']:.1f}" for head in ("frame", "linear")),
            *(f"{r[ratio]:.2f}" for ratio in ("time_ratio", "memory_ratio")),
        ]
        for r in _read(BENCHMARKS / "head_cost_cpu.json")["results"]
    ]
    return "\n".join(markdown(["classes", "width", "frame", "linear", "time ratio", "memory ratio"], body))


def codes(page: Path) -> str:
    """Largest cosines of spherical codes beside the best known."""
    names = ["spherical_code", "best_known", "quick_code", "random_frame"]
    body = [
        [f"{r['classes']:,}", f"{r['dim']}", *(f"{r[n]:.5f}" if r.get(n) is not None else "" for n in names)]
        for r in _read(BENCHMARKS / "frames_cpu.json")["codes"]
    ]
    return "\n".join(markdown(["classes", "width", "optimized", "best known", "quick", "random"], body))


def collapse_speed(page: Path) -> str:
    """Seconds and memory of the collapse metrics, exact and in float32, beside another package."""
    body = []
    for r in _read(BENCHMARKS / "collapse_speed.json")["results"]:
        seconds = [f"{r[side]['seconds']:.2f}" for side in ("ours", "fast", "package")]
        ratios = [f"{r[s]['times_faster']['seconds']:.2f} ({r[s]['memory_ratio']:.2f})" for s in ("ours", "fast")]
        apart = f"{r['largest_relative_difference']['fast, ours']:.0e}"
        bound = f"{r['times_faster_at_most']:.1f}" if "times_faster_at_most" in r else ""
        body.append([f"{r['num_classes']:,}", f"{r['dim']}", *seconds, *ratios, bound, apart])
    columns = ["classes", "width", "exact (s)", "float32 (s)", "package (s)", "package / exact", "package / float32"]
    return "\n".join(markdown([*columns, "at most", "float32 from exact"], body))


def kerdock_step(page: Path) -> str:
    """A training step over a million classes: time and memory of the head, beside a learned one."""
    names = {"kerdock": "Kerdock frame", "stored": "fixed frame, stored", "linear": "`nn.Linear`, SGD with momentum"}
    heads = _read(BENCHMARKS / "kerdock_step_cpu.json")["results"]["heads"]
    body = [
        [
            label,
            f"{heads[name]['classes']:,}",
            f"{heads[name]['seconds_at_all_classes']:.2f}",
            f"{heads[name]['times_of_first_at_all_classes']:.1f}",
            f"{heads[name]['peak_bytes_at_all_classes'] / 1e6:,.0f}",
        ]
        for name, label in names.items()
    ]
    return "\n".join(markdown(["head", "measured at K", "seconds", "times the first", "memory (MB)"], body))


def kerdock_auto(page: Path) -> str:
    """A frame that is stored beside one that is computed, by the number of classes."""
    body = [
        [f"{r['dim']}", f"{r['classes']:,}", f"{r['stored_over_computed_time']:.1f}", f"{r['stored_megabytes']:.0f}"]
        for r in _read(BENCHMARKS / "kerdock_auto_cpu.json")["results"]
    ]
    return "\n".join(markdown(["width", "classes", "stored / computed, time", "matrix (MB)"], body))


def kerdock_code(page: Path) -> str:
    """Cosines of Kerdock frames beside other arrangements and the bound."""
    names = ["kerdock", "spherical code", "orthoplexes", "random"]
    body = []
    for r in _read(BENCHMARKS / "kerdock_code_cpu.json")["results"]:
        cells = [f"{r[n]['largest_cosine']:.4f} ({r[n]['mean_nearest_cosine']:.4f})" if n in r else "" for n in names]
        body.append([f"{r['dim']}", f"{r['classes']:,}", f"{r['levenshtein_bound']:.4f}", *cells])
    return "\n".join(markdown(["width", "classes", "bound", *names], body))


TABLES: dict[str, Callable[[Path], str]] = {
    "results": source,
    "transfer": _text("transfer", "summary.md"),
    "transfer-rates": _text("transfer_rates", "summary.md"),
    "scratch": _text("flowers17_scratch", "summary.md"),
    "heads": _text("cifar100_heads", "table.md"),
    "rare": _text("cifar100_rare", "table.md"),
    "rare-01": _text("cifar100_rare_01", "table.md"),
    "tree-tiny": _text("tiny_tree", "table.md"),
    "tree-grocery": _text("grocery_tree", "table.md"),
    "camvid": _text("camvid_losses", "table.md"),
    "camvid-embedded": _text("camvid_embedded", "table.md"),
    "tree-cifar100": _text("cifar100_tree", "table.md"),
    "head-start": _text("head_start", "table.md"),
    "pretrain-speed": pretrain_speed,
    "photos-speed": photos_speed,
    "step-profile": step_profile,
    "small-maps": small_maps,
    "cache-speed": cache_speed,
    "head-cost": head_cost,
    "codes": codes,
    "collapse-speed": collapse_speed,
    "kerdock-step": kerdock_step,
    "kerdock-auto": kerdock_auto,
    "kerdock-code": kerdock_code,
    "kerdock-choose": _text("kerdock", "choose.md"),
    "kerdock-instances": _text("kerdock", "instances.md"),
    "kerdock-features": _text("kerdock", "features.md"),
    "kerdock-classes": _text("kerdock", "classes.md"),
    "kerdock-choose-classes": _text("kerdock", "choose_classes.md"),
    "standing": standing,
    "pairs": pairs,
    "better-transfer": _text("better_transfer", "stage1.md"),
    "better-transfer-longer": _text("better_transfer", "stage1_6_epochs_97500_images.md"),
    "better-transfer-weights": _text("better_transfer", "stage2_weights_of_the_zoo.md"),
    "sooner": _text("sooner", "table.md"),
    "photos": _text("photos", "summary.md"),
    "photos-short": _text("photos", "short.md"),
    "photos-heads": _text("photos", "heads.md"),
    "photos-defaults": _text("photos", "defaults.md"),
    "later-sessions": _text("later", "sessions.md"),
    "later-ood": _text("later", "ood.md"),
    "later-ood-sessions": _text("later", "ood_sessions.md"),
    "later-retrieval": _text("later", "retrieval.md"),
}


# --------------------------------------------------------------------------------------------------------------- pages


def pages(root: Path = ROOT) -> list[Path]:
    """Markdown files that have tables."""
    files = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("training/*.md")]
    return [file for file in sorted(files) if COMMAND in file.read_text(encoding="utf-8")]


def rendered(text: str, page: Path) -> str:
    """A page with fresh tables.

    Args:
        text: Of the page.
        page: Its file; links lead from there.

    Raises:
        ValueError: On a mark of no table, or one without an end.
    """

    def fresh(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            raise EtfZooError(f"{page}: there is no table {name!r}, only {', '.join(TABLES)}.")
        return f"{found['begin']}\n{TABLES[name](page)}\n{found['end']}"

    begin, end = rf"(?P<begin><!-- (?P<name>\S+): {re.escape(COMMAND)} -->)", r"(?P<end><!-- end of (?P=name) -->)"
    new, count = re.subn(f"{begin}(?s:.*?){end}", fresh, text)
    if count != len(re.findall(rf"<!-- \S+: {re.escape(COMMAND)} -->", text)):
        raise EtfZooError(f"{page}: a table has no end, a line <!-- end of NAME -->.")
    return new


def write_tables(root: Path = ROOT) -> None:
    """Write fresh tables into all pages that have some."""
    for page in pages(root):
        page.write_text(rendered(page.read_text(encoding="utf-8"), page), encoding="utf-8")


if __name__ == "__main__":
    write_tables()
