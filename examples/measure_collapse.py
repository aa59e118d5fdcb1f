"""Measure how far the features of any timm model have collapsed: `python examples/measure_collapse.py --model NAME`."""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import etf_zoo  # noqa: F401  registers the twins
from etf_zoo.evaluation import evaluate, format_table


def batches(images: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """scikit-learn's digits; put your own iterable of (images, labels) here."""
    digits = load_digits()
    x = torch.from_numpy(digits.images[:images]).float().div(16)[:, None].expand(-1, 3, -1, -1)
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return list(zip(x.split(128), torch.from_numpy(digits.target[:images]).split(128), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mobilenetv3_small_100_etf")
    parser.add_argument("--random", action="store_true", help="random weights")
    parser.add_argument("--images", type=int, default=600)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=not args.random, num_classes=10)
    figures = evaluate(model, batches(args.images, 64))
    print(format_table(figures))
    print(f"\nNC1 {figures['nc1_quotient']:.3f}: 0 would be full collapse, every image of a class at one point.")


if __name__ == "__main__":
    main()
