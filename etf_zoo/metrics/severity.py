"""How bad mistakes are, by a tree of the classes: taking a beagle for a terrier is better than taking it for a bus."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import EtfZooError
from .distributed import sum_over_processes

__all__ = ["MistakeSeverity"]

RANKS = (1, 5, 20)


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
        # by ranking (logits, risk): samples, mistakes, their summed heights, then for each k the top k's mean heights
        self._sums = torch.zeros(2, 3 + len(self.ranks), dtype=torch.float64, device=self.distances.device)

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
        logits = logits.detach().to(self.distances.device, torch.float64)
        from_label = self.distances[labels.to(self.distances.device)]
        self._sums[0] += self._tally(logits, from_label)
        self._sums[1] += self._tally(-(logits.softmax(1) @ self.distances), from_label)

    def _tally(self, scores: Tensor, from_label: Tensor) -> Tensor:
        heights = from_label.gather(1, scores.topk(self.ranks[-1], dim=1).indices)  # (B, largest k), best first
        top = heights[:, 0]
        first = torch.stack([heights.new_tensor(len(heights)), (top > 0).sum(), top.sum()])
        return torch.cat([first, torch.stack([heights[:, :k].mean(1).sum() for k in self.ranks])])

    def reduce(self, processes: Any = None) -> None:
        """Sum over processes; call it once, on every process, after the last `update`. See `sum_over_processes`."""
        self._sums = sum_over_processes(self._sums, processes)

    def compute(self) -> dict[str, float]:
        """The figures, in levels of the tree.

        Returns:
            `severity`: mean LCA height of the mistakes, NaN without any; `hier_dist@k` for k of 1, 5 and 20 up to K:
            mean height of the k first classes, the right one counting 0; `crm_top1`: share of right first classes after
            conditional risk minimization; `crm_severity` and `crm_hier_dist@k` likewise.

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
            figures |= {f"{prefix}hier_dist@{k}": s / samples for k, s in zip(self.ranks, sums[3:], strict=True)}
        return figures
