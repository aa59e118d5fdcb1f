"""How good a Kerdock frame is as a code: its cosines beside those of other arrangements, and the bounds.

    python training/benchmarks/kerdock_code.py --out training/benchmarks/kerdock_code_cpu.json

For each arrangement: the largest cosine of any two classes, the mean over classes of the largest cosine with another
one, and the root mean square of all cosines. Up to 4,224 classes all pairs are looked at. Beyond, a sample of 256
classes against all others: the largest is then that of the sample, so the true one may be larger; a Kerdock frame's is
exact throughout. `orthoplexes` are Haar random bases with their negatives; `spherical code` is optimized, where that
is affordable.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from etf_zoo.frames import levenshtein_bound, random_frame, spherical_code
from etf_zoo.frames.kerdock import kerdock_signs
from etf_zoo.frames.report import kerdock_report
from etf_zoo.frames.simplex import haar_columns
from etf_zoo.layers.implicit import kerdock_vectors

SIZES = [(64, 1_000), (64, 4_224), (256, 1_000), (256, 10_000), (256, 66_048), (1024, 10_000), (1024, 1_050_624)]
ALL_PAIRS = 4_224
SAMPLE = 256
PIECE = 8_192
KEPT = 100_000  # classes up to which an arrangement is held whole
OPTIMIZED = 1_000  # classes up to which a spherical code is optimized here


def kerdock_pieces(dim: int, classes: int) -> Iterator[Tensor]:
    """A Kerdock frame, some rows at a time."""
    signs, like = kerdock_signs(dim), torch.empty(0, dim)
    for numbers in torch.arange(classes).split(PIECE):
        yield kerdock_vectors(numbers, signs, like)


def random_pieces(dim: int, classes: int) -> Iterator[Tensor]:
    """Independent random unit vectors."""
    for start in range(0, classes, PIECE):
        yield random_frame(min(PIECE, classes - start), dim, seed=start)


def orthoplex_pieces(dim: int, classes: int) -> Iterator[Tensor]:
    """Random orthoplexes."""
    for start in range(0, classes, 2 * dim):
        basis = haar_columns(dim, dim, start).T.float()
        yield torch.cat([basis, -basis])[: classes - start]


def code_pieces(dim: int, classes: int) -> Iterator[Tensor]:
    """The optimized code, in one piece."""
    yield spherical_code(classes, dim)


ARRANGEMENTS: dict[str, Callable[[int, int], Iterator[Tensor]]] = {
    "kerdock": kerdock_pieces,
    "random": random_pieces,
    "orthoplexes": orthoplex_pieces,
    "spherical code": code_pieces,
}


def measure(pieces: Callable[[int, int], Iterator[Tensor]], dim: int, classes: int) -> dict[str, float]:
    """Cosines of an arrangement, gone through twice: for the sample, and for what the sample is compared with."""
    began = time.monotonic()
    kept = list(pieces(dim, classes)) if classes <= KEPT else None
    count = classes if classes <= ALL_PAIRS else SAMPLE
    chosen = torch.linspace(0, classes - 1, count).round().long()
    sample, start = [], 0
    for piece in kept or pieces(dim, classes):
        inside = chosen[(chosen >= start) & (chosen < start + len(piece))] - start
        sample.append(piece[inside])
        start += len(piece)
    rows = torch.cat(sample)
    nearest, squares, start = torch.full((count,), -1.0), 0.0, 0
    for piece in kept or pieces(dim, classes):
        cosines = rows @ piece.T
        own = (chosen >= start) & (chosen < start + len(piece))
        cosines[torch.nonzero(own)[:, 0], chosen[own] - start] = -math.inf
        nearest = torch.maximum(nearest, cosines.amax(dim=1))
        squares += cosines.masked_fill(cosines == -math.inf, 0).double().square().sum().item()
        start += len(piece)
    return {
        "largest_cosine": nearest.max().item(),
        "mean_nearest_cosine": nearest.mean().item(),
        "rms_cosine": math.sqrt(squares / (count * (classes - 1))),
        "classes_looked_at": count,
        "seconds": round(time.monotonic() - began, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=SIZES[-1][1], help="leave out more classes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dim, classes in SIZES:
        if classes > args.largest:
            continue
        exact = kerdock_report(classes, dim)
        row: dict = {
            "dim": dim,
            "classes": classes,
            "levenshtein_bound": levenshtein_bound(classes, dim),
            "welch_bound": exact.welch_bound,
        }
        for name, pieces in ARRANGEMENTS.items():
            if name == "spherical code" and classes > OPTIMIZED:
                continue
            if name == "orthoplexes" and classes > KEPT:
                continue  # a thousand decompositions, for what independent vectors have too
            row[name] = measure(pieces, dim, classes)
        row["kerdock"]["largest_cosine"] = exact.largest_cosine
        print(json.dumps(row), flush=True)
        rows.append(row)
    report = {
        "command": "python training/benchmarks/kerdock_code.py " + " ".join(sys.argv[1:]),
        "torch": torch.__version__,
        "results": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
