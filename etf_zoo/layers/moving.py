"""A classifier that moves: the simplex ETF nearest to the class means, followed as they drift (2411.01248)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import EtfZooError
from ..frames import nearest_simplex_etf
from ..frames.simplex import check_simplex_fits
from .classifier import FrameClassifier

__all__ = ["MOVING_ARGS", "MovingFrameClassifier", "copy_moving_frames"]

MOVING_ARGS = ("momentum", "update_every", "delta")  # those that a plain FrameClassifier has not


class MovingFrameClassifier(FrameClassifier):
    r"""FrameClassifier whose frame is the simplex ETF nearest to an average of the class means (2411.01248).

    After the backward pass of each training step (the frame changes in place) hand it the step's embeddings with
    `observe`: it updates an exponential moving average of
    the class means, summed over all processes, and every `update_every` steps replaces the frame by the ETF nearest to
    the centered means. The step before starts and the proximal term holds that solution in place where the means leave
    it open (classes not seen yet, means of low rank).

    The frame moves in `observe` alone, never in `forward`: evaluation depends on no batch. (In the published code the
    frame is solved inside forward, and gradients flow through the solution; here the frame is a constant for the
    gradient.) Means and step count are persistent buffers, so a checkpoint resumes exactly.

    An average of ETFs is no ETF: after each update of a weight EMA call `copy_moving_frames(ema_model, model)`.

    Args:
        in_features: Width of the features.
        num_classes: Number of classes K; the frame's width must be at least K - 1.
        momentum: Share of the old means kept at each step; 0.9 averages about the last ten batches of a class.
        update_every: Steps between two updates of the frame. One update costs an eigendecomposition of size K - 1.
        delta: Strength of the proximal term, relative to the means' norm; see `nearest_simplex_etf`. Small, so that it
            decides only what the means leave open.
        **kwargs: As for `FrameClassifier`; `frame` is the start.

    Raises:
        ValueError: If the simplex does not fit, or on a momentum outside [0, 1), `update_every` below 1 or a delta that
            is not positive.

    Example:
        >>> head = MovingFrameClassifier(8, 3)
        >>> embeddings = head.embed(torch.randn(6, 8))
        >>> head.observe(embeddings, torch.tensor([0, 1, 2, 0, 1, 2]))  # after the backward pass
        True
    """

    class_means: Tensor
    class_seen: Tensor
    steps_seen: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        momentum: float = 0.9,
        update_every: int = 1,
        delta: float = 1e-3,
        **kwargs,
    ):
        super().__init__(in_features, num_classes, **kwargs)
        check_simplex_fits(num_classes, self.dim)
        if self.reserve:
            raise EtfZooError("A frame that follows the class means has no room for classes without any: reserve=0.")
        if not 0 <= momentum < 1:
            raise EtfZooError(f"momentum is the share of the old means that is kept, in [0, 1), got {momentum}.")
        if update_every < 1:
            raise EtfZooError(f"update_every counts steps and is at least 1, got {update_every}.")
        if not (math.isfinite(delta) and delta > 0):
            raise EtfZooError(f"delta must be positive and finite, got {delta}: without it the frame jumps.")
        self.momentum, self.update_every, self.delta = momentum, update_every, delta
        device = self.weight.device
        self.register_buffer("class_means", torch.zeros(num_classes, self.dim, dtype=torch.float32, device=device))
        self.register_buffer("class_seen", torch.zeros(num_classes, dtype=torch.bool, device=device))
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64, device=device))

    @torch.jit.unused
    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Build frame and scale again as the constructor did, and forget the class means; in place."""
        super().reset_parameters()
        self.class_means.zero_()
        self.class_seen.zero_()
        self.steps_seen.zero_()

    @torch.no_grad()
    def observe(self, embeddings: Tensor, labels: Tensor) -> bool:
        """Take in one training step; every process must call it at every step, with an empty batch if need be.

        Args:
            embeddings: `(B, dim)`, what `embed` returned.
            labels: `(B,)` int64 in [0, K).

        Returns:
            Whether the frame moved.

        Raises:
            ValueError: On other shapes, labels outside [0, K), or embeddings that are not finite (on any process).
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim or labels.shape != embeddings.shape[:1]:
            raise EtfZooError(
                f"Expected embeddings (B, {self.dim}) and labels (B,), got {tuple(embeddings.shape)} and "
                f"{tuple(labels.shape)}. Flatten positions of a map first."
            )
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise EtfZooError(f"Labels must lie in [0, {self.num_classes}), got {labels.min()} to {labels.max()}.")
        # sums and counts in one matrix, so that one reduction serves
        sums = torch.zeros(self.num_classes, self.dim + 1, dtype=torch.float32, device=self.weight.device)
        rows = torch.cat([embeddings.float(), embeddings.new_ones(len(embeddings), 1).float()], dim=1)
        sums.index_add_(0, labels.to(sums.device), rows.to(sums.device))
        reduced = dist.is_available() and dist.is_initialized()
        if reduced:
            dist.all_reduce(sums)
        if not bool(torch.isfinite(sums).all()):
            raise EtfZooError("The embeddings are not finite; the class means are left as they were.")
        counts = sums[:, -1:]
        present = counts.squeeze(1) > 0
        means = sums[:, :-1] / counts.clamp_min(1)
        kept = torch.where(self.class_seen & present, self.momentum, 0.0)[:, None]  # a class's first mean counts fully
        moved = kept * self.class_means + (1 - kept) * means
        self.class_means.copy_(torch.where(present[:, None], moved, self.class_means))
        self.class_seen.logical_or_(present)
        self.steps_seen.add_(1)
        if int(self.steps_seen) % self.update_every:
            return False
        self.move()
        if reduced:
            dist.broadcast(self.weight, 0)  # processes on unlike processors must not drift apart
        return True

    @torch.no_grad()
    def move(self) -> None:
        """Put the frame at the ETF nearest to the present class means, the proximal term holding it to the old one.

        Classes not seen yet lie at the mean of the others, so the proximal term alone places them.
        """
        if not bool(self.class_seen.any()):
            return
        seen, means = self.class_seen.cpu(), self.class_means.cpu().double()  # not every device has float64
        centered = torch.where(seen[:, None], means - means[seen].mean(dim=0), 0.0)
        self.weight.copy_(nearest_simplex_etf(centered, previous=self.weight, delta=self.delta))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}, update_every={self.update_every}, delta={self.delta}"


@torch.no_grad()
def copy_moving_frames(target: nn.Module, source: nn.Module) -> int:
    """Copy frames and means of all moving heads, as they are, into a weight average of the model.

    Args:
        target: The averaged model, or a wrapper that holds it as `module` (timm's `ModelEmaV3`).
        source: The model in training, or a wrapper likewise.

    Returns:
        How many heads were copied.

    Raises:
        ValueError: If the two have not the same moving heads.

    Example:
        >>> model = MovingFrameClassifier(8, 3)
        >>> copy_moving_frames(copy.deepcopy(model), model)
        1
    """
    ours, theirs = _moving_heads(target), _moving_heads(source)
    if ours.keys() != theirs.keys():
        raise EtfZooError(f"The models have different moving heads: {sorted(ours)} and {sorted(theirs)}.")
    for name, head in ours.items():
        for leaf in ("weight", "class_means", "class_seen", "steps_seen"):
            getattr(head, leaf).copy_(getattr(theirs[name], leaf))
    return len(ours)


def _moving_heads(model: nn.Module) -> dict[str, MovingFrameClassifier]:
    heads = {name: head for name, head in model.named_modules() if isinstance(head, MovingFrameClassifier)}
    return {"" if name == "module" else name.removeprefix("module."): head for name, head in heads.items()}
