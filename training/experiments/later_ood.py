"""Does a model tell images of classes it does not know? Scores of `etf_zoo.ood`, by AUROC and FPR at 95 %.

    python training/experiments/later_features.py --output FOLDER
    python training/experiments/later_ood.py --features FOLDER

Familiar are validation images of Tiny ImageNet; what is fitted is fitted to its training images. Unfamiliar: CIFAR-100
(near: small pictures of things, and some classes are the same), birds, flowers and groceries. A learned classifier's
rows, made unit, stand for prototypes. One trained model each. Writes `training/results/later/ood.json` and `ood.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from etf_zoo import frame_heads, ood
from etf_zoo.frames.numerics import unit
from etf_zoo.models.find import load_model
from training.experiments.later_features import FAMILIAR, MODELS, UNFAMILIAR, read

RESULTS = Path("training/results/later")
SCORES = (
    "largest logit",
    "largest cosine",
    "feature length",
    "energy",
    "share in span",
    "nearest class mean",
    "10th neighbor",
)


def scores(name: str, data: dict[str, Tensor], prototypes: Tensor, means: Tensor, gallery: Tensor) -> Tensor:
    """One of `SCORES` for each image."""
    features = data["features"]
    found = {
        "largest logit": lambda: ood.familiarity(data["logits"]),
        "largest cosine": lambda: ood.largest_cosine(features, prototypes),
        "feature length": lambda: ood.feature_length(features),
        "energy": lambda: ood.energy(data["logits"]),
        "share in span": lambda: ood.span_share(features, prototypes),
        "nearest class mean": lambda: ood.mean_cosine(features, means),
        "10th neighbor": lambda: ood.neighbor_cosine(features, gallery, k=10),
    }
    return found[name]()


def compared(known: Tensor, unknown: Tensor) -> dict[str, float]:
    """AUROC, and the share of unfamiliar images taken for familiar where 95 % of the familiar are, in percent."""
    truth = np.r_[np.ones(len(known)), np.zeros(len(unknown))]
    values = np.r_[known.numpy(), unknown.numpy()]
    false, true, _ = roc_curve(truth, values, drop_intermediate=False)
    return {
        "auroc": round(100 * float(roc_auc_score(truth, values)), 2),
        "fpr95": round(100 * float(false[np.searchsorted(true, 0.95)]), 2),
    }


def measure(folder: Path, name: str) -> dict[str, Any]:
    """Figures of a model: score -> set -> AUROC and FPR."""
    model = load_model(name)
    heads = list(frame_heads(model).values())
    prototypes = heads[0].weight if heads else unit(model.get_classifier().weight.detach())
    train, known = (read(folder, name, *part) for part in FAMILIAR)
    means = ood.fit_means(train["features"], train["labels"], model.num_classes)
    found: dict[str, Any] = {
        "top1": round(100 * (known["logits"].argmax(1) == known["labels"]).float().mean().item(), 2),
        "images": {"fitted": len(train["labels"]), "familiar": len(known["labels"])},
    }
    others = {source: read(folder, name, source, split) for source, split in UNFAMILIAR}
    found["images"] |= {source: len(data["labels"]) for source, data in others.items()}
    for score in SCORES:
        own = scores(score, known, prototypes, means, train["features"])
        found[score] = {
            source: compared(own, scores(score, data, prototypes, means, train["features"]))
            for source, data in others.items()
        }
    return found


def table(found: dict[str, Any]) -> str:
    """AUROC and FPR, the mean over the sets first."""
    sources = [source for source, _ in UNFAMILIAR]
    lines = ["| model | score | mean | " + " | ".join(sources) + " |", "|---" * (3 + len(sources)) + "|"]
    for name, figures in found.items():
        for score in SCORES:
            cells = [figures[score][source] for source in sources]
            mean = " / ".join(f"{statistics.mean(cell[key] for cell in cells):.1f}" for key in ("auroc", "fpr95"))
            shown = " | ".join(f"{cell['auroc']:.1f} / {cell['fpr95']:.1f}" for cell in cells)
            lines.append(f"| {name} ({figures['top1']:.1f}) | {score} | {mean} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path, required=True)
    args = parser.parse_args()
    last = f"{UNFAMILIAR[-1][0]}-{UNFAMILIAR[-1][1]}.safetensors"
    found = {name: measure(args.features, name) for name in MODELS if (args.features / name / last).is_file()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "ood.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "ood.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
