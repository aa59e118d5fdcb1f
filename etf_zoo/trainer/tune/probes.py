"""Classifiers on frozen features: logistic regression, nearest neighbors, nearest class mean.

Features are the backbone's, before any neck or norm of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from etf_zoo.errors import EtfZooError
from etf_zoo.models.names import split_head, timm_classifier_names

from ..data.augment import colors_of
from ..data.batches import eval_batches
from ..data.subsets import Images

__all__ = ["PROBES", "Probe", "backbone_features", "backbone_size", "class_means", "fit_probe", "linear_classifier"]

PROBES = ("linear_probe", "knn", "ncm")
STRENGTHS = tuple(10.0 ** np.arange(-4, 2))  # scikit-learn's C: larger is weaker regularization
NEIGHBORS = (1, 5, 10, 20)
FOLDS = 3


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
    """

    predict: Callable[[np.ndarray], np.ndarray]
    chosen: str
    tuned: int
    linear: tuple[Tensor, Tensor] | None = None
    prototypes: Tensor | None = None
    logit_scale: float = 1.0


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
    method: str, features: Tensor, labels: Tensor, names: list[str], *, seed: int = 0, strength: float = 0.0
) -> Probe:
    """Fit a probe.

    Args:
        method: `linear_probe`: L2 logistic regression on standardized features, its strength chosen by stratified
            3-fold cross-validation. `knn`: nearest neighbors by cosine, weighted by distance, their number chosen
            likewise. `ncm`: nearest class mean by cosine, of features of unit length.
        features: `(N, d)`.
        labels: `(N,)`.
        names: Of the K classes.
        seed: Of the folds.
        strength: scikit-learn's C for `linear_probe`, instead of the choice; 0 to choose.

    Raises:
        ValueError: On an unknown method, a single class, or too few images to choose by cross-validation.
    """
    if method not in PROBES:
        raise EtfZooError(f"Unknown probe {method!r}. Choose one of {', '.join(PROBES)}.")
    if len(labels.unique()) < 2:
        raise EtfZooError("All training images are of one class; a classifier needs at least 2.")
    if method == "ncm":
        return _nearest_mean(features, labels, names)
    x, y = features.numpy(), labels.numpy()
    if method == "knn":
        kept = [k for k in NEIGHBORS if k <= len(y) * (FOLDS - 1) // FOLDS]
        search = _choose(KNeighborsClassifier(metric="cosine", weights="distance"), "n_neighbors", kept, x, y, seed)
        return Probe(search.predict, f"{search.best_params_['n_neighbors']} neighbors, by cross-validation", 0)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, tol=1e-3))
    key = "logisticregression__C"
    if strength:
        fitted, chosen = pipeline.set_params(**{key: strength}).fit(x, y), f"C = {strength:g}"
    else:
        search = _choose(pipeline, key, list(STRENGTHS), x, y, seed)
        fitted, chosen = search.best_estimator_, f"C = {search.best_params_[key]:g}, by cross-validation"
    weight, bias = _folded(fitted, features.shape[1], len(names))
    return Probe(fitted.predict, chosen, weight.numel() + bias.numel(), linear=(weight, bias))


def _choose(estimator: Any, key: str, values: list, x: np.ndarray, y: np.ndarray, seed: int) -> GridSearchCV:
    smallest = int(np.unique(y, return_counts=True)[1].min())
    if smallest < 2:
        raise EtfZooError(
            "A class has a single training image: nothing is left to choose the probe by. Give at least 2 of each, "
            "set the strength of a linear_probe (--strength 0.01), or use ncm."
        )
    folds = StratifiedKFold(min(FOLDS, smallest), shuffle=True, random_state=seed)
    return GridSearchCV(estimator, {key: values}, cv=folds).fit(x, y)


def _folded(pipeline: Any, dim: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weight and bias on the raw features: w (x - m) / s + b = (w / s) x + (b - (w / s) m)."""
    scaler, fitted = pipeline[0], pipeline[-1]
    own, offset = fitted.coef_.astype(np.float64), fitted.intercept_.astype(np.float64)
    if len(fitted.classes_) == 2:  # one row for two classes: its sigmoid is the softmax of plus and minus a half
        own, offset = np.concatenate([-own, own]) / 2, np.concatenate([-offset, offset]) / 2
    own = own / scaler.scale_
    offset = offset - own @ scaler.mean_
    weight, bias = np.zeros((num_classes, dim)), np.full(num_classes, offset.min() - 100.0)  # never a class unseen
    weight[fitted.classes_], bias[fitted.classes_] = own, offset
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


def _nearest_mean(features: Tensor, labels: Tensor, names: list[str]) -> Probe:
    unit = F.normalize(features, dim=1)
    prototypes = F.normalize(class_means(unit, labels, names), dim=1).float()

    def predict(x: np.ndarray) -> np.ndarray:
        return (F.normalize(torch.from_numpy(x), dim=1) @ prototypes.T).argmax(1).numpy()

    cosines = unit @ prototypes.T
    scales = 10 ** torch.linspace(0, 3, 31)  # the one that fits the training labels best, for honest probabilities
    losses = torch.stack([F.cross_entropy(scale * cosines, labels) for scale in scales])
    chosen = "class means of unit features, by cosine"
    return Probe(predict, chosen, prototypes.numel(), prototypes=prototypes, logit_scale=scales[losses.argmin()].item())
