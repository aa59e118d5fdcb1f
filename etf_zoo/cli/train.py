"""`etf-zoo finetune`, `pretrain` and `prepare`: the trainer in this process, or in several through accelerate."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec

import torch

from ..errors import MissingPackageError

__all__ = ["finetune", "prepare", "pretrain", "require_training", "train"]

PACKAGES = ("accelerate", "datasets", "jsonargparse", "matplotlib", "sklearn", "tqdm", "yaml")


def finetune(args: argparse.Namespace) -> int:
    """Fine-tune, as `training/finetune.py` does."""
    return train("finetune", args)


def pretrain(args: argparse.Namespace) -> int:
    """Pretrain, as `training/pretrain.py` does."""
    return train("pretrain", args)


def prepare(args: argparse.Namespace) -> int:
    """Decode a data set once, as `training/prepare.py` does."""
    return train("prepare", args)


def train(name: str, args: argparse.Namespace, arguments: list[str] | None = None) -> int:
    """Run a script of the trainer.

    Args:
        name: Module of `etf_zoo.trainer`.
        args: `processes` and `config_file`: with either, accelerate's launcher starts the processes. `rest`: arguments.
        arguments: Of the script, in the place of `rest`.

    Returns:
        Exit status.

    Raises:
        MissingPackageError: Without the extra `training`.
    """
    require_training(f"etf-zoo {name}")
    given: list[str] = args.rest if arguments is None else arguments
    if getattr(args, "all_options", False):
        given = ["--help"]
    elif args.processes > 1 or args.config_file:
        from etf_zoo.trainer.run.launcher import launch

        return launch([*_launcher(args.processes, args.config_file), "-m", "etf_zoo.trainer", name, *given])
    from etf_zoo.trainer.run.script import run_script

    before, sys.argv = sys.argv, [f"etf-zoo {name}", *given]
    try:
        run_script(import_module(f"etf_zoo.trainer.{name}").main)
    finally:
        sys.argv = before
    return 0


def require_training(what: str) -> None:
    """Raise MissingPackageError unless the extra `training` is installed."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingPackageError(f"`{what}` needs {', '.join(missing)}: pip install 'etf-zoo[training]'.")


def _launcher(processes: int, config_file: str | None) -> list[str]:
    """Arguments of accelerate's launcher, with all that it would else complain not to have been told."""
    if config_file:
        return ["--config_file", config_file, *(["--num_processes", str(processes)] if processes else [])]
    command = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0"]
    # two ids that no GPU has: accelerate starts processes on the CPU by mpirun alone, unless it takes them for GPUs
    return command if torch.accelerator.is_available() else [*command, "--gpu_ids=-1,-1"]
