"""How bad mistakes are, by a tree of the classes: taking a beagle for a terrier is better than taking it for a bus."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import EtfZooError
from .distributed import sum_over_processes

__all__ = ["MistakeSeverity", "preference_scores"]

RANKS = (1, 5, 20)


def preference_scores(scores: Tensor, labels: Tensor, distances: Tensor, *, k: int | None = None) -> Tensor:
    r"""Hierarchically ordered preference score (HOPS, 2503.07853) of each sample: does the order follow the tree?

    Mean severity alone misleads: a model may err more often and look milder. HOPS looks at the whole order of classes.
    Classes are ranked by their distance from the true one, equal distances sharing a rank. Along the predicted order,
    ranks are compared with those of the ideal order; a position of rank r weighs :math:`2^{-r}`, falling linearly to
    the next rank's weight (to zero in the last) over the positions that share r. The weighted sum of differences is
    divided by that of the worst order, the ideal one reversed, and taken from one.

    Args:
        scores: `(B, K)`, larger for classes that are preferred, such as logits.
        labels: `(B,)`, class numbers.
        distances: `(K, K)`, see `MistakeSeverity`.
        k: Look at the first k positions only; the worst order then has these reversed. All by default; 1 gives top-1
            accuracy.

    Returns:
        `(B,)` float64 in [0, 1]; 1 for an order that follows the tree.

    Raises:
        EtfZooError: If k is not in 1..K.

    Example:
        >>> distances = torch.tensor([[0.0, 1, 2], [1, 0, 2], [2, 2, 0]])
        >>> preference_scores(torch.tensor([[3.0, 2, 1], [3, 1, 2]]), torch.tensor([0, 0]), distances)
        tensor([1.0000, 0.7000], dtype=torch.float64)
    """
    num_classes, labels = distances.shape[0], labels.long()  # uint8 would choose rows as a mask does
    if k is not None and not 1 <= k <= num_classes:
        raise EtfZooError(f"k must lie in 1..{num_classes}, got {k}.")
    k = num_classes if k is None else k
    predicted = scores.argsort(dim=1, descending=True, stable=True)
    if k == 1:
        return (predicted[:, 0] == labels.to(predicted.device)).double()
    heights, order = distances.to(scores.device, torch.float64)[labels.to(scores.device)].sort(dim=1, stable=True)
    steps = F.pad((heights.diff(dim=1) > 0).long(), (1, 0))
    ideal = steps.cumsum(1)  # rank at each position of the ideal order
    rank = torch.empty_like(ideal).scatter_(1, order, ideal)  # of each class
    weights = _position_weights(ideal)[:, :k]
    reversed_ = ideal[:, :k].flip(1)
    worst = (weights * (ideal[:, :k] - reversed_).abs()).sum(1)
    found = (weights * (ideal[:, :k] - rank.gather(1, predicted[:, :k])).abs()).sum(1)
    return (1 - found / worst).clamp(0, 1)


def _position_weights(ideal: Tensor) -> Tensor:
    """Weight of each position of the ideal order, `(B, K)` ranks to `(B, K)` float64."""
    positions = torch.arange(ideal.shape[1], device=ideal.device).expand_as(ideal)
    sizes = torch.zeros_like(ideal).scatter_add_(1, ideal, torch.ones_like(ideal))  # of the tie of each rank
    starts = sizes.cumsum(1) - sizes
    within = (positions - starts.gather(1, ideal)).double() / sizes.gather(1, ideal)
    own = torch.exp2(-ideal.double())
    following = torch.where(ideal < ideal[:, -1:], own / 2, 0.0)
    return own + (following - own) * within


class MistakeSeverity:
    """Heights of lowest common ancestors (LCA) between true and predicted classes, collected batch by batch.

    The figures of 1912.09393, and the same after conditional risk minimization (2104.00795): classes are then ranked by
    ascending expected height, sum_j softmax_j * distance_jc, instead of descending logit.

    Args:
        distances: LCA heights `(K, K)` in levels: symmetric, zero on the diagonal, positive elsewhere. For an
            `etf_zoo.frames.Hierarchy` that is `hierarchy.distances(class_names)`. The height of a node is the longest
            path down from it to a leaf.
        device: Where the sums live and the work is done; needs float64.

    Raises:
        ValueError: If `distances` is not such a matrix.
    """

    def __init__(self, distances: Tensor, *, device: torch.device | str | None = "cpu"):
        if distances.ndim != 2 or distances.shape[0] != distances.shape[1] or len(distances) < 2:
            raise EtfZooError(f"Expected distances of shape (K, K) with K >= 2, got {tuple(distances.shape)}.")
        self.distances = distances.detach().to(device, torch.float64)
        others = ~torch.eye(len(distances), dtype=torch.bool, device=self.distances.device)
        if not (torch.isfinite(self.distances).all() and torch.equal(self.distances, self.distances.mT)):
            raise EtfZooError("Distances must be finite and symmetric: distances[i, j] is the height of an ancestor.")
        if self.distances.diagonal().any() or not (self.distances[others] > 0).all():
            raise EtfZooError("Distances must be zero on the diagonal and positive elsewhere: every class is a leaf.")
        self.ranks = tuple(k for k in RANKS if k <= len(distances))
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        # by ranking (logits, risk): samples, mistakes, their summed heights, the top k's mean heights for each k, then
        # the preference scores over all classes and over the first k for each k > 1
        columns = 4 + len(self.ranks) + len(self.ranks[1:])
        self._sums = torch.zeros(2, columns, dtype=torch.float64, device=self.distances.device)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            logits: `(B, K)`; B may be 0.
            labels: `(B,)`, class numbers.

        Raises:
            ValueError: On wrong shapes or labels outside of 0..K-1.
        """
        k = len(self.distances)
        if logits.ndim != 2 or logits.shape[1] != k or labels.shape != logits.shape[:1]:
            raise EtfZooError(
                f"Expected logits of shape (batch, {k}) and labels of shape (batch,), got {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}. The tree has {k} classes."
            )
        if not len(labels):
            return
        if labels.min() < 0 or labels.max() >= k:
            raise EtfZooError(f"Labels must lie in 0..{k - 1}, got {labels.min().item()} to {labels.max().item()}.")
        labels = labels.long()  # uint8 would choose rows as a mask does
        logits = logits.detach().to(self.distances.device, torch.float64)
        self._sums[0] += self._tally(logits, labels)
        self._sums[1] += self._tally(-(logits.softmax(1) @ self.distances), labels)

    def _tally(self, scores: Tensor, labels: Tensor) -> Tensor:
        from_label = self.distances[labels.to(self.distances.device)]
        heights = from_label.gather(1, scores.topk(self.ranks[-1], dim=1).indices)  # (B, largest k), best first
        top = heights[:, 0]
        first = torch.stack([heights.new_tensor(len(heights)), (top > 0).sum(), top.sum()])
        nearby = torch.stack([heights[:, :k].mean(1).sum() for k in self.ranks])
        hops = [preference_scores(scores, labels, self.distances, k=k).sum() for k in (None, *self.ranks[1:])]
        return torch.cat([first, nearby, torch.stack(hops)])

    def reduce(self, processes: Any = None) -> None:
        """Sum over processes; call it once, on every process, after the last `update`. See `sum_over_processes`."""
        self._sums = sum_over_processes(self._sums, processes)

    def compute(self) -> dict[str, float]:
        """The figures, in levels of the tree.

        Returns:
            `severity`: mean LCA height of the mistakes, NaN without any; `hier_dist@k` for k of 1, 5 and 20 up to K:
            mean height of the k first classes, the right one counting 0; `crm_top1`: share of right first classes after
            conditional risk minimization; `crm_severity` and `crm_hier_dist@k` likewise. `hops` and `hops@k`: mean of
            `preference_scores`, over all classes and over the first k for k of 5 and 20; `crm_hops` likewise.

        Raises:
            ValueError: Before any update.
        """
        if not self._sums[0, 0]:
            raise EtfZooError("No sample was taken in: call update(logits, labels) first.")
        figures = {}
        for prefix, sums in zip(("", "crm_"), self._sums.tolist(), strict=True):
            samples, mistakes, height = sums[:3]
            if prefix:
                figures["crm_top1"] = 1 - mistakes / samples
            figures[f"{prefix}severity"] = height / mistakes if mistakes else math.nan
            names = [f"hier_dist@{k}" for k in self.ranks] + ["hops"] + [f"hops@{k}" for k in self.ranks[1:]]
            figures |= {prefix + name: value / samples for name, value in zip(names, sums[3:], strict=True)}
        return figures
