"""Twins as plain timm checkpoints: the frame folded into a linear classifier, for others without this package."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import filter_pretrained_cfg, get_model_args, get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

from ..errors import EtfZooError, LoadError
from ..layers.classifier import FrameClassifier
from ..layers.necks import Center
from ..layers.subspaces import SubspaceClassifier
from ..layers.whitening import Whitening
from ..models.head_config import split_head_args
from ..models.names import SKIP_CONNECTION, base_name, frame_heads, split_head
from .folder import save_folder

__all__ = ["export_plain", "fold_head"]

# Run by a Python of its own: what stock timm makes of a folder.
_STOCK_TIMM = """
import sys
import safetensors.torch, timm, torch
folder, given, wanted = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
if "etf_zoo" in sys.modules:
    sys.exit("this Python imports etf_zoo by itself")
with torch.no_grad():
    logits = model(safetensors.torch.load_file(given)["images"])
safetensors.torch.save_file({"logits": logits.contiguous()}, wanted)
"""


@torch.no_grad()
def fold_head(head: FrameClassifier) -> nn.Linear | nn.Conv2d:
    """The linear layer, or 1x1 convolution, with a head's ranking of the classes.

    With `feature_norm="none"` it has the head's logits. Otherwise each image's logits are the head's times a positive
    number, the length of its features: the order of the classes is the same, the softmax is not.

    Args:
        head: The head; neck None, `"linear"` or `"center"`.

    Raises:
        EtfZooError: If the neck is not linear.

    Example:
        >>> head = FrameClassifier(8, 3)
        >>> x = torch.randn(5, 8)
        >>> torch.equal(fold_head(head)(x).argmax(1), head(x).argmax(1))
        True
    """
    dim = head.in_features
    if isinstance(head, SubspaceClassifier):
        raise EtfZooError(
            "Lengths of projections on subspaces are not linear, so no plain classifier has the same predictions. "
            "Export with --format onnx, or load the model with etf_zoo imported."
        )
    if head.neck is None:
        matrix, offset = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    elif isinstance(head.neck, nn.Linear):
        matrix, offset = head.neck.weight.double(), head.neck.bias.double()
    elif isinstance(head.neck, Center):
        matrix, offset = torch.eye(dim, dtype=torch.float64), -head.neck.running_mean.double()
    else:
        raise EtfZooError(
            f"A {type(head.neck).__name__} neck is not linear, so no plain classifier has the same predictions. "
            f"Export with --format onnx, or load the model with etf_zoo imported."
        )
    if head.norm is not None:
        norm: Any = head.norm.bn
        spread = (norm.running_var.double() + norm.eps).sqrt()
        matrix, offset = matrix / spread[:, None], (offset - norm.running_mean.double()) / spread
    weight, bias = head.project(matrix.T).T, head.project(offset)
    plain: Any = nn.Conv2d(dim, head.num_classes, 1) if head.channels_first else nn.Linear(dim, head.num_classes)
    plain.weight.copy_(weight.reshape(plain.weight.shape))
    plain.bias.copy_(bias)
    return plain.to(head.weight.device)


@torch.no_grad()
def export_plain(model: nn.Module, folder: str | Path, *, half: bool = False) -> bool:
    """Write a twin as a checkpoint of its base that stock timm loads, without this package.

    The frame, its scale and a linear neck are folded into the classifier. **Top-1 predictions are the same; the softmax
    is only with `feature_norm="none"`** (converted models): timm's classifiers do not normalize their features, so the
    plain logits of an image are ours times the length of its features, which makes it more confident than it should be.

    The folder is loaded in a process without this package and compared on random images before this returns.

    Args:
        model: A twin.
        folder: Where to; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.
        half: Whether to store the weights in float16, which can turn a close decision.

    Returns:
        Whether the softmax is the same too.

    Raises:
        EtfZooError: If the model has no plain form: no frame, a neck that is not linear, whitening, a skip connection,
            an architecture that timm has not, or several heads on normalized features, whose mean of logits has none.
        LoadError: If the folder, loaded by stock timm, cannot be opened or predicts something else.

    Example:
        >>> model = timm.create_model("mobilenetv3_small_100_etf", pretrained=True)
        >>> export_plain(model, "plain")
        False
    """
    exact = _check_has_plain_form(model)
    model = copy.deepcopy(model).cpu().eval()
    plain = _rebuild(model)
    cfg: Any = model.pretrained_cfg
    note = "plain: its fixed frame folded into a linear classifier"
    description = "; ".join(filter(None, (cfg.get("description"), note)))
    labels = {key: cfg.get(key) for key in ("label_names", "label_descriptions")}
    save_folder(plain, folder, pretrained_cfg={"description": description}, half=half, **labels)
    size = timm.models.get_model_input_config(model)["input_size"]
    images = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    ours, theirs = model(images), _logits_in_stock_timm(Path(folder), images)
    # random images can be close decisions: theirs may only be a class that ours finds as good
    regret = ours.max(1).values - ours.gather(1, theirs.argmax(1, keepdim=True)).squeeze(1)
    if not half and bool((regret > 1e-3 * ours.std(1).clamp_min(1e-6)).any()):
        raise LoadError(f"{folder} predicts something else than the model; do not use it, and please report this.")
    return exact


def _check_has_plain_form(model: nn.Module) -> bool:
    """Whether the plain form has the same softmax; EtfZooError if there is no plain form."""
    kind, heads = type(model).__name__, frame_heads(model)
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if not heads:
        raise EtfZooError(f"{kind} has no fixed frame; it is a plain model already.")
    if any(isinstance(module, Whitening) for module in model.modules()):
        raise EtfZooError(
            "timm has no whitening layer, so a model with one has no plain form. Export with --format onnx."
        )
    architecture = cfg.get("architecture") or ""
    if architecture == SKIP_CONNECTION:
        raise EtfZooError(
            "timm has no skip connection to the head, so this has no plain form. Export with --format onnx."
        )
    base = base_name(architecture)
    if not timm.is_model(base) or not model_entrypoint(base).__module__.startswith("timm."):
        raise EtfZooError(
            f"timm itself has no architecture {base!r}, so it has no plain form. Export with --format onnx."
        )
    exact = all(head.feature_norm == "none" for head in heads.values())
    if len(heads) > 1 and not exact:
        raise EtfZooError(
            f"{kind} has {len(heads)} heads, each on features of length one, whose logits it averages: "
            f"plain linear layers would weigh them differently and predict something else. Export with --format onnx."
        )
    return exact


def _rebuild(model: nn.Module) -> nn.Module:
    """timm's own model with a twin's backbone and its heads, folded."""
    heads = frame_heads(model)
    weights = split_head(model.state_dict(), heads)[0]
    for name, head in heads.items():
        weights |= {f"{name}.{key}": value for key, value in fold_head(head).state_dict().items()}
    cfg: Any = model.pretrained_cfg
    base = base_name(cfg["architecture"])
    own_tag = getattr(get_pretrained_cfg(base), "tag", None)  # some of timm's builders look a width up by it
    source = {**filter_pretrained_cfg(cfg, remove_source=True), "architecture": base, "tag": own_tag}
    plain: Any = timm.create_model(base, pretrained_cfg=source, **split_head_args(get_model_args(model))[1])
    plain.pretrained_cfg["tag"] = cfg.get("tag")
    try:
        plain.load_state_dict(weights)
    except RuntimeError:
        raise EtfZooError(
            f"The model is not timm's {base} with another head: its layers were changed after it was created, so it "
            f"has no plain form. Export it before the change, or with --format onnx."
        ) from None
    return plain.eval()


def _logits_in_stock_timm(folder: Path, images: Tensor) -> Tensor:
    """Logits of a folder's model in a Python that has not imported this package.

    Raises:
        LoadError: If stock timm cannot open the folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, wanted = Path(scratch, "images.safetensors"), Path(scratch, "logits.safetensors")
        safetensors.torch.save_file({"images": images}, given)
        command = [sys.executable, "-c", _STOCK_TIMM, str(folder.resolve()), str(given), str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise LoadError(f"Stock timm cannot open {folder}: {reason}. Do not use it, and please report this.")
        return safetensors.torch.load_file(wanted)["logits"]
