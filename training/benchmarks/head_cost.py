"""Time and memory of one training step of FrameClassifier beside nn.Linear, in one run.

    python training/benchmarks/head_cost.py --out training/benchmarks/head_cost_cpu.json

A step is forward, cross-entropy, backward and the optimizer (SGD with momentum, as timm builds it), from features that
want a gradient, as a backbone's do. The two take turns; times are medians. Memory is what stays between steps:
parameters, buffers, gradients and optimizer state; on a GPU also the peak within a step. The frame is one of
independent random directions: which frame it is changes neither figure, and this one is quick to make.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from etf_zoo import FrameClassifier

HEADS: dict[str, Callable[..., nn.Module]] = {
    "frame": lambda dim, classes, device: FrameClassifier(dim, classes, frame="random", device=device),
    "linear": lambda dim, classes, device: nn.Linear(dim, classes, device=device),
}


class Stepper:
    """A head in training, behind features that want a gradient."""

    def __init__(self, kind: str, dim: int, classes: int, device: str):
        self.head = HEADS[kind](dim, classes, device)
        has_parameters = any(True for _ in self.head.parameters())
        self.optimizer = create_optimizer_v2(self.head, opt="sgd", lr=0.1, momentum=0.9) if has_parameters else None
        self.device = torch.device(device)

    def step(self, features: Tensor, labels: Tensor) -> float:
        """Seconds of a step."""
        self._wait()
        began = time.perf_counter()
        F.cross_entropy(self.head(features), labels).backward()
        features.grad = None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)  # what a step leaves is what the next one needs
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def kept_bytes(self) -> int:
        """Bytes of parameters, buffers, gradients and optimizer state."""
        kept = [*self.head.parameters(), *self.head.buffers()]
        kept += [p.grad for p in self.head.parameters() if p.grad is not None]
        if self.optimizer is not None:
            kept += [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def compare(dim: int, classes: int, *, batch: int, repeats: int, device: str) -> dict[str, Any]:
    """Both heads at one size, taking turns."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, dim, generator=generator).to(device).requires_grad_()
    labels = torch.randint(classes, (batch,), generator=generator).to(device)
    steppers = {kind: Stepper(kind, dim, classes, device) for kind in HEADS}
    times: dict[str, list[float]] = {kind: [] for kind in HEADS}
    peaks: dict[str, int] = {}
    for turn in range(repeats + 2):
        for kind, stepper in steppers.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = stepper.step(features, labels)
            if turn >= 2:  # the first steps allocate
                times[kind].append(seconds)
                if device == "cuda":
                    peaks[kind] = torch.cuda.max_memory_allocated()
    found: dict[str, Any] = {"dim": dim, "classes": classes}
    for kind, stepper in steppers.items():
        found[kind] = {"milliseconds": 1000 * statistics.median(times[kind]), "kept_bytes": stepper.kept_bytes()}
        if kind in peaks:  # both heads are in memory: take the other's share off
            others = sum(s.kept_bytes() for k, s in steppers.items() if k != kind)
            found[kind]["peak_bytes"] = peaks[kind] - others
    found["time_ratio"] = statistics.median(a / b for a, b in zip(times["frame"], times["linear"], strict=True))
    found["memory_ratio"] = found["frame"]["kept_bytes"] / found["linear"]["kept_bytes"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for dim in args.dims:
        for classes in args.classes:
            row = compare(dim, classes, batch=args.batch, repeats=args.repeats, device=args.device)
            results.append(row)
            print(
                f"d={dim:<5} K={classes:<7} frame {row['frame']['milliseconds']:9.2f} ms  linear "
                f"{row['linear']['milliseconds']:9.2f} ms  "
                f"time {row['time_ratio']:.3f}  memory {row['memory_ratio']:.3f}",
                flush=True,
            )
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    report = {
        "command": "python training/benchmarks/head_cost.py " + " ".join(sys.argv[1:]),
        "machine": {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__},
        "batch": args.batch,
        "repeats": args.repeats,
        "results": results,
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
