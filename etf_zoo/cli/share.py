"""`etf-zoo convert`, `export`, `card` and `publish`: models for others."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ..errors import EtfZooError
from ..models.find import find_model, load_model
from ..sharing.card import write_card
from ..sharing.checkpoint import convert_checkpoint
from ..sharing.onnx import export_onnx
from ..sharing.plain import export_plain
from ..sharing.publish import publish, zoo_folders
from ..text import printable
from ..weights.native import CONFIG_NAME
from .evaluate import SplitImages

__all__ = ["convert", "export", "publish_models", "write_cards"]

GIVEN = {"logits": "logits", "features": "features", "top_k": "best classes and their logits"}


def convert(args: argparse.Namespace) -> None:
    """Write a checkpoint with a fixed frame in the place of its learned classifier."""
    if args.center and not (args.data and args.mode == "nearest"):
        raise EtfZooError("--center SPLIT takes the mean features of --data, for --mode nearest.")
    _refuse_model(args.out)
    measured = center = None
    record = {}
    if args.data:
        measured = SplitImages(args, args.split)
        center = SplitImages(args, args.center) if args.center else None
        name = {"name": measured.data_name, "split": measured.split_name}
        record = {"dataset": name, "command": shlex.join(["etf-zoo", *args.argv])}
    results = convert_checkpoint(
        args.source,
        args.out,
        mode=args.mode,
        architecture=args.architecture,
        half=args.half,
        data=measured.batches if measured else None,
        center=center.batches if center else None,
        record=record,
    )
    for when, figures in results.items():
        print(f"{when:<7} top-1 {figures['top1']:6.2f} %  cross-entropy {figures['loss']:.4f}")
    print(args.out)


def _refuse_model(folder: str) -> None:
    """Raise EtfZooError on a folder with a model, which would be gone."""
    if any((Path(folder) / name / CONFIG_NAME).is_file() for name in ("", "model")):
        raise EtfZooError(f"{folder} holds a model already: choose another folder.")


def export(args: argparse.Namespace) -> None:
    """Write a model for stock timm or as ONNX."""
    formats = args.formats or []
    if not formats:
        raise EtfZooError("Say what to export: --format plain (a checkpoint for stock timm) or --format onnx.")
    if args.half and "onnx" in formats:
        raise EtfZooError("--half is for --format plain: an ONNX file keeps the model's precision. Leave it out.")
    if args.output and "onnx" not in formats:
        raise EtfZooError("--output is for --format onnx: a plain checkpoint is a whole model. Leave it out.")
    if args.top is not None and args.output != "top_k":
        raise EtfZooError("--top says how many classes --output top_k gives: add that, or leave --top out.")
    if "plain" in formats:
        _refuse_model(args.out)
    model = load_model(args.model)
    if "plain" in formats:
        same = export_plain(model, args.out, half=args.half)
        print(f"{args.out}: same top-1 predictions, {'the same' if same else 'another'} softmax")
    if "onnx" in formats:
        output = args.output or "logits"
        file = export_onnx(model, args.out, output=output, k=5 if args.top is None else args.top)
        print(f"{file}: the same {GIVEN[output]}")


def write_cards(args: argparse.Namespace) -> None:
    """Write the cards of model folders anew."""
    for name in args.folders:
        print(write_card(_folder(name)))


def publish_models(args: argparse.Namespace) -> None:
    """Publish a model folder, or all that are embedded."""
    if bool(args.model) == args.all or (args.all and not args.org) or (args.org and args.repo_id):
        raise EtfZooError("Publish one MODEL, with --repo-id ORG/NAME, or the zoo with --all --org ORG.")
    for folder in zoo_folders() if args.all else [_folder(args.model)]:
        repo_id = f"{args.org}/{folder.resolve().name}" if args.org else args.repo_id
        done = publish(folder, repo_id, private=args.private, create_pr=args.create_pr, dry_run=args.dry_run)
        if args.dry_run:
            state = f"ready; would send {', '.join(done.files)}"
        else:
            state = f"{'commit' if done.changed else 'unchanged, at'} {done.revision[:12]}"
        print(f"{printable(folder.name)}: {done.url} ({state})")


def _folder(name: str) -> Path:
    folder = find_model(name).folder
    if folder is None:
        raise EtfZooError(
            f"{name} has no model folder on this machine: give a folder, the output of a run, or an embedded model."
        )
    return folder
