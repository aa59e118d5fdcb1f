"""Command line: `etf-zoo list | info | predict | evaluate | convert | export | card | publish`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..errors import EtfZooError

__all__ = ["main"]


def _load(name: str, pretrained: bool = True) -> Any:
    """A model by name or folder, with an error that names the fix."""
    import timm

    import etf_zoo  # noqa: F401  registers the twins

    from ..weights.download import hub_errors

    if Path(name).is_dir():
        name = f"local-dir:{name}"
    elif ":" not in name and not timm.is_model(name):
        import difflib

        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise EtfZooError(f"There is no model or folder {name!r}.{hint} `etf-zoo list` shows the names.")
    with hub_errors(name.removeprefix("hf-hub:")) if name.startswith("hf-hub:") else nullcontext():
        return timm.create_model(name, pretrained=pretrained)


def _list(args: argparse.Namespace) -> None:
    import timm

    import etf_zoo  # noqa: F401

    pattern = args.pattern or "*"
    if "_etf" not in pattern:
        pattern = f"{pattern}_etf*" if args.pretrained else f"{pattern}_etf"
    names = timm.list_pretrained(pattern) if args.pretrained else timm.list_models(pattern)
    if not names:
        raise EtfZooError(f"No model matches {pattern!r}.")
    width = max(map(len, names))
    print("\n".join(f"{name:<{width}}  {_source(name)}" if args.pretrained else name for name in names))


def _source(name: str) -> str:
    """Where the weights of a tag come from, in words."""
    from timm.models import get_pretrained_cfg

    from ..models.tags import is_converted

    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        return "none yet"
    where = "embedded" if cfg.file else f"hf-hub:{cfg.hf_hub_id}" if cfg.hf_hub_id else str(cfg.url)
    return f"converted from {where}" if is_converted(cfg) else where


def _describe(name: str) -> dict[str, Any]:
    import timm

    from ..frames.report import frame_report, simplex_report
    from ..models.convert import EXACT
    from ..models.names import frame_heads
    from ..models.tags import is_converted
    from ..weights.native import native_tags

    model: Any
    tagged = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    native = next((tag for tag in native_tags() if name in (tag, tag.partition(".")[0])), None)
    if tagged is not None and is_converted(tagged):  # its head is known without a download
        kwargs = EXACT.saved()
        model, weights = timm.create_model(name, **kwargs), _source(name)
    elif tagged is not None and native is None:
        converted = timm.list_pretrained(f"{name}.*") if "." not in name else []
        model, weights = _load(name, pretrained=False), "none yet"
        if converted:
            weights = f"{len(converted)} converted, such as {converted[0]}"
    else:
        model = _load(name)
        weights = f"{model.pretrained_cfg.get('tag') or 'in the folder'}"
    cfg = model.pretrained_cfg
    info: dict[str, Any] = {
        "architecture": cfg["architecture"],
        "weights": f"{weights} ({cfg.get('license') or 'no license stated'})",
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": model.num_classes,
        "features": model.num_features,
        "input": " x ".join(str(n) for n in cfg["input_size"]),
    }
    for head_name, head in frame_heads(model).items():
        # an implicit head is a simplex of so many classes that its matrix is never formed
        report = simplex_report(head.num_classes, head.dim) if head.implicit else frame_report(head.weight)
        digits = 9 if head.implicit else 6
        info[f"head {head_name}"] = {
            "frame": f"{head.frame}, computed and not stored" if head.implicit else head.frame,
            "width": head.dim,
            "largest cosine": round(report.largest_cosine, digits),
            "coherence": round(report.coherence, digits),
            "Rankin bound on the largest cosine": round(report.rankin_bound, digits),
            "Welch bound on the coherence": round(report.welch_bound, digits),
            "equiangularity error": float(f"{report.equiangularity_error:.2g}"),
            "tightness error": float(f"{report.tightness_error:.2g}"),
            "feature norm": head.feature_norm,
            "logit scale": round(head.logit_scale.item(), 4),
        }
    if not frame_heads(model):
        info["head"] = "learned (not a fixed frame)"
    return info


def _info(args: argparse.Namespace) -> None:
    info = _describe(args.name)
    if args.json:
        print(json.dumps(info, indent=1))
        return
    for key, value in info.items():
        if isinstance(value, dict):
            print(key)
            for inner, entry in value.items():
                print(f"  {inner:<36}{entry}")
        else:
            print(f"{key:<38}{value:,}" if isinstance(value, int) else f"{key:<38}{value}")


def _predict(args: argparse.Namespace) -> None:
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError
    from timm.data import create_transform, resolve_data_config

    images = []
    for path in args.images:  # before the model is loaded: a wrong path should fail at once
        try:
            images.append(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))  # upright, as in training
        except (UnidentifiedImageError, OSError) as error:
            reason = "is not an image" if isinstance(error, UnidentifiedImageError) else f"cannot be read: {error}"
            raise EtfZooError(f"{path} {reason}.") from None
    model = _load(args.name).eval()
    transform: Any = create_transform(**resolve_data_config(model=model), is_training=False)
    names = model.pretrained_cfg.get("label_names") or [str(i) for i in range(model.num_classes)]
    with torch.inference_mode():
        probabilities = model(torch.stack([transform(image) for image in images])).softmax(dim=1)
    top = probabilities.topk(min(args.top, model.num_classes), dim=1)
    results = [
        {
            "image": path,
            "predictions": [{"label": names[i], "probability": p} for p, i in zip(ps, indices, strict=True)],
        }
        for path, ps, indices in zip(args.images, top.values.tolist(), top.indices.tolist(), strict=True)
    ]
    if args.json:
        print(json.dumps(results, indent=1))
        return
    for result in results:
        print(result["image"])
        for entry in result["predictions"]:
            print(f"  {100 * entry['probability']:6.2f} %  {entry['label']}")


def _images(args: argparse.Namespace, split: str) -> Any:
    from .data import Images

    return Images(args.data, split, args.image_column, args.label_column, args.batch_size)


def _evaluate(args: argparse.Namespace) -> None:
    from ..evaluation.measure import evaluate, format_table
    from ..frames import Hierarchy

    images = _images(args, args.split)
    model = _load(args.name).eval()
    distances = None
    if args.hierarchy:
        own = model.pretrained_cfg.get("label_names") or images.names
        distances = Hierarchy.from_json(args.hierarchy).distances(own)
    figures = evaluate(model, images.batches(model), distances=distances)
    print(json.dumps(figures, indent=1) if args.json else format_table(figures))


def _convert(args: argparse.Namespace) -> None:
    from ..sharing.checkpoint import convert_checkpoint

    if args.center and not (args.data and args.mode == "nearest"):
        raise EtfZooError("--center SPLIT takes the mean features of --data, for --mode nearest.")
    data_name = Path(args.data).resolve().name if args.data and Path(args.data).is_dir() else args.data
    results = convert_checkpoint(
        args.source,
        args.out,
        mode=args.mode,
        architecture=args.architecture,
        half=args.half,
        data=_images(args, args.split).batches if args.data else None,
        center=_images(args, args.center).batches if args.center else None,
        record={"dataset": {"name": data_name, "split": args.split}, "command": shlex.join(["etf-zoo", *args.argv])},
    )
    for when, figures in results.items():
        print(f"{when:<7} top-1 {figures['top1']:6.2f} %  cross-entropy {figures['loss']:.4f}")
    print(args.out)


def _export(args: argparse.Namespace) -> None:
    from ..sharing.onnx import export_onnx
    from ..sharing.plain import export_plain

    model = _load(args.name).eval()
    if not (args.plain or args.onnx):
        raise EtfZooError("Say what to export: --plain (a checkpoint for stock timm), --onnx, or both.")
    if args.plain:
        same = export_plain(model, args.out, half=args.half)
        print(f"{args.out}: same top-1 predictions, {'the same' if same else 'another'} softmax")
    if args.onnx:
        print(f"{export_onnx(model, args.out)}: the same logits")


def _model_folder(path: str) -> Path:
    """A model folder, also by the run that exported it."""
    from ..weights.native import CONFIG_NAME

    exported = Path(path) / "model"
    return exported if (exported / CONFIG_NAME).is_file() and not (Path(path) / CONFIG_NAME).is_file() else Path(path)


def _card(args: argparse.Namespace) -> None:
    from ..sharing.card import write_card

    print(write_card(_model_folder(args.folder)))


def _publish(args: argparse.Namespace) -> None:
    from ..sharing.publish import publish, zoo_folders
    from ..weights.native import cards_folder

    if bool(args.name) == args.all or (args.all and not args.org) or (args.org and args.repo_id):
        raise EtfZooError("Publish one folder or name, with --repo-id ORG/NAME, or the zoo with --all --org ORG.")
    if args.all:
        folders = list(zoo_folders())
    else:
        folders = [_model_folder(args.name) if Path(args.name).is_dir() else cards_folder() / args.name]
    for folder in folders:
        repo_id = f"{args.org}/{folder.resolve().name}" if args.org else args.repo_id
        done = publish(folder, repo_id, private=args.private, create_pr=args.create_pr, dry_run=args.dry_run)
        if args.dry_run:
            state = f"ready; would send {', '.join(done.files)}"
        else:
            state = f"{'commit' if done.changed else 'unchanged, at'} {done.revision[:12]}"
        print(f"{folder.name}: {done.url} ({state})")


def _data_options(command: argparse.ArgumentParser, required: bool) -> None:
    about = "folder of images by class, of parquet files, or a Hub name"
    command.add_argument("--data", required=required, help=about)
    command.add_argument("--split", default="validation")
    command.add_argument("--image-column", default="image")
    command.add_argument("--label-column", default="label")
    command.add_argument("--batch-size", type=int, default=64)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; the process's own by default.

    Returns:
        Exit status: 0, or 1 after a message on standard error.
    """
    parser = argparse.ArgumentParser(prog="etf-zoo", description="timm models with a fixed-frame classifier.")
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("list", help="names of the models")
    command.add_argument("pattern", nargs="?", help="such as 'resnet*'")
    command.add_argument("--pretrained", action="store_true", help="only those with weights")
    command.set_defaults(run=_list)

    command = commands.add_parser("info", help="size, frame, scale, input, weights and license of a model")
    command.add_argument("name", help="model name or folder")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_info)

    command = commands.add_parser("predict", help="most probable classes of images")
    command.add_argument("name", help="model name or folder")
    command.add_argument("images", nargs="+", metavar="IMAGE")
    command.add_argument("--top", type=int, default=5, help="how many classes")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_predict)

    command = commands.add_parser("evaluate", help="accuracy, calibration, collapse and severity on a data set")
    command.add_argument("name", help="model name or folder")
    _data_options(command, required=True)
    command.add_argument("--hierarchy", help="JSON file {child: parent} over the class names")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("convert", help="put a fixed frame in the place of a trained classifier")
    command.add_argument("source", help="timm name, hf-hub:ORG/NAME, folder in timm's format, or .safetensors file")
    command.add_argument("out", help="folder to write")
    command.add_argument(
        "--mode",
        choices=("exact", "nearest"),
        default="exact",
        help="the same softmax, behind a linear neck; or the nearest simplex frame, without one",
    )
    command.add_argument("--architecture", help="of a .safetensors file, as timm calls it")
    command.add_argument("--half", action="store_true", help="store the backbone in float16")
    command.add_argument("--center", metavar="SPLIT", help="subtract the mean features of this split (mode nearest)")
    _data_options(command, required=False)
    command.set_defaults(run=_convert)

    command = commands.add_parser("export", help="write a model for stock timm, without this package, or as ONNX")
    command.add_argument("name", help="model name or folder")
    command.add_argument("out", help="folder to write")
    command.add_argument("--plain", action="store_true", help="fold the frame into a linear layer: the same top-1")
    command.add_argument("--onnx", action="store_true", help="write model.onnx: the same logits")
    command.add_argument("--half", action="store_true", help="store a plain checkpoint in float16")
    command.set_defaults(run=_export)

    command = commands.add_parser("card", help="write the card (README.md) of a model folder")
    command.add_argument("folder", metavar="RUN", help="model folder, or the output of the run that exported it")
    command.set_defaults(run=_card)

    command = commands.add_parser("publish", help="check a model folder and put it on the Hugging Face Hub")
    command.add_argument("name", nargs="?", help="folder, output of a run, or name of a model of the zoo")
    command.add_argument("--repo-id", metavar="ORG/NAME", help="where to; where it was published last by default")
    command.add_argument("--all", action="store_true", help="every model of the zoo that has weights")
    command.add_argument("--org", help="publish as ORG/<name of the folder>")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    command.add_argument("--dry-run", action="store_true", help="check only, send nothing")
    command.set_defaults(run=_publish)

    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args.run(args)
    except BrokenPipeError:  # `etf-zoo list | head`
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"etf-zoo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
