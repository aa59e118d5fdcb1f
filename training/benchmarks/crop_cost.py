"""What antialiased crops of resident images cost, beside crops by one bilinear sampling and a training step.

    python training/benchmarks/crop_cost.py --out training/benchmarks/crop_cost_cpu.json

Random images; a random resized crop and flip of a batch by both, and a step of a model (forward, backward, SGD) at the
size they give. Processor time of one thread, so that other work on the machine counts little; medians over rounds in
which the three take turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn import functional as F

import etf_zoo  # noqa: F401  registers the twins
from etf_zoo.trainer.data.augment import Draws, augment, crop_matrix
from etf_zoo.trainer.recipe.config import Augment
from etf_zoo.trainer.run.faster_layers import use_faster_layers

MODELS = ("resnet18_etf", "mobilenetv3_small_100_etf", "convnext_atto_etf")
SIZES = ((64, 64), (64, 32), (128, 96))  # stored, trained at
BATCH = 64


def plain(images: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """The same crops by one bilinear sampling, without antialiasing."""
    theta = crop_matrix(Augment(), Draws(generator, len(images)))[:, :2]
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of a call."""
    began = time.process_time()
    call()
    return time.process_time() - began


def compare(name: str, stored: int, size: int, rounds: int) -> dict[str, Any]:
    """Medians of both crops and of a step, in milliseconds, and what antialiasing adds to crop and step together."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, stored, stored, 3), dtype=torch.uint8, generator=generator)
    images = images.permute(0, 3, 1, 2)  # as a resident split gives them
    labels = torch.randint(0, 200, (BATCH,), generator=generator)
    model: Any = use_faster_layers(timm.create_model(name, num_classes=200)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = augment(images, Augment(), size, generator).div_(255).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    calls = {
        "plain": lambda: plain(images, size, generator),
        "antialiased": lambda: augment(images, Augment(), size, generator),
        "step": step,
    }
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    for i in range(rounds + 1):
        for kind, call in calls.items():
            taken = seconds(call)
            if i:  # the first warms up
                times[kind].append(taken)
    median = {kind: statistics.median(values) for kind, values in times.items()}
    added = (median["antialiased"] - median["plain"]) / (median["plain"] + median["step"])
    shown = {f"{kind}_ms": round(1000 * value, 2) for kind, value in median.items()}
    return {"model": name, "stored": stored, "size": size, **shown, "added_percent_of_step": round(100 * added, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for name in MODELS:
        for stored, size in SIZES:
            results.append(compare(name, stored, size, args.rounds))
            print(json.dumps(results[-1]), flush=True)
    found = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": 1,
        "batch": BATCH,
        "results": results,
    }
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
