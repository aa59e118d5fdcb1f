"""The best epoch of a run: which it is, its weights, and when to stop waiting for a better one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["BEST", "BestEpoch", "Score"]

BEST = "best.safetensors"  # in a checkpoint


class Score(NamedTuple):
    """An evaluation on the images that are watched; `top1` in percent, `loss` in nats."""

    epoch: int
    top1: float
    loss: float

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better: the accuracy, and of equal ones the one with the smaller loss."""
        return self.top1, -self.loss


class BestEpoch:
    """Keeps the epoch with the best accuracy on the images that a run evaluates on.

    Hand it to a `Run`, which tells it of each evaluation, keeps the best weights in its checkpoints, and after `fit`
    has them in the place of the last. It works with resuming, averaged weights, several processes and FSDP (there each
    better epoch gathers the weights on the main process, as a checkpoint does). The images have to be held-out training
    images: an epoch chosen on test images would make their accuracy an optimistic one.

    Args:
        patience: Stop after so many evaluations in a row without a better one; 0 for never.
        keeps: Whether the best weights are the result; if not, the last ones are, and this only stops the run.

    Example:
        >>> best = BestEpoch(patience=2)
        >>> [best.observe(epoch, {"top1": top1, "loss": 1.0}) for epoch, top1 in enumerate([50.0, 70.0, 60.0, 70.0], 1)]
        [True, True, False, False]
        >>> best.score.epoch, best.is_exhausted
        (2, True)
    """

    def __init__(self, patience: int = 0, keeps: bool = True):
        self.patience = patience
        self.keeps = keeps
        self.scores: list[Score] = []
        self.weights: Mapping[str, Tensor] | Path | None = None  # of the best; or the checkpoint's file that has them

    @property
    def score(self) -> Score | None:
        """The best evaluation, of equals the first; None before the first."""
        return max(self.scores, key=lambda score: score.rank, default=None)

    @property
    def is_exhausted(self) -> bool:
        """Whether the best is `patience` evaluations old."""
        best = self.score
        return best is not None and 0 < self.patience <= len(self.scores) - 1 - self.scores.index(best)

    def observe(self, epoch: int, figures: Mapping[str, float]) -> bool:
        """Take in an evaluation.

        Args:
            epoch: Its number, from 1.
            figures: `top1` and `loss` of it.

        Returns:
            Whether it is the best so far: its weights are to be kept then.
        """
        self.scores.append(Score(epoch, figures["top1"], figures["loss"]))
        return self.score == self.scores[-1]

    def describe(self) -> str:
        """A sentence for people; empty before the first evaluation."""
        best = self.score
        if best is None:
            return ""
        return f"Best of {len(self.scores)} evaluations: epoch {best.epoch}, {best.top1:.2f} % on held-out images."

    def state_dict(self) -> list[list[Any]]:
        """The evaluations, for JSON."""
        return [list(score) for score in self.scores]

    def load_state_dict(self, scores: list[list[Any]]) -> None:
        """The reverse."""
        self.scores = [Score(*score) for score in scores]
