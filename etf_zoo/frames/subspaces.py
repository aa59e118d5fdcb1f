"""Subspaces of a class tree (Hier-COS): an axis for each node, a class is the span of its own and its ancestors'."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import EtfZooError
from .hierarchy import checked_distances

__all__ = ["check_subspaces_fit", "hierarchical_subspaces", "node_levels", "subspace_axes"]


def hierarchical_subspaces(distance: Tensor, dim: int) -> Tensor:
    r"""Directions of classes in the subspaces of their tree's nodes (Hier-COS, 2503.07853).

    Every node but the root has a coordinate of its own. A class spans the coordinates of the nodes on its path; which
    those are is where its row is not zero. The row itself is the direction that the paper's target distribution asks
    for: its square is :math:`\exp(1/i)^2`, normalized, at the i-th node of the path counted from the leaf.

    The tree is read off the distances, so a node with one child, which holds the same classes, has no axis of its own.

    Args:
        distance: D, `(K, K)`, heights of lowest common ancestors, such as `Hierarchy.distances`.
        dim: Width of the features, at least the number of nodes N (`subspace_axes`). Coordinates beyond it are not
            looked at.

    Returns:
        Float32 `(K, dim)`, unit rows, nonnegative. Coordinates 0 to K - 1 are the leaves', then come wider nodes.

    Raises:
        EtfZooError: If the distances are no heights in a tree, or on fewer dimensions than nodes.

    Example:
        >>> tree = Hierarchy({"cat": "pet", "dog": "pet", "pet": "root", "bus": "root"})
        >>> hierarchical_subspaces(tree.distances(["cat", "dog", "bus"]), 4) > 0
        tensor([[ True, False, False,  True],
                [False,  True, False,  True],
                [False, False,  True, False]])
    """
    members = _nodes(distance)
    check_subspaces_fit(distance, dim, len(members))
    order = members.long().cumsum(0)  # 1 at a class's leaf, 2 at the node above, as the nodes widen
    rows = torch.where(members, torch.exp(1 / order.clamp_min(1).double()), 0.0).T
    rows = rows / rows.norm(dim=1, keepdim=True)
    return torch.nn.functional.pad(rows, (0, dim - rows.shape[1])).float()


def subspace_axes(distance: Tensor) -> int:
    """Number of nodes of a tree without its root, and without those that have one child: the dimensions needed.

    Args:
        distance: See `hierarchical_subspaces`.
    """
    return len(_nodes(distance))


def check_subspaces_fit(distance: Tensor, dim: int, axes: int | None = None) -> None:
    """Raise EtfZooError, naming the way out, unless the axes of a tree's nodes fit `dim` dimensions."""
    axes = subspace_axes(distance) if axes is None else axes
    if dim < axes:
        raise EtfZooError(
            f"The tree has {axes} nodes below its root, each with an axis of its own, and the features have {dim} "
            f"dimensions. Use neck='residual', whose output is then {axes} wide."
        )


def node_levels(frame: Tensor) -> Tensor:
    """Level of each axis, from 1 for leaves: its largest position on a path, 0 where no class has the axis.

    Args:
        frame: Rows of `hierarchical_subspaces`, `(K, dim)`.

    Returns:
        `(dim,)` int64.

    Example:
        >>> tree = Hierarchy({"cat": "pet", "dog": "pet", "pet": "root", "bus": "root"})
        >>> node_levels(hierarchical_subspaces(tree.distances(["cat", "dog", "bus"]), 5))
        tensor([1, 1, 1, 2, 0])
    """
    leaf = frame.amax(dim=1, keepdim=True)
    positions = 1 / (1 + torch.log(frame / leaf))  # the row falls as exp(1/i); -0.0 where it is zero
    return positions.round().long().clamp_min(0).amax(dim=0)


def _nodes(distance: Tensor) -> Tensor:
    """Classes of each node below the root, `(N, K)` bool, leaves first, in the order of the classes."""
    d = checked_distances(distance)
    nodes = [torch.eye(len(d), dtype=torch.bool)]
    for height in d.unique().tolist()[1:-1]:
        groups = d <= height
        first = groups.float().argmax(dim=1)  # of the classes that a row holds
        clusters = groups[first.unique()]
        if not torch.equal(groups, groups[first]) or bool((clusters.sum(0) != 1).any()):
            raise EtfZooError(
                "These distances are no heights in a tree: of three classes, two are always equally far from the "
                "third, or nearer to one another. Take Hierarchy.distances(class_names)."
            )
        known = torch.cat(nodes).float()
        alike = clusters.float() @ known.T == clusters.sum(1, keepdim=True)  # known nodes that hold all of a cluster
        nodes.append(clusters[~alike.any(dim=1)])
    return torch.cat(nodes)
