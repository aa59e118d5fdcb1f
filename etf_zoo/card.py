"""The model card: `README.md` of a model folder, made from its `config.json` and `metrics.json` and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .pretrained import CONFIG_NAME, WEIGHTS_NAME, cards_folder

__all__ = ["METRICS_NAME", "render_card", "write_card"]

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
    "severity": "severity of a mistake (height of the lowest common ancestor)",
}
_DATA = {
    "tiny_imagenet": (
        "Tiny ImageNet, 64 px, 200 classes, re-encoded as WebP quality 70: figures are close to, not the same as, "
        "those on the original files.",
        "Tiny ImageNet is under the ImageNet terms of access (non-commercial research).",
    ),
    "scikit-learn digits": ("scikit-learn's digits, 8 px.", "UCI optical digits, CC BY 4.0."),
}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; a model folder needs it for its card. Export the run again.")
    return json.loads(path.read_text(encoding="utf-8"))


def _head_text(config: dict[str, Any]) -> str:
    args = config.get("model_args", {})
    if not args.get("base", config["architecture"]).endswith("_etf"):  # base: of a model with a skip connection
        return "a learned linear classifier: the control for the fixed frame of the same recipe, data order and seed"
    frame, orientation = args.get("frame", "auto"), args.get("orientation", "random")
    kind = {
        "auto": "a simplex equiangular tight frame (the most separated directions; another code where none fits)",
        "simplex": "a simplex equiangular tight frame",
        "random": "independent random unit vectors, the control for the geometry",
        "code": "a spherical code",
        "custom": "given as a matrix",
    }[frame]
    return f"a fixed frame, never trained: {kind}, orientation `{orientation}`"


def _results_table(metrics: dict[str, Any], name: str) -> str:
    columns = {name: metrics["results"], **{c["model"]: c["results"] for c in metrics.get("references", [])}}
    rows = [key for key in _LABELS if all(key in values for values in columns.values())]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {_LABELS[key]} | " + " | ".join(f"{values[key]:.2f}" for values in columns.values()) + " |" for key in rows
    ]
    return "\n".join(lines)


def render_card(folder: str | Path) -> str:
    """Text of a folder's card.

    Args:
        folder: Model folder with `config.json` and `metrics.json`.

    Raises:
        ValueError: If one of the two is missing.
    """
    folder = Path(folder)
    config, metrics = _read(folder / CONFIG_NAME), _read(folder / METRICS_NAME)
    cfg, training = config["pretrained_cfg"], metrics["training"]
    tag = cfg.get("tag")
    ours = folder.resolve().parent == cards_folder().resolve()
    name = folder.resolve().name if ours else f"{config['architecture']}.{tag}" if tag else config["architecture"]
    data_text, data_license = _DATA.get(training["data_source"], (training["data_source"], "see the data's own terms."))
    dataset = metrics["dataset"]
    evals = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset["name"],
            dataset_name=dataset["name"],
            dataset_split=dataset["split"],
            metric_type="accuracy",
            metric_name=_LABELS[key],
            metric_value=round(metrics["results"][key], 2),
        )
        for key in ("top1", "top5")
    ]
    license_name = cfg.get("license", "other")
    card_data = ModelCardData(
        license=license_name,
        library_name="timm",
        tags=["image-classification", "timm", "etf-zoo", "neural-collapse"],
        datasets=[dataset["name"]] if "/" in dataset["name"] else None,
        pipeline_tag="image-classification",
        model_name=name,
        eval_results=evals,
    )
    recipe = "\n".join(
        f"{key}: {json.dumps(value)}" for key, value in training["recipe"].items() if value not in ("", {}, [])
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).with_name("card_template.md")),
        name=name,
        what=f"{config['architecture']} with {config['num_classes']} classes. Its classifier is {_head_text(config)}.",
        load_name=name if ours else "local-dir:FOLDER",
        embedded=ours,
        has_weights=(folder / WEIGHTS_NAME).is_file(),
        size=cfg["input_size"][-1],
        mean=tuple(round(x, 3) for x in cfg["mean"]),
        std=tuple(round(x, 3) for x in cfg["std"]),
        results=_results_table(metrics, name),
        measured=(
            f"On {dataset['images']} images of {dataset['name']} ({dataset['split']}) at {cfg['input_size'][-1]} px, "
            f"measured from the stored weights by `{metrics['command']}`. {data_text}"
        ),
        trained=(
            f"{training['steps']} steps on {training['train_images']} images in {training['hours']} hours on "
            f"{training['device']} ({training['processes']} process(es)), commit "
            f"{training['commit'][:12] or 'unknown'}. {training['recipe'].get('notes', '')}".rstrip()
        ),
        recipe=recipe,
        limits=metrics.get("limits")
        or "Trained on small images of few classes: a start for transfer and for research, not a product.",
        license=license_name,
        data_license=data_license,
    )
    return str(card)


def write_card(folder: str | Path) -> Path:
    """Write the card of a model folder; see `render_card`."""
    path = Path(folder) / "README.md"
    path.write_text(render_card(folder), encoding="utf-8")
    return path
