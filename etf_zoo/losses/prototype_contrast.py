"""Prototypes contrasted with the features of the batch, instead of features with the prototypes (2605.20302)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..errors import EtfZooError
from ..frames.numerics import unit
from ._common import check_inputs, without_autocast

__all__ = ["PrototypeContrastLoss"]


class PrototypeContrastLoss(nn.Module):
    r"""Cross-entropy over the features of the batch: which of them belongs to a class's prototype? (2605.20302)

    :math:`1/B \sum_i (\log \sum_j \exp(s\, w_{y_i}^T u_j) - s\, w_{y_i}^T u_i)` with unit features u and prototypes w.
    The sum over j is over the whole batch (the paper's NTCE), or over the features of other classes alone (its NONL),
    which then pulls all features of a class, where NTCE's sum pushes those of its own class too. A feature whose
    batch has no other class is only pulled.

    It wants large batches, with classes about as frequent as one another: NTCE keeps the features of a class that is
    frequent in its batch away from their prototype. The paper has learned prototypes; with a fixed frame the push
    moves features alone. Takes unit embeddings, not logits. The head's plain logits still classify.

    Args:
        own_class: Whether a feature's own class is in the sum: True for NTCE, False for NONL.
        logit_scale: s, the inverse of the paper's temperature; better the head's own, `head.logit_scale.item()`.

    Shape:
        embeddings `(B, dim)`, labels `(B,)`, frame `(K, dim)` to a scalar, float32 at least. The batch is this
        process's.

    Raises:
        EtfZooError: On a scale that is not positive, or (in forward) shapes that do not fit.

    Example:
        >>> loss = PrototypeContrastLoss(logit_scale=1.0)
        >>> round(loss(torch.eye(2), torch.arange(2), torch.eye(2)).item(), 4)  # ln(1 + e) - 1
        0.3133
    """

    def __init__(self, own_class: bool = True, *, logit_scale: float = 16.0):
        super().__init__()
        if not (math.isfinite(logit_scale) and logit_scale > 0):
            raise EtfZooError(f"logit_scale must be positive and finite, got {logit_scale}.")
        self.own_class, self.logit_scale = own_class, logit_scale

    @without_autocast
    def forward(self, embeddings: Tensor, labels: Tensor, frame: Tensor) -> Tensor:
        x, w, labels = check_inputs(embeddings, labels, frame)
        logits = self.logit_scale * w[labels] @ unit(x, embeddings).T  # (B, B): own prototype, feature
        own = logits.diagonal()
        if self.own_class:
            return (logits.logsumexp(dim=1) - own).mean()
        same = labels[:, None] == labels
        alone = same.all(dim=1)
        # a row without an entry has neither a logarithm nor a gradient: it keeps one that is then left out
        push = logits.masked_fill(same & ~alone[:, None], -math.inf).logsumexp(dim=1)
        return (push.masked_fill(alone, 0) - own).mean()

    def extra_repr(self) -> str:
        return f"own_class={self.own_class}, logit_scale={self.logit_scale}"
