"""Command line: `etf-zoo list | info | predict | evaluate | card | publish`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

__all__ = ["main"]


def _load(name: str, pretrained: bool = True) -> Any:
    """A model by name or folder, with an error that names the fix."""
    import timm

    import etf_zoo  # noqa: F401  registers the twins

    from .download import hub_errors

    if Path(name).is_dir():
        name = f"local-dir:{name}"
    elif ":" not in name and not timm.is_model(name):
        import difflib

        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"There is no model or folder {name!r}.{hint} `etf-zoo list` shows the names.")
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
        raise ValueError(f"No model matches {pattern!r}.")
    print("\n".join(names))


def _describe(name: str) -> dict[str, Any]:
    import timm

    from .frames import frame_report
    from .heads import frame_heads

    registered = not Path(name).is_dir() and timm.is_model(name.split(".")[0])
    has_weights = not registered or timm.models.is_model_pretrained(name) or bool(timm.list_pretrained(f"{name}.*"))
    model = _load(name, pretrained=has_weights)
    cfg = model.pretrained_cfg
    info: dict[str, Any] = {
        "architecture": cfg["architecture"],
        "weights": f"{cfg.get('tag') or 'in the folder'} ({cfg.get('license', 'no licence stated')})"
        if has_weights
        else "none yet",
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": model.num_classes,
        "features": model.num_features,
        "input": " x ".join(str(n) for n in cfg["input_size"]),
    }
    for head_name, head in frame_heads(model).items():
        report = frame_report(head.weight)
        info[f"head {head_name}"] = {
            "frame": head.frame,
            "width": head.dim,
            "largest cosine": round(report.largest_cosine, 6),
            "coherence": round(report.coherence, 6),
            "Rankin bound on the largest cosine": round(report.rankin_bound, 6),
            "Welch bound on the coherence": round(report.welch_bound, 6),
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
    from PIL import Image, UnidentifiedImageError
    from timm.data import create_transform, resolve_data_config

    images = []
    for path in args.images:  # before the model is loaded: a wrong path should fail at once
        try:
            images.append(Image.open(path).convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            reason = "is not an image" if isinstance(error, UnidentifiedImageError) else f"cannot be read: {error}"
            raise ValueError(f"{path} {reason}.") from None
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


class _Rows:
    """Batches of a data set, as often as they are asked for: transformed images and the model's own label numbers."""

    def __init__(self, rows, transform, image_column: str, label_column: str, numbers: list[int], batch_size: int):
        self.rows, self.transform, self.numbers, self.batch_size = rows, transform, numbers, batch_size
        self.image_column, self.label_column = image_column, label_column

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self):
        import torch

        for batch in self.rows.iter(self.batch_size):
            images = [self.transform(image.convert("RGB")) for image in batch[self.image_column]]
            labels = [self.numbers[label] for label in batch[self.label_column]]
            yield torch.stack(images), torch.tensor(labels)


def _label_numbers(own: Sequence[str] | None, theirs: Sequence[str], num_classes: int) -> list[int]:
    """Model's number for each of the data's labels, by name; by position only where the model has no names."""
    if own is None:
        if len(theirs) != num_classes:
            raise ValueError(f"The model has {num_classes} classes, the data {len(theirs)}.")
        return list(range(num_classes))
    missing = [name for name in theirs if name not in own]
    if missing:
        raise ValueError(
            f"The model does not know {len(missing)} of the data's {len(theirs)} classes, such as {missing[0]!r}; it "
            f"knows {', '.join(repr(name) for name in own[:3])} and so on. Fine-tune it on this data first."
        )
    return [list(own).index(name) for name in theirs]


def _evaluate(args: argparse.Namespace) -> None:
    try:
        import datasets
        from tqdm import tqdm
    except ImportError as error:
        raise RuntimeError(f"evaluate needs {error.name}: pip install 'etf-zoo[training]'.") from None
    from timm.data import create_transform, resolve_data_config

    from .evaluation import evaluate, format_table
    from .frames import Hierarchy

    folder = Path(args.data)
    try:
        is_images = folder.is_dir() and not any(folder.rglob("*.parquet"))
        where = {"path": "imagefolder", "data_dir": args.data} if is_images else {"path": args.data}
        rows = datasets.load_dataset(**where, split=args.split)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise ValueError(f"Cannot read split {args.split!r} of {args.data!r}: {error}") from None
    for column in (args.image_column, args.label_column):
        if column not in rows.column_names:
            raise ValueError(f"{args.data} has no column {column!r} but {', '.join(rows.column_names)}.")
    names = getattr(rows.features[args.label_column], "names", None)
    if names is None:
        raise ValueError(f"Column {args.label_column!r} has no class names; name a column of class labels.")
    model = _load(args.name).eval()
    numbers = _label_numbers(model.pretrained_cfg.get("label_names"), names, model.num_classes)
    distances = None
    if args.hierarchy:
        own = model.pretrained_cfg.get("label_names") or names
        distances = Hierarchy.from_json(args.hierarchy).distances(own)
    transform = create_transform(**resolve_data_config(model=model), is_training=False)
    rows = rows.cast_column(args.image_column, datasets.Image(mode="RGB"))
    batches = _Rows(rows, transform, args.image_column, args.label_column, numbers, args.batch_size)
    figures = evaluate(model, tqdm(batches, unit="batch", disable=None), distances=distances)
    print(json.dumps(figures, indent=1) if args.json else format_table(figures))


def _model_folder(path: str) -> Path:
    """A model folder, also by the run that exported it."""
    from .pretrained import CONFIG_NAME

    exported = Path(path) / "model"
    return exported if (exported / CONFIG_NAME).is_file() and not (Path(path) / CONFIG_NAME).is_file() else Path(path)


def _card(args: argparse.Namespace) -> None:
    from .card import write_card

    print(write_card(_model_folder(args.folder)))


def _publish(args: argparse.Namespace) -> None:
    from .pretrained import cards_folder
    from .publish import publish, zoo_folders

    if bool(args.name) == args.all or (args.all and not args.org) or (args.org and args.repo_id):
        raise ValueError("Publish one folder or name, with --repo-id ORG/NAME, or the zoo with --all --org ORG.")
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

    command = commands.add_parser("info", help="size, frame, scale, input, weights and licence of a model")
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
    command.add_argument("--data", required=True, help="folder of images by class, of parquet files, or a Hub name")
    command.add_argument("--split", default="validation")
    command.add_argument("--image-column", default="image")
    command.add_argument("--label-column", default="label")
    command.add_argument("--hierarchy", help="JSON file {child: parent} over the class names")
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_evaluate)

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
