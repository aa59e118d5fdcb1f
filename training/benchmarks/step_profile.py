"""Where a training step on a CPU goes: its convolutions, one by one, and how near they run to the fastest of them.

    python training/benchmarks/step_profile.py --out training/benchmarks/step_profile_cpu.json

The library's convolutions are timed apart, forward and both gradients, and summed over the layers of the network;
beside them a whole step of it with timm's AdamW, the library's layers, channels last. `share` is what the convolutions
take of the step: if all else took no time, a step would be 1 / share times as fast. `bound` is how much faster a step
would be if besides each convolution ran like the fastest that was seen. Processor time of one thread, the least of some
repeats.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn import functional as F

from etf_zoo.trainer.run.faster_layers import keep_freed_memory
from training.benchmarks.pretrain_speed import BATCH, machine

CELLS = ("resnet18 224 bf16", "resnet50 160 bf16", "resnet18 224 fp32", "tf_efficientnet_lite0 224 fp32")
LAST = torch.channels_last


def least(repeats: int, function: Callable[[], Any]) -> float:
    """Seconds of processor time."""
    function()
    found = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        found.append(time.thread_time() - start)
    return min(found)


def convolutions(model: torch.nn.Module, images: Tensor) -> Counter[tuple[Any, ...]]:
    """How often each one occurs: shapes of input, weight and output, stride, padding, groups."""
    found: Counter[tuple[Any, ...]] = Counter()
    library = F.conv2d

    def note(x: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
        y = library(x, weight, bias, stride, padding, dilation, groups)
        found[tuple(x.shape), tuple(weight.shape), tuple(y.shape), stride, padding, groups] += 1
        return y

    F.conv2d = note
    try:
        with torch.no_grad():
            model(images)
    finally:
        F.conv2d = library
    return found


def measure(model_name: str, size: int, precision: str, repeats: int) -> dict[str, Any]:
    """A step, and its convolutions."""
    torch.manual_seed(0)
    net: Any = timm.create_model(model_name, num_classes=50)
    model = net.to(memory_format=LAST).train()
    images = torch.randn(BATCH[size], 3, size, size).contiguous(memory_format=LAST)
    labels = torch.zeros(len(images), dtype=torch.long)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.05)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    whole, dtype = least(repeats, step), torch.bfloat16 if precision == "bf16" else torch.float32
    layers = []
    for (given, taps, wanted, stride, padding, groups), count in convolutions(model, images).items():
        x, weight, y = (torch.randn(shape).to(dtype).contiguous(memory_format=LAST) for shape in (given, taps, wanted))

        def gradient(*mask: bool, of=(y, x, weight), steps=(stride, padding), groups=groups) -> Any:
            return torch.ops.aten.convolution_backward(*of, None, *steps, (1, 1), False, (0, 0), groups, (*mask, False))

        passes = {
            "forward": lambda x=x, w=weight, s=stride, p=padding, g=groups: F.conv2d(x, w, None, s, p, 1, g),
            "by_input": lambda gradient=gradient: gradient(True, False),
            "by_weight": lambda gradient=gradient: gradient(False, True),
        }
        if given[1] == 3:  # images have no gradient
            del passes["by_input"]
        work = 2 * wanted[0] * wanted[2] * wanted[3] * weight.numel() / 1e9
        seconds = {name: least(repeats, function) for name, function in passes.items()}
        speeds = {name: round(work / spent, 1) for name, spent in seconds.items()}
        layers.append({"input": given, "weight": taps, "stride": stride, "count": count, "gflop": work})
        layers[-1] |= {"seconds": seconds, "gflop_per_second": speeds}
    spent = sum(layer["count"] * sum(layer["seconds"].values()) for layer in layers)
    work = sum(layer["count"] * layer["gflop"] * len(layer["seconds"]) for layer in layers)
    fastest = max(max(layer["gflop_per_second"].values()) for layer in layers)
    return {
        "model": model_name,
        "size": size,
        "precision": precision,
        "batch": len(images),
        "step_seconds": whole,
        "convolution_seconds": spent,
        "share": spent / whole,
        "gflop_per_second": work / spent,
        "fastest_gflop_per_second": fastest,
        "bound": whole / (work / fastest),
        "layers": layers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), help="model, size, precision")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    report: dict[str, Any] = {
        "command": "python training/benchmarks/step_profile.py " + " ".join(sys.argv[1:]),
        "machine": machine("cpu"),
        "results": [],
    }
    for cell in args.cells:
        name, size, precision = cell.split()
        report["results"].append(found := measure(name, int(size), precision, args.repeats))
        print(cell, {k: round(v, 2) for k, v in found.items() if isinstance(v, float)}, flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
