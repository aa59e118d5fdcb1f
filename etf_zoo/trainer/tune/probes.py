"""Classifiers on frozen features: logistic regression, nearest neighbors, nearest class mean.

Features are the backbone's, before any neck or norm of the head. `docs/protocol.md` says how they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from etf_zoo.errors import EtfZooError
from etf_zoo.models.names import split_head, timm_classifier_names

from ..data.augment import colors_of
from ..data.batches import eval_batches
from ..data.near_duplicates import grouped_folds, near_duplicates
from ..data.sealed import choosing
from ..data.subsets import Images
from .logistic import fit_logistic, principal_axes, rough_path

__all__ = [
    "PROBES",
    "Probe",
    "backbone_features",
    "backbone_size",
    "class_means",
    "copy_linear",
    "fit_probe",
    "linear_classifier",
]

PROBES = ("linear_probe", "knn", "knn_20", "ncm", "ncm_euclid")
STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # scikit-learn's C: larger is weaker regularization
SCALINGS = ("whole", "each")
NEIGHBORS = (1, 3, 5, 10, 20, 50, 100, 200)
FOLDS = 3
FALLEN = 3.0  # standard errors below the best accuracy, from which on weaker penalties are not tried


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
        predict: Features `(N, d)` to class numbers `(N,)`, numpy.
        chosen: What was chosen, and how, for people.
        tuned: Numbers fitted: weights and biases, or prototypes; 0 where the training features themselves are kept.
        linear: Weight `(K, d)` and bias `(K,)` on the raw features, where that is what the probe is.
        prototypes: Unit rows `(K, d)` compared with features by their cosine, likewise.
        logit_scale: Of the prototypes' softmax.
        details: What was chosen, for tables: `C`, `scaling`, `k`, `cv_top1` (accuracy on the images that the folds
            held out, in percent), `gradient_norm`, `steps`.
    """

    predict: Callable[[np.ndarray], np.ndarray]
    chosen: str
    tuned: int
    linear: tuple[Tensor, Tensor] | None = None
    prototypes: Tensor | None = None
    logit_scale: float = 1.0
    details: dict[str, Any] = field(default_factory=dict)


def backbone_size(model: nn.Module) -> int:
    """Parameters of a timm model without the layers that classify."""
    backbone, _ = split_head(dict(model.named_parameters()), timm_classifier_names(model))
    return sum(p.numel() for p in backbone.values())


def linear_classifier(model: nn.Module) -> nn.Linear | nn.Conv2d | None:
    """The one linear layer, or 1x1 convolution, that turns a timm model's features into logits.

    None where there are several (distilled models, CrossViT) or where more than it stands behind the features (LeViT's
    norm, CAFormer's MLP): no layer of theirs can then hold what was fitted to the features.
    """
    layer = model.get_classifier()  # type: ignore[operator]
    single = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
    return layer if single and len(timm_classifier_names(model)) == 1 else None


@torch.no_grad()
def copy_linear(probe: Probe, layer: nn.Linear | nn.Conv2d) -> None:
    """Put a linear probe into the layer that classifies, see `linear_classifier`."""
    if probe.linear is None or layer.bias is None:
        raise EtfZooError(f"A probe with weight and bias does not fit into {layer}: {probe.chosen}.")
    layer.weight.copy_(probe.linear[0].view_as(layer.weight))
    layer.bias.copy_(probe.linear[1])


@torch.no_grad()  # not inference_mode, in which a model that is moved to a GPU could not be trained any more
def backbone_features(
    model: nn.Module, split: Images, *, size: int, batch_size: int = 256, device: torch.device | str = "cpu"
) -> Tensor:
    """Features `(N, d)`, float32 on the CPU, of a timm model in evaluation mode, before any neck of its head.

    Raises:
        ValueError: If an image cannot be read.
    """
    model = model.to(device).eval()
    batches = eval_batches(split, size=size, batch_size=batch_size, colors=colors_of(model), device=device)
    found = []
    for images, _ in tqdm(batches, total=-(-len(split) // batch_size), desc="features", mininterval=5, disable=None):
        hidden = model.forward_features(images)  # type: ignore[operator]
        found.append(model.forward_head(hidden, pre_logits=True).flatten(1).float().cpu())  # type: ignore[operator]
    features = torch.cat(found)
    if len(features) != len(split):
        raise EtfZooError(f"{len(split) - len(features)} images of {split.source} cannot be read: remove them.")
    return features


def class_means(features: Tensor, labels: Tensor, names: list[str]) -> Tensor:
    """Mean feature of each class, `(K, d)` float64.

    Raises:
        ValueError: If a class has none.
    """
    counts = torch.bincount(labels, minlength=len(names))
    if not counts.all():
        missing = [names[int(k)] for k in torch.nonzero(counts == 0)[:3, 0]]
        raise EtfZooError(f"No training image of {', '.join(missing)}: there is no class mean.")
    sums = torch.zeros(len(names), features.shape[1], dtype=torch.float64)
    return sums.index_add_(0, labels, features.double()) / counts[:, None]


def fit_probe(
    method: str,
    features: Tensor,
    labels: Tensor,
    names: list[str],
    *,
    seed: int = 0,
    strength: float = 0.0,
    groups: np.ndarray | None = None,
) -> Probe:
    """Fit a probe. What there is to choose is chosen by 3-fold cross-validation that keeps near-duplicates together.

    No data set but the training split can be opened meanwhile, see `etf_zoo.trainer.data.sealed`.

    Args:
        method: `linear_probe`: L2 logistic regression, converged; its strength is chosen, and whether features are
            standardized each or centered and scaled as a whole. `knn`: nearest neighbors by cosine, weighted by the
            inverse distance; their number, up to 200, is chosen. `knn_20`: always 20. `ncm`: nearest class mean by
            cosine, of features of unit length. `ncm_euclid`: nearest class mean by Euclidean distance.
        features: `(N, d)`.
        labels: `(N,)`.
        names: Of the K classes.
        seed: Of the folds.
        strength: C of `linear_probe` on standardized features, instead of the choice; 0 to choose.
        groups: `(N,)`, images that stay together, by default `near_duplicates` of the features.

    Raises:
        EtfZooError: On an unknown method, a single class, too few images to choose by cross-validation, features that
            are not finite, or a regression that does not converge.
    """
    if method not in PROBES:
        raise EtfZooError(f"Unknown probe {method!r}. Choose one of {', '.join(PROBES)}.")
    if len(labels.unique()) < 2:
        raise EtfZooError("All training images are of one class; a classifier needs at least 2.")
    if not features.isfinite().all():
        raise EtfZooError("Features are not finite: these weights have diverged, or overflow in half precision.")
    if method == "ncm":
        return _nearest_mean(features, labels, names)
    if method == "ncm_euclid":
        return _nearest_mean_euclid(features, labels, names)
    if method == "knn_20":
        return _neighbors(features, labels, min(20, len(labels)), "20 neighbors", {})
    with choosing():
        if method == "linear_probe" and strength:
            return _linear_probe(features, labels, len(names), Choice("each", strength))
        folds = _folds(features, labels, seed, groups)
        if method == "knn":
            k, accuracy = _choose_neighbors(features, labels, folds)
            details = {"k": k, "cv_top1": 100 * accuracy}
            return _neighbors(features, labels, k, f"{k} neighbors, by cross-validation", details)
        choice, accuracy, start = _choose_strength(features, labels, folds)
        return _linear_probe(features, labels, len(names), choice, accuracy, start)


def _folds(features: Tensor, labels: Tensor, seed: int, groups: np.ndarray | None) -> list[tuple[Tensor, Tensor]]:
    smallest = int(labels.unique(return_counts=True)[1].min())
    if smallest < 2:
        raise EtfZooError(
            "A class has a single training image: nothing is left to choose the probe by. Give at least 2 of each, "
            "set the strength of a linear_probe (--strength 0.01), or use knn_20 or ncm."
        )
    groups = near_duplicates(features) if groups is None else groups
    found = [tuple(map(torch.from_numpy, f)) for f in grouped_folds(labels.numpy(), groups, min(FOLDS, smallest), seed)]
    found = [(fit, judged) for fit, judged in found if len(labels[fit].unique()) > 1]
    if not found:
        raise EtfZooError(
            "All training images of a class, or all images, are near-duplicates: nothing is left to choose the probe "
            "by. Set the strength of a linear_probe (--strength 0.01), or use knn_20 or ncm."
        )
    return found


class Choice(NamedTuple):
    """What a linear probe has to choose.

    Attributes:
        scaling: `whole`: centered, and divided by one number. `each`: every feature standardized.
        strength: C.
    """

    scaling: str
    strength: float


def _scaled(x: Tensor, scaling: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features along their principal axes `(N, r)`, and what made them: `(x - shift) @ map`, all float64."""
    x = x.double()
    shift, spread = x.mean(0), x.std(0, correction=0)
    # as scikit-learn's StandardScaler, a feature that is constant but for rounding is left as it is
    flat = spread <= 10 * torch.finfo(torch.float32).eps * shift.abs()
    scale = torch.where(flat, 1.0, spread) if scaling == "each" else spread.square().mean().sqrt().clamp(min=1e-30)
    x = (x - shift) / scale
    axes = principal_axes(x)
    return x @ axes, shift, axes / (scale[:, None] if scaling == "each" else scale)


def _choose_strength(
    features: Tensor, labels: Tensor, folds: list[tuple[Tensor, Tensor]]
) -> tuple[Choice, float, Tensor | None]:
    """The choice with the best accuracy on the images that the folds hold out; of equals the first of its kind.

    Strengths are tried from small to large until the accuracy lies `FALLEN` standard errors below the best so far: the
    weakest penalties take by far the most steps.

    Returns:
        The choice, its accuracy, and where to start the fit to all images: the mean of the folds' fits, if each of them
        has all classes.
    """
    images, num_classes = sum(len(judged) for _, judged in folds), len(labels.unique())
    best, highest, start = Choice(SCALINGS[0], STRENGTHS[0]), -1.0, None
    for scaling in SCALINGS:  # which looks at all training images, but at no label
        x = _scaled(features, scaling)[0].float()
        seen = [labels[fit].unique(return_inverse=True) for fit, _ in folds]
        paths = [
            rough_path(x[fit], own, len(classes), STRENGTHS)
            for (fit, _), (classes, own) in zip(folds, seen, strict=True)
        ]
        peak = 0.0
        for strength, points in zip(STRENGTHS, zip(*paths, strict=True), strict=False):
            right = 0
            for (_, judged), (classes, _), point in zip(folds, seen, points, strict=True):
                guesses = (x[judged] @ point[:, :-1].T.float() + point[:, -1].float()).argmax(1)
                right += int((classes[guesses] == labels[judged]).sum())
            accuracy = right / images
            if accuracy > highest:
                whole = all(len(classes) == num_classes for classes, _ in seen)
                best, highest = Choice(scaling, strength), accuracy
                start = torch.stack(points).mean(0) if whole else None
            peak = max(peak, accuracy)
            if accuracy < peak - FALLEN * (peak * (1 - peak) / images) ** 0.5:
                break
    return best, highest, start


def _linear_probe(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    choice: Choice,
    accuracy: float | None = None,
    start: Tensor | None = None,
) -> Probe:
    x, shift, axes = _scaled(features, choice.scaling)
    classes, own = labels.unique(return_inverse=True)
    fitted = fit_logistic(x, own, len(classes), choice.strength, start=start)
    rows = fitted.weight @ axes.T
    offsets = fitted.bias - rows @ shift
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
    bias = torch.full((num_classes,), (fitted.bias.min() - 100).item(), dtype=torch.float64)
    weight[classes], bias[classes] = rows, offsets
    unseen = torch.ones(num_classes, dtype=torch.bool).index_fill_(0, classes, False)
    # a class unseen is never predicted: its logit is that of the mean feature's least likely class, less 100
    weight[unseen] = rows.mean(0)
    bias[unseen] = offsets.mean() - 100
    details = {
        "C": choice.strength,
        "scaling": choice.scaling,
        "gradient_norm": fitted.gradient_norm,
        "steps": fitted.steps,
    }
    how = "" if accuracy is None else ", by cross-validation"
    if accuracy is not None:
        details["cv_top1"] = 100 * accuracy
    kind = {"each": "each feature standardized", "whole": "features scaled as a whole"}[choice.scaling]
    chosen = f"C = {choice.strength:g}, {kind}{how}"
    linear = weight.float(), bias.float()
    return Probe(_linear_rule(weight, bias), chosen, weight.numel() + bias.numel(), linear=linear, details=details)


def _linear_rule(weight: Tensor, bias: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: (torch.from_numpy(x).double() @ weight.T + bias).argmax(1).numpy()


def _votes(
    queries: Tensor, features: Tensor, labels: Tensor, num_classes: int, ks: list[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Predictions `(queries, ks)` by cosine, weighted by the inverse of 1 - cosine, so many queries at a time."""
    unit = F.normalize(features, dim=1)
    for rows in torch.arange(len(queries)).split(1024):
        cosines, found = (F.normalize(queries[rows], dim=1) @ unit.T).topk(max(ks), dim=1)
        weights = 1 / (1 - cosines.double()).clamp(min=1e-6)
        scores = torch.zeros(len(rows), num_classes, dtype=torch.float64)
        guesses, first = [], 0
        for k in ks:
            scores.scatter_add_(1, labels[found[:, first:k]], weights[:, first:k])
            guesses.append(scores.argmax(1))
            first = k
        yield rows, torch.stack(guesses, 1)


def _choose_neighbors(features: Tensor, labels: Tensor, folds: list[tuple[Tensor, Tensor]]) -> tuple[int, float]:
    """The number of neighbors with the best accuracy on the images that the folds hold out; of equals the smallest."""
    ks = [k for k in NEIGHBORS if k <= min(len(fit) for fit, _ in folds)]
    right = torch.zeros(len(ks))
    for fit, judged in folds:
        for rows, guesses in _votes(features[judged], features[fit], labels[fit], int(labels.max()) + 1, ks):
            right += (guesses == labels[judged[rows], None]).sum(0)
    best = int(right.argmax())
    return ks[best], right[best].item() / sum(len(judged) for _, judged in folds)


def _neighbors(features: Tensor, labels: Tensor, k: int, chosen: str, details: dict[str, Any]) -> Probe:
    def predict(x: np.ndarray) -> np.ndarray:
        votes = _votes(torch.from_numpy(x), features, labels, int(labels.max()) + 1, [k])
        return torch.cat([guesses[:, 0] for _, guesses in votes]).numpy()

    return Probe(predict, chosen, 0, details=details)


def _fitting_scale(logits: Tensor, labels: Tensor) -> float:
    """What to multiply logits by for the training labels to be most likely, for honest probabilities."""
    scales = 10 ** torch.linspace(-4, 4, 81)
    losses = torch.stack([F.cross_entropy(scale * logits, labels) for scale in scales])
    return scales[losses.argmin()].item()


def _nearest_mean(features: Tensor, labels: Tensor, names: list[str]) -> Probe:
    unit = F.normalize(features, dim=1)
    prototypes = F.normalize(class_means(unit, labels, names), dim=1).float()

    def predict(x: np.ndarray) -> np.ndarray:
        return (F.normalize(torch.from_numpy(x), dim=1) @ prototypes.T).argmax(1).numpy()

    scale = _fitting_scale(unit @ prototypes.T, labels)
    chosen = "class means of unit features, by cosine"
    return Probe(predict, chosen, prototypes.numel(), prototypes=prototypes, logit_scale=scale)


def _nearest_mean_euclid(features: Tensor, labels: Tensor, names: list[str]) -> Probe:
    """A linear classifier: |x - m|^2 is least where 2 m x - |m|^2 is largest."""
    means = class_means(features, labels, names)
    shift = means.mean(0)  # which moves no boundary, and keeps numbers small
    weight, bias = 2 * (means - shift), shift.square().sum() - means.square().sum(1)
    scale = _fitting_scale(features.double() @ weight.T + bias, labels)
    linear = (scale * weight).float(), (scale * bias).float()
    chosen = "class means, by Euclidean distance"
    return Probe(_linear_rule(weight, bias), chosen, means.numel(), linear=linear)
