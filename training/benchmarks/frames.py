"""Largest cosines of spherical codes beside quick and random ones and the bounds, and what the large solutions take.

    python training/benchmarks/frames.py --out training/benchmarks/frames_cpu.json

A smaller largest cosine is a larger margin between classes. The optima are those of the table of best known spherical
codes (Cohn's, and Sloane's before it).
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

from etf_zoo.frames import frame_report, hierarchy_frame, quick_code, random_frame, simplex_etf, spherical_code
from etf_zoo.layers.moving import MovingFrameClassifier

# (classes, dimensions) -> the largest cosine of the optimum or best known code; None where there is no table of any
CODES = {(12, 3): 0.44721, (16, 5): 0.2, (27, 6): 0.25, (56, 7): 1 / 3, (120, 4): 0.80902, (1000, 128): None}


def timed(make: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    """What a call gives, and the median of its seconds."""
    seconds, made = [], None
    for _ in range(repeats):
        began = time.perf_counter()
        made = make()
        seconds.append(time.perf_counter() - began)
    return made, statistics.median(seconds)


def codes() -> list[dict[str, Any]]:
    rows = []
    for (k, d), best in CODES.items():
        code, seconds = timed(lambda k=k, d=d: spherical_code(k, d))
        report = frame_report(code)
        cosines = {"spherical_code": report.largest_cosine, "best_known": best}
        cosines |= {f.__name__: frame_report(f(k, d)).largest_cosine for f in (quick_code, random_frame)}
        bounds = {"rankin_bound": report.rankin_bound, "welch_bound_on_coherence": report.welch_bound}
        rows.append({"classes": k, "dim": d, **cosines, **bounds, "seconds": seconds})
        print(rows[-1], flush=True)
    return rows


def tree(groups: int, each: int) -> torch.Tensor:
    """Heights of a tree of two levels."""
    same = torch.block_diag(*[torch.ones(each, each)] * groups).double()
    return (2 - same).fill_diagonal_(0)


def times(repeats: int) -> dict[str, float]:
    """Seconds of the large closed forms."""
    head = MovingFrameClassifier(2048, 1000)
    labels = torch.arange(1000)
    features = simplex_etf(1000, 2048, orientation="random") + 0.1 * random_frame(1000, 2048)
    found = {
        "hierarchy_frame, K = 1010": timed(lambda: hierarchy_frame(tree(101, 10), 1024), repeats)[1],
        "moving frame, one update, K = 1000, d = 2048": timed(lambda: head.observe(features, labels), repeats)[1],
    }
    print(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = {
        "command": "python training/benchmarks/frames.py " + " ".join(sys.argv[1:]),
        "machine": {"device": f"{platform.machine()} CPU", "threads": torch.get_num_threads()},
        "codes": codes(),
        "seconds": times(args.repeats),
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
