"""Cross-entropy over very many classes of a fixed frame, exact, without ever holding the logits."""

# no `from __future__ import annotations` here: torch reads the operator's to make its schema
import math

import torch
from torch import Tensor, library, nn
from torch.nn import functional as F

from ..errors import EtfZooError
from ..frames.numerics import at_least_float32
from ..layers.classifier import FrameClassifier
from ..layers.implicit import frame_blocks, into_core, kerdock_sum, kerdock_vectors
from ..layers.subspaces import SubspaceClassifier
from ._common import check_labels, without_autocast

__all__ = ["FrameCrossEntropy"]

# Length of a scaled feature up to which exponentials of its logits need no shift: exp(80) = 5.5e34 and its inverse are
# float32 numbers, and so is their sum over a Kerdock frame, as the squared logits of each basis sum to the squared
# length. All rows of a frame that is stored may lie near the feature: there K times the largest has to fit.
_PLAIN_LENGTH = 80.0
_LARGEST = 88.0  # exp(88) = 1.7e38 is a float32 number


@library.custom_op("etf_zoo::other_classes", mutates_args=())
def _other_classes(
    x: Tensor, labels: Tensor, weight: Tensor, signs: Tensor, num_classes: int, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of the logits of all classes but the label, `(B,)`, the largest of them, and the gradient `(B, d)`.

    The gradient of the first is the softmax over the other classes times their vectors: it falls out of the same pass,
    so the backward pass recomputes nothing and a step is two transforms of each basis. It is empty if not asked for.
    """
    limit = _PLAIN_LENGTH if signs.numel() else min(_PLAIN_LENGTH, _LARGEST - math.log(num_classes))
    plain = bool(x.norm(dim=1).max() <= limit)
    top = x.new_full((len(x),), 0.0 if plain else -math.inf)  # what exponents are shifted by
    highest = x.new_full((len(x),), -math.inf)
    total = torch.zeros_like(top)
    direction = x.new_zeros(x.shape[1], len(x)) if gradient else x.new_zeros(0, 0)
    for block in frame_blocks(x, weight, signs, num_classes):
        if plain:
            signed = [block.logits.exp_()]
            if block.mirrored:
                signed.append(signed[0].reciprocal())
            block.leave_out(signed, labels, 0.0)
            highest = torch.maximum(highest, torch.stack([figures.amax(dim=0) for figures in signed]).amax(dim=0).log())
        else:
            signed = [block.logits, -block.logits] if block.mirrored else [block.logits]
            block.leave_out(signed, labels, -math.inf)
            highest = torch.maximum(highest, torch.stack([figures.amax(dim=0) for figures in signed]).amax(dim=0))
            shift = highest.masked_fill(highest == -math.inf, 0)  # a block may hold nothing but the label
            for figures in signed:
                figures.sub_(shift).exp_()
            shrink = torch.exp(top - shift)
            total, direction, top = total * shrink, direction * shrink if gradient else direction, highest
        for figures in signed:
            total = total + figures.sum(dim=0)
        if gradient:
            direction += block.pull(signed[0].sub_(signed[1]) if block.mirrored else signed[0])
    return top + total.log(), highest, (direction / total).T.contiguous() if gradient else direction


@_other_classes.register_fake
def _(x, labels, weight, signs, num_classes, gradient):
    return x.new_empty(len(x)), x.new_empty(len(x)), x.new_empty(x.shape if gradient else (0, 0))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx, grad, *_):
    if torch.is_grad_enabled():
        raise EtfZooError("FrameCrossEntropy has no second derivative: use F.cross_entropy(head(x), y).")
    return grad[:, None] * ctx.saved_tensors[0], None, None, None, None, None


_other_classes.register_autograd(_backward, setup_context=_setup_context)


class FrameCrossEntropy(nn.Module):
    r"""Cross-entropy of a frame's classifier over all its classes, without the `(B, K)` logits.

    The same number as `F.cross_entropy(head(features), labels)`, in blocks of classes: a running sum of exponentials,
    and the gradient in the same pass. It is exact: no class is sampled or left out. With `frame="kerdock"` there is no
    weight matrix either: a step at a million classes and d = 1,024 holds some megabytes. With a frame that is stored it
    saves the logits.

    There is nothing to learn in the frame, so with several processes the classes need no exchange: each process has all
    of them, and DDP sees the neck's parameters alone, if there is a neck. For DDP to see those, call the loss in the
    wrapped module's forward.

    Margins, with normalized features only: the label's logit becomes
    :math:`s\,(\cos(\theta_y + m) - c)`, with m the `angular_margin` of ArcFace (1801.07698; where :math:`\theta_y + m`
    passes :math:`\pi` it goes on in a straight line, as there) and c the `cosine_margin` of CosFace (1801.09414).

    Args:
        head: The classifier; any frame but the Helmert one of converted classifiers.
        label_smoothing: Share of the target spread over all classes, as `F.cross_entropy` has it.
        angular_margin: m, in radians.
        cosine_margin: c.

    Shape:
        features `(B, in_features)`, labels `(B,)` to a scalar, float32 at least.

    Raises:
        ValueError: On options that do not fit, or (in forward) shapes, labels or learned prototypes that do not, and
            (in backward) where a second derivative is wanted.

    Example:
        >>> head = FrameClassifier(64, 4000, frame="kerdock")
        >>> loss = FrameCrossEntropy(head, label_smoothing=0.1)
        >>> loss(torch.randn(8, 64, requires_grad=True), torch.arange(8)).backward()
    """

    def __init__(
        self,
        head: FrameClassifier,
        *,
        label_smoothing: float = 0.0,
        angular_margin: float = 0.0,
        cosine_margin: float = 0.0,
    ):
        super().__init__()
        if not isinstance(head, FrameClassifier):
            raise EtfZooError(f"FrameCrossEntropy takes a FrameClassifier, got {type(head).__name__}.")
        if head.implicit and head.frame == "helmert":
            raise EtfZooError("A converted classifier has no blocks of classes: use F.cross_entropy(head(x), y).")
        if head.has_lengths or isinstance(head, SubspaceClassifier):
            raise EtfZooError("Blocks of classes are of unit rows and their cosines: use F.cross_entropy(head(x), y).")
        if not 0 <= label_smoothing < 1:
            raise EtfZooError(f"label_smoothing lies in [0, 1), got {label_smoothing}.")
        if not 0 <= angular_margin < math.pi / 2 or not 0 <= cosine_margin < 1:
            raise EtfZooError(
                f"angular_margin lies in [0, pi/2) and cosine_margin in [0, 1), got {angular_margin}, {cosine_margin}."
            )
        if (angular_margin or cosine_margin) and head.feature_norm == "none":
            raise EtfZooError("Margins are of cosines: they need a head with feature_norm='l2' or 'batch'.")
        self.head = head
        self.label_smoothing, self.angular_margin, self.cosine_margin = label_smoothing, angular_margin, cosine_margin

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.from_embeddings(self.head.embed(features), labels)[0].mean()

    @without_autocast
    def from_embeddings(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each sample's loss, and whether its label has the largest logit (without margin).

        Args:
            embeddings: `(B, dim)`, what the head's `embed` returns.
            labels: `(B,)` int64 in [0, K).

        Returns:
            Float `(B,)` and bool `(B,)`.
        """
        head = self.head
        if head.seen_weight.requires_grad:
            raise EtfZooError("Blocks of classes give prototypes no gradient, and these learn: use cross_entropy.")
        if embeddings.ndim != 2 or embeddings.shape[1] != head.dim:
            raise EtfZooError(f"Expected embeddings (B, {head.dim}), got {tuple(embeddings.shape)}.")
        labels = check_labels(labels, len(embeddings), head.num_classes)
        x = into_core(at_least_float32(embeddings), head.rotation)
        scaled = x * head.scale()
        if head.implicit:
            own, mean = kerdock_vectors(labels, head.signs, x), kerdock_sum(head.num_classes, head.signs, x)
        else:
            own, mean = head.seen_weight[labels].to(x.dtype), head.seen_weight.sum(dim=0).to(x.dtype)
        target = (scaled * own).sum(dim=1)
        others, highest, _ = _other_classes(
            scaled,
            labels,
            head.seen_weight,
            head.signs,
            head.num_classes,
            scaled.requires_grad and torch.is_grad_enabled(),
        )
        wanted = self._with_margin((x * own).sum(dim=1)) * head.scale() if self._has_margin else target
        loss = F.softplus(others - wanted)
        if self.label_smoothing:  # mean logit in the place of the label's, for a share
            mean_logit = (scaled @ mean - target + wanted) / head.num_classes
            loss = loss + self.label_smoothing * (wanted - mean_logit)
        return loss, target.detach() >= highest

    @property
    def _has_margin(self) -> bool:
        return self.angular_margin > 0 or self.cosine_margin > 0

    def _with_margin(self, cosine: Tensor) -> Tensor:
        m = self.angular_margin
        if m:
            sine = (1 - cosine.square()).clamp_min(torch.finfo(cosine.dtype).eps).sqrt()
            turned = cosine * math.cos(m) - sine * math.sin(m)
            cosine = torch.where(cosine > -math.cos(m), turned, cosine - math.sin(m) * m)
        return cosine - self.cosine_margin

    def extra_repr(self) -> str:
        return (
            f"label_smoothing={self.label_smoothing}, angular_margin={self.angular_margin}, "
            f"cosine_margin={self.cosine_margin}"
        )
