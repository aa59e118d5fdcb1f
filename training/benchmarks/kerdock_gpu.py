"""A training step over a million classes on a GPU: a Kerdock frame, compiled and in Triton, beside nn.Linear in bf16.

    python training/benchmarks/kerdock_gpu.py --out training/benchmarks/kerdock_gpu.json
    TRITON_INTERPRET=1 python training/benchmarks/kerdock_gpu.py --check

Not run on a GPU yet: there are no figures of it. `--check` compares the numbers of all ways with those of
`FrameCrossEntropy` on a CPU, where Triton interprets its kernel.

A step is forward, cross-entropy and backward, from features that want a gradient, and for `nn.Linear` SGD's with
momentum; weights, gradients, momentum and logits of it are bfloat16. The ways of a Kerdock frame: `library`, as
`FrameCrossEntropy` does it; `compiled`, a block of bases in one graph of `torch.compile`; `triton`, one kernel in which
a program keeps a sample's 32 x 32 feature in registers, so that no logit is ever written to memory. The last two are of
whole frames, K = d(d + 2), and of features up to length 80, whose exponentials need no shift.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F
from triton import testing

from etf_zoo import FrameClassifier
from etf_zoo.frames.kerdock import hadamard, kerdock_capacity, unpack_signs
from etf_zoo.layers import classifier
from etf_zoo.layers.implicit import kerdock_vectors
from etf_zoo.losses import FrameCrossEntropy

CHUNK = 64  # bases in a graph of `compiled`
SPLITS = 8  # programs that share a sample's bases
SCALE = 20.0

# Scaled features (B, d), labels, packed signs -> sum of exponentials of all other classes (B,), and of the vectors
# times them (B, d)
Sums = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def identity_sums(x: Tensor, labels: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """The last basis, whose vectors are the coordinates."""
    dim = x.shape[1]
    own = unpack_signs(signs[:1], dim, x)
    offset = labels[:, None] - 2 * dim * len(signs) - torch.arange(2 * dim, device=x.device)
    both = torch.cat([x * own, -x * own], dim=1).exp().masked_fill(offset == 0, 0)
    return both.sum(dim=1), (both[:, :dim] - both[:, dim:]) * own


def chunk_sums(x: Tensor, labels: Tensor, packed: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Some bases, `packed` `(n, d/8)`, of which the first begins with class `first`."""
    dim = x.shape[1]
    side = math.isqrt(dim)
    square = hadamard(side, x)
    own = unpack_signs(packed, dim, x) / math.sqrt(dim)

    def transform(values: Tensor) -> Tensor:
        return (square @ values.unflatten(-1, (side, side)) @ square).flatten(-2)

    logits = transform(x[:, None] * own)  # (B, n, d)
    offset = (labels - first)[:, None, None]
    basis = torch.arange(len(packed), device=x.device)[:, None] * 2 * dim + torch.arange(dim, device=x.device)
    up = logits.exp().masked_fill(offset == basis, 0)
    down = (-logits).exp().masked_fill(offset == basis + dim, 0)
    return (up + down).sum(dim=(1, 2)), (transform(up - down) * own).sum(dim=1)


def by_chunks(sums: Callable[..., tuple[Tensor, Tensor]]) -> Sums:
    """All bases but the identity, so many at a time."""

    def run(x: Tensor, labels: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        total, direction = identity_sums(x, labels, signs)
        for start in range(0, len(signs), CHUNK):
            part = sums(x, labels, signs[start : start + CHUNK], 2 * x.shape[1] * start)
            total, direction = total + part[0], direction + part[1]
        return total, direction

    return run


@triton.jit
def kerdock_kernel(
    x_ptr, labels_ptr, signs_ptr, square_ptr, total_ptr, direction_ptr, bases, splits, SIDE: tl.constexpr
):
    """A sample (axis 0) and each `splits`-th basis (axis 1): what `chunk_sums` gives, `(B, splits)` and with d."""
    sample, split = tl.program_id(0), tl.program_id(1)
    dim: tl.constexpr = SIDE * SIDE
    place = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    square = tl.load(square_ptr + place)
    x = tl.load(x_ptr + sample * dim + place) / SIDE  # SIDE is the root of d
    label = tl.load(labels_ptr + sample)
    totals = tl.zeros((SIDE, SIDE), tl.float32)
    direction = tl.zeros((SIDE, SIDE), tl.float32)
    for basis in range(split, bases, splits):
        byte = tl.load(signs_ptr + basis * (dim // 8) + place // 8).to(tl.int32)
        own = 1.0 - 2.0 * ((byte >> (place % 8)) & 1).to(tl.float32)
        half = tl.dot(square, x * own, input_precision="ieee")
        logits = tl.dot(half, square, input_precision="ieee")
        offset = label - basis * 2 * dim
        up = tl.where(place == offset, 0.0, tl.exp(logits))
        down = tl.where(place + dim == offset, 0.0, tl.exp(-logits))
        totals += up + down
        back = tl.dot(tl.dot(square, up - down, input_precision="ieee"), square, input_precision="ieee")
        direction += back * own
    out = sample * splits + split
    tl.store(total_ptr + out, tl.sum(tl.sum(totals, axis=1), axis=0))
    tl.store(direction_ptr + out * dim + place, direction / SIDE)


def triton_sums(x: Tensor, labels: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """All bases by the kernel."""
    batch, dim = x.shape
    side = math.isqrt(dim)
    total, direction = x.new_empty(batch, SPLITS), x.new_empty(batch, SPLITS, dim)
    square = hadamard(side, x)
    kerdock_kernel[(batch, SPLITS)](x, labels, signs, square, total, direction, len(signs), SPLITS, SIDE=side)  # type: ignore[arg-type]  # Triton's constexpr
    last = identity_sums(x, labels, signs)
    return total.sum(dim=1) + last[0], direction.sum(dim=1) + last[1]


class OtherClasses(torch.autograd.Function):
    """Log-sum-exp of the logits of all classes but the label; its gradient comes with the sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, signs: Tensor, sums: Sums) -> Tensor:  # type: ignore[override]  # torch's is *args
        total, direction = sums(x, labels, signs)
        ctx.save_for_backward(direction / total[:, None])
        return total.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]  # torch's is *args
        return grad[:, None] * ctx.saved_tensors[0], None, None, None


def loss_by(sums: Sums, head: FrameClassifier) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy of a Kerdock head, the sums computed in some way."""

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        scaled = head.embed(features) * SCALE
        target = (scaled * kerdock_vectors(labels, head.signs, scaled)).sum(dim=1)
        return F.softplus(OtherClasses.apply(scaled, labels, head.signs, sums) - target).mean()

    return loss


def losses(dim: int, device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Cross-entropy over a whole Kerdock frame in each way."""
    stored, classifier.KERDOCK_MATRIX_CLASSES = classifier.KERDOCK_MATRIX_CLASSES, 1
    head = FrameClassifier(dim, kerdock_capacity(dim), frame="kerdock", logit_scale=SCALE, device=device)
    classifier.KERDOCK_MATRIX_CLASSES = stored
    compiled = by_chunks(torch.compile(chunk_sums) if device == "cuda" else chunk_sums)
    return {
        "library": FrameCrossEntropy(head),
        "compiled": loss_by(compiled, head),
        "triton": loss_by(triton_sums, head),
    }


def check() -> None:
    """Compare all ways with the library's, in 256 dimensions, and print the largest differences."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 300, 66_047, 40_000])
    features = torch.randn(len(labels), 256, generator=generator)
    found = {}
    for name, loss in losses(256, "cpu").items():
        x = features.clone().requires_grad_()
        value = loss(x, labels)
        found[name] = (value.detach(), *torch.autograd.grad(value, x))
    for name, (value, grad) in found.items():
        wanted, wanted_grad = found["library"]
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grad, wanted_grad, atol=1e-6, rtol=1e-4)
        print(f"{name}: {value.item():.6f}, gradient off by {(grad - wanted_grad).abs().max().item():.1e}")


def linear_step(dim: int, classes: int) -> Callable[[Tensor, Tensor], None]:
    """A step of a learned classifier, all of it in bfloat16."""
    head = nn.Linear(dim, classes, device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, fused=True)
    loss = torch.compile(lambda x, y: F.cross_entropy(head(x), y))

    def step(x: Tensor, y: Tensor) -> None:
        loss(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(step: Callable[[Tensor, Tensor], Any], dim: int, batch: int, classes: int, dtype: Any) -> dict[str, Any]:
    """Median milliseconds and peak bytes of a step."""
    x = torch.randn(batch, dim, device="cuda", dtype=dtype).requires_grad_()
    labels = torch.randint(classes, (batch,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    milliseconds = testing.do_bench(lambda: step(x, labels), warmup=500, rep=2000, return_mode="median")
    return {"milliseconds": milliseconds, "peak_bytes": torch.cuda.max_memory_allocated()}


def compare(dim: int, batch: int) -> dict[str, Any]:
    """Each head's step, one after the other."""
    classes = kerdock_capacity(dim)
    found = {
        name: measured(lambda x, y, loss=loss: loss(x, y).backward(), dim, batch, classes, torch.float32)
        for name, loss in losses(dim, "cuda").items()
    }
    found["linear"] = measured(linear_step(dim, classes), dim, batch, classes, torch.bfloat16)
    for figures in found.values():
        figures["linear_over_this"] = found["linear"]["milliseconds"] / figures["milliseconds"]
    return {"dim": dim, "classes": classes, "batch": batch, "heads": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=1024, choices=(256, 1024))
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--check", action="store_true", help="compare the ways on a CPU, and measure nothing")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.check:
        check()
        return
    if not torch.cuda.is_available():
        raise SystemExit("This needs a GPU; --check compares the numbers on a CPU.")
    report = {
        "command": "python training/benchmarks/kerdock_gpu.py " + " ".join(sys.argv[1:]),
        "machine": {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__},
        "results": [compare(args.dim, batch) for batch in args.batch],
    }
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
