"""Does a model tell images of classes it does not know? Scores of `etf_zoo.ood`, by AUROC and FPR at 95 %.

    python training/experiments/later_features.py --output FOLDER
    python training/experiments/later_ood.py --features FOLDER

Familiar are validation images of Tiny ImageNet; what is fitted is fitted to its training images. Unfamiliar: CIFAR-100
(near: small pictures of things, and some classes are the same), and far birds, flowers and groceries. A learned
classifier's rows, made unit, stand for prototypes. One trained model each; intervals are over images alone.

With `--sessions FOLDER`, of backbones that `training/incremental.py base` trained: test images of their 60 classes of
CIFAR-100 against those of the other 40, three trainings of each loss.

`pytorch-ood` finds the same figures (`tests/ecosystem/test_ood.py`). Writes `training/results/later/ood*.json` and
`ood*.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from etf_zoo import FrameClassifier, frame_heads, ood
from etf_zoo.frames.numerics import unit
from etf_zoo.metrics import NeuralCollapse
from etf_zoo.models.find import load_model
from training.experiments.fscil import interval
from training.experiments.fscil_features import LOSSES, PROTOCOLS
from training.experiments.later_features import FAMILIAR, MODELS, UNFAMILIAR, read

RESULTS = Path("training/results/later")
GROUPS = {"near": ["cifar100"], "far": ["cub50", "flowers17", "grocery"]}
DRAWS = 1000  # of the bootstrap
SCORES = (
    "largest logit",
    "largest cosine",
    "feature length",
    "energy",
    "share in span",
    "nearest class mean",
    "10th neighbor",
)


def scores(name: str, data: Mapping[str, Tensor], prototypes: Tensor, means: Tensor, gallery: Tensor) -> Tensor:
    """One of `SCORES` for each image.

    Args:
        name: The score.
        data: `features`, `logits`, and `embeddings` where those are not the features.
        prototypes: Of the classifier.
        means: Class means of the features.
        gallery: Training features.
    """
    features, embeddings = data["features"], data.get("embeddings", data["features"])
    found = {
        "largest logit": lambda: ood.familiarity(data["logits"]),
        "largest cosine": lambda: ood.largest_cosine(embeddings, prototypes),
        "feature length": lambda: ood.feature_length(features),
        "energy": lambda: ood.energy(data["logits"]),
        "share in span": lambda: ood.span_share(embeddings, prototypes),
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


def half_width(known: Tensor, unknown: list[Tensor], seed: int = 0) -> float:
    """Of the 95 % interval of the mean AUROC over sets, in points, by drawing images of each set anew.

    A draw weighs images by how often it has them: the AUROC is then a weighted mean over pairs.
    """
    rng = np.random.default_rng(seed)

    def weights(count: int) -> Tensor:
        return torch.from_numpy(rng.multinomial(count, np.full(count, 1 / count), size=DRAWS)).float() / count

    of_known, total = weights(len(known)), torch.zeros(DRAWS)
    for other in unknown:
        wins = (known[:, None] > other).float() + 0.5 * (known[:, None] == other)
        total += ((of_known @ wins) * weights(len(other))).sum(1)
    low, high = (total / len(unknown)).quantile(torch.tensor([0.025, 0.975])).tolist()
    return round(50 * (high - low), 2)


def nc1(features: Tensor, labels: Tensor, num_classes: int) -> float:
    """Within-class over between-class variance of some training features: 0 is full collapse."""
    collapse = NeuralCollapse(num_classes, features.shape[1], diagonal=True)
    collapse.update(features, labels)
    return round(collapse.compute()["nc1_quotient"], 4)


def measure(folder: Path, name: str) -> dict[str, Any]:
    """Figures of a model: score -> set -> AUROC and FPR."""
    model = load_model(name)
    heads = list(frame_heads(model).values())
    prototypes = heads[0].weight if heads else unit(model.get_classifier().weight.detach())
    train, known = (read(folder, name, *part) for part in FAMILIAR)
    means = ood.fit_means(train["features"], train["labels"], model.num_classes)
    found: dict[str, Any] = {
        "top1": round(100 * (known["logits"].argmax(1) == known["labels"]).float().mean().item(), 2),
        "nc1": nc1(train["features"], train["labels"], model.num_classes),
        "images": {"fitted": len(train["labels"]), "familiar": len(known["labels"])},
    }
    others = {source: read(folder, name, source, split) for source, split in UNFAMILIAR}
    found["images"] |= {source: len(data["labels"]) for source, data in others.items()}
    for score in SCORES:
        own = scores(score, known, prototypes, means, train["features"])
        theirs = {s: scores(score, data, prototypes, means, train["features"]) for s, data in others.items()}
        found[score] = {source: compared(own, values) for source, values in theirs.items()}
        found[score]["half_width"] = {
            group: half_width(own, [theirs[source] for source in sources]) for group, sources in GROUPS.items()
        }
    return found


def table(found: dict[str, Any]) -> str:
    """AUROC and FPR by model and score, of the near set and over the far ones; then collapse and AUROC over models."""
    lines = []
    for group, sources in GROUPS.items():
        lines += [f"| {group}: {', '.join(sources)} (top-1, NC1) | " + " | ".join(SCORES) + " |"]
        lines += ["|---" * (1 + len(SCORES)) + "|"]
        for name, figures in found.items():
            cells = [
                f"{mean_of(figures, score, sources):.1f} ± {figures[score]['half_width'][group]:.1f} / "
                f"{mean_of(figures, score, sources, 'fpr95'):.1f}"
                for score in SCORES
            ]
            lines.append(f"| {name} ({figures['top1']:.1f}, {figures['nc1']:.2f}) | " + " | ".join(cells) + " |")
        lines.append("")
    every = [source for sources in GROUPS.values() for source in sources]
    own = {score: [mean_of(figures, score, every) for figures in found.values()] for score in SCORES}
    return "\n".join(lines) + "\n" + correlations([figures["nc1"] for figures in found.values()], own)


def mean_of(figures: dict[str, Any], score: str, sources: Sequence[str], key: str = "auroc") -> float:
    """Mean over some unfamiliar sets."""
    return statistics.mean(figures[score][source][key] for source in sources)


def correlations(collapse: list[float], aurocs: dict[str, list[float]]) -> str:
    """Of -log NC1, which grows with collapse, with the AUROC of each score over models."""
    lines = ["| score | Pearson's r of collapse and AUROC | 95 % interval | models |", "|---|---|---|---|"]
    for score, values in aurocs.items():
        found: Any = stats.pearsonr(-np.log(collapse), values)
        ends = found.confidence_interval()
        lines.append(f"| {score} | {found.statistic:+.2f} | {ends.low:+.2f} to {ends.high:+.2f} | {len(values)} |")
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------- backbones of the sessions


def measure_base(data: dict[str, Tensor]) -> dict[str, Any]:
    """Figures of a backbone on the classes it was trained on against those that come later; NC1; top-1."""
    base = PROTOCOLS["cifar100"].base
    head = FrameClassifier(data["train"].shape[1], base, reserve=100 - base, neck="mlp").eval()
    head.load_state_dict({key.removeprefix("head."): data[key] for key in data if key.startswith("head.")})
    fitted = (data["train_labels"] < base) & ~data["held"].bool()
    train, labels = data["train"][fitted], data["train_labels"][fitted]

    @torch.inference_mode()
    def part(rows: Tensor) -> dict[str, Tensor]:
        features = data["test"][rows]
        return {"features": features, "embeddings": head.embed(features), "logits": head(features)}

    known, unknown = part(data["test_labels"] < base), part(data["test_labels"] >= base)
    right = known["logits"].argmax(1) == data["test_labels"][data["test_labels"] < base]
    found: dict[str, Any] = {"top1": round(100 * right.float().mean().item(), 2), "nc1": nc1(train, labels, base)}
    means, gallery = ood.fit_means(train, labels, base), train[:: max(1, len(train) // 5000)]
    for score in SCORES:
        rows = (scores(score, one, head.seen_weight, means, gallery) for one in (known, unknown))
        found[score] = compared(*rows)
    return found


def base_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """AUROC and FPR by score and loss, means over trainings; then collapse and AUROC over all of them."""
    names = [f"{loss.replace('_', ' ')} ({len(own)} trainings)" for loss, own in found.items()]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for key, label in (("top1", "top-1 on 60 classes (%)"), ("nc1", "NC1")):
        cells = [f"{statistics.mean(one[key] for one in own):.2f}" for own in found.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for score in SCORES:
        cells = [
            " / ".join(interval([one[score][figure] for one in own]) for figure in ("auroc", "fpr95"))
            for own in found.values()
        ]
        lines.append(f"| {score} | " + " | ".join(cells) + " |")
    every = [one for own in found.values() for one in own]
    aurocs = {score: [one[score]["auroc"] for one in every] for score in SCORES}
    return "\n".join(lines) + "\n\n" + correlations([one["nc1"] for one in every], aurocs)


def write(name: str, found: Any, text: str) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--sessions", type=Path)
    args = parser.parse_args()
    if args.features:
        last = f"{UNFAMILIAR[-1][0]}-{UNFAMILIAR[-1][1]}.safetensors"
        found = {name: measure(args.features, name) for name in MODELS if (args.features / name / last).is_file()}
        write("ood", found, table(found))
    if args.sessions:
        files = {loss: sorted(args.sessions.glob(f"cifar100-{loss}-*.safetensors")) for loss in LOSSES}
        by_loss = {loss: [measure_base(load_file(file)) for file in own] for loss, own in files.items()}
        write("ood_sessions", by_loss, base_table(by_loss))


if __name__ == "__main__":
    main()
