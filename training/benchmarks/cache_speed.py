"""What `cache_views` saves: steps of `head`, `layer` and `scl` on images, and on what the frozen layers gave.

`python training/benchmarks/cache_speed.py --output training/benchmarks/cache_speed_cpu.json`. EfficientNet-lite0 with
random weights at 160 pixels, batches of 64, one core; no data set, so without the time to decode and augment images,
which a cached training saves too. Seconds are of the processor.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etf_zoo.trainer.run.faster_layers import use_faster_layers
from etf_zoo.trainer.tune.methods import first_tuned, prepare, tuned_share
from etf_zoo.trainer.tune.trunk import layer_input, replayed

MODEL, SIZE, BATCH, CLASSES = "tf_efficientnet_lite0", 160, 64, 17
METHODS = [("head", ""), ("layer", "conv_head"), ("layer", "blocks.6.0"), ("layer", ""), ("scl", "")]
STEPS = 3


def images_per_second(model: nn.Module, inputs: Tensor) -> float:
    """Of training steps."""
    labels = torch.arange(len(inputs)) % CLASSES
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    for step in range(STEPS + 1):
        if step == 1:  # the first one allocates
            began = time.process_time()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return STEPS * len(inputs) / (time.process_time() - began)  # type: ignore[possibly-undefined] # set by step 1


def measure(method: str, layer: str) -> dict[str, Any]:
    """Speeds of one method."""
    model: Any = timm.create_model(MODEL, num_classes=CLASSES)
    first = first_tuned(model, method, layer)
    use_faster_layers(prepare(model, method, layer).to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    tuned, total = tuned_share(model)
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    began = time.process_time()
    stored = layer_input(model.eval(), first, images)
    storing = BATCH / (time.process_time() - began)
    model.train()
    direct = images_per_second(model, images)
    with replayed(model, first, images[:2]):
        cached = images_per_second(model, stored)
    speeds = {"images": direct, "stored": cached, "storing": storing}
    return {
        "method": method,
        "layer": first,
        "tuned_percent": round(100 * tuned / total, 1),
        "images_per_second": {name: round(speed) for name, speed in speeds.items()},
        "times_faster_steps": round(cached / direct, 1),
        # N images, E epochs, k views: N E / direct over N k / storing + N E / cached
        "times_faster_20_epochs": {
            str(views): round(20 / direct / (views / storing + 20 / cached), 1) for views in (1, 8)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {
        "command": f"python training/benchmarks/cache_speed.py --output {args.output}",
        "what": f"{MODEL}, {SIZE} px, batch {BATCH}, float32, one core; 1 or 8 views stored, 20 epochs trained",
        "torch": torch.__version__,
        "runs": [],
    }
    for method, layer in METHODS:
        found["runs"].append(measure(method, layer))
        print(found["runs"][-1], flush=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
