"""Time and memory of NeuralCollapse beside the `neural_collapse` package, on the same features, in one run.

    python training/benchmarks/collapse_speed.py --out training/benchmarks/collapse_speed.json

The package is rhubarbwu/neural-collapse on GitHub, measured at commit c05a0b8; it is in no package index.

Both get the same float32 features in the same batches, and the same linear head; both give NC1 (pseudo-inverse,
quotient of traces, CDNV), NC2, NC3 and NC4. Each measurement is a process of its own and the two take turns. Times are
CPU seconds of the process, which a busy machine disturbs less than the clock on the wall; with one thread the two are
the same on an idle one. Memory is the growth of the process's peak over what it held with the features loaded.

`products` is no way to measure anything: the matrix products that `fast` cannot do without, on the same numbers. With
them alone, and the figures, it would be `times_faster_at_most` as fast as the package.

`ours` works in float64, `fast` (`FastNeuralCollapse`) in float32; the package in float32, its default, with the tile of
64 its example uses (without tiles CDNV at K = 1000, d = 2048 needs 16 GB). It reads the features once for means, once
for covariances and once for NC4, ours once and once; the forward passes of a model that this costs are not in the
figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etf_zoo.metrics import FastNeuralCollapse, NeuralCollapse
from etf_zoo.metrics.products import product

TILE = 64


def make_features(num_classes: int, dim: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 features around random class means with as much variance within as between, labels, and a head."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(num_classes, dim, generator=generator)
    labels = torch.arange(num_classes).repeat(samples // num_classes + 1)[:samples]
    labels = labels[torch.randperm(samples, generator=generator)]
    features = torch.randn(samples, dim, generator=generator)
    for part, own in zip(features.split(1024), labels.split(1024), strict=True):
        part += means[own]
    return features, labels, means + 0.3 * torch.randn(num_classes, dim, generator=generator)


def ours(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    batch: int,
    clock: list[float],
    kind: type[NeuralCollapse] = NeuralCollapse,
) -> dict[str, float]:
    collapse = kind(*weight.shape)
    for x, y in zip(features.split(batch), labels.split(batch), strict=True):
        collapse.update(x, y)
    collapse.settle()
    clock.append(time.process_time())
    for x in features.split(batch):
        collapse.update_agreement(x, weight)
    collapse.settle()
    clock.append(time.process_time())
    return collapse.compute(weight, spectra=False)  # the package has neither of the two spectral figures


def fast(features: Tensor, labels: Tensor, weight: Tensor, batch: int, clock: list[float]) -> dict[str, float]:
    return ours(features, labels, weight, batch, clock, FastNeuralCollapse)


def products(features: Tensor, labels: Tensor, weight: Tensor, batch: int, clock: list[float]) -> dict[str, float]:
    """What `fast` cannot do without: half of the scatter, and the two products of NC4; nothing is kept."""
    for x in features.split(2048):
        columns = x.mT.contiguous()
        for i in range(0, x.shape[1], 128):
            product(columns[i : i + 128], columns[i:])
    clock.append(time.process_time())
    for x in features.split(2048):
        product(x, weight)
        product(x, weight)
    clock.append(time.process_time())
    return {}


def package(features: Tensor, labels: Tensor, weight: Tensor, batch: int, clock: list[float]) -> dict[str, float]:
    from neural_collapse import accumulate, measure  # type: ignore[import-not-found]

    batches = list(zip(features.split(batch), labels.split(batch), strict=True))
    sums = accumulate.MeanAccumulator(*weight.shape)
    for x, y in batches:
        sums.accumulate(x, y)
    means, center = sums.compute()
    norms = accumulate.VarNormAccumulator(*weight.shape, M=means)
    covariance = accumulate.CovarAccumulator(*weight.shape, M=means)
    for x, y in batches:
        norms.accumulate(x, y, means)
        covariance.accumulate(x, y, means)
    clock.append(time.process_time())
    decisions = accumulate.DecAccumulator(*weight.shape, M=means, W=weight)
    for x, y in batches:
        decisions.accumulate(x, y, weight, means)
    clock.append(time.process_time())
    within: Any = covariance.compute()  # annotated as a pair by the package, but a matrix
    return {
        "nc1_pinv": measure.covariance_ratio(within, means, center),
        "nc1_quotient": measure.covariance_ratio(within, means, center, "quotient"),
        "nc1_cdnv": measure.variability_cdnv(norms.compute()[0], means, tile_size=TILE),
        "nc2_etf_distance": measure.simplex_etf_error(means, center),
        "nc3_etf_distance": measure.self_duality_error(weight, means, center),
        "nc4_agreement": measure.clf_ncc_agreement(decisions),
    }


def _difference(figures: dict[str, float], others: dict[str, float]) -> float:
    return max(abs(figures[name] / value - 1) for name, value in others.items() if value and name in figures)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux


def _measure(method, num_classes: int, dim: int, samples: int, batch: int, threads: int, pipe) -> None:
    torch.set_num_threads(threads)
    small = make_features(8, 16, 64)
    method(*small, 32, [])  # imports and the libraries' own buffers come before the clock
    features, labels, weight = make_features(num_classes, dim, samples)
    held, clock = _peak(), [time.process_time()]
    with torch.no_grad():
        figures = method(features, labels, weight, batch, clock)
    clock.append(time.process_time())
    steps = [b - a for a, b in itertools.pairwise(clock)]
    pipe.send({"nc1_to_nc3": steps[0], "nc4": steps[1], "figures": steps[2], "mib": _peak() - held, "values": figures})


def run(method, *args) -> dict:
    """One measurement in a fresh process: nothing is warm, no memory is left over."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(method, *args, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def _processor() -> str:
    """Its name, and the vector instructions that torch uses of it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _write(args: argparse.Namespace, rows: list[dict]) -> None:
    report = {
        "command": " ".join(["python", *sys.argv]),
        "times": "CPU seconds, median of the repeats",
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "machine": {"cpus": os.cpu_count(), "machine": _processor(), "torch": torch.__version__},
        "results": rows,
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--classes", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    rows = []
    print("   K     d          CPU seconds, MiB, times faster than the package (NC1-3, NC4, figures)", flush=True)
    for dim in args.dims:
        for num_classes in args.classes:
            methods = (package, ours, fast, products)
            runs: dict[str, list[dict]] = {method.__name__: [] for method in methods}
            for _ in range(args.repeats):
                for method in methods:
                    sizes = (num_classes, dim, args.samples, args.batch, args.threads)
                    runs[method.__name__].append(run(method, *sizes))
            row: dict[str, Any] = {"num_classes": num_classes, "dim": dim}
            for name, results in runs.items():
                row[name] = {
                    k: statistics.median(r[k] for r in results) for k in ("nc1_to_nc3", "nc4", "figures", "mib")
                }
                row[name]["seconds"] = statistics.median(r["nc1_to_nc3"] + r["nc4"] + r["figures"] for r in results)
            peer, values = row["package"], {name: results[0]["values"] for name, results in runs.items()}
            for name in ("ours", "fast"):
                own = row[name]
                own["times_faster"] = {k: peer[k] / own[k] for k in ("seconds", "nc1_to_nc3", "nc4", "figures")}
                own["memory_ratio"] = own["mib"] / peer["mib"]
            least = row["products"]["nc1_to_nc3"] + row["products"]["nc4"] + row["fast"]["figures"]
            row["times_faster_at_most"] = peer["seconds"] / least
            row["largest_relative_difference"] = {
                "ours, package": _difference(values["ours"], values["package"]),
                "fast, ours": _difference(values["fast"], values["ours"]),
            }
            rows.append(row)
            print(f"{num_classes:4d}  {dim:4d}  package {peer['seconds']:7.2f} s, {peer['mib']:5.0f} MiB")
            for name in ("ours", "fast"):
                own, faster = row[name], row[name]["times_faster"]
                parts = ", ".join(f"{faster[k]:.1f}" for k in ("nc1_to_nc3", "nc4", "figures"))
                print(f"{name:>19s} {own['seconds']:7.2f} s, {own['mib']:5.0f} MiB, {faster['seconds']:.1f} ({parts})")
            if args.out:  # after each row: a run that is cut short leaves what it has
                _write(args, rows)


if __name__ == "__main__":
    main()
