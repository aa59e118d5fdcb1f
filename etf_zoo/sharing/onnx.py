"""Models as ONNX files."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.models import get_model_input_config
from torch import Tensor, nn

from ..errors import EtfZooError, ExportError, MissingPackageError

__all__ = ["OUTPUTS", "export_onnx"]

# What a file can give -> the names of its outputs.
OUTPUTS = {"logits": ("logits",), "features": ("features",), "top_k": ("logits", "classes")}

_OLDEST_TORCH = (2, 8)
_EXTERNAL_BYTES = 1_800_000_000  # protobuf files end at 2 GB; larger weights go into a file beside


class _Outputs(nn.Module):
    """A timm model whose forward gives what was asked for."""

    def __init__(self, model: nn.Module, output: str, k: int):
        super().__init__()
        self.model, self.output, self.k = model, output, k

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.output == "features":
            return self.model.forward_head(self.model.forward_features(images), pre_logits=True)  # type: ignore
        logits = self.model(images)
        return logits if self.output == "logits" else logits.topk(self.k)


def export_onnx(model: nn.Module, folder: str | Path, *, output: str = "logits", k: int = 5) -> Path:
    """Write a model, whatever its head, as `model.onnx`: images `(batch, C, H, W)` to exactly its logits `(batch, K)`.

    Or to something narrower, which suits heads of very many classes: the backbone's features, or the best k classes.

    What preprocessing needs, the class names and the license are in the file's metadata. Weights of more than 1.8 GB go
    into a file beside.

    Args:
        model: A timm model.
        folder: Where to; made if need be.
        output: `"logits"`; `"features"`, `(batch, d)` before any neck of the head; or `"top_k"`: `logits` and
            `classes`, both `(batch, k)`, the largest first. A Kerdock frame that is not stored is not stored in the
            file either; within a run its logits are formed once.
        k: For `"top_k"`.

    Returns:
        The file.

    Raises:
        EtfZooError: On another output, or a k that is no number of classes.
        MissingPackageError: If onnx or onnxscript is missing.
        ExportError: If torch cannot export the model, or is older than 2.8.
    """
    if output not in OUTPUTS:
        raise EtfZooError(f"Unknown output {output!r}. Choose one of {', '.join(OUTPUTS)}.")
    if output == "top_k" and not 1 <= k <= int(model.num_classes):  # type: ignore[arg-type]
        raise EtfZooError(f"k lies between 1 and {model.num_classes}, the number of classes, got {k}.")
    model = copy.deepcopy(model).cpu().eval()
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(f"ONNX export needs {error.name}: pip install 'etf-zoo[onnx]'.") from None
    if (
        tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH
    ):  # older exporters know no named dimension and no batch norm
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise ExportError(f"ONNX export needs torch {oldest} or newer, not {torch.__version__}: pip install -U torch.")
    images = torch.randn(2, *get_model_input_config(model)["input_size"])
    names: Any = {"input_names": ["images"], "output_names": list(OUTPUTS[output]), "dynamic_shapes": ({0: "batch"},)}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch, on what it is going to change
            wrapped = _Outputs(model, output, k)
            program: Any = torch.onnx.export(wrapped, (images,), dynamo=True, verbose=False, **names)
    except Exception as error:  # torch wraps whatever went wrong in a class of its own
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(f"torch cannot export {type(model).__name__} to ONNX: {reason}") from error
    program.model.metadata_props.update(_metadata(model))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    program.save(path, external_data=size > _EXTERNAL_BYTES)
    return path


def _metadata(model: Any) -> dict[str, str]:
    cfg: Mapping[str, Any] = model.pretrained_cfg
    entries = {
        **resolve_data_config(model=model),
        **{k: cfg.get(k) for k in ("label_names", "license", "architecture")},
    }
    return {key: json.dumps(value) for key, value in entries.items() if value is not None}
