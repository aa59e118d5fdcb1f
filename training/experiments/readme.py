"""Write the README's tables from the files of results: `python training/experiments/readme.py`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from etf_zoo.sharing.card import top1_of_seeds
from etf_zoo.weights.native import WEIGHTS_NAME

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "training" / "results"


def table(folder: Path = ROOT / "model_cards") -> str:
    """Markdown table of every model and control, pairs together."""
    columns = ["model", "head", "weights", "data", "top-1 (%)", "top-5 (%)", "epochs, size", "hours, device"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for path in sorted(folder.glob("*/metrics.json"), key=_order):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        results, training, recipe = metrics["results"], metrics["training"], metrics["training"]["recipe"]
        name, dataset = path.parent.name, metrics["dataset"]
        top1, every = f"{results['top1']:.2f}", top1_of_seeds(path.parent)
        if len(every) > 1:
            top1 += f" (mean of {len(every)} seeds {statistics.mean(every):.2f} ± {statistics.stdev(every):.2f})"
        head = {"frame": "fixed frame", "random": "fixed random frame", "learned": "learned (control)"}[recipe["head"]]
        scale = recipe["model_args"].get("logit_scale")
        if recipe["head"] != "learned" and isinstance(scale, int | float):
            head += f", logit scale {scale:g}"
        kept = (path.parent / WEIGHTS_NAME).is_file()
        weights = ("embedded" if recipe["head"] == "frame" else "in this repository") if kept else "not kept"
        lines.append(
            f"| [`{name}`](model_cards/{name}) | {head} | {weights} | {dataset['name']}, {dataset['split']} "
            f"| {top1} | {results['top5']:.2f} | {recipe['epochs']}, {dataset['size']} px "
            f"| {training['hours']}, {training['device']} |"
        )
    return "\n".join(lines)


def _order(path: Path) -> tuple[str, str, bool]:
    name, _, tag = path.parent.name.partition(".")
    base = name.removesuffix("_control").removesuffix("_random").removesuffix("_etf")
    return base, tag, not name.endswith("_etf")


def rendered(readme: str) -> str:
    """The README with fresh tables."""
    files = {name: RESULTS / f"cifar100_{name}" / "table.md" for name in ("heads", "longtail")}
    files["transfer"] = RESULTS / "transfer" / "summary.md"
    contents = {name: file.read_text(encoding="utf-8").strip() for name, file in files.items()}
    for name, content in {"results": table(), **contents}.items():
        begin, end = f"<!-- {name}: python training/experiments/readme.py -->", f"<!-- end of {name} -->"
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
    return readme


def write_tables() -> None:
    """Write fresh tables into the README."""
    file = ROOT / "README.md"
    file.write_text(rendered(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write_tables()
