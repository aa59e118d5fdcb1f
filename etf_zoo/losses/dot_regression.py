"""Dot regression (2203.09081): pull each feature's product with its own prototype to the wanted length, push none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import EtfZooError
from ..frames.numerics import unit
from ._common import check_inputs, without_autocast

__all__ = ["DotRegressionLoss", "class_lengths", "dot_regression"]


def class_lengths(class_counts: Tensor | Sequence[int]) -> Tensor:
    """Prototype lengths sqrt(mean count / count) of the published code: rare classes get long prototypes.

    Args:
        class_counts: Training samples of each of the K classes.

    Returns:
        Float32 `(K,)`.

    Raises:
        ValueError: If a class has no sample.
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.ndim != 1 or not bool((counts > 0).all()):
        raise EtfZooError("class_counts holds one positive count for each class.")
    return torch.sqrt(counts.mean() / counts).float()


def dot_regression(
    products: Tensor, prototype_length: Tensor | float = 1.0, feature_length: Tensor | float = 1.0
) -> Tensor:
    r"""Mean of :math:`\frac{1}{2h} (\langle x, w\rangle - h\,l)^2`.

    Args:
        products: `(B,)`, of each feature with the prototype of its class, of length l.
        prototype_length: l, `(B,)` or a number.
        feature_length: h, the length wanted of a feature, `(B,)` or a number.

    Returns:
        Scalar.
    """
    return ((products - prototype_length * feature_length).square() / (2 * feature_length)).mean()


class DotRegressionLoss(nn.Module):
    r"""Dot-regression loss (2203.09081): :math:`\frac12 (\cos(x, w_y) - 1)^2` in its plain form.

    Its gradient has a pull toward the own prototype and no push from the others, which under imbalance is what tilts
    a rare class. Two things make it stall. Nonnegative features cannot reach a randomly turned prototype, see
    `orientation="blocks"` and `feature_norm="batch"`. And in its plain form the gradient is smaller than that of
    cross-entropy by about the logit scale (11 for 100 classes): with the same step size training hardly starts. The
    length h multiplies it; `"own"` does what the published code does.

    Takes unit embeddings (`feature_norm="l2"` or `"batch"`), not logits; raw ones for other lengths than a number.

    Args:
        class_counts: Scale the prototype of class k to sqrt(mean count / count_k), as the published code does. On unit
            features that weighs class k by mean count / count_k. Off by default: with the balanced data of the plain
            form it changes nothing, and on a long tail it is a choice to measure. (That code counts each batch.)
        feature_length: h: features are projected to this length, which gives h / 2 (cos - 1)^2. `"own"` takes raw
            embeddings (`feature_norm="none"`) and for h each one's own length, without a gradient through it, as the
            published code does. None takes them too and pulls their product with the prototype to the prototype's
            length.
        length_penalty: Weight of the published code's penalty, the mean length of the embeddings; needs
            raw ones, a `feature_length` of `"own"` or None.

    Shape:
        embeddings `(B, dim)`, labels `(B,)`, frame `(K, dim)` to a scalar, float32 at least.

    Raises:
        ValueError: On options that do not go together, or (in forward) shapes that do not.
    """

    lengths: Tensor | None

    def __init__(
        self,
        class_counts: Tensor | Sequence[int] | None = None,
        *,
        feature_length: float | Literal["own"] | None = 1.0,
        length_penalty: float = 0.0,
    ):
        super().__init__()
        is_number = isinstance(feature_length, int | float)
        if not (math.isfinite(feature_length) and feature_length > 0 if is_number else feature_length in (None, "own")):
            raise EtfZooError(
                f"feature_length is positive, or 'own' or None for raw embeddings, got {feature_length!r}."
            )
        if length_penalty < 0:
            raise EtfZooError(f"length_penalty must not be negative, got {length_penalty}.")
        if length_penalty and is_number:
            raise EtfZooError(
                "A penalty on lengths does nothing to features of fixed length: pass feature_length='own' or None."
            )
        self.feature_length, self.length_penalty = feature_length, length_penalty
        lengths = None if class_counts is None else class_lengths(class_counts)
        self.register_buffer("lengths", lengths, persistent=False)

    @without_autocast
    def forward(self, embeddings: Tensor, labels: Tensor, frame: Tensor) -> Tensor:
        x, w, labels = check_inputs(embeddings, labels, frame)
        wanted: Tensor | float = 1.0
        if self.feature_length == "own":
            wanted = x.detach().norm(dim=1).clamp_min(torch.finfo(x.dtype).eps)
        elif isinstance(self.feature_length, int | float):
            wanted = self.feature_length
            x = wanted * unit(x, embeddings)
        products = (x * w[labels]).sum(dim=1)
        length = 1.0
        if self.lengths is not None:
            if len(self.lengths) != len(w):
                raise EtfZooError(f"class_counts has {len(self.lengths)} classes, the frame {len(w)}.")
            length = self.lengths.to(x.dtype)[labels]
            products = products * length
        loss = dot_regression(products, length, wanted)
        if self.length_penalty:
            loss = loss + self.length_penalty * x.norm(dim=1).mean()
        return loss

    def extra_repr(self) -> str:
        return f"feature_length={self.feature_length}, length_penalty={self.length_penalty}"
