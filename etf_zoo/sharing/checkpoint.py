"""Checkpoints with a learned classifier, converted into model folders with a card."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from ..errors import EtfZooError, LoadError
from ..evaluation.measure import evaluate
from ..models.convert import convert_classifier, learned_classifiers
from ..models.names import as_names, base_name
from ..weights.download import download, hub_errors
from ..weights.native import CONFIG_NAME, WEIGHTS_NAME, read_file
from .card import METRICS_NAME, write_card
from .folder import save_folder

__all__ = ["convert_checkpoint", "load_learned"]

Data = Callable[[nn.Module], Iterable[tuple[Tensor, Tensor]]]
_LIMITS = {
    "exact": "Those of its source. Softmax and predictions are the source's; a sigmoid of each logit is not.",
    "nearest": "Those of its source, and the predictions are not the source's: the classifier was replaced.",
}


def load_learned(source: str, *, architecture: str | None = None) -> nn.Module:
    """A timm model with its learned classifier, from wherever it lies.

    Args:
        source: A timm name (`resnet50.a1_in1k`), `hf-hub:ORG/NAME`, a folder in timm's format, a `.safetensors` file.
        architecture: timm's name of the architecture; for a file, unless timm's `config.json` lies beside it.

    Raises:
        EtfZooError: If there is no such source, it is a pickle, or its classifier is a frame already.
        LoadError: If the weights cannot be had or do not fit the architecture.
    """
    path = Path(source.removeprefix("local-dir:"))
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".npz"):
        raise EtfZooError(
            f"{source} is not a .safetensors file, and pickles are not read, as they can run code. Rewrite it, if you "
            f"trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
        )
    if path.is_file() and architecture:
        model = _from_file(path, architecture)
    elif path.is_file() and not path.with_name(CONFIG_NAME).is_file():
        raise EtfZooError(f"{source} does not say what model it is of: name it with --architecture, such as resnet50.")
    elif path.is_file():
        model = _from_folder(path.parent, path)
    elif path.is_dir():
        model = _from_folder(path, path / WEIGHTS_NAME)
    else:
        if ":" not in source and not timm.is_model(source):
            raise EtfZooError(f"There is no file, folder or timm model {source!r}. On the Hub? Then hf-hub:ORG/NAME.")
        if ":" not in source and base_name(source) != source.split(".")[0]:
            raise EtfZooError(f"{source} has a fixed frame already; only a learned classifier can be converted.")
        cfg = None if ":" in source else get_pretrained_cfg(source)
        with hub_errors(getattr(cfg, "hf_hub_id", None) or source.partition(":")[2] or source):
            model = timm.create_model(source, pretrained=True)
    learned_classifiers(model)  # raises if there is nothing to convert
    return model.eval()


def _from_folder(folder: Path, weights: Path) -> nn.Module:
    if not (folder / CONFIG_NAME).is_file():
        raise EtfZooError(f"{folder} is no model folder: it has no {CONFIG_NAME}.")
    state = read_file(weights)
    model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise LoadError(f"{weights} does not hold the weights that {CONFIG_NAME} beside it tells of: {error}") from None
    return model


def _from_file(path: Path, architecture: str) -> nn.Module:
    cfg = get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    if cfg is None:
        raise EtfZooError(f"timm has no architecture {architecture!r}; `timm.list_models()` lists them.")
    try:
        with safe_open(path, "pt") as file:
            keys = [f"{name}.weight" for name in as_names(cfg.classifier)]
            rows = [file.get_slice(key).get_shape()[0] for key in keys if key in file.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise LoadError(f"{path} is not a readable safetensors file ({error}).") from None
    num_classes = rows[0] if rows else cfg.num_classes
    overlay = {"file": str(path), "num_classes": num_classes, "label_offset": None}
    overlay |= dict.fromkeys(("tag", "license", "description", "url", "hf_hub_id"))  # of timm's weights, not of these
    try:
        return timm.create_model(architecture, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)
    except RuntimeError as error:
        raise LoadError(f"{path} does not hold the weights of a {architecture}: {error}") from None


def convert_checkpoint(
    source: str,
    folder: str | Path,
    *,
    mode: str = "exact",
    architecture: str | None = None,
    half: bool = False,
    data: Data | None = None,
    center: Data | None = None,
    record: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, float]]:
    """Convert a checkpoint with a learned classifier and write it as a Hub-ready folder with a card.

    Args:
        source: See `load_learned`.
        folder: Where to.
        mode: See `convert_classifier`.
        architecture: See `load_learned`.
        half: Whether to store the backbone in float16, which costs the exactness of `"exact"`.
        data: Gives (images, labels) for a model; with it, the source and the written folder are measured.
        center: The same; for `"nearest"`, the images whose mean features are subtracted before the frame.
        record: What the card says about the data: `dataset` (name and split) and `command`.

    Returns:
        Figures of `evaluate` under `"before"` and `"after"`; empty without data.

    Raises:
        EtfZooError: See `load_learned` and `convert_classifier`; on data without a record.
        LoadError: See `load_learned`.
    """
    if data and not (record and "dataset" in record):
        raise EtfZooError(
            "data needs record={'dataset': {'name': ..., 'split': ...}}: the card says what was measured."
        )
    model: Any = load_learned(source, architecture=architecture)
    cfg = dict(model.pretrained_cfg)
    name = ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))
    name = f"{name} ({Path(source).name})" if Path(source).is_file() else name
    results = {"before": _figures(model, data)} if data else {}
    convert_classifier(model, mode, feature_means=_feature_means(model, center(model)) if center else None)
    what = "a linear neck and a fixed frame of the same softmax" if mode == "exact" else "the nearest simplex frame"
    what += " on centered features" if center else ""
    save_folder(
        model,
        folder,
        pretrained_cfg={
            "description": f"converted: {name}, its classifier rewritten as {what}",
            "license": _license(cfg, source),
        },
        label_names=cfg.get("label_names"),
        label_descriptions=cfg.get("label_descriptions"),
        half=half,
    )
    hub_id = None if Path(source).exists() else cfg.get("hf_hub_id")
    metrics: dict[str, Any] = {"source": hub_id or name, "base_model": hub_id, "limits": _LIMITS[mode]}
    if data:
        results["after"] = _figures(timm.create_model(f"local-dir:{folder}", pretrained=True), data)
        reference = {"model": f"{name} (before)", "results": results["before"]}
        metrics |= {**(record or {}), "results": results["after"], "references": [reference]}
        metrics["dataset"] = {**metrics["dataset"], "images": results["after"]["images"]}
    Path(folder, METRICS_NAME).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    write_card(folder)
    return results


def _figures(model: nn.Module, data: Data) -> dict[str, float]:
    figures = evaluate(model, data(model))
    return {key: figures[key] for key in ("images", "top1", "top5", "loss", "ece") if key in figures}


def _license(cfg: Mapping[str, Any], source: str) -> str | None:
    """License of a checkpoint: its cfg's, or that of the card beside it. timm's cfgs often leave it to the card."""
    if cfg.get("license"):
        return cfg["license"]
    path = Path(source)
    card = (path if path.is_dir() else path.parent) / "README.md"
    if not path.exists():
        try:
            card = download(str(cfg.get("hf_hub_id")).partition("@")[0], "README.md") if cfg.get("hf_hub_id") else card
        except RuntimeError:  # there is none, or no network: no license is stated then, and `publish` asks for one
            return None
    return ModelCard.load(card).data.get("license") if card.is_file() else None


@torch.no_grad()
def _feature_means(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean input of each classifier over some images, `(d,)` float32."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, dim: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].movedim(dim, -1).flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + rows.sum(0)
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    leaves = learned_classifiers(model)
    hooks = [
        leaf.register_forward_pre_hook(watch(name, 1 if isinstance(leaf, nn.Conv2d) else -1))
        for name, leaf in leaves.items()
    ]
    try:
        for images, _ in batches:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not sums:
        raise EtfZooError("There are no images to take the mean features of.")
    return {name: (total / counts[name]).float() for name, total in sums.items()}
