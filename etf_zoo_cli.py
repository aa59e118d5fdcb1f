"""The command `etf-zoo`: its options and its help. What a command does is in `etf_zoo/cli/`.

This module stands beside the package, because `import etf_zoo` imports torch and timm, which takes seconds: a command's
help, the version and a mistyped option are answered here, before anything else is imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

__all__ = ["build_parser", "main"]

MODEL = (
    "timm name (resnet50.a1_in1k), twin (resnet50_etf, with or without a tag), model folder, output folder of a run, "
    "or hf-hub:ORG/NAME"
)
DATA = "folder of images by class, with or without splits; folder of parquet files; or Hub name"
TRAIN = {  # the options of a training that are asked for most: name -> help
    "--data": "folder of photos (train/CLASS/x.jpg and val/CLASS/x.jpg), folder of parquet files, or Hub name",
    "--model": MODEL,
    "--output": "folder of the run; the model is written to OUTPUT/model",
    "--config": "recipe, a YAML file with the same fields as these options",
    "--head": "frame, random or learned; finetune also takes warm",
    "--epochs": "passes over the training images",
    "--batch_size": "images of a step, over all processes",
    "--optim.lr": "peak learning rate",
    "--sizes": "training size by epoch, such as '[[0, 224]]'",
    "--seed": "of weights, data order and augmentation",
    "--time_budget": "save and stop after so long, such as 9m or 2h",
    "--resume": "go on from the last checkpoint in OUTPUT",
}
SCRIPTS = ("finetune", "pretrain", "prepare")
TUNE = {
    "--method": "full, head, layer, scl; or on frozen features linear_probe, knn, ncm",
    "--holdout": "share of each class's training images to watch",
    "--patience": "stop after so many epochs without a better result on them",
    "--shots": "train on so many images of each class",
    "--reserve": "room for so many classes to come, for etf-zoo add-classes",
    "--compare": "also run the same from random weights and with a learned head",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, the function that does it, as `module:function`."""
    parser = _Parser(
        prog="etf-zoo",
        usage="etf-zoo COMMAND ...",
        description="timm models with a fixed-frame classifier: find, use, train, measure and share them.",
        epilog="etf-zoo COMMAND --help shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    using = (_list, _info, _predict, _segment, _embed, _search, _evaluate)
    for add in (*using, _finetune, _add_classes, _pretrain, _prepare, _convert, _export, _card, _publish):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; the process's own by default.

    Returns:
        Exit status: 0; 1 after an error or where files could not be read; 2 after a mistyped option.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    wants_help = any(arg in ("-h", "--help") for arg in argv)
    if argv and argv[0] in SCRIPTS and not wants_help:  # whose own parser reads the options
        args, rest = _launch_parser().parse_known_args(argv[1:])
        args.run = f"train:{argv[0]}"
    else:
        args, rest = parser.parse_known_args(_joined(argv))
        if rest and not all(arg.startswith("--data.") and argv[0] == "evaluate" for arg in rest):
            args.parser.error(f"there is no option {rest[0]!r}" if rest[0][0] == "-" else f"what is {rest[0]!r}?")
    args.argv, args.rest = argv, rest
    from etf_zoo.cli.main import run

    return run(args)


def _joined(argv: list[str]) -> list[str]:
    """`--data.name value`, which only the trainer knows, as `--data.name=value`: the value is no argument of ours."""
    joined: list[str] = []
    for arg in argv:
        if joined and joined[-1].startswith("--data.") and "=" not in joined[-1] and not arg.startswith("--"):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and where the options are."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help\n")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=110)


def _versions() -> str:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return f"etf-zoo {of('etf-zoo')} (timm {of('timm')}, torch {of('torch')})"


def _add(commands, name: str, run: str, usage: str, about: str, **kwargs):
    command = commands.add_parser(
        name,
        prog=f"etf-zoo {name}",
        usage=f"etf-zoo {name} {usage}",
        help=about,
        description=about[0].upper() + about[1:] + ".",
        **kwargs,
    )
    command.set_defaults(run=run, parser=command)
    return command


# ------------------------------------------------------------------------------------------------- find and use models


def _list(commands) -> None:
    command = _add(commands, "list", "models:list_models", "[PATTERN] [--pretrained]", "names of the models")
    command.add_argument("pattern", nargs="?", metavar="PATTERN", help="such as 'resnet*'")
    command.add_argument("--pretrained", action="store_true", help="only what has weights, embedded ones first")


def _info(commands) -> None:
    about = "size, frame, scale, input, weights and license of a model"
    command = _add(commands, "info", "models:show_info", "MODEL [--json]", about)
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("--json", action="store_true", help="print JSON")


def _predict(commands) -> None:
    usage = "MODEL IMAGE... [--top K] [--reject SHARE] [--output FILE]"
    command = _add(commands, "predict", "predict:predict", usage, "most probable classes of images")
    command.add_argument("model", metavar="MODEL", help=MODEL)
    _images(command)
    command.add_argument("--top", type=_positive, default=5, metavar="K", help="how many classes to name (default: 5)")
    command.add_argument(
        "--reject",
        type=float,
        metavar="SHARE",
        help="say 'none of these' of unfamiliar images; SHARE, such as 0.05, is how many of the familiar ones you are "
        "willing to lose. For models that etf-zoo finetune wrote with held-out images",
    )
    command.add_argument(
        "--output",
        metavar="FILE",
        help="write a table there, too: FILE.csv, or FILE.jsonl with one JSON object for each image",
    )
    command.add_argument("--json", action="store_true", help="print one JSON array instead of text")


def _segment(commands) -> None:
    about = "what each pixel of an image shows, by a model of training/segment.py"
    command = _add(commands, "segment", "segment:segment_image", "MODEL IMAGE [--output FILE.png]", about)
    command.add_argument("model", metavar="MODEL", help="folder of a segmentation model")
    command.add_argument("image", metavar="IMAGE", help="image file")
    command.add_argument("--output", metavar="FILE.png", help="write the image there with its classes painted over it")
    command.add_argument("--json", action="store_true", help="print JSON")


def _images(command) -> None:
    command.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, folders (with all that lies in them), patterns such as 'x/**/*.jpg', or - for a list of "
        "such, one a line, on standard input",
    )
    command.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="images at a time (default: 32)")


def _embed(commands) -> None:
    usage = "IMAGE... --model MODEL --output FILE.safetensors"
    command = _add(commands, "embed", "search:embed_images", usage, "index images, to be searched by their looks")
    _images(command)
    command.add_argument("--model", required=True, metavar="MODEL", help=MODEL)
    command.add_argument("--output", required=True, metavar="FILE.safetensors", help="index to write")


def _search(commands) -> None:
    usage = "IMAGE... --index FILE.safetensors [--model MODEL] [--top K]"
    command = _add(commands, "search", "search:search_images", usage, "images of an index that look like yours")
    _images(command)
    command.add_argument("--index", required=True, metavar="FILE.safetensors", help="what etf-zoo embed wrote")
    command.add_argument(
        "--model", metavar="MODEL", help="by default the index's own; another needs the same classes and kind of frame"
    )
    command.add_argument("--top", type=_positive, default=10, metavar="K", help="how many images (default: 10)")
    command.add_argument("--json", action="store_true", help="print one JSON array instead of text")


def _evaluate(commands) -> None:
    command = _add(
        commands,
        "evaluate",
        "evaluate:evaluate",
        "MODEL DATA [--split NAME] [--errors FILE] [--pictures FOLDER]",
        "accuracy, calibration, collapse and worst confusions on a data set",
        epilog="Options of training/evaluate.py, such as --data.max_corrupt, work here too, and the other way round: "
        "the two are one. Needs pip install 'etf-zoo[training]'.",
    )
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("data", nargs="?", metavar="DATA", help=DATA)
    command.add_argument("--data", dest="data_option", help=argparse.SUPPRESS)  # as it was called before
    command.add_argument("--split", metavar="NAME", help="by default the test split, else the held-out one there is")
    command.add_argument("--image-column", metavar="NAME", help="column of the images (default: image)")
    command.add_argument("--label-column", metavar="NAME", help="column of the class labels (default: label)")
    command.add_argument("--batch-size", type=_positive, metavar="N", help="images at a time (default: 256)")
    command.add_argument("--size", type=_positive, metavar="PIXELS", help="side of the images (default: the model's)")
    command.add_argument("--hierarchy", metavar="FILE", help="JSON file {child: parent} over the class names")
    command.add_argument("--errors", metavar="FILE.csv", help="write a list of the images that are wrong")
    command.add_argument("--pictures", metavar="FOLDER", help="draw wrong images, confusions and class means there")
    command.add_argument("--output", metavar="FILE.json", help="write the figures, and what they were measured on")
    command.add_argument("--json", action="store_true", help="print JSON")
    _processes(command)


# --------------------------------------------------------------------------------------------------------------- train


def _launch_parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False)
    parser.add_argument("--all-options", action="store_true", help="list all options; takes some seconds")
    _processes(parser)
    return parser


def _processes(command) -> None:
    command.add_argument("--processes", type=_positive, default=0, metavar="N", help="processes, one for each GPU")
    command.add_argument("--config_file", metavar="FILE", help="launch file of accelerate, for FSDP or several nodes")


def _training(commands, name: str, about: str, options: dict[str, str]) -> None:
    command = _add(
        commands,
        name,
        f"train:{name}",
        "--data FOLDER [--model MODEL] [--output FOLDER] [OPTION VALUE]...",
        about,
        parents=[_launch_parser()],
        epilog=f"Every field of a recipe is an option: --all-options lists them. The same as accelerate launch "
        f"training/{name}.py in a clone. Needs pip install 'etf-zoo[training]'.",
    )
    for option, text in options.items():  # listed only: the trainer reads them, see `etf_zoo/trainer/recipe/parsing.py`
        flag = option in ("--resume", "--compare")
        kwargs = {"action": "store_true"} if flag else {"metavar": option.strip("-").rpartition(".")[2].upper()}
        command.add_argument(option, help=text, default=argparse.SUPPRESS, **kwargs)


def _finetune(commands) -> None:
    _training(commands, "finetune", "fine-tune a model on your images", {**TRAIN, **TUNE})


def _add_classes(commands) -> None:
    usage = "MODEL FOLDER --output FOLDER [--test FOLDER] [--base FOLDER]"
    about = "add classes to a model that has room for them, from a few images"
    command = _add(
        commands,
        "add-classes",
        "later:add_classes",
        usage,
        about,
        epilog="The model comes from etf-zoo finetune --reserve N. Its backbone and its frame stay as they are. Needs "
        "pip install 'etf-zoo[training]'.",
    )
    command.add_argument("model", metavar="MODEL", help="model folder, or output folder of a run")
    command.add_argument("folder", metavar="FOLDER", help="a folder for each new class, with two images or more")
    command.add_argument("--output", required=True, metavar="FOLDER", help="model folder to write")
    command.add_argument("--test", default="", metavar="FOLDER", help="test images of old and new classes")
    command.add_argument(
        "--base", default="", metavar="FOLDER", help="what the model was trained on, if no memory lies beside it"
    )
    command.add_argument("--steps", type=_positive, default=100, metavar="N", help="steps of the fit (default: 100)")
    command.add_argument(
        "--rate",
        type=float,
        default=3e-4,
        metavar="LR",
        help="its learning rate (default: 0.0003); a larger one learns the new classes better and forgets more",
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _pretrain(commands) -> None:
    _training(commands, "pretrain", "train a model from the start, by a recipe", TRAIN)


def _prepare(commands) -> None:
    options = {"--data": DATA, "--out": "folder to write", "--data.size": "side of the stored images in pixels"}
    _training(commands, "prepare", "decode a data set once, into arrays for training", options)


# --------------------------------------------------------------------------------------------------------------- share


def _convert(commands) -> None:
    usage = "SOURCE OUT [--mode exact|nearest] [--data DATA]"
    about = "put a fixed frame in the place of a trained classifier"
    command = _add(commands, "convert", "share:convert", usage, about)
    command.add_argument("source", metavar="SOURCE", help=f"{MODEL}, or a .safetensors file")
    command.add_argument("out", metavar="OUT", help="folder to write")
    command.add_argument(
        "--mode",
        choices=("exact", "nearest"),
        default="exact",
        help="exact: the same softmax, behind a linear neck; nearest: the nearest simplex frame, without one",
    )
    command.add_argument("--architecture", metavar="NAME", help="of a .safetensors file, as timm calls it")
    command.add_argument("--half", action="store_true", help="store the backbone in float16")
    command.add_argument("--data", metavar="DATA", help=f"measure before and after on this: {DATA}")
    command.add_argument("--split", metavar="NAME", help="split to measure on; by default as for evaluate")
    command.add_argument("--center", metavar="SPLIT", help="subtract the mean features of this split (mode nearest)")
    command.add_argument("--image-column", metavar="NAME", help="column of the images (default: image)")
    command.add_argument("--label-column", metavar="NAME", help="column of the class labels (default: label)")
    command.add_argument("--batch-size", type=_positive, metavar="N", help="images at a time (default: 256)")


def _export(commands) -> None:
    usage = "MODEL OUT --format plain|onnx [--half] [--output features|top_k]"
    about = "write a model for stock timm, without this package, or as ONNX"
    command = _add(commands, "export", "share:export", usage, about)
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("out", metavar="OUT", help="folder to write")
    command.add_argument(
        "--format",
        action="append",
        choices=("plain", "onnx"),
        dest="formats",
        help="plain: a checkpoint for stock timm, the same top-1; onnx: model.onnx, the same logits; twice for both",
    )
    command.add_argument("--plain", action="append_const", const="plain", dest="formats", help=argparse.SUPPRESS)
    command.add_argument("--onnx", action="append_const", const="onnx", dest="formats", help=argparse.SUPPRESS)
    command.add_argument("--half", action="store_true", help="store a plain checkpoint in float16")
    command.add_argument(
        "--output",
        choices=("logits", "features", "top_k"),
        help="what the ONNX file gives: all logits (default), the features before the head, or the best classes",
    )
    command.add_argument("--top", type=int, metavar="K", help="how many classes top_k gives (default 5)")


def _card(commands) -> None:
    about = "write the card (README.md) of a model folder anew"
    command = _add(commands, "card", "share:write_cards", "MODEL...", about)
    command.add_argument("folders", nargs="+", metavar="MODEL", help="model folder, run, or name in model_cards/")


def _publish(commands) -> None:
    usage = "MODEL --repo-id ORG/NAME [--dry-run]  |  --all --org ORG"
    about = "check a model folder and put it on the Hugging Face Hub"
    command = _add(commands, "publish", "share:publish_models", usage, about)
    command.add_argument("model", nargs="?", metavar="MODEL", help="model folder, run, or name of an embedded model")
    command.add_argument("--repo-id", metavar="ORG/NAME", help="where to (default: where it was published last)")
    command.add_argument("--all", action="store_true", help="every embedded model")
    command.add_argument("--org", help="publish as ORG/<name of the folder>")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    command.add_argument("--dry-run", action="store_true", help="check only, send nothing")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
