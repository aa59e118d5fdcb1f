"""Features of models on images that they know and on others, for `later_ood.py` and `later_retrieval.py`.

    python training/experiments/later_features.py --output FOLDER

Images are prepared as each model's config says. Of each split a fixed random choice is taken, the same for all models.
One file a model and split, `FOLDER/MODEL/SET-SPLIT.safetensors`: the backbone's features, the head's logits, labels;
files that are there are not computed again. Data are found through $ETF_ZOO_DATA. The first model's weights are in the
repository's history: `git checkout 8fb60d7 -- model_cards/resnet18_etf.e23s30_tiny`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor

import etf_zoo  # noqa: F401  registers the twins
from etf_zoo.models.find import load_model
from etf_zoo.trainer.data.sources import open_rows
from etf_zoo.trainer.recipe.config import Data

MODELS = (
    "resnet18_etf.e23s30_tiny",
    "resnet18_control.e23_tiny",
    "mobilenetv3_small_100_etf.e27_tiny",
    "convnext_atto_etf.e27_tiny",
    "vit_d256_patch8_gap_64_etf.e60_tiny",
    "resnet50_etf.e60_tiny",
)
FAMILIAR = ("tiny_imagenet", "train"), ("tiny_imagenet", "validation")
UNFAMILIAR = ("cifar100", "test"), ("cub50", "test"), ("flowers17", "test"), ("grocery", "test")
GALLERIES = ("cub50", "train"), ("flowers17", "train"), ("grocery", "train")
LABELS = {"cifar100": "fine_label"}
LIMIT = {"tiny_imagenet": 2000}
MOST = 1000  # images of every other split


def chosen_rows(source: str, split: str) -> Any:
    """A fixed random choice of a split's images."""
    rows = open_rows(Data(source=source, label_column=LABELS.get(source, "label")), split, resident=True)
    limit = LIMIT.get(source, MOST)
    if len(rows) <= limit:
        return rows
    order = np.random.default_rng(0).permutation(len(rows))[:limit]
    return rows.subset(np.sort(order))


@torch.inference_mode()
def features_of(model: Any, rows: Any, batch_size: int = 64) -> dict[str, Tensor]:
    """Features `(N, d)`, logits `(N, K)` and labels `(N,)`."""
    transform: Any = create_transform(**resolve_data_config(model=model), is_training=False)
    features, logits = [], []
    for first in range(0, len(rows), batch_size):
        pictures = [rows.picture(i) for i in range(first, min(first + batch_size, len(rows)))]
        images = torch.stack([transform(Image.fromarray(np.asarray(picture))) for picture in pictures])
        hidden = model.forward_head(model.forward_features(images), pre_logits=True)
        features.append(hidden.flatten(1))
        logits.append(model.get_classifier()(hidden))
    return {"features": torch.cat(features), "logits": torch.cat(logits), "labels": torch.from_numpy(rows.labels)}


def read(folder: Path, model: str, source: str, split: str) -> dict[str, Tensor]:
    """What `main` has written of a model on a split."""
    return load_file(folder / model / f"{source}-{split}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    args = parser.parse_args()
    for name in args.models:
        model = load_model(name)
        (args.output / name).mkdir(parents=True, exist_ok=True)
        for source, split in (*FAMILIAR, *UNFAMILIAR, *GALLERIES):
            file = args.output / name / f"{source}-{split}.safetensors"
            if file.is_file():
                continue
            started = time.time()
            save_file(features_of(model, chosen_rows(source, split)), file)
            print(f"{name} {source} {split}: {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
