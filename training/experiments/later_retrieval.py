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

import torch
from torch import Tensor

from etf_zoo.frames.numerics import unit
from etf_zoo.frames.simplex import helmert_coordinates
from training.experiments.later_features import GALLERIES, MODELS, UNFAMILIAR, read

RESULTS = Path("training/results/later")
SOURCES = [source for source, _ in GALLERIES]


def coordinates(logits: Tensor) -> Tensor:
    """Unit embeddings of a model, from its logits `(N, K)`."""
    return unit(helmert_coordinates(logits.T).T).float()


def ranked(queries: Tensor, gallery: Tensor, wanted: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean average precision over the whole ranking, and recall at 1 and 10, in percent.

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
    return {
        "map": round(100 * average.mean().item(), 2),
        "recall1": round(100 * right[:, 0].mean().item(), 2),
        "recall10": round(100 * right[:, :10].amax(1).mean().item(), 2),
    }


def measure(folder: Path, names: list[str]) -> dict[str, Any]:
    """Figures by set, then by gallery's and queries' model; and of the backbones' own features."""
    splits = dict(UNFAMILIAR)
    found: dict[str, Any] = {}
    for source in SOURCES:
        galleries = {name: read(folder, name, source, "train") for name in names}
        queries = {name: read(folder, name, source, splits[source]) for name in names}
        embedded = {
            name: (coordinates(galleries[name]["logits"]), coordinates(queries[name]["logits"])) for name in names
        }
        any_gallery, any_queries = galleries[names[0]]["labels"], queries[names[0]]["labels"]
        found[source] = {
            f"{a} < {b}": ranked(embedded[b][1], embedded[a][0], any_queries, any_gallery)
            for a, b in product(names, names)
        }
        found[source] |= {
            f"{name}, features": ranked(
                unit(queries[name]["features"]), unit(galleries[name]["features"]), any_queries, any_gallery
            )
            for name in names
        }
    return found


def mean(found: dict[str, Any], key: str, figure: str = "map") -> float:
    return statistics.mean(found[source][key][figure] for source in SOURCES)


def table(found: dict[str, Any], names: list[str]) -> str:
    """Mean average precision, mean over the sets: the gallery's model down, the queries' across; then two tests."""
    lines = ["| gallery by, queries by | " + " | ".join(names) + " | own features |", "|---" * (2 + len(names)) + "|"]
    for a in names:
        cells = [f"{mean(found, f'{a} < {b}'):.1f}" for b in names]
        lines.append(f"| {a} | " + " | ".join(cells) + f" | {mean(found, f'{a}, features'):.1f} |")
    lines += ["", "| sets and pairs of frames | compatible | crossing costs less |", "|---|---|---|"]
    frames = [name for name in names if "_control" not in name]
    for source in SOURCES:
        gains = crossings = pairs = 0
        for old, new in product(frames, frames):
            alone = {name: found[source][f"{name} < {name}"]["map"] for name in (old, new)}
            if alone[new] <= alone[old]:
                continue
            crossed = found[source][f"{old} < {new}"]["map"]
            pairs += 1
            gains += crossed > alone[old]
            crossings += alone[new] - crossed < alone[new] - alone[old]
        lines.append(f"| {source}: {pairs} | {gains} | {crossings} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path, required=True)
    args = parser.parse_args()
    source, split = GALLERIES[-1]
    names = [name for name in MODELS if (args.features / name / f"{source}-{split}.safetensors").is_file()]
    found = measure(args.features, names)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "retrieval.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "retrieval.md").write_text(table(found, names))
    print(table(found, names))


if __name__ == "__main__":
    main()
