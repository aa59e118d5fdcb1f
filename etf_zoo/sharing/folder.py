"""Model folders in the Hub's format: float16 weights, config, label names; what `local-dir:` and `hf-hub:` load."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import EtfZooError
from ..layers.cosine import fix_prototypes
from ..layers.whitening import Whitening
from ..models.attach import FrameModel
from ..models.names import frame_heads
from ..timm_compat import save_config_for_hf
from ..weights.config import DIGEST, config_digest
from ..weights.native import CONFIG_NAME, WEIGHTS_NAME, sha256

__all__ = ["save_folder", "storage_state_dict"]

_HALF_MAX = torch.finfo(torch.float16).max


def storage_state_dict(model: nn.Module, *, half: bool = True) -> dict[str, Tensor]:
    """State dict as it is stored: float16, but float32 for frames, scales and running statistics.

    Tensors that float16 cannot hold stay as they are; all do without `half`.
    """
    exact = {
        f"{name}.{key}"
        for name, head in frame_heads(model).items()
        for key in head.state_dict()
        if not key.startswith("neck.")
    }
    stored = {}
    for key, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        statistic = key in exact or ".running_" in f".{key}"
        if half and value.dtype == torch.float32 and not statistic and value.abs().max().item() < _HALF_MAX:
            value = value.half()
        stored[key] = value.clone()
    return stored


def save_folder(
    model: nn.Module,
    folder: str | Path,
    *,
    pretrained_cfg: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
    label_descriptions: Mapping[str, str] | None = None,
    half: bool = True,
) -> Path:
    """Write a model as a Hub-ready folder: `model.safetensors` and `config.json` with the file's sha256.

    Learned prototypes are stored as the fixed frame that they have become.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it after `import etf_zoo`.

    Args:
        model: A timm model, twin or not.
        folder: Where to; made if need be. Each file is written beside its final name and then renamed.
        pretrained_cfg: Entries for the pretrained cfg: input size, mean, std, license, description, tag.
        label_names: Names of the classes, in order.
        label_descriptions: Name -> text for people.
        half: Whether to store the backbone in float16; otherwise everything keeps its precision.

    Returns:
        The folder.

    Raises:
        ValueError: If the number of label names is not the model's number of classes, or the model has a part that
            loading could not build: a neck of your own, whitening beside a learned head or in several places.
        OSError: If it cannot be written; files already there stay whole.
    """
    folder = Path(folder)
    if label_names is not None and len(label_names) != model.num_classes:
        raise EtfZooError(f"{len(label_names)} label names for {model.num_classes} classes.")
    model = fix_prototypes(model)
    _check_whitening(model)
    if isinstance(model, FrameModel) and isinstance(model.head_config.neck, nn.Module):
        raise EtfZooError("A model with a neck of your own cannot be saved for others to build; use a named neck.")
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    new_weights, new_config = folder / (WEIGHTS_NAME + ".new"), folder / (CONFIG_NAME + ".new")
    try:
        safetensors.torch.save_file(storage_state_dict(model, half=half), new_weights, metadata={"format": "pt"})
        model_config: dict[str, Any] = {
            "pretrained_cfg": dict(pretrained_cfg or {}),
            "weights_sha256": sha256(new_weights),
        }
        if label_names is not None:
            model_config["label_names"] = list(label_names)
        if label_descriptions is not None:
            model_config["label_descriptions"] = dict(label_descriptions)
        save_config_for_hf(model, str(new_config), model_config=model_config)
        written = json.loads(new_config.read_text(encoding="utf-8"))
        written.get("model_args", {}).pop("num_classes", None)  # said above; transformers refuses it twice
        written[DIGEST] = config_digest(written)
        new_config.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        new_weights.chmod(0o644)  # safetensors writes files that only their owner can read
        os.replace(new_weights, weights)
        os.replace(new_config, config)
    finally:
        new_weights.unlink(missing_ok=True)
        new_config.unlink(missing_ok=True)
    return folder


def _check_whitening(model: nn.Module) -> None:
    """Raise ValueError unless a twin's `whitening` argument builds all the whitening that the model has."""
    count = sum(isinstance(module, Whitening) for module in model.modules())
    recorded = getattr(model, "_model_args", {}).get("whitening")  # type: ignore[union-attr]
    if count and not (count == 1 and recorded not in (None, False) and isinstance(model, FrameModel)):
        raise EtfZooError(
            "The model's whitening cannot be saved for others to build: that takes a fixed-frame head, and one "
            "whitening layer that whitening=... or etf_zoo.layers.whitening.whiten_last_norm put into it."
        )
