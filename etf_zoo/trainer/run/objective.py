"""What a training step minimizes: the recipe's loss on the head's embeddings, and penalties on the features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etf_zoo import FrameClassifier, frame_heads, losses
from etf_zoo.errors import EtfZooError
from etf_zoo.layers.moving import MovingFrameClassifier
from etf_zoo.layers.subspaces import SubspaceClassifier
from etf_zoo.losses import LOSSES

from ..recipe.config import Loss
from .earlier_stage import STAGE_HEAD, EarlierStage

__all__ = ["Objective", "class_weights_of"]

# Losses with a scale of their own, which has to be the head's: its logits classify.
_SCALED = ("hierarchy_cosine", "prototype_contrast", "separating_cone")


class Objective:
    """Loss of a batch, by the recipe.

    Cross-entropy with a frame that is not stored is computed in blocks of classes, see `losses.FrameCrossEntropy`.

    Args:
        settings: The recipe's loss.
        model: The model without wrappers.
        class_counts: Training images of each class; empty if not known.
        label_smoothing: Of the cross-entropy.

    Raises:
        ValueError: On an unknown loss, arguments it does not take, or a loss that the model's head cannot serve.
    """

    def __init__(self, settings: Loss, model: nn.Module, class_counts: list[int], label_smoothing: float = 0.0):
        heads = self.heads = [head for name, head in frame_heads(model).items() if name != STAGE_HEAD]
        self.head = heads[0] if len(heads) == 1 else None
        self.classifier: Any = self.head or model.get_classifier()  # type: ignore[operator]
        self.label_smoothing = label_smoothing
        if (settings.class_weights or settings.class_scaling or settings.logit_adjustment) and not class_counts:
            raise EtfZooError(
                "loss.class_weights, loss.class_scaling and loss.logit_adjustment need the class counts, which a "
                "stream does not have."
            )
        self.class_weights = (
            class_weights_of(class_counts, next(model.parameters()).device) if settings.class_weights else None
        )
        self.loss = self._build(settings, class_counts)
        self.adjustment = None
        if settings.logit_adjustment:
            if self.loss is not None:
                raise EtfZooError(f"loss.logit_adjustment is for cross_entropy on stored frames, not {settings.name}.")
            added = losses.logit_adjustment(class_counts, settings.logit_adjustment)
            self.adjustment = added.to(next(model.parameters()).device)
        self.penalties = _penalties(settings)
        self.stage = EarlierStage(model, settings) if settings.stage_weight else None
        self.moving = self.head if isinstance(self.head, MovingFrameClassifier) else None
        if self.moving is None and any(isinstance(head, MovingFrameClassifier) for head in heads):
            raise EtfZooError(
                f"A moving frame follows one head's features; {type(model).__name__} has {len(heads)} heads."
            )
        self.in_blocks = self.loss if isinstance(self.loss, losses.FrameCrossEntropy) else None
        self.takes_shares = self.loss is None and self.moving is None  # of classes `(B, K)` in the place of labels
        self._observed: list[tuple[Tensor, Tensor]] = []  # embeddings and labels of this step
        if self.penalties and not isinstance(self.classifier, nn.Module):
            raise EtfZooError("Penalties on the backbone's features need a model with one classifier.")

    def _build(self, settings: Loss, class_counts: list[int]) -> nn.Module | None:
        not_stored = any(head.signs.numel() for head in self.heads)
        if settings.name == "cross_entropy":
            if settings.args or settings.class_scaling:
                raise EtfZooError("loss.name cross_entropy takes neither loss.args nor loss.class_scaling.")
            if not not_stored:
                return None
        if settings.name == "frame_cross_entropy" or not_stored:
            return self._build_in_blocks(settings)
        if settings.class_weights:
            raise EtfZooError(f"loss.class_weights is for cross_entropy, not {settings.name}.")
        if settings.name not in LOSSES:
            known = ", ".join(("cross_entropy", "frame_cross_entropy", *LOSSES))
            raise EtfZooError(f"Unknown loss {settings.name!r}. Choose one of {known}.")
        if self.head is None:
            raise EtfZooError(
                f"The loss {settings.name} compares embeddings with one fixed frame: use head=frame, and a model with "
                f"one classifier."
            )
        if self.head.logit_scale.requires_grad:
            raise EtfZooError(f"A learnable logit scale learns from cross_entropy alone, not from {settings.name}.")
        if (settings.name == "hierarchical_subspaces") != isinstance(self.head, SubspaceClassifier):
            raise EtfZooError(
                f"loss.name hierarchical_subspaces and model_args.frame subspaces go together, or cross_entropy with "
                f"the latter; not {settings.name} with a {type(self.head).__name__}."
            )
        if self.head.has_lengths:
            raise EtfZooError(f"{settings.name} compares with unit rows; a frame with lengths needs cross_entropy.")
        args = dict(settings.args)
        raw = self.head.feature_norm == "none"  # whose scale is meant for raw features, not for their cosines
        if settings.name in _SCALED and not raw:
            args.setdefault("logit_scale", self.head.logit_scale.item())
        if settings.class_scaling:
            if settings.name != "dot_regression":
                raise EtfZooError(f"loss.class_scaling is for dot_regression, not {settings.name}.")
            args["class_counts"] = class_counts
        try:
            loss = LOSSES[settings.name](**args).to(self.head.weight.device)
        except TypeError as error:
            raise EtfZooError(f"loss.args of {settings.name}: {error}.") from error
        if isinstance(loss, losses.DotRegressionLoss) and not isinstance(loss.feature_length, int | float) and not raw:
            raise EtfZooError(
                f"loss.args.feature_length {loss.feature_length!r} is of raw features, which this head's norm makes "
                f"all of length 1: set model_args.feature_norm none, or feature_length to a number."
            )
        return loss

    def _build_in_blocks(self, settings: Loss) -> losses.FrameCrossEntropy:
        if settings.name not in ("cross_entropy", "frame_cross_entropy") or self.head is None:
            raise EtfZooError(
                f"A Kerdock frame of so many classes is not stored: only cross_entropy and frame_cross_entropy can use "
                f"it, with a model of one classifier, not {settings.name} with {len(self.heads)}."
            )
        if settings.class_weights or settings.class_scaling:
            raise EtfZooError("Cross-entropy in blocks of classes knows neither loss.class_weights nor class_scaling.")
        try:
            return losses.FrameCrossEntropy(self.head, label_smoothing=self.label_smoothing, **settings.args)
        except TypeError as error:
            raise EtfZooError(f"loss.args of {settings.name}: {error}.") from error

    def __call__(self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which predictions are right, `(B,)`, and the loss; gradients flow through the wrapped model's `forward`.

        Labels are class numbers `(B,)`, or shares of the classes `(B, K)` if `takes_shares`: the class of the largest
        share is then the right one.
        """
        early = nullcontext() if self.in_blocks is None else self.in_blocks.head.without_logits()
        with _seen(self.classifier) as seen, early, nullcontext() if self.stage is None else self.stage.watched():
            logits = forward(images).float()
        if self.in_blocks is not None:
            each, right = self.in_blocks.from_embeddings(seen["embeddings"], labels)
            loss = each.mean()
        else:
            right = logits.detach().argmax(dim=1) == (labels if labels.ndim == 1 else labels.argmax(dim=1))
            loss = self._of_logits(logits, seen, labels)
        for weight, penalty in self.penalties:
            loss = loss + weight * penalty(seen["features"])
        if self.stage is not None:
            loss = loss + self.stage.weight * self._cross_entropy(self.stage.logits(), labels)
        if self.moving is not None:
            self._observed.append((seen["embeddings"].detach(), labels))
        return right, loss

    def _of_logits(self, logits: Tensor, seen: dict[str, Tensor], labels: Tensor) -> Tensor:
        if self.loss is None:
            return self._cross_entropy(logits, labels)
        return self.loss(seen["embeddings"], labels, self.head.seen_weight)  # type: ignore[union-attr]

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.adjustment is not None:
            logits = logits + self.adjustment
        # not `mean`, which divides by the weights of these very images, however few they are
        smoothing, weights = self.label_smoothing, self.class_weights
        return F.cross_entropy(logits, labels, weights, label_smoothing=smoothing, reduction="none").mean()

    def after_step(self) -> None:
        """Let a moving frame follow what the step has seen; every process calls it."""
        if self.moving is not None and self._observed:
            embeddings, labels = zip(*self._observed, strict=True)  # of all pieces of the batch
            self.moving.observe(torch.cat(embeddings), torch.cat(labels))
            self._observed.clear()


def _penalties(settings: Loss) -> list[tuple[float, nn.Module]]:
    """Penalties on the backbone's features, with their weights."""
    found: list[tuple[float, nn.Module]] = []
    if settings.variance_covariance:
        try:
            found.append((settings.variance_covariance, losses.VarianceCovarianceLoss(**settings.penalty_args)))
        except TypeError as error:
            raise EtfZooError(f"loss.penalty_args: {error}.") from error
    elif settings.penalty_args:
        raise EtfZooError("loss.penalty_args are of the penalty: set its weight, loss.variance_covariance.")
    if settings.nearest_neighbor_entropy:
        found.append((settings.nearest_neighbor_entropy, losses.NearestNeighborEntropyLoss()))
    return found


def _rows(x: Tensor) -> Tensor:
    """Features as `(B, d)`: those of a 1x1 convolution come as maps of one pixel, channels first or last."""
    return x.flatten(1) if x.ndim == 4 and x[0].numel() in (x.shape[1], x.shape[3]) else x


def class_weights_of(counts: list[int], device: torch.device) -> Tensor:
    """Inverse frequencies, `(K,)`, whose mean over the training images is 1; 0 for a class without images."""
    count = torch.tensor(counts, dtype=torch.float32, device=device)
    return torch.where(count > 0, count.sum() / ((count > 0).sum() * count.clamp_min(1)), 0)


@contextmanager
def _seen(classifier: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What goes into a classifier while the context lasts (`features`), and on to its frame (`embeddings`)."""
    seen: dict[str, Tensor] = {}
    if isinstance(classifier, FrameClassifier):
        with classifier.register_embedding_hook(
            lambda features, embeddings: seen.update(features=_rows(features), embeddings=_rows(embeddings))
        ):
            yield seen
    elif isinstance(classifier, nn.Module):
        with classifier.register_forward_pre_hook(lambda module, inputs: seen.update(features=_rows(inputs[0]))):
            yield seen
    else:
        yield seen
