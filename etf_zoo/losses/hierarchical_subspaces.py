"""Loss of Hier-COS (2503.07853): a feature's weight on the axes of a tree's nodes lies on the path of its class."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import EtfZooError
from ..frames.numerics import unit
from ..frames.subspaces import node_levels
from ._common import check_inputs, without_autocast

__all__ = ["HierarchicalSubspaceLoss", "level_distances"]


def level_distances(x: Tensor, on_path: Tensor, levels: Tensor) -> Tensor:
    r"""Sum over a tree's levels of the l1 distance between a feature's unit part in the level and its one-hot node.

    Samples whose class has no node in a level pay their weight there instead. Each level counts the mean over the
    samples that have a node in it, and the mean over those that have none.

    Args:
        x: Absolute coordinates on the axes, `(B, N)`.
        on_path: Whether an axis is of a sample's class, `(B, N)` bool.
        levels: Of the axes, `(N,)` from 1; see `frames.subspaces.node_levels`.

    Returns:
        Scalar.
    """
    total = x.new_zeros(())
    for level in range(1, int(levels.max()) + 1):
        part, node = x[:, levels == level], on_path[:, levels == level].to(x.dtype)
        has_node = node.sum(dim=1)
        distance = (unit(part, part) - node).abs().sum(dim=1)
        total = total + (has_node * distance).sum() / has_node.sum().clamp_min(1)
        total = total + ((1 - has_node) * part.sum(dim=1)).sum() / (1 - has_node).sum().clamp_min(1)
    return total


class HierarchicalSubspaceLoss(nn.Module):
    r"""Loss of Hier-COS (2503.07853) for a classifier on the subspaces of a tree.

    With :math:`p_y` the square of the row of class y, a distribution over the nodes on its path,

    .. math:: \mathrm{KL}(p_y \,\|\, \mathrm{softmax}(|x|)) + \alpha \sum_l \| |x_l| / \|x_l\| - e_{y,l} \|_1

    where :math:`x_l` are the coordinates of level l's nodes and :math:`e_{y,l}` marks the one on the path.

    Takes raw embeddings (`feature_norm="none"`), not logits. Levels are counted from the leaves, where the published
    code counts from the root: the same in a tree whose leaves are equally deep.

    While no class of a level is more likely than not, what the levels ask for is least where one node has the whole
    level, whatever the image: with many levels a large alpha draws all features to one point, and accuracy stays at
    chance while the loss falls.

    Args:
        alpha: Weight of the levels. The published commands let it fall as trees get deeper: 0.1 (3 levels), 0.05 for
            CIFAR-100 (5), 0.001 (7), 0.00001 for tieredImageNet (12).

    Shape:
        embeddings `(B, dim)`, labels `(B,)`, frame `(K, dim)` of `hierarchical_subspaces` to a scalar, float32 at
        least.

    Raises:
        EtfZooError: On a negative alpha, or (in forward) a frame that is none of subspaces, or shapes that do not fit.

    Example:
        >>> tree = Hierarchy({"cat": "pet", "dog": "pet", "pet": "root", "bus": "root"})
        >>> frame = hierarchical_subspaces(tree.distances(["cat", "dog", "bus"]), 4)
        >>> loss = HierarchicalSubspaceLoss()
        >>> float(loss(9 * frame, torch.arange(3), frame)) < float(loss(9 * frame, torch.tensor([1, 0, 2]), frame))
        True
    """

    def __init__(self, alpha: float = 0.001):
        super().__init__()
        if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha >= 0):
            raise EtfZooError(f"alpha is a weight, at least 0, got {alpha!r}.")
        self.alpha = alpha

    @without_autocast
    def forward(self, embeddings: Tensor, labels: Tensor, frame: Tensor) -> Tensor:
        x, w, labels = check_inputs(embeddings, labels, frame)
        if bool((w < 0).any()):
            raise EtfZooError(
                "This loss reads the nodes of a tree off the frame, whose rows are then nonnegative: use "
                "frame='subspaces', or frames.hierarchical_subspaces."
            )
        levels = node_levels(w)
        used = levels > 0
        x, targets, levels = x[:, used].abs(), w[labels][:, used].square(), levels[used]
        divergence = F.kl_div(x.log_softmax(dim=1), targets, reduction="batchmean")
        return divergence + self.alpha * level_distances(x, targets > 0, levels)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
