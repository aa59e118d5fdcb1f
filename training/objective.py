"""What a training step minimises: the recipe's loss on the head's embeddings, and penalties on the features."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etf_zoo import FrameClassifier, frame_heads, losses
from etf_zoo.moving import MovingFrameClassifier

from .config import Loss

__all__ = ["Objective", "LOSSES"]

# Losses on (embeddings, labels, frame), by the name a recipe has for them.
LOSSES: dict[str, type[nn.Module]] = {
    "dot_regression": losses.DotRegressionLoss,
    "hierarchy_cosine": losses.HierarchyCosineLoss,
    "separating_cone": losses.SeparatingConeLoss,
    "squared": losses.SquaredLoss,
}
# Losses with a scale of their own, which has to be the head's: its logits classify.
_SCALED = ("hierarchy_cosine", "separating_cone")


class Objective:
    """Loss of a batch, by the recipe.

    Args:
        settings: The recipe's loss.
        model: The model without wrappers.
        class_counts: Training images of each class; empty if not known.
        label_smoothing: Of the cross-entropy.

    Raises:
        ValueError: On an unknown loss, arguments it does not take, or a loss that the model's head cannot serve.
    """

    def __init__(self, settings: Loss, model: nn.Module, class_counts: list[int], label_smoothing: float = 0.0):
        heads = list(frame_heads(model).values())
        self.head = heads[0] if len(heads) == 1 else None
        self.classifier: Any = self.head or model.get_classifier()  # type: ignore[operator]
        self.label_smoothing = label_smoothing
        self.class_weights = (
            _class_weights(class_counts, next(model.parameters()).device) if settings.class_weights else None
        )
        self.loss = self._build(settings, class_counts)
        self.penalty = losses.VarianceCovarianceLoss(**settings.penalty_args) if settings.variance_covariance else None
        self.penalty_weight = settings.variance_covariance
        self.moving = self.head if isinstance(self.head, MovingFrameClassifier) else None
        self.takes_shares = self.loss is None and self.moving is None  # of classes `(B, K)` in the place of labels
        self._observed: list[tuple[Tensor, Tensor]] = []  # embeddings and labels of this step
        if self.penalty is not None and not isinstance(self.classifier, nn.Module):
            raise ValueError("The variance-covariance penalty needs a model with one classifier.")

    def _build(self, settings: Loss, class_counts: list[int]) -> nn.Module | None:
        if settings.name == "cross_entropy":
            if settings.args or settings.class_scaling:
                raise ValueError("loss.name cross_entropy takes neither loss.args nor loss.class_scaling.")
            return None
        if settings.class_weights:
            raise ValueError(f"loss.class_weights is for cross_entropy, not {settings.name}.")
        if settings.name not in LOSSES:
            raise ValueError(f"Unknown loss {settings.name!r}. Choose one of cross_entropy, {', '.join(LOSSES)}.")
        if self.head is None:
            raise ValueError(f"The loss {settings.name} compares embeddings with one fixed frame: use head=frame.")
        if self.head.logit_scale.requires_grad:
            raise ValueError(f"A learnable logit scale learns from cross_entropy alone, not from {settings.name}.")
        args = dict(settings.args)
        if settings.name in _SCALED:
            args.setdefault("logit_scale", self.head.logit_scale.item())
        if settings.class_scaling:
            if settings.name != "dot_regression":
                raise ValueError(f"loss.class_scaling is for dot_regression, not {settings.name}.")
            if not class_counts:
                raise ValueError("loss.class_scaling needs the counts of the classes, which a stream does not have.")
            args["class_counts"] = class_counts
        try:
            return LOSSES[settings.name](**args).to(self.head.weight.device)
        except TypeError as error:
            raise ValueError(f"loss.args of {settings.name}: {error}.") from error

    def __call__(self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B, K)` in float32 and the loss; gradients flow through the wrapped model's `forward`.

        Labels are class numbers `(B,)`, or shares of the classes `(B, K)` if `takes_shares`.
        """
        with _seen(self.classifier) as seen:
            logits = forward(images).float()
        if self.loss is None:
            loss = F.cross_entropy(logits, labels, self.class_weights, label_smoothing=self.label_smoothing)
        else:
            loss = self.loss(seen["embeddings"], labels, self.head.weight)  # type: ignore[union-attr]
        if self.penalty is not None:
            loss = loss + self.penalty_weight * self.penalty(seen["features"])
        if self.moving is not None:
            self._observed.append((seen["embeddings"].detach(), labels))
        return logits, loss

    def after_step(self) -> None:
        """Let a moving frame follow what the step has seen; every process calls it."""
        if self.moving is not None and self._observed:
            embeddings, labels = zip(*self._observed, strict=True)  # of all pieces of the batch
            self.moving.observe(torch.cat(embeddings), torch.cat(labels))
            self._observed.clear()


def _class_weights(counts: list[int], device: torch.device) -> Tensor:
    """Inverse frequencies, `(K,)`, whose mean over the training images is 1; 0 for a class without images."""
    count = torch.tensor(counts, dtype=torch.float32, device=device)
    return torch.where(count > 0, count.sum() / ((count > 0).sum() * count.clamp_min(1)), 0)


@contextmanager
def _seen(classifier: nn.Module):
    """What goes into a classifier while the context lasts (`features`), and on to its frame (`embeddings`).

    Nothing stays behind on the module, so copies of the model (an average of its weights) are clean.
    """
    seen: dict[str, Tensor] = {}
    hook = None
    if isinstance(classifier, nn.Module):
        hook = classifier.register_forward_pre_hook(lambda module, inputs: seen.update(features=inputs[0]))
    if isinstance(classifier, FrameClassifier):

        def embed(x: Tensor) -> Tensor:
            seen["embeddings"] = FrameClassifier.embed(classifier, x)
            return seen["embeddings"]

        classifier.embed = embed  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        if hook is not None:
            hook.remove()
        if isinstance(classifier, FrameClassifier):
            del classifier.embed
