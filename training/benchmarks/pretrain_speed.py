"""Training speed of this engine beside timm's training script: models, sizes, precisions, in one run.

    ETF_ZOO_DATA=... python training/benchmarks/pretrain_speed.py --out training/benchmarks/pretrain_speed_cpu.json
    ETF_ZOO_DATA=... python training/benchmarks/pretrain_speed.py --photos flowers17 --sizes 160 --precisions fp32 \
        --models tf_efficientnet_lite0 mobilenetv3_small_100 --sides ours "ours, workers" timm "timm, channels_last" \
        --out training/benchmarks/photos_speed_cpu.json
    ETF_ZOO_DATA=... python training/benchmarks/pretrain_speed.py --device cuda --sizes 64 224 --batch 512 128 \
        --precisions bf16 --models resnet18 resnet50 --workers 8 16 --images 65536 --seconds 5 --warm 3 \
        --out training/benchmarks/pretrain_speed_gpu.json

At 64 pixels a network is pretrained on Tiny ImageNet (SGD), at 160 and 224 fine-tuned on photographs of `cub50`
(AdamW). Ours is the engine as `training/pretrain.py` and `training/finetune.py` run it: images decoded once, augmented
in batches; "ours, workers" is the same with `data.resident: false`, where timm's transforms run in worker processes.
The peer is what timm's `train.py` does with the same model, batch, size, augmentation (random resized crop
and flip), precision and optimizer: `create_dataset` on a folder of the same image files, `create_loader` (PIL in worker
processes, prefetcher) and its step; with as many workers as were fastest in a trial of the same run. The script's
default memory format is contiguous; `--channels-last` is an option of it, so both are measured.

Each side has a process of its own, for the engine changes how its process keeps memory. In a cell the sides take turns;
the first second of a turn is not counted, so that the peer's queue is as full as it stays, nor what the engine measures
once on a machine. Workers of the peer stop between its turns. Cells are written as they end; `--minutes` leaves out
those that would come later.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MODELS = ("mobilenetv3_small_100", "resnet18", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "resnet50")
BATCH = {64: 128, 160: 32, 224: 16}
OPTIM = {
    64: {"name": "sgd", "lr": 0.1, "weight_decay": 4e-5, "warmup_epochs": 0},
    160: {"name": "adamw", "lr": 1e-4, "weight_decay": 0.05, "warmup_epochs": 0},
}
OPTIM[224] = OPTIM[160]
SIDES = ("ours", "timm", "timm, channels_last")
WORKERS = "ours, workers"  # another side, if asked for


@dataclasses.dataclass(frozen=True)
class Cell:
    """One comparison."""

    model: str
    size: int
    precision: str

    @property
    def model_args(self) -> dict[str, Any]:
        return {"img_size": self.size} if self.model.startswith("vit") else {}


class Peer:
    """timm's pipeline and loop."""

    def __init__(self, cell: Cell, folder: Path, num_classes: int, workers: int, device: str, channels_last: bool):
        import timm
        import torch
        from timm.optim import create_optimizer_v2

        self.cell, self.folder, self.workers, self.channels_last = cell, folder, workers, channels_last
        self.device, optim = torch.device(device), OPTIM[cell.size]
        torch.manual_seed(0)
        net: Any = timm.create_model(cell.model, num_classes=num_classes, **cell.model_args)
        self.model: Any = net.to(self.device)
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = create_optimizer_v2(
            self.model, opt=optim["name"], lr=optim["lr"], weight_decay=optim["weight_decay"], momentum=0.9
        )

    def steps(self) -> Iterator[int]:
        """Images of each step, once it is done."""
        import torch
        from timm.data import create_dataset, create_loader
        from timm.utils import AverageMeter

        from etf_zoo.trainer.data.augment import IMAGENET

        images: Any = create_dataset("", root=str(self.folder))
        loader = create_loader(
            images,
            input_size=(3, self.cell.size, self.cell.size),
            batch_size=BATCH[self.cell.size],
            is_training=True,
            scale=(0.35, 1.0),
            ratio=(0.75, 1.3333),
            hflip=0.5,
            color_jitter=0.0,
            interpolation="bilinear",
            mean=IMAGENET.mean,
            std=IMAGENET.std,
            num_workers=self.workers,
            device=self.device,
            pin_memory=self.device.type == "cuda",
            persistent_workers=False,
        )
        losses, loss_fn = AverageMeter(), torch.nn.CrossEntropyLoss()
        self.model.train()
        for pixels, labels in loader:
            if self.channels_last:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cell.precision == "bf16"):
                loss = loss_fn(self.model(pixels), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.update(loss.item(), len(pixels))  # which waits for the device, as the script does
            yield len(pixels)


class Ours:
    """The engine, with a learned head."""

    def __init__(self, cell: Cell, split: Any, folder: Path):
        self.cell = cell
        from etf_zoo.trainer.recipe.config import Data, Optim, Recipe
        from etf_zoo.trainer.run.run import Run

        recipe = Recipe(
            output=str(folder),
            model=f"{cell.model}_etf",
            model_args=cell.model_args,
            head="learned",
            data=Data(size=cell.size),
            optim=Optim(**OPTIM[cell.size]),
            epochs=1_000,
            batch_size=BATCH[cell.size],
            sizes=[[0, cell.size]],
            label_smoothing=0.0,
            precision=cell.precision,
        )
        self.run, self.epoch = Run(recipe, split, split), 0

    def steps(self) -> Iterator[int]:
        """Images of each step."""
        self.run.model.train()
        self.epoch += 1
        for number, (images, labels) in enumerate(self.run.batches(self.epoch, 0)):
            self.run.stepper.step(number, images, labels)
            yield len(labels)


def rate(side: Peer | Ours, seconds: float, warm: float) -> dict[str, float]:
    """Images a second over at least two steps and so many seconds, what came before left out."""
    import torch

    turns, start = side.steps(), time.perf_counter()
    for _ in turns:
        if time.perf_counter() - start > warm:
            break
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began, images, steps = time.perf_counter(), 0, 0
    for count in turns:
        images, steps = images + count, steps + 1
        if steps >= 2 and time.perf_counter() - began > seconds:
            break
    if torch.cuda.is_available():  # the engine does not wait for each step
        torch.cuda.synchronize()
    spent = time.perf_counter() - began
    turns.close()  # type: ignore[attr-defined]
    return {"images": images, "steps": steps, "seconds": round(spent, 4), "images_per_second": images / spent}


def serve(pipe: Any, folder: Path, args: argparse.Namespace) -> None:
    """A process of one side: takes what to make or to measure, gives what it found."""
    import torch

    set_batches(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    sides: dict[str, Peer | Ours] = {}
    while (asked := pipe.recv()) is not None:
        verb, name, *rest = asked
        if verb == "rate":
            pipe.send(rate(sides[name], *rest))
            continue
        cell, workers = rest
        split = open_images(source(cell.size, args), cell.size, args.images, name != WORKERS)
        sides = {kept: side for kept, side in sides.items() if side.cell == cell}
        if name.startswith("ours"):
            sides[name] = Ours(cell, split, folder / name / "-".join(map(str, dataclasses.astuple(cell))))
        else:
            images, classes = folder / source(cell.size, args), len(split.label_names)
            sides[name] = Peer(cell, images, classes, workers, args.device, name.endswith("channels_last"))
        pipe.send({"threads": torch.get_num_threads()})


def set_batches(args: argparse.Namespace) -> None:
    """Take the sizes of batches that were asked for."""
    BATCH.update(zip(args.sizes, args.batch, strict=False))


def source(size: int, args: argparse.Namespace) -> str:
    """Data set that images of a size are taken from."""
    return "tiny_imagenet" if size == 64 else args.photos


@functools.cache
def open_images(name: str, size: int, images: int, resident: bool) -> Any:
    """Training images as a recipe has them, each as often as makes enough of them."""
    from etf_zoo.trainer.data.batches import load_split
    from etf_zoo.trainer.recipe.config import Data

    whole: Any = load_split(Data(name, size=size, resident="auto" if resident else False), "train")
    return whole.subset(chosen(len(whole), images))


def chosen(count: int, images: int) -> np.ndarray:
    """Rows that both sides train on."""
    order = np.random.default_rng(0).permutation(count)
    return np.resize(order, images)


def write_folder(name: str, images: int, folder: Path) -> None:
    """The image files as they are, `CLASS/NUMBER.jpg`, what timm's image folder reads."""
    from etf_zoo.trainer.data.batches import load_split
    from etf_zoo.trainer.recipe.config import Data

    rows: Any = load_split(Data(name, size=64, resident=False), "train")
    for number, row in enumerate(chosen(len(rows), images)):
        file = folder / f"{rows.labels[row]:04d}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(rows.encoded(int(row)))


class Processes:
    """One process for ours, one for the peer."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        context, self.pipes = multiprocessing.get_context("spawn"), {}
        for side in ("ours", "timm"):
            self.pipes[side], theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, folder, args)).start()

    def ask(self, verb: str, name: str, *rest: Any) -> Any:
        pipe = self.pipes[name[:4]]
        pipe.send((verb, name, *rest))
        return pipe.recv()

    def close(self) -> None:
        for pipe in self.pipes.values():
            with contextlib.suppress(OSError):  # of one that an error ended
                pipe.send(None)


def compare(processes: Processes, cell: Cell, workers: int, args: argparse.Namespace) -> dict[str, Any]:
    """All sides on one cell, taking turns."""
    for name in args.sides:
        processes.ask("make", name, cell, workers)
    processes.ask("rate", "ours", 0.0, 0.0)  # the engine measures once
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in args.sides}
    for _ in range(args.rounds):
        for name in args.sides:
            turns[name].append(processes.ask("rate", name, args.seconds, args.warm))
    found: dict[str, Any] = {**dataclasses.asdict(cell), "batch": BATCH[cell.size], "workers": workers, "turns": turns}
    for peer in args.sides[1:]:
        ratios = [
            a["images_per_second"] / b["images_per_second"] for a, b in zip(turns["ours"], turns[peer], strict=True)
        ]
        found[f"ours / {peer}"] = statistics.median(ratios)
    return found


def best_workers(processes: Processes, size: int, args: argparse.Namespace) -> tuple[int, dict[str, float]]:
    """Worker processes with which the peer is fastest, on the model that waits most for its images."""
    tried = {}
    for workers in args.workers:
        processes.ask("make", SIDES[2], Cell(MODELS[0], size, "fp32"), workers)
        tried[workers] = processes.ask("rate", SIDES[2], args.seconds, args.warm)["images_per_second"]
    return max(tried, key=lambda n: tried[n]), {str(n): value for n, value in tried.items()}


def summary(results: list[dict[str, Any]], sides: list[str]) -> dict[str, Any]:
    """Geometric mean and least of the ratios, to each other side and to the faster of timm's."""
    ratios = {peer: [r[f"ours / {peer}"] for r in results] for peer in sides[1:]}
    peers = [side for side in sides if side.startswith("timm")]
    ratios["the faster of both"] = [min(r[f"ours / {peer}"] for peer in peers) for r in results]
    return {
        peer: {"geometric_mean": math.exp(statistics.fmean(map(math.log, values))), "least": min(values)}
        for peer, values in ratios.items()
    }


def machine(device: str) -> dict[str, Any]:
    """What it was measured on."""
    import timm
    import torch

    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{(names or [platform.machine()])[0]}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(BATCH), choices=list(BATCH))
    parser.add_argument("--batch", type=int, nargs="*", default=[], help="images of a step at each of the sizes")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--photos", default="cub50", help="data set of the sizes above 64")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=[*SIDES, WORKERS], help="ours first")
    parser.add_argument("--images", type=int, default=8192, help="training images; fewer are repeated")
    parser.add_argument("--seconds", type=float, default=1.5, help="counted in a turn, at least")
    parser.add_argument("--warm", type=float, default=1.0, help="seconds not counted at the start of a turn")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, os.cpu_count() or 1], help="of the peer, tried")
    parser.add_argument("--threads", type=int, default=0, help="of each side; 0 for torch's default")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no cell after so many")
    parser.add_argument("--device", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import torch

    set_batches(args)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both sides, in processes to come
    results: list[dict[str, Any]] = []
    report = {
        "command": "python training/benchmarks/pretrain_speed.py " + " ".join(sys.argv[1:]),
        "machine": machine(args.device),
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "optimizers": OPTIM,
        "workers_tried": {},
        "results": results,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in {source(size, args) for size in args.sizes}:
            write_folder(name, args.images, folder / name)
        began, processes, workers = time.monotonic(), Processes(folder, args), {}
        try:
            for precision in args.precisions:
                for size in args.sizes:
                    if size not in workers:
                        workers[size], tried = best_workers(processes, size, args)
                        report["workers_tried"][str(size)] = tried
                    for model in args.models:
                        if time.monotonic() - began > 60 * args.minutes:
                            continue
                        results.append(compare(processes, Cell(model, size, precision), workers[size], args))
                        report["summary"] = summary(results, args.sides)
                        ratios = ", ".join(f"{results[-1][f'ours / {peer}']:.2f}" for peer in args.sides[1:])
                        print(
                            f"{time.monotonic() - began:5.0f} s  {precision} {size:3d} {model:24s} {ratios}", flush=True
                        )
                        if args.out:
                            args.out.write_text(json.dumps(report, indent=1) + "\n")
        finally:
            processes.close()
    print(json.dumps(report.get("summary"), indent=1))


if __name__ == "__main__":
    main()
