"""A training step over a million classes: a Kerdock frame's cross-entropy beside nn.Linear with SGD and momentum.

    python training/benchmarks/kerdock_step.py --out training/benchmarks/kerdock_step_cpu.json
    python training/benchmarks/kerdock_step.py --auto --out training/benchmarks/kerdock_auto_cpu.json

A step is forward, cross-entropy, backward, and for `nn.Linear` the optimizer's, from features that want a gradient. The
peer is run at K / 16 classes, and its time and memory are multiplied by 16: both grow with K, and the whole of it
does not fit many machines. The two take turns; a ratio is of two steps next to each other, and what is reported is the
least time of each and the median ratio. Memory is the growth of the largest resident set over ten steps, each head in a
process of its own, after a small step that loads all code.

A whole network is there too: ten steps of a ResNet-18 on 64 x 64 pixels with an MLP neck, SGD with momentum, and the
largest resident set of its process, Python and torch included; beside it the same with ten classes.

`--auto` compares, at smaller K, the frame that is stored with the one that is computed: where `frame="auto"` changes
over.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from etf_zoo import FrameClassifier, attach_frame
from etf_zoo.layers import classifier
from etf_zoo.losses import FrameCrossEntropy

SHARE = 16  # the peer has so many times fewer classes
MEMORY_STEPS = 10


def kerdock_step(dim: int, classes: int, device: str) -> Callable[[Tensor, Tensor], None]:
    """A step of cross-entropy over a Kerdock frame that is computed."""
    stored, classifier.KERDOCK_MATRIX_CLASSES = classifier.KERDOCK_MATRIX_CLASSES, 1
    loss = FrameCrossEntropy(FrameClassifier(dim, classes, frame="kerdock", device=device))
    classifier.KERDOCK_MATRIX_CLASSES = stored
    return lambda x, y: loss(x, y).backward()


def stored_step(dim: int, classes: int, device: str) -> Callable[[Tensor, Tensor], None]:
    """A step of cross-entropy over a fixed frame that is a matrix, by its logits."""
    head = FrameClassifier(dim, classes, frame="random", device=device)
    return lambda x, y: F.cross_entropy(head(x), y).backward()


def linear_step(dim: int, classes: int, device: str) -> Callable[[Tensor, Tensor], None]:
    """A step of a learned classifier: SGD with momentum, as timm builds it."""
    head = nn.Linear(dim, classes, device=device)
    optimizer = create_optimizer_v2(head, opt="sgd", lr=0.1, momentum=0.9)

    def step(x: Tensor, y: Tensor) -> None:
        F.cross_entropy(head(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS = {"kerdock": kerdock_step, "stored": stored_step, "linear": linear_step}


def batch(dim: int, classes: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Features that want a gradient, and labels."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(size, dim, generator=generator).to(device).requires_grad_()
    return features, torch.randint(classes, (size,), generator=generator).to(device)


def seconds(step: Callable[[Tensor, Tensor], None], features: Tensor, labels: Tensor) -> float:
    """Time of one step."""
    if features.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step(features, labels)
    features.grad = None
    if features.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(sizes: dict[str, int], dim: int, *, size: int, repeats: int, device: str) -> dict[str, Any]:
    """Heads taking turns: name -> number of classes. The first is what the others are compared with."""
    steps = {name: STEPS[name](dim, classes, device) for name, classes in sizes.items()}
    data = {name: batch(dim, classes, size, device) for name, classes in sizes.items()}
    times: dict[str, list[float]] = {name: [] for name in sizes}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            taken = seconds(step, *data[name])
            if turn:  # the first steps allocate
                times[name].append(taken)
    first = next(iter(sizes))
    ratios = {
        name: statistics.median(other / own for own, other in zip(times[first], taken, strict=True))
        for name, taken in times.items()
    }
    return {
        name: {"classes": sizes[name], "seconds": min(taken), "times_of_first": ratios[name]}
        for name, taken in times.items()
    }


def peak_bytes() -> int:
    """The largest resident set so far, of this program alone: `getrusage` counts what its parent had before it too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def peak_growth(name: str, dim: int, classes: int, size: int) -> int:
    """Bytes by which ten steps raise the largest resident set of a process; call it in one of its own."""
    x, y = batch(dim, 64, size, "cpu")
    STEPS[name](dim, 64, "cpu")(x, y)
    x.grad = None
    before = peak_bytes()
    step = STEPS[name](dim, classes, "cpu")
    for _ in range(MEMORY_STEPS):
        step(*batch(dim, classes, size, "cpu"))
    return peak_bytes() - before


def network_peak(dim: int, classes: int, size: int) -> dict[str, Any]:
    """Ten steps of a ResNet-18 on noise, in a process of its own: its largest resident set, and its losses."""
    torch.manual_seed(0)
    model = attach_frame(timm.create_model("resnet18"), classes, frame="kerdock", neck="mlp", neck_features=dim)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9)
    loss = FrameCrossEntropy(model.get_classifier())  # type: ignore[operator]
    images, labels = torch.randn(size, 3, 64, 64), torch.randint(classes, (size,))
    losses = []
    for _ in range(MEMORY_STEPS):
        features = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
        value = loss(features, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return {"classes": classes, "peak_bytes": peak_bytes(), "first_loss": losses[0], "last_loss": losses[-1]}


def in_own_process(name: str, dim: int, classes: int, size: int) -> Any:
    """The same, in a new process."""
    command = [sys.executable, __file__, "--child", name, "--dim", str(dim), "--classes", str(classes)]
    done = subprocess.run(
        [*command, "--batch", str(size), "--threads", str(torch.get_num_threads())],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def million(args: argparse.Namespace) -> dict[str, Any]:
    """The comparison at a million classes."""
    peer = args.classes // SHARE
    sizes = {"kerdock": args.classes, "linear": peer, "stored": peer}
    found: dict[str, Any] = compare(sizes, args.dim, size=args.batch, repeats=args.repeats, device=args.device)
    for name, classes in sizes.items():
        scale = args.classes / classes
        found[name]["seconds_at_all_classes"] = scale * found[name]["seconds"]
        found[name]["times_of_first_at_all_classes"] = scale * found[name]["times_of_first"]
        if args.device == "cpu":
            grown = in_own_process(name, args.dim, classes, args.batch)
            found[name]["peak_bytes"] = grown
            found[name]["peak_bytes_at_all_classes"] = scale * grown
    if args.device == "cpu":
        found["networks"] = [in_own_process("network", args.dim, k, args.batch) for k in (args.classes, 10)]
        found["memory_ratio"] = (
            found["kerdock"]["peak_bytes_at_all_classes"] / found["linear"]["peak_bytes_at_all_classes"]
        )
    return {"dim": args.dim, "classes": args.classes, "batch": args.batch, "heads": found}


def changeover(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Computed and stored frames at growing K."""
    rows = []
    for dim in (256, 512, 1024):
        for classes in (2048, 4096, 8192, 16384, 32768, 65536):
            sizes = {"kerdock": classes, "stored": classes}
            found = compare(sizes, dim, size=args.batch, repeats=args.repeats, device=args.device)
            row = {
                "dim": dim,
                "classes": classes,
                "stored_over_computed_time": found["stored"]["times_of_first"],
                "computed_milliseconds": 1000 * found["kerdock"]["seconds"],
                "stored_milliseconds": 1000 * found["stored"]["seconds"],
                "stored_megabytes": 4e-6 * classes * dim,
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=1_050_624)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--auto", action="store_true")
    parser.add_argument("--child", choices=(*STEPS, "network"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        measured = network_peak if args.child == "network" else partial(peak_growth, args.child)
        print(json.dumps(measured(args.dim, args.classes, args.batch)))
        return
    found = changeover(args) if args.auto else million(args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    report = {
        "command": "python training/benchmarks/kerdock_step.py " + " ".join(sys.argv[1:]),
        "machine": {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__},
        "repeats": args.repeats,
        "results": found,
    }
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
