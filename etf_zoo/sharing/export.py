"""Models for others to load: checkpoints converted to twins, twins folded into plain timm checkpoints, ONNX files."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from timm.data import resolve_data_config
from timm.models._input import get_model_input_config
from timm.models._registry import get_pretrained_cfg
from torch import Tensor, nn

from ..errors import EtfZooError, ExportError, LoadError, MissingPackageError
from ..evaluation.measure import evaluate
from ..layers.classifier import FrameClassifier
from ..layers.necks import Center
from ..layers.whitening import Whitening
from ..models.convert import convert_classifier, learned_classifiers
from ..models.heads import as_names, base_name, frame_heads, without_frames
from ..weights.download import download, hub_errors
from ..weights.native import CONFIG_NAME
from .card import METRICS_NAME, write_card
from .folder import save_folder

__all__ = ["convert_checkpoint", "export_onnx", "export_plain", "fold_head", "load_learned"]

Data = Callable[[nn.Module], Iterable[tuple[Tensor, Tensor]]]
_LIMITS = {
    "exact": "Those of its source. Softmax and predictions are the source's; a sigmoid of each logit is not.",
    "nearest": "Those of its source, and the predictions are not the source's: the classifier was replaced.",
}
_EXTERNAL_BYTES = 1_800_000_000  # protobuf files end at 2 GB; larger weights go into a file beside


# ------------------------------------------------------------------------------------------------- learned -> converted


def load_learned(source: str, *, architecture: str | None = None) -> nn.Module:
    """A timm model with its learned classifier, from wherever it lies.

    Args:
        source: A timm name (`resnet50.a1_in1k`), `hf-hub:ORG/NAME`, a folder in timm's format, a `.safetensors` file.
        architecture: timm's name of the architecture; for a file, unless timm's `config.json` lies beside it.

    Raises:
        ValueError: If there is no such source, it is a pickle, or its classifier is a frame already.
        RuntimeError: If the weights cannot be had or do not fit the architecture.
    """
    path = Path(source)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".npz"):
        raise EtfZooError(
            f"{source} is not a .safetensors file, and pickles are not read, as they can run code. Rewrite it, if you "
            f"trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
        )
    if path.is_file() and architecture:
        model = _from_file(path, architecture)
    elif path.is_file() and not path.with_name(CONFIG_NAME).is_file():
        raise EtfZooError(f"{source} does not say what model it is of: name it with --architecture, such as resnet50.")
    elif path.is_file() or path.is_dir():
        model = _from_folder(path if path.is_dir() else path.parent)
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


def _from_folder(folder: Path) -> nn.Module:
    if not (folder / CONFIG_NAME).is_file():
        raise EtfZooError(f"{folder} is no model folder: it has no {CONFIG_NAME}.")
    if not list(folder.glob("*.safetensors")):
        raise EtfZooError(f"{folder} has no .safetensors file; nothing else is read, for safety.")
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


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
        ValueError: See `load_learned` and `convert_classifier`; on data without a record.
        RuntimeError: See `load_learned`.
    """
    if data and not (record and "dataset" in record):
        raise EtfZooError(
            "data needs record={'dataset': {'name': ..., 'split': ...}}: the card says what was measured."
        )
    model: Any = load_learned(source, architecture=architecture)
    cfg = dict(model.pretrained_cfg)
    name = ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))
    results = {"before": _figures(model, data)} if data else {}
    convert_classifier(model, mode, feature_means=_feature_means(model, center(model)) if center else None)
    what = "a linear neck and a fixed frame of the same softmax" if mode == "exact" else "the nearest simplex frame"
    what += " on centerd features" if center else ""
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
    return {key: figures[key] for key in ("images", "top1", "top5", "loss", "ece")}


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


# --------------------------------------------------------------------------------------------------- frame -> plain


@torch.no_grad()
def fold_head(head: FrameClassifier) -> nn.Linear | nn.Conv2d:
    """The linear layer, or 1x1 convolution, with a head's ranking of the classes.

    With `feature_norm="none"` it has the head's logits. Otherwise each image's logits are the head's times a positive
    number, the length of its features: the order of the classes is the same, the softmax is not.

    Args:
        head: The head; neck None, `"linear"` or `"center"`.

    Raises:
        ValueError: If the neck is not linear.
    """
    dim = head.in_features
    if head.neck is None:
        matrix, offset = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    elif isinstance(head.neck, nn.Linear):
        matrix, offset = head.neck.weight.double(), head.neck.bias.double()
    elif isinstance(head.neck, Center):
        matrix, offset = torch.eye(dim, dtype=torch.float64), -head.neck.running_mean.double()
    else:
        raise EtfZooError(
            f"A {type(head.neck).__name__} neck is not linear, so no plain classifier has the same predictions. "
            f"Export with --onnx, or load the model with etf_zoo imported."
        )
    if head.norm is not None:
        mean, var = head.norm.bn.running_mean, head.norm.bn.running_var
        spread = (var.double() + head.norm.bn.eps).sqrt()  # type: ignore[union-attr]
        matrix, offset = matrix / spread[:, None], (offset - mean.double()) / spread  # type: ignore[union-attr]
    weight, bias = head.project(matrix.T).T, head.project(offset)
    shape = (1, 1) if head.channels_first else ()
    plain = nn.Conv2d(dim, head.num_classes, 1) if head.channels_first else nn.Linear(dim, head.num_classes)
    plain.weight.copy_(weight.reshape(*weight.shape, *shape))
    plain.bias.copy_(bias)  # type: ignore[union-attr]
    return plain.to(head.weight.device)


@torch.no_grad()
def export_plain(model: nn.Module, folder: str | Path, *, half: bool = False) -> bool:
    """Write a twin as a checkpoint of its base that stock timm loads, without this package.

    The frame, its scale and a linear neck are folded into the classifier. **Top-1 predictions are the same; the softmax
    is only with `feature_norm="none"`** (converted models): timm's classifiers do not normalize their features, so the
    plain logits of an image are ours times the length of its features, which makes it more confident than it should be.

    The folder is loaded again and compared on random images before this returns.

    Args:
        model: A twin.
        folder: Where to; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.
        half: Whether to store the weights in float16, which can turn a close decision.

    Returns:
        Whether the softmax is the same too.

    Raises:
        ValueError: If the model has no frame, a neck that is not linear, whitening, or several heads on normalized
            features: the mean of their logits has no plain form.
        RuntimeError: If the folder, loaded again, predicts something else.
    """
    heads = frame_heads(model)
    if not heads:
        raise EtfZooError(f"{type(model).__name__} has no fixed frame; it is a plain model already.")
    if any(isinstance(module, Whitening) for module in model.modules()):
        raise EtfZooError("timm has no whitening layer, so a model with one has no plain form. Export with --onnx.")
    exact = all(head.feature_norm == "none" for head in heads.values())
    if len(heads) > 1 and not exact:
        raise EtfZooError(
            f"{type(model).__name__} has {len(heads)} heads, each on features of length one, whose logits it averages: "
            f"plain linear layers would weigh them differently and predict something else. Export with --onnx."
        )
    model = copy.deepcopy(model).cpu().eval()
    heads = frame_heads(model)
    plain = without_frames(copy.deepcopy(model), {name: fold_head(head) for name, head in heads.items()})
    cfg: Any = model.pretrained_cfg
    note = "plain: its fixed frame folded into a linear classifier"
    description = "; ".join(filter(None, (cfg.get("description"), note)))
    labels = {key: cfg.get(key) for key in ("label_names", "label_descriptions")}
    save_folder(plain, folder, pretrained_cfg={"description": description}, half=half, **labels)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(4, *_input_size(model), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(images), again(images)
    # random images can be close decisions: theirs may only be a class that ours finds as good
    regret = ours.max(1).values - ours.gather(1, theirs.argmax(1, keepdim=True)).squeeze(1)
    if not half and bool((regret > 1e-3 * ours.std(1).clamp_min(1e-6)).any()):
        raise ExportError(f"{folder} predicts something else than the model; do not use it, and please report this.")
    return exact


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    return get_model_input_config(model)["input_size"]


# ---------------------------------------------------------------------------------------------------------------- ONNX


def export_onnx(model: nn.Module, folder: str | Path) -> Path:
    """Write a model, whatever its head, as `model.onnx`: images `(batch, C, H, W)` to exactly its logits `(batch, K)`.

    What preprocessing needs, the class names and the license are in the file's metadata. Weights of more than 1.8 GB go
    into a file beside.

    Args:
        model: A timm model.
        folder: Where to; made if need be.

    Returns:
        The file.

    Raises:
        MissingPackageError: If onnx or onnxscript is missing.
        ExportError: If torch cannot export the model.
    """
    model = copy.deepcopy(model).cpu().eval()
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(f"ONNX export needs {error.name}: pip install 'etf-zoo[onnx]'.") from None
    images = torch.randn(2, *_input_size(model))
    names: Any = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch, on what it is going to change
            program = torch.onnx.export(model, (images,), dynamo=True, verbose=False, **names)
    except Exception as error:  # torch wraps whatever went wrong in a class of its own
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(f"torch cannot export {type(model).__name__} to ONNX: {reason}") from error
    program.model.metadata_props.update(_metadata(model))  # type: ignore[union-attr]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    program.save(path, external_data=size > _EXTERNAL_BYTES)  # type: ignore[union-attr]
    return path


def _metadata(model: nn.Module) -> dict[str, str]:
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    entries = {
        **resolve_data_config(model=model),
        **{k: cfg.get(k) for k in ("label_names", "license", "architecture")},
    }
    return {key: json.dumps(value) for key, value in entries.items() if value is not None}
