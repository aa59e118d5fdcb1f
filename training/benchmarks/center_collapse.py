"""What center collapse adds to a training step of a segmentation, in processor time of one thread.

`OMP_NUM_THREADS=1 python training/benchmarks/center_collapse.py --output training/benchmarks/center_collapse_cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch

import etf_zoo  # noqa: F401  registers the twins
from etf_zoo.losses import CenterCollapseLoss
from etf_zoo.segmentation import Segmenter
from etf_zoo.trainer.segment.objective import PixelObjective, masks_at
from etf_zoo.trainer.segment.recipe import Segmentation

BACKBONE, BATCH, SIZE, CLASSES = "tf_efficientnet_lite0_etf", 8, (120, 160), 11


def step_seconds(objective: PixelObjective, model: Segmenter, images: torch.Tensor, masks: torch.Tensor) -> float:
    """Processor time of forward and backward pass."""
    began = time.process_time()
    objective(model, images, masks)[1].backward()
    return time.process_time() - began


def loss_seconds(objective: PixelObjective, features: torch.Tensor, masks: torch.Tensor) -> float:
    """The same of the loss alone, from features that want a gradient."""
    features = features.detach().requires_grad_()
    began = time.process_time()
    (0.1 * CenterCollapseLoss()(features, masks_at(features, masks), objective.frame)).backward()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each kind, by turns, after one of each")
    args = parser.parse_args()
    torch.manual_seed(0)
    names = [str(k) for k in range(CLASSES)]
    model = Segmenter(BACKBONE, CLASSES, head="learned").to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, *SIZE).contiguous(memory_format=torch.channels_last)
    masks = torch.randint(CLASSES, (BATCH, *SIZE))
    counts = torch.bincount(masks.flatten(), minlength=CLASSES).tolist()
    objectives = [PixelObjective(Segmentation(class_names=names, center_collapse=w), model, counts) for w in (0.0, 0.1)]
    seconds = np.array([[step_seconds(o, model, images, masks) for o in objectives] for _ in range(args.steps + 1)])
    with torch.no_grad():
        features = model.decode(images)
    alone = np.median([loss_seconds(objectives[1], features, masks) for _ in range(args.steps + 1)][1:])
    plain, more = np.median(seconds[1:], axis=0)
    found = {
        "backbone": BACKBONE,
        "decoder": "fpn",
        "batch": BATCH,
        "size": SIZE,
        "steps": args.steps,
        "seconds_plain": round(float(plain), 4),
        "seconds_with_center_collapse": round(float(more), 4),
        "added_percent": round(100 * float(np.median(seconds[1:, 1] / seconds[1:, 0]) - 1), 2),
        "seconds_of_the_loss_alone": round(float(alone), 4),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(found, indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
