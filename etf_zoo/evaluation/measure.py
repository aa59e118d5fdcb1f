"""A model and any iterable of (images, labels) in, all figures out: accuracy, calibration, collapse, severity."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import EtfZooError
from ..layers.classifier import FrameClassifier
from ..metrics import FastNeuralCollapse, MistakeSeverity, NeuralCollapse, sum_over_processes
from ..models.names import frame_heads
from .mistakes import Predictions

__all__ = ["Measurement", "evaluate", "measure", "format_table"]

CALIBRATION_BINS = 15
# Wider features get the diagonal mode of NeuralCollapse: the full covariance would take more than 134 MB.
FULL_COVARIANCE_DIM = 4096

Batches = Iterable[tuple[Tensor, Tensor]]
Forward = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Measurement:
    """What `measure` finds.

    Attributes:
        figures: See `evaluate`.
        class_means: Of the backbone's features, `(K, d)` float64 on the CPU; zero for a class without samples.
        counts: Samples of each class, `(K,)`.
        confusion: Samples by true (row) and predicted (column) class, `(K, K)`; None unless asked for.
        predictions: Of each of this process's samples, in the order of its batches; None unless asked for.
    """

    figures: dict[str, float]
    class_means: Tensor
    counts: Tensor
    confusion: Tensor | None
    predictions: Predictions | None = None


def evaluate(model: nn.Module, batches: Batches, **kwargs) -> dict[str, float]:
    """All figures of a model on some images, ready for JSON.

    Takes the arguments of `measure` and returns its `figures`:

    - `images`; `top1` and, of more than five classes, `top5` in percent; `loss`: cross-entropy in nats; `ece`: expected
      calibration error of the top-1 confidence in 15 bins of equal width (1706.04599), in percentage points;
      `images_per_second`: see `measure`.
    - NC1 to NC4 and the rest of `NeuralCollapse.compute`, of the **backbone's** features, before any neck or norm of
      the head. `nc3_*` compares their class means with the head's weight or frame. Behind a neck the frame lives in
      another space: then `nc3_*_after_neck` compares it with the class means on its own side (after neck and norm), and
      there is no `nc3_*`. Heads that are no single linear layer or frame have neither.
    - The figures of `MistakeSeverity`, if distances are given.

    What is undefined or infinite, such as the severity of no mistakes, is left out.
    """
    return measure(model, batches, **kwargs).figures


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Batches,
    *,
    distances: Tensor | None = None,
    confusion: bool = False,
    predictions: bool = False,
    processes: Any = None,
    autocast: Callable[..., contextlib.AbstractContextManager] = contextlib.nullcontext,
    forward: Forward | None = None,
    global_mean: str = "balanced",
    store_limit: int = 1 << 30,
    fast: bool = False,
) -> Measurement:
    """Figures, class means and, if asked for, the confusion matrix of a model.

    Every sample counts once, those of a short last batch as much as any. The model is put in evaluation mode and back.
    NC4 needs the final class means. Features are kept for it, in their own precision, as long as they fit
    `store_limit`; beyond, the batches are read a second time, if they can be.

    Args:
        model: A timm model, without the wrapper of DistributedDataParallel or the like.
        batches: (images, labels) of this process. With several processes every sample has to be in one share only.
        distances: LCA heights of the classes `(K, K)`, see `MistakeSeverity`.
        confusion: Whether to count the confusion matrix, K x K numbers.
        predictions: Whether to keep what is predicted for each sample.
        processes: accelerate's `Accelerator` or a process group, to sum over; None for this process alone. A
            collective call then: every process has to make it.
        autocast: Gives a context for the forward pass, such as `accelerator.autocast`.
        forward: Maps (model, images) to (features `(B, d)`, logits `(B, K)`), for other modules than timm's and for
            features from elsewhere. By default timm's `forward_features` and `forward_head`.
        global_mean: See `NeuralCollapse.compute`.
        store_limit: Bytes of features this process may keep for NC4; 0 for always a second pass.
        fast: Measure collapse by `FastNeuralCollapse`, to five digits.

    Returns:
        A `Measurement`. `images_per_second` counts the forward passes alone, without waiting for data and without
        these statistics, leaving the first batch out if there are more, summed over processes.

    Raises:
        ValueError: If there are no samples, the model has no such methods, or shapes or labels do not fit.

    Warns:
        UserWarning: If NC4 cannot be measured: features do not fit and the batches can be read only once. If there are
            samples of one class alone, which have no collapse.
    """
    was_training = model.training
    model.eval()
    try:
        tally = _Tally(model, distances, confusion, predictions, store_limit, fast)
        for labels, features, logits, seconds in _forwarded(model, batches, autocast, forward):
            tally.update(labels, features, logits, seconds)
        tally.reduce(processes)
        if tally.classes < 2:
            warnings.warn("Collapse is left out: it needs samples of two classes.", stacklevel=2)
        elif tally.stored is None:
            for _, features, logits, _ in _forwarded(model, batches, autocast, forward):
                tally.collapse.update_agreement(features, predictions=logits.argmax(1))
        else:
            for features, predicted in tally.stored:
                tally.collapse.update_agreement(features, predictions=predicted)
        return tally.finish(processes, global_mean)
    finally:
        model.train(was_training)


def _timm_forward(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise EtfZooError(
            f"{type(model).__name__} has no forward_features and forward_head. Unwrap it (accelerator.unwrap_model), "
            f"or pass forward=, a function of (model, images) that gives (features, logits)."
        )
    hidden = model.forward_features(images)  # type: ignore[operator]
    return model.forward_head(hidden, pre_logits=True), model.forward_head(hidden)  # type: ignore[operator]


def _forwarded(
    model: nn.Module, batches: Batches, autocast: Callable, forward: Forward | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """Labels, features (B, d), float32 logits (B, K), and the seconds the model took."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        _wait(device)
        began = time.perf_counter()
        with autocast():
            features, logits = (forward or _timm_forward)(model, images)
        _wait(device)
        seconds = time.perf_counter() - began
        if features.ndim > 2 and features.shape[1:].numel() == features.shape[1]:  # (B, d, 1, 1)
            features = features.flatten(1)
        if features.ndim != 2 or logits.ndim != 2 or len(features) != len(labels) or len(logits) != len(labels):
            raise EtfZooError(
                f"Expected features (batch, d) and logits (batch, K) for labels {tuple(labels.shape)}, got "
                f"{tuple(features.shape)} and {tuple(logits.shape)}. Pass forward= to say what to take."
            )
        yield labels, features, logits.float(), seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Tally:
    """Everything `measure` counts."""

    def __init__(
        self,
        model: nn.Module,
        distances: Tensor | None,
        confusion: bool,
        predictions: bool,
        store_limit: int,
        fast: bool,
    ):
        self.num_classes = getattr(model, "num_classes", None)
        self.dim = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
        self.weight, self.bias, self.head = _head(model)
        parameter = next(model.parameters(), None)
        knows_float64 = parameter is not None and parameter.device.type != "mps"
        self.device = parameter.device if parameter is not None and knows_float64 else torch.device("cpu")
        self.distances, self.with_confusion, self.store_limit = distances, confusion, store_limit
        self.kind = FastNeuralCollapse if fast else NeuralCollapse
        self.collapse: NeuralCollapse = None  # type: ignore[assignment]  # made when the sizes are known
        self.stored: list[tuple[Tensor, Tensor]] | None = []
        self.kept: list[tuple[Tensor, Tensor, Tensor]] | None = [] if predictions else None
        self.bytes = 0
        self.speeds: list[tuple[int, float]] = []  # images, seconds

    def _start(self, num_classes: int | None, dim: int | None) -> None:
        if not num_classes or not dim:
            raise EtfZooError("There are no batches, and the model does not say how wide its features are.")
        self.num_classes = num_classes
        wide = dim > FULL_COVARIANCE_DIM
        self.collapse = self.kind(num_classes, dim, diagonal=wide, device=self.device)
        self.severity = None if self.distances is None else MistakeSeverity(self.distances, device=self.device)
        self.after_neck = None
        if self.head is not None and self.head.neck is not None and self.head.in_features == dim:
            self.after_neck = self.kind(num_classes, self.head.dim, diagonal=True, device=self.device)
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # images, top-1, top-5, loss
        self.bins = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64, device=self.device)
        self.confusion = None
        if self.with_confusion:
            self.confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=self.device)

    def update(self, labels: Tensor, features: Tensor, logits: Tensor, seconds: float) -> None:
        if self.collapse is None:
            self._start(logits.shape[1], features.shape[1])
        self.collapse.update(features, labels)  # checks the labels too
        if self.after_neck is not None:
            self.after_neck.update(self.head.embed(features.float()), labels)  # type: ignore[union-attr]
        if self.severity is not None:
            self.severity.update(logits, labels)
        labels, logits = labels.to(self.device, torch.int64), logits.to(self.device)
        confidence, predicted = logits.softmax(1).max(1)
        right = predicted == labels
        among_five = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).any(1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        count = loss.new_tensor(len(labels))
        self.sums += torch.stack([count, right.sum(), among_five.sum(), loss]).double()
        own_bin = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
        self.bins.index_add_(1, own_bin, torch.stack([torch.ones_like(confidence), right, confidence]).double())
        if self.confusion is not None:
            self.confusion += torch.bincount(labels * logits.shape[1] + predicted, minlength=len(self.confusion))
        if self.kept is not None:
            self.kept.append((labels.cpu(), predicted.cpu(), confidence.cpu()))
        if self.stored is not None:
            self.bytes += features.numel() * features.element_size()
            if self.bytes > self.store_limit:
                self.stored = None
            else:
                self.stored.append((features, predicted))
        self.speeds.append((len(labels), seconds))

    def reduce(self, processes: Any) -> None:
        if self.collapse is None:  # a process without a share still takes part
            self._start(self.num_classes, self.dim)
        self.collapse.settle()
        overflow = torch.tensor([float(self.stored is None)], dtype=torch.float64, device=self.device)
        timed = self.speeds[1:] or self.speeds
        speed = sum(n for n, _ in timed) / max(1e-9, sum(s for _, s in timed))
        self.speed = torch.tensor([speed], dtype=torch.float64, device=self.device)
        if processes is not None:
            self.collapse.reduce(processes)
            if self.after_neck is not None:
                self.after_neck.reduce(processes)
            if self.severity is not None:
                self.severity.reduce(processes)
            for name in ("sums", "bins", "speed", "confusion"):
                if getattr(self, name) is not None:
                    setattr(self, name, sum_over_processes(getattr(self, name), processes))
            overflow = sum_over_processes(overflow, processes)  # all read again, or none: a forward may be collective
        if overflow.item():
            self.stored = None
        if not self.sums[0]:
            raise EtfZooError("There are no samples to evaluate on: the batches are empty.")

    @property
    def classes(self) -> int:
        """Classes with samples."""
        return int((self.collapse.counts > 0).sum())

    def _collapse(self, global_mean: str) -> dict[str, float]:
        if self.classes < 2:
            return {"classes": self.classes}
        fits = self.weight is not None and self.weight.shape == (self.num_classes, self.collapse.dim)
        own_side = fits and self.after_neck is None
        figures = self.collapse.compute(*((self.weight, self.bias) if own_side else ()), global_mean=global_mean)
        if figures.pop("samples") != self.collapse.agreement_samples:
            warnings.warn(
                "NC4 is left out: the features do not fit store_limit, and the batches cannot be read twice. Pass a "
                "list or a DataLoader instead of a generator, or a higher store_limit.",
                stacklevel=5,
            )
            figures.pop("nc4_agreement", None)
        if self.after_neck is not None:
            behind = self.after_neck.compute(self.weight, global_mean=global_mean)
            figures |= {f"{name}_after_neck": value for name, value in behind.items() if name.startswith("nc3")}
        return figures

    def finish(self, processes: Any, global_mean: str) -> Measurement:
        if processes is not None:
            self.collapse.reduce(processes)
        images, top1, top5, loss = self.sums.tolist()
        filled = self.bins[:, self.bins[0] > 0]
        figures = {
            "images": int(images),
            "top1": 100 * top1 / images,
            "top5": 100 * top5 / images,
            "loss": loss / images,
            "ece": 100 * (filled[1] - filled[2]).abs().sum().item() / images,
            "images_per_second": self.speed.item(),
        }
        if self.num_classes is not None and self.num_classes <= 5:  # of which all are among the first five
            del figures["top5"]
        figures |= self._collapse(global_mean)
        if self.severity is not None:
            figures |= self.severity.compute()
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        confusion = None if self.confusion is None else self.confusion.view(self.num_classes, -1).cpu()  # type: ignore
        predictions = None if self.kept is None else Predictions.joined(self.kept)
        return Measurement(figures, self.collapse.means.cpu(), self.collapse.counts.cpu(), confusion, predictions)


def _head(model: nn.Module) -> tuple[Tensor | None, Tensor | None, FrameClassifier | None]:
    """Weight (K, d) and bias (K,) of the one head a model has, and the head if it is a frame."""
    frames = list(frame_heads(model).values())
    if frames:
        one = len(frames) == 1 and not frames[0].implicit  # a frame of very many classes is not stored
        return (frames[0].seen_weight, None, frames[0]) if one else (None, None, None)
    layer = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.flatten(1).shape[1] == layer.weight.shape[1]:
        return _whole(layer.weight).flatten(1), None if layer.bias is None else _whole(layer.bias), None
    return None, None, None


def _whole(tensor: Tensor) -> Tensor:
    """A parameter in one piece; a sharded one (FSDP) is gathered, by all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------------------ table

_ROWS: dict[str, tuple[str, str]] = {
    "images": ("images", "{:,.0f}"),
    "top1": ("top-1 accuracy", "{:.2f} %"),
    "top5": ("top-5 accuracy", "{:.2f} %"),
    "loss": ("cross-entropy", "{:.4f}"),
    "ece": ("calibration error, 15 bins", "{:.2f} %"),
    "images_per_second": ("images per second", "{:,.0f}"),
    "nc1_pinv": ("NC1  tr(Sw pinv(Sb)) / K", "{:.4g}"),
    "nc1_pinv_diagonal": ("NC1  the same, diagonal of Sw only", "{:.4g}"),
    "nc1_quotient": ("NC1  tr(Sw) / tr(Sb)", "{:.4g}"),
    "nc1_cdnv": ("NC1  class-distance normalized variance", "{:.4g}"),
    "vci": ("NC1  variability collapse index", "{:.4g}"),
    "nc2_equinorm": ("NC2  spread of norms", "{:.4g}"),
    "nc2_equiangularity": ("NC2  spread of cosines", "{:.4g}"),
    "nc2_maximal_angle": ("NC2  distance of cosines from -1/(K-1)", "{:.4g}"),
    "nc2_etf_distance": ("NC2  distance from an ETF", "{:.4g}"),
    "nc3_self_duality": ("NC3  distance of head and class means", "{:.4g}"),
    "nc3_etf_distance": ("NC3  distance of their product from an ETF", "{:.4g}"),
    "nc3_cosine": ("NC3  cosine class mean / prototype", "{:.4f}"),
    "nc3_bias": ("NC3  |W m + b|", "{:.4g}"),
    "nc4_agreement": ("NC4  agreement with nearest class mean", "{:.4f}"),
    "effective_rank": ("effective rank of the features", "{:.1f}"),
    "effective_rank_means": ("effective rank of the class means", "{:.1f}"),
    "classes": ("classes with samples", "{:.0f}"),
    "single_sample_classes": ("classes with a single sample", "{:.0f}"),
    "severity": ("severity of a mistake (LCA height)", "{:.3f}"),
    "crm_top1": ("top-1 by least risk", "{:.4f}"),
}


def _describe(name: str) -> tuple[str, str]:
    if name in _ROWS:
        return _ROWS[name]
    if name.endswith("_after_neck"):
        label, pattern = _describe(name.removesuffix("_after_neck"))
        return f"{label}, after the neck", pattern
    if name.startswith("crm_"):
        label, pattern = _describe(name.removeprefix("crm_"))
        return f"{label}, by least risk", pattern
    if name.startswith("hier_dist@"):
        return f"hierarchical distance @ {name.partition('@')[2]}", "{:.3f}"
    if name.partition("@")[0] == "hops":
        return f"order of preference {name[4:].replace('@', '@ ')}".rstrip() + " (HOPS, best 1)", "{:.4f}"
    return name, "{:.4g}"


def format_table(figures: Mapping[str, float]) -> str:
    """Figures of `evaluate` as lines of text: what it is, and its value.

    Args:
        figures: Name -> value; unknown names are shown as they are.

    Returns:
        One line for each, values aligned to the right.
    """
    order = {name: i for i, name in enumerate(_ROWS)}
    rows = []
    for name in sorted(figures, key=lambda name: order.get(name.removesuffix("_after_neck"), len(order))):
        label, pattern = _describe(name)
        rows.append((label, pattern.format(figures[name])))
    width, digits = (max((len(row[i]) for row in rows), default=0) for i in range(2))
    return "\n".join(f"{label:<{width}}  {value:>{digits}}" for label, value in rows)
