"""Seconds of a whole linear probe, and of its one fit beside scikit-learn's.

    OMP_NUM_THREADS=2 python training/benchmarks/probe.py --out training/benchmarks/probe_cpu.json

The whole: near-duplicates, grouped folds, the choice of scaling and C, the converged fit. Features are made up, much
like those of a ResNet-50 on 64-pixel images: nonnegative, a few hundred directions with nearly all their variance,
classes that differ along the leading ones and that a linear probe tells apart in about half of the cases. The fit
beside scikit-learn's is smaller, as both are then quick: the same features and C, and a tolerance at which the two give
the same probabilities.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from etf_zoo.trainer.tune.probes import fit_probe

WHOLE = (10_000, 2048, 200)
BESIDE = (2_000, 512, 50)
STRENGTH = 0.1
AXES, DECAY, SIGNAL, TAIL = 256, 60.0, 0.7, 0.05


def made_features(images: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Features `(images, width)` and labels `(images,)`."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % classes
    spread = torch.exp(-torch.arange(AXES) / DECAY)
    latent = torch.randn(images, AXES, generator=generator)
    latent += SIGNAL * (spread.square() * torch.randn(classes, AXES, generator=generator))[labels]
    directions = torch.randn(AXES, width, generator=generator) * spread[:, None]
    noise = TAIL * spread.norm() * torch.randn(images, width, generator=generator)
    return F.relu(latent @ directions + noise), labels


def whole(images: int, width: int, classes: int) -> dict[str, Any]:
    """The protocol's time, and what it chose."""
    features, labels = made_features(images, width, classes)
    began, used = time.perf_counter(), time.process_time()
    probe = fit_probe("linear_probe", features, labels, [str(k) for k in range(classes)])
    seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
    return {"images": images, "width": width, "classes": classes, **seconds, **probe.details}


def beside(images: int, width: int, classes: int) -> dict[str, Any]:
    """One fit, ours and scikit-learn's."""
    features, labels = made_features(images, width, classes)
    names = [str(k) for k in range(classes)]
    began = time.perf_counter()
    probe = fit_probe("linear_probe", features, labels, names, strength=STRENGTH)
    ours = time.perf_counter() - began
    x = features.double()
    x = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    began = time.perf_counter()
    peer = LogisticRegression(C=STRENGTH, tol=1e-6, max_iter=100_000).fit(x, labels.numpy())
    theirs = time.perf_counter() - began
    assert probe.linear is not None
    found = F.linear(features.double(), *(part.double() for part in probe.linear)).softmax(1).numpy()
    return {
        "images": images,
        "width": width,
        "classes": classes,
        "C": STRENGTH,
        "seconds": ours,
        "scikit_learn_seconds": theirs,
        "ratio": theirs / ours,
        "steps": probe.details["steps"],
        "scikit_learn_steps": int(peer.n_iter_.max()),
        "largest_difference_of_probabilities": float(np.abs(found - peer.predict_proba(x)).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--whole", type=int, nargs=3, default=WHOLE, metavar="SIZE", help="images, width, classes")
    parser.add_argument("--beside", type=int, nargs=3, default=BESIDE, metavar="SIZE", help="likewise")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "scikit_learn": sklearn.__version__,
        "note": args.note,
        "beside": beside(*args.beside),
        "whole": whole(*args.whole),
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
