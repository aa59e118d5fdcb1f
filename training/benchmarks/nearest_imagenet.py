"""What the nearest simplex costs a classifier of 1,000 classes, beside the exact conversion.

`python training/benchmarks/nearest_imagenet.py --output training/results/nearest/imagenet.json`, with the extra
`imagenet` and Tiny ImageNet in $ETF_ZOO_DATA.

EfficientNet-lite0 classifies Tiny ImageNet's validation images, of 64 pixels and enlarged, among ImageNet's 1,000
classes; the two are mapped by WordNet id. They were training images of ImageNet, so the accuracy is no score of the
model: what counts is how a conversion changes it.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor

from etf_zoo.models.convert import convert_classifier
from etf_zoo.models.find import load_model
from etf_zoo.trainer.data.subsets import Images, few_shot_indices, load_images
from etf_zoo.trainer.recipe.config import Data
from etf_zoo.trainer.tune.probes import backbone_features

SCRIPT = "training/benchmarks/nearest_imagenet.py"
SIZE = 224


def wordnet_numbers(names: list[str]) -> Tensor:
    """ImageNet's class number `(K,)` of names that begin with a WordNet id."""
    info = ImageNetInfo("imagenet-1k")
    number = {str(info.index_to_label_name(i)): i for i in range(info.num_classes())}
    return torch.tensor([number[name.split()[0]] for name in names])


def some_images(per_class: int) -> tuple[Images, Images]:
    """So many validation images of each class to test on, and half as many others."""
    images = load_images(Data(source="tiny_imagenet", size=64, val_split="validation"), "validation")
    at = few_shot_indices(images.labels, per_class, 0, images.label_names)
    others = images.subset(np.setdiff1d(np.arange(len(images)), at))
    return images.subset(at), others.subset(few_shot_indices(others.labels, per_class // 2, 0, images.label_names))


@torch.no_grad()
def figures(logits: Tensor, before: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 among all classes and among those that occur, and agreement with the predictions before, in percent."""
    shares = {
        "top1_of_1000": logits.argmax(1) == classes[labels],
        "top1_of_200": logits[:, classes].argmax(1) == labels,
        "agreement_of_1000": logits.argmax(1) == before.argmax(1),
        "agreement_of_200": logits[:, classes].argmax(1) == before[:, classes].argmax(1),
    }
    return {name: round(100 * share.float().mean().item(), 2) for name, share in shares.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    model = load_model(args.model)
    test, others = some_images(args.per_class)
    features = backbone_features(model, test, size=SIZE, batch_size=50)
    mean = backbone_features(model, others, size=SIZE, batch_size=50).mean(0)
    labels, classes = torch.from_numpy(test.labels), wordnet_numbers(test.label_names)
    before = model.get_classifier()(features)
    results = {"learned": figures(before, before, classes, labels)}
    conversions = {
        "exact": {"mode": "exact"},
        "nearest": {"mode": "nearest"},
        "nearest_centered": {"mode": "nearest", "feature_means": {"classifier": mean}},
    }
    for name, how in conversions.items():
        head = convert_classifier(copy.deepcopy(model), **how).get_classifier()  # type: ignore[operator]
        results[name] = figures(head(features), before, classes, labels)
    found = {
        "what": "A classifier of ImageNet's 1,000 classes, converted; images of Tiny ImageNet's 200, enlarged (%)",
        "command": f"python {SCRIPT} --per-class {args.per_class} --output {args.output}",
        "model": args.model,
        "timm": timm.__version__,
        "images": len(test),
        "centered_by": len(others),
        "pixels": [64, SIZE],
        "results": results,
    }
    Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
    for name, values in results.items():
        print(f"{name:<18}", values)


if __name__ == "__main__":
    main()
