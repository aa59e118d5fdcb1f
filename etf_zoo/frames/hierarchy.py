"""Class trees and the frame that follows them: cosines fall with the height of the lowest common ancestor."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import EtfZooError
from .simplex import check_room, haar_columns

__all__ = ["Hierarchy", "checked_distances", "hierarchy_cosines", "hierarchy_frame"]

MIN_GAMMA = 1e-6


class Hierarchy:
    """Tree of classes, given as each node's parent.

    Args:
        parents: Child name -> parent name for every node but the root.

    Raises:
        ValueError: If the mapping is empty, has a cycle, or has several roots.
    """

    def __init__(self, parents: Mapping[str, str]):
        if not isinstance(parents, Mapping):
            raise EtfZooError(f"A hierarchy is a mapping {{child: parent}}, got a {type(parents).__name__}.")
        if not parents:
            raise EtfZooError("The hierarchy is empty: give {child: parent} for every node but the root.")
        for child, parent in parents.items():
            if not isinstance(child, str) or not isinstance(parent, str):
                raise EtfZooError(f"A hierarchy maps a child's name to its parent's, got {child!r}: {parent!r}.")
        self.parents = dict(parents)
        self._check_acyclic()
        roots = sorted(set(self.parents.values()) - self.parents.keys())
        if len(roots) != 1:
            raise EtfZooError(
                f"A hierarchy has one root, this one has {len(roots)}: {', '.join(roots[:5])}. "
                f"Add a common parent above them."
            )
        self.root = roots[0]
        self._heights = self._node_heights()
        self.leaves = tuple(node for node, height in self._heights.items() if height == 0)

    @classmethod
    def from_dict(cls, parents: Mapping[str, str]) -> Hierarchy:
        """The tree of a mapping child -> parent; see the class."""
        return cls(parents)

    @classmethod
    def from_json(cls, path: str | Path) -> Hierarchy:
        """The tree of a JSON file holding one object `{"child": "parent", ...}`.

        Raises:
            ValueError: If the file holds something else, names a child twice, or holds no tree.
        """
        try:
            parents = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
        except TypeError:
            raise EtfZooError(f"A hierarchy is read from the path of a JSON file, got {path!r}.") from None
        except RecursionError:
            raise EtfZooError(f"{path} is nested too deeply: expected one object {{child: parent}}.") from None
        except OSError as error:
            raise EtfZooError(f"Cannot read the hierarchy {path}: {error.strerror}.") from error
        except ValueError as error:
            raise EtfZooError(f"{path}: {error}") from error
        if not isinstance(parents, dict):
            raise EtfZooError(f"{path} holds a {type(parents).__name__}, expected one object {{child: parent}}.")
        return cls(parents)

    def _check_acyclic(self) -> None:
        done: set[str] = set()
        for start in self.parents:
            path: dict[str, None] = {}  # a dict, for its order in the message
            node = start
            while node in self.parents and node not in done:
                if node in path:
                    nodes = list(path)
                    cycle = nodes[nodes.index(node) :] + [node]
                    raise EtfZooError(f"The hierarchy has a cycle: {' -> '.join(cycle)}.")
                path[node] = None
                node = self.parents[node]
            done.update(path)

    def _node_heights(self) -> dict[str, int]:
        waiting = dict.fromkeys([*self.parents, self.root], 0)  # children not yet measured
        for parent in self.parents.values():
            waiting[parent] += 1
        heights = dict.fromkeys(waiting, 0)
        ready = [node for node, count in waiting.items() if count == 0]
        while ready:
            node = ready.pop()
            if node == self.root:
                continue
            parent = self.parents[node]
            heights[parent] = max(heights[parent], heights[node] + 1)
            waiting[parent] -= 1
            if waiting[parent] == 0:
                ready.append(parent)
        return heights

    def height(self, node: str) -> int:
        """Edges of the longest path from `node` down to a leaf; 0 for a leaf.

        Raises:
            ValueError: If there is no such node.
        """
        if not isinstance(node, str):
            raise EtfZooError(f"Classes of a hierarchy are named by texts, got {node!r}.")
        if node not in self._heights:
            close = difflib.get_close_matches(node, self._heights, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise EtfZooError(f"{node!r} is not in the hierarchy.{hint}")
        return self._heights[node]

    def distances(self, class_names: Sequence[str]) -> Tensor:
        """Height of the lowest common ancestor of every two classes; 0 on the diagonal.

        Args:
            class_names: K leaves, in the order of the labels.

        Returns:
            Float64 `(K, K)`, symmetric and ultrametric.

        Raises:
            ValueError: If a class is not in the tree, is not a leaf, or is named twice.
        """
        if isinstance(class_names, str | Tensor) or not isinstance(class_names, Iterable):
            raise EtfZooError(f"Classes are a list of their names, got {class_names!r}.")
        names = list(class_names)
        inner = [name for name in names if self.height(name) > 0]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise EtfZooError(f"Classes named twice: {', '.join(twice[:5])}.")
        if inner:
            raise EtfZooError(f"Classes are leaves of the hierarchy, but these have children: {', '.join(inner[:5])}.")
        below: dict[str, list[int]] = {}  # node -> the classes under it
        for i, name in enumerate(names):
            node = name
            while node != self.root:
                node = self.parents[node]
                below.setdefault(node, []).append(i)
        distances = torch.zeros(len(names), len(names), dtype=torch.float64, device="cpu")
        for node in sorted(below, key=self._heights.__getitem__, reverse=True):  # lower ancestors overwrite higher ones
            members = torch.tensor(below[node], device="cpu")
            distances[members[:, None], members] = self._heights[node]
        return distances.fill_diagonal_(0)

    def __repr__(self) -> str:
        return f"Hierarchy({len(self.leaves)} leaves, height {self._heights[self.root]}, root {self.root!r})"


def _unique_keys(pairs: list[tuple[str, str]]) -> dict[str, str]:
    seen: dict[str, str] = {}
    for child, parent in pairs:
        if child in seen:
            raise EtfZooError(f"{child!r} is named twice, under {seen[child]!r} and {parent!r}; a tree has it once.")
        seen[child] = parent
    return seen


def hierarchy_cosines(distance: Tensor, *, gamma: float = 2.0) -> tuple[Tensor, float]:
    r"""Wanted cosines between classes and the smallest offset that any frame can realize (2303.05689).

    With :math:`E = \exp(-\gamma D / \max D)` they are :math:`S = (1 - s) E + s J`. S is positive semidefinite down to
    :math:`s^* = -1 / (\mathbf 1^\top E^{-1} \mathbf 1 - 1)`, where it has rank K - 1. (Published code scans a grid of
    100 values in [-1, -1/(K-1)], which for small gamma stops short of it.)

    Args:
        distance: D, `(K, K)`, symmetric, nonnegative, zero on the diagonal, such as `Hierarchy.distances`.
        gamma: Decay; 2 is what the published code uses for CIFAR-100. Large values approach the simplex ETF.

    Returns:
        S, float64 `(K, K)`, and s*.

    Raises:
        ValueError: If `distance` is no such matrix, if gamma is not positive, or if E is not positive definite (heights
            in a tree always give one that is, other dissimilarities may not).
    """
    _, cosines, offset = _solve(distance, gamma)
    return cosines, offset


def hierarchy_frame(distance: Tensor, dim: int, *, gamma: float = 2.0, seed: int = 0) -> Tensor:
    r"""Hierarchy-aware frame (HAFrame, 2303.05689): related classes point in nearby directions, the rest far apart.

    Its Gram matrix is exactly the S of `hierarchy_cosines`, turned by a Haar random rotation.

    Args:
        distance: D, `(K, K)`, such as `Hierarchy.distances`.
        dim: Feature dimension, at least K - 1.
        gamma: Decay of the cosines with the distance, see `hierarchy_cosines`.
        seed: Seed of the rotation.

    Returns:
        Float32 `(K, dim)`, unit rows.

    Raises:
        ValueError: If dim < K - 1, or as `hierarchy_cosines` does.
    """
    null, cosines, _ = _solve(distance, gamma)
    k = len(cosines)
    check_hierarchy_fits(k, dim)
    # S has the one null vector E^-1 1. Leaving out the class of its largest entry leaves a positive definite matrix, so
    # a Cholesky factor serves where the paper takes eigenvectors; the class left out follows from sum_i null_i w_i = 0.
    last = int(null.abs().argmax())
    others = torch.tensor([i for i in range(k) if i != last], device="cpu")
    factor = torch.zeros(k, k - 1, dtype=torch.float64, device="cpu")
    factor[others] = torch.linalg.cholesky(cosines[others][:, others])
    factor[last] = -(null[others] / null[last]) @ factor[others]
    return (factor @ haar_columns(dim, k - 1, seed).T).float()


def check_hierarchy_fits(num_classes: int, dim: int) -> None:
    """Raise ValueError, naming the way out, unless a hierarchy-aware frame fits `dim` dimensions."""
    way_out = f"Use neck='residual', whose output is {num_classes - 1} wide."
    check_room("hierarchy-aware frame", num_classes, dim, way_out)


def check_gamma(gamma: float) -> None:
    """Raise ValueError unless gamma is a finite number, and not so small that rounding decides on the frame."""
    if not isinstance(gamma, int | float) or not (math.isfinite(gamma) and gamma >= MIN_GAMMA):
        raise EtfZooError(f"gamma must be positive and finite, got {gamma!r} (at least {MIN_GAMMA}).")


def check_matrix(distance: Tensor) -> None:
    """Raise ValueError unless distances are a square matrix of at least two classes."""
    if not isinstance(distance, Tensor):
        raise EtfZooError(
            f"The distances between classes are a tensor (K, K), got a {type(distance).__name__}. For a tree: "
            f"Hierarchy.distances(class_names); for a list or an array: torch.as_tensor(...)."
        )
    if distance.ndim != 2 or distance.shape[0] != distance.shape[1] or distance.shape[0] < 2:
        raise EtfZooError(f"distance must be a square matrix of at least two classes, got {tuple(distance.shape)}.")


def _solve(distance: Tensor, gamma: float) -> tuple[Tensor, Tensor, float]:
    """Null vector `(K,)` of S, S `(K, K)` and s*."""
    check_gamma(gamma)
    d = checked_distances(distance)
    e = torch.exp(-float(gamma) * d / d.max())
    lower, info = torch.linalg.cholesky_ex(e)
    if info != 0:
        raise EtfZooError(
            "exp(-gamma * distance / max) is not positive definite, so no vectors have these cosines. Tree heights "
            "(Hierarchy.distances) always do; for another dissimilarity try a larger gamma."
        )
    null = torch.cholesky_solve(torch.ones(len(d), 1, dtype=torch.float64, device="cpu"), lower).squeeze(1)
    q = null.sum().item()  # above 1: e has ones on its diagonal and smaller entries elsewhere
    offset = -1 / (q - 1)
    return null, (1 - offset) * e + offset, offset


def checked_distances(distance: Tensor) -> Tensor:
    """Distances as float64 on the CPU; EtfZooError unless they are symmetric, zero on the diagonal, positive beside."""
    check_matrix(distance)
    if not isinstance(distance, Tensor) or distance.is_complex() or distance.dtype == torch.bool:
        raise EtfZooError(f"distance holds numbers, got {distance.dtype}.")
    d = distance.detach().cpu().double()
    if not bool(torch.isfinite(d).all()) or bool((d < 0).any()):
        raise EtfZooError("distance must be finite and nonnegative.")
    if not torch.equal(d, d.T):
        raise EtfZooError("distance must be symmetric.")
    if bool(d.diagonal().any()):
        raise EtfZooError("distance must be zero on the diagonal.")
    if int((d == 0).sum()) > len(d):
        raise EtfZooError("Two classes have distance 0; no frame tells them apart. Merge them or give them a distance.")
    return d
