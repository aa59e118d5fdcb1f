"""Training steps on small images with convolutions of small maps as products, beside the library's own, on a CPU.

    python training/benchmarks/small_maps.py --out training/benchmarks/small_maps_cpu.json

One thread, batches of 128, SGD; the two take turns in one run. Figures are images a second of processor time, medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F

from etf_zoo.trainer.run.faster_layers import use_faster_layers

MODELS = ("resnet18", "resnet50", "mobilenetv3_small_100", "convnext_atto")
SIZES = (32, 48, 64)
BATCH = 128


def step_seconds(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Processor time of one training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    began = time.process_time()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - began


def row(name: str, size: int, turns: int) -> dict[str, float | int | str]:
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=200).to(memory_format=torch.channels_last)
    models = {"products": use_faster_layers(copy.deepcopy(plain)), "library": plain}
    images = torch.randn(BATCH, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 200, (BATCH,))
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    for turn in range(turns + 1):
        for kind, model in models.items():
            spent = step_seconds(model, images, labels)
            if turn:  # the first is a warm-up
                seconds[kind].append(spent)
    speed = {kind: BATCH / statistics.median(spent) for kind, spent in seconds.items()}
    return {"model": name, "size": size, **speed, "ratio": speed["products"] / speed["library"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}",
        "rows": [],
    }
    for name in MODELS:
        for size in SIZES:
            found["rows"].append(row(name, size, args.turns))
            print(found["rows"][-1], flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
