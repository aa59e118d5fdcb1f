"""The model card: `README.md` of a model folder, made from its `config.json` and `metrics*.json` and nothing else."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from timm.models import get_pretrained_cfg

from ..errors import EtfZooError
from ..frames.describe import describe_frame
from ..models.names import SUFFIX, as_names, frame_heads
from ..text import code, markdown, quoted
from ..weights.native import CONFIG_NAME, WEIGHTS_NAME, cards_folder, recorded_location
from .origin import tell_origin

__all__ = ["CARD_NAME", "METRICS_NAME", "card_problems", "render_card", "top1_of_seeds", "write_card"]

CARD_NAME = "README.md"
# What each field of a recipe is if nothing is said of it; `python tests/sharing/test_card.py` writes it.
DEFAULTS = Path(__file__).with_name("recipe_defaults.json")
METRICS_NAME = "metrics.json"
_LABELS = {
    "top1": "top-1 (%)",
    "top5": "top-5 (%)",
    "loss": "cross-entropy",
    "ece": "calibration error, 15 bins (%)",
    "nc1_quotient": "NC1: within-class over between-class variance",
    "nc2_etf_distance": "NC2: distance of class means from a simplex ETF",
    "nc3_self_duality": "NC3: distance of head and class means",
    "nc4_agreement": "NC4: agreement with the nearest class mean",
    "severity": "severity of a mistake",
}
_TREE_HEIGHTS = {"tiny_imagenet": 11, "cifar100": 2, "grocery": 3}  # of their `hierarchy.json`
_DATA = {
    "tiny_imagenet": (
        "Tiny ImageNet, 64 px, 200 classes, re-encoded as WebP quality 70: figures are close to, not the same as, "
        "those on the original files.",
        "Tiny ImageNet is under the ImageNet terms of access (non-commercial research).",
    ),
    "cifar100": (
        "CIFAR-100, 32 px, 100 classes, re-encoded as WebP quality 85, in a split of its own: figures do not compare "
        "with those on the official test images.",
        "no license is stated for CIFAR-100, whose images come from the Tiny Images collection, which was withdrawn.",
    ),
    "grocery": ("GroceryStore, official splits, short side 96 px.", "GroceryStore is under the MIT license."),
    "cub50": (
        "The first 50 species of Caltech-UCSD Birds 200-2011, official split, whole images, short side 96 px.",
        "Caltech-UCSD Birds is for non-commercial research.",
    ),
    "flowers17": (
        "Oxford Flowers-17, a random split, short side 96 px.",
        "no license is stated for Oxford Flowers.",
    ),
    "scikit-learn digits": ("scikit-learn's digits, 8 px.", "UCI optical digits, CC BY 4.0."),
}
# Identifiers that the Hub takes as a license, as far as timm's checkpoints and our data have them; others need a name.
_HUB_LICENSES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "openrail"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "apple-ascl", "apple-amlr", "gemma"),
    *("fair-noncommercial-research-license", "unknown", "other"),
}
_USE = (
    "A start for transfer to fine-grained image data, and for research on fixed classifiers and neural collapse. "
    "Whether a fixed frame helps on your data is for a measurement there to say."
)
_LIMITS = "Trained on small images of few classes: a start for transfer and for research, not a product."
# What a run does beside its result: of no use to who reads how the weights came about.
_BESIDE = {
    *("output", "model", "tag", "notes", "resume", "time_budget", "tensorboard", "log_every", "compile", "compare"),
    *("eval_every", "save_every", "save_steps", "save_minutes", "keep_checkpoints"),
}
_SECTIONS = ("Use", "Results", "How it was made", "Intended use and limits", "License", "Cite")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise EtfZooError(f"{path} is missing; a model folder needs it for its card. Export the run again.")
    return json.loads(path.read_text(encoding="utf-8"))


def _head_text(config: dict[str, Any], name: str, folder: Path) -> str:
    args = config.get("model_args", {})
    if not args.get("base", config["architecture"]).endswith("_etf"):  # base: of a model with a skip connection
        control = ": the control for the fixed frame of the same recipe, data order and seed"
        return "a learned linear classifier" + (control if "_control." in name else "")
    if "head=learned_cosine" in (config.get("pretrained_cfg", {}).get("description") or ""):
        return "learned prototypes under a frame's norm and scale: the control for the frame being fixed"
    frame, orientation = args.get("frame", "auto"), args.get("orientation", "auto")
    text = "a fixed frame, never trained: "
    reserve = args.get("reserve", 0)
    classes, frame = config["num_classes"] + reserve, "subspaces" if args.get("subspaces") else frame
    text += describe_frame(frame, classes, _frame_width(config, folder), orientation=orientation)
    text += f", {reserve} of them in reserve for classes to come" if reserve else ""
    text += ", whose prototypes have stored lengths" if args.get("lengths") else ""
    if args.get("neck") == "linear":
        return text + ", behind a linear neck; the two together are a learned classifier by another name"
    if args.get("neck") == "center":
        return text + ", on features centered by a stored mean"
    neck = args.get("neck") not in (None, "none")
    return text + (f", behind a `{code(args['neck'])}` neck" if neck else "")


def _frame_width(config: dict[str, Any], folder: Path) -> int:
    """Dimensions of the space that a model's frame lies in: of the stored one, or by building it without computing."""
    names = as_names(config["pretrained_cfg"].get("classifier"))
    if (folder / WEIGHTS_NAME).is_file():
        with suppress(SafetensorError), safe_open(folder / WEIGHTS_NAME, "pt") as file:  # `publish` says if unreadable
            stored = [f"{name}.weight" for name in names if f"{name}.weight" in file.keys()]  # noqa: SIM118
            if stored:
                return file.get_slice(stored[0]).get_shape()[1]
    args = {key: value for key, value in config.get("model_args", {}).items() if key not in ("frame", "hierarchy")}
    with torch.device("meta"):
        model = timm.create_model(config["architecture"], **{**args, "num_classes": config["num_classes"]})
    return next(iter(frame_heads(model).values())).dim


def _results(metrics: dict[str, Any], name: str) -> str:
    if not metrics.get("results"):
        return "Not measured."
    columns = {name: metrics["results"], **{c["model"]: c["results"] for c in metrics.get("references", [])}}
    rows = [key for key in _LABELS if all(key in values for values in columns.values())]
    lines = ["| | " + " | ".join(map(markdown, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {_label(key, metrics)} | " + " | ".join(f"{values[key]:.2f}" for values in columns.values()) + " |"
        for key in rows
    ]
    if len(columns) == 1 and metrics.get("training", {}).get("recipe", {}).get("head") != "learned":
        lines += ["", "No control was trained beside it, so the figures say nothing about the frame."]
    return "\n".join(lines)


def _label(key: str, metrics: dict[str, Any]) -> str:
    """What a figure is, with the scale that it lies on."""
    dataset = metrics.get("dataset", {})
    height = dataset.get("tree_height") or _TREE_HEIGHTS.get(_data_name(dataset.get("name") or ""))
    if key != "severity":
        return _LABELS[key]
    scale = f", from 1 to {height:g}" if height else ""
    return f"severity of a mistake: height of the lowest common ancestor{scale}"


def top1_of_seeds(folder: Path) -> list[float]:
    """Top-1 (%) of a folder's model, and of the same recipe with other seeds, whose figures alone are there."""
    files = [folder / METRICS_NAME, *sorted(folder.glob("metrics_seed*.json"))]
    return [_read(file)["results"]["top1"] for file in files]


def _seeds(folder: Path) -> str:
    if not any(folder.glob("metrics_seed*.json")):
        return ""
    found = top1_of_seeds(folder)
    return (
        f"Top-1 over {len(found)} seeds, of which this is the first: {', '.join(f'{top1:.2f}' for top1 in found)} %; "
        f"mean {statistics.mean(found):.2f}, standard deviation {statistics.stdev(found):.2f}."
    )


def _data_name(name: str) -> str:
    """Hub id of a data set, or the name of a local folder without its path."""
    return name if _is_hub_id(name) else Path(name).name


def _is_hub_id(name: str) -> bool:
    """Whether a data set is named as on the Hub. Files of a run name local ones without the folders they lie in."""
    return name.count("/") == 1 and name[0] not in "./~" and not name.endswith("/") and not Path(name).exists()


def _evals(metrics: dict[str, Any]) -> list[EvalResult] | None:
    """Entries of the model index; None where nothing was measured."""
    results, dataset = metrics.get("results", {}), metrics.get("dataset", {})
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=_data_name(dataset["name"]),
            dataset_name=_data_name(dataset["name"]),
            dataset_split=dataset["split"],
            metric_type="accuracy",
            metric_name=_LABELS[key],
            metric_value=round(results[key], 2),
        )
        for key in ("top1", "top5")
        if key in results
    ] or None


def _base_model(config: dict[str, Any], metrics: dict[str, Any]) -> str | None:
    """Hub id of the model whose weights these grew from, if there is one and it has an id."""
    named = metrics.get("base_model") or config.get("base_model")
    recipe = metrics.get("training", {}).get("recipe", {})
    if named or not recipe.get("pretrained"):
        return named.partition("@")[0] if named else None
    start = recipe["model"].removeprefix("hf-hub:")
    if start != recipe["model"]:
        return start.partition("@")[0]
    place = recorded_location(cards_folder() / start)
    cfg = None if place or ":" in start else get_pretrained_cfg(start)
    hub_id = place[0] if place else getattr(cfg, "hf_hub_id", None)
    return hub_id.partition("@")[0] if hub_id else None


def _settings(recipe: dict[str, Any]) -> str:
    """The settings of a recipe that are not the usual ones, as YAML that a training reads."""
    usual = json.loads(DEFAULTS.read_text(encoding="utf-8"))["finetune" if "method" in recipe else "pretrain"]
    lines = []
    for key, value in recipe.items():
        if key in _BESIDE:
            continue
        if isinstance(value, dict) and isinstance(usual.get(key), dict) and not key.endswith("args"):
            value = {k: v for k, v in value.items() if v != usual[key].get(k)}
            if not value:
                continue
        if value != usual.get(key) and (key, value) != ("precision", "no"):  # as fp32 was called
            lines.append(f"{code(key)}: {json.dumps(value)}")
    return "\n".join(lines)


def _measured(cfg: dict[str, Any], metrics: dict[str, Any], load_name: str, has_weights: bool) -> str:
    if not metrics.get("results"):
        return ""
    dataset = metrics["dataset"]
    data, size = _data_name(dataset["name"]), dataset.get("size", cfg["input_size"][-1])
    text = _DATA.get(Path(data).name, ("", ""))[0]
    command = _command(metrics, load_name)
    copy = ", DATA being a copy of the data set" if " DATA" in command else ""
    again = f" by `{command}`{copy}" if has_weights else ""
    return (
        f"On {dataset['images']:,} images of {markdown(data)} ({markdown(dataset['split'])}) at {size} px, "
        f"measured from the stored weights{again}. {text}".rstrip()
    )


def _command(metrics: dict[str, Any], load_name: str) -> str:
    """The command that measures the model again."""
    recorded = metrics.get("command", "")
    if recorded.startswith("etf-zoo convert"):
        return code(recorded)
    if not recorded.startswith("etf-zoo evaluate"):  # a script of a clone, at a path of the machine it ran on
        dataset = metrics["dataset"]
        recorded = f"etf-zoo evaluate MODEL DATA --split {shlex.quote(dataset['split'])}"
    model = load_name.removeprefix("local-dir:")
    return code(recorded.replace(" MODEL ", f" {model} ", 1))


def _license(config: dict[str, Any]) -> dict[str, Any]:
    """License metadata: the Hub wants a name for every license that it does not know."""
    license_name = config["pretrained_cfg"].get("license") or "other"
    if license_name in _HUB_LICENSES:
        named = {key: config[key] for key in ("license_name", "license_link") if config.get(key)}
        return {"license": license_name, **named}
    return {"license": "other", "license_name": license_name}


def render_card(folder: str | Path, *, repo_id: str | None = None) -> str:
    """Text of a folder's card.

    A converted model has no `training` in its `metrics.json`, or no such file at all: then `source` and `base_model`
    (a Hub id) in either file, and the description in the pretrained cfg, say where it comes from.

    Args:
        folder: Model folder with `config.json` and `metrics.json`.
        repo_id: Hub repository it lies in, or will; the recorded one by default.

    Raises:
        ValueError: If a file is missing, or lacks what the card needs.
    """
    folder = Path(folder)
    config = _read(folder / CONFIG_NAME)
    cfg = config["pretrained_cfg"]
    converted = (cfg.get("description") or "").startswith("converted")
    metrics = {} if converted and not (folder / METRICS_NAME).is_file() else _read(folder / METRICS_NAME)
    place = recorded_location(folder)
    repo_id = repo_id or (place[0] if place else None)
    tag = cfg.get("tag")
    ours = folder.resolve().parent == cards_folder().resolve()
    native = ours and config["architecture"].endswith(SUFFIX)
    embedded = (folder / WEIGHTS_NAME).is_file()
    name = folder.resolve().name if ours else f"{config['architecture']}.{tag}" if tag else config["architecture"]
    here = f"local-dir:model_cards/{name}" if ours else "local-dir:FOLDER"
    load_name = name if native else f"hf-hub:{repo_id}" if repo_id else here

    recipe = metrics.get("training", {}).get("recipe", {})
    data_name = metrics.get("training", {}).get("data_source", "")
    license_data = _license(config)
    unknown = f"see the terms of {markdown(data_name or 'what the source was trained on')}."
    sets = [metrics.get("dataset", {}).get("name", ""), recipe.get("data", {}).get("source", "")]
    card_data = ModelCardData(
        **license_data,
        library_name="timm",
        tags=["image-classification", "timm", "etf-zoo", "neural-collapse"] + ["converted"] * converted,
        datasets=sorted({name for name in sets if _is_hub_id(name)}) or None,
        base_model=_base_model(config, metrics),
        pipeline_tag="image-classification",
        model_name=name,
        eval_results=_evals(metrics),
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).with_name("card_template.md")),
        name=markdown(name),
        what=f"{markdown(config['architecture'])} with {config['num_classes']} classes. "
        f"Its classifier is {_head_text(config, name, folder)}.",
        load_name=quoted(load_name),
        hub_name=quoted(f"hf-hub:{repo_id}") if native and repo_id else None,
        embedded=native and embedded,
        has_weights=embedded or repo_id,
        size=cfg["input_size"][-1],
        mean=tuple(round(x, 3) for x in cfg["mean"]),
        std=tuple(round(x, 3) for x in cfg["std"]),
        fresh="a fresh frame" if config["architecture"].endswith(SUFFIX) else "a classifier of random weights",
        results=_results(metrics, name),
        seeds=_seeds(folder),
        measured=_measured(cfg, metrics, load_name, bool(embedded or repo_id)),
        made=tell_origin(config, metrics),
        recipe=_settings(recipe),
        recipe_file=(folder / "recipe.yaml").is_file(),
        use=metrics.get("intended_use") or _USE,
        limits=metrics.get("limits") or ("Those of its source." if converted else _LIMITS),
        license=markdown(cfg.get("license") or "other"),
        data_license=_DATA.get(data_name, ("", unknown))[1],
        hierarchy=config.get("model_args", {}).get("frame") == "hierarchy",
    )
    return str(card)


def write_card(folder: str | Path) -> Path:
    """Write the card of a model folder; see `render_card`."""
    path = Path(folder) / CARD_NAME
    path.write_text(render_card(folder), encoding="utf-8")
    return path


def card_problems(folder: str | Path) -> list[str]:
    """What a folder's card lacks before others should see it, one line each that names the fix; offline.

    Args:
        folder: Model folder with `README.md`, `config.json` and `metrics.json`.
    """
    folder = Path(folder)
    if not (folder / CARD_NAME).is_file():
        return [f"there is no {CARD_NAME}: run `etf-zoo card {folder}`"]
    try:
        wanted = render_card(folder)
        card = ModelCard((folder / CARD_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        return [str(error)]
    if str(card) != wanted:
        return [f"{CARD_NAME} is not what {CONFIG_NAME} and {METRICS_NAME} say: run `etf-zoo card {folder}`"]
    data: Any = card.data
    problems = []
    if data.license in (None, "other", "unknown") and not data.get("license_name"):
        problems.append(
            f"no license is stated: put one into `license` of `pretrained_cfg` in {CONFIG_NAME}, or "
            f"`license_name` and `license_link` beside `pretrained_cfg`"
        )
    if not data.eval_results:
        problems.append(f"no figures: {METRICS_NAME} has no top1; measure the model")
    elif not all(math.isfinite(entry.metric_value) for entry in data.eval_results):
        problems.append(f"the figures in {METRICS_NAME} are not finite")
    problems += [f"section {name!r} is missing" for name in _SECTIONS if f"\n## {name}\n" not in card.text]
    return problems
