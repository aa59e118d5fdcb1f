"""Can one model search a gallery that another has indexed? Classes that neither was trained on.

    python training/experiments/later_features.py --output FOLDER
    python training/experiments/later_retrieval.py --features FOLDER

Galleries are training images of birds, flowers and groceries, queries their test images. Embeddings are those of
`etf_zoo.embed`: unit Helmert coordinates of the logits, which for a learned head are its logits, centered and unit, the
fair rival. `features`: the backbone's own, which other models cannot search. Writes
`training/results/later/retrieval.json` and `retrieval.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etf_zoo.frames.numerics import unit
from etf_zoo.frames.simplex import helmert_coordinates
from training.experiments.later_features import GALLERIES, MODELS, UNFAMILIAR, read

RESULTS = Path("training/results/later")
DRAWS = 2000  # of the bootstrap
SOURCES = [source for source, _ in GALLERIES]


def coordinates(logits: Tensor) -> Tensor:
    """Unit embeddings of a model, from its logits `(N, K)`."""
    return unit(helmert_coordinates(logits.T).T).float()


def ranked(queries: Tensor, gallery: Tensor, wanted: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of each query in percent: average precision over the whole ranking, and recall at 1 and 10.

    Args:
        queries: Unit rows `(Q, d)`.
        gallery: Unit rows `(G, d)`.
        wanted: Classes of the queries `(Q,)`; queries without any image of their class in the gallery are left out.
        labels: Classes of the gallery `(G,)`.
    """
    kept = torch.isin(wanted, labels)
    order = (queries[kept] @ gallery.T).argsort(dim=1, descending=True)
    right = (labels[order] == wanted[kept, None]).double()
    precision = right.cumsum(1) / torch.arange(1, right.shape[1] + 1)
    average = (precision * right).sum(1) / right.sum(1)
    found = {"map": average, "recall1": right[:, 0], "recall10": right[:, :10].amax(1)}
    return {figure: 100 * values for figure, values in found.items()}


def measure(folder: Path, names: list[str]) -> dict[str, Any]:
    """Figures of each query by set, then by gallery's and queries' model; and of the backbones' own features."""
    splits = dict(UNFAMILIAR)
    found: dict[str, Any] = {}
    for source in SOURCES:
        galleries = {name: read(folder, name, source, "train") for name in names}
        queries = {name: read(folder, name, source, splits[source]) for name in names}
        embedded = {
            name: (coordinates(galleries[name]["logits"]), coordinates(queries[name]["logits"])) for name in names
        }
        classes = queries[names[0]]["labels"], galleries[names[0]]["labels"]
        found[source] = {
            f"{a} < {b}": ranked(embedded[b][1], embedded[a][0], *classes) for a, b in product(names, names)
        }
        found[source] |= {
            f"{name}, features": ranked(unit(queries[name]["features"]), unit(galleries[name]["features"]), *classes)
            for name in names
        }
    return found


def means(found: dict[str, Any]) -> dict[str, Any]:
    """The same, means over queries."""
    return {
        source: {
            key: {figure: round(values.mean().item(), 2) for figure, values in own.items()}
            for key, own in pairs.items()
        }
        for source, pairs in found.items()
    }


def mean(found: dict[str, Any], key: str, figure: str = "map") -> float:
    return statistics.mean(found[source][key][figure].mean().item() for source in SOURCES)


def difference(found: dict[str, Any], one: str, other: str, seed: int = 0) -> tuple[float, float, float]:
    """Mean average precision of one pair minus another's, mean over the sets, with a 95 % interval over queries."""
    rng, total, draws = np.random.default_rng(seed), 0.0, np.zeros(DRAWS)
    for source in SOURCES:
        values = (found[source][one]["map"] - found[source][other]["map"]).numpy()
        counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=DRAWS)
        total, draws = total + values.mean() / len(SOURCES), draws + counts @ values / len(values) / len(SOURCES)
    return total, *np.quantile(draws, [0.025, 0.975]).tolist()


def table(found: dict[str, Any], names: list[str]) -> str:
    """Figures of each pair, means over the sets: the gallery's model down, the queries' across; then the two tests."""
    shown = ["map", "recall1", "recall10"]
    lines = ["| gallery by, queries by | " + " | ".join(names) + " | own features |", "|---" * (2 + len(names)) + "|"]
    for a in names:
        keys = [*(f"{a} < {b}" for b in names), f"{a}, features"]
        cells = [" / ".join(f"{mean(found, key, figure):.1f}" for figure in shown) for key in keys]
        lines.append(f"| {a} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| old gallery, better new model | old alone | new alone | new on the old gallery | minus old alone |",
    ]
    lines += ["|---" * 5 + "|"]
    pairs = compatible = 0
    for old, new in product(names, names):
        alone, better = mean(found, f"{old} < {old}"), mean(found, f"{new} < {new}")
        if better <= alone:
            continue
        crossed = mean(found, f"{old} < {new}")
        gain, low, high = difference(found, f"{old} < {new}", f"{old} < {old}")
        pairs, compatible = pairs + 1, compatible + (gain > 0)
        cells = [f"{old}, {new}", *(f"{value:.1f}" for value in (alone, better, crossed))]
        lines.append("| " + " | ".join([*cells, f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"]) + " |")
    lines += ["", f"The new model on the old gallery is ahead of the old one alone in {compatible} of {pairs} pairs."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path, required=True)
    args = parser.parse_args()
    source, split = GALLERIES[-1]
    names = [name for name in MODELS if (args.features / name / f"{source}-{split}.safetensors").is_file()]
    found = measure(args.features, names)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "retrieval.json").write_text(json.dumps(means(found), indent=1) + "\n")
    (RESULTS / "retrieval.md").write_text(table(found, names))
    print(table(found, names))


if __name__ == "__main__":
    main()
