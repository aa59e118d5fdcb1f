"""Classifier on the subspaces of a class tree (Hier-COS, 2503.07853)."""

import torch  # no `from __future__ import annotations` here: TorchScript cannot read the class's as strings
from torch import Tensor

from ..errors import EtfZooError
from ..frames.build import CUSTOM, SUBSPACES
from ..frames.subspaces import subspace_axes
from .classifier import FrameClassifier

__all__ = ["SubspaceClassifier", "subspace_scores"]

torch.fx.wrap("subspace_scores")  # a leaf, as those of the classifier are


def subspace_scores(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Scaled length of each feature's projection on the coordinates of each class, those where its row is not zero.

    Args:
        x: `(..., dim)`.
        weight: `(K, dim)`.
        scale: A number.

    Example:
        >>> rows = torch.tensor([[0.8, 0.6, 0], [0, 0, 1]])
        >>> subspace_scores(torch.tensor([[3.0, 4.0, 5.0]]), rows, torch.tensor(1.0))
        tensor([[5., 5.]])
    """
    members = (weight != 0).to(x.dtype).T
    if not torch.jit.is_scripting():  # noqa: SIM102
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return scale * (x.square() @ members).clamp_min(1e-12).sqrt()
    return scale * (x.square() @ members).clamp_min(1e-12).sqrt()  # at zero the square root has no gradient


class SubspaceClassifier(FrameClassifier):
    """A `FrameClassifier` that scores a class by how much of the feature lies in its subspace.

    The subspace of a class is spanned by the coordinates of its own node and of its ancestors; see
    `frames.hierarchical_subspaces`, whose rows are the buffer `weight`. Trained by `losses.HierarchicalSubspaceLoss`.
    Scores are lengths, at least zero: their order is meant, their softmax is no calibrated probability. A class with a
    longer path has more axes to collect length on: where leaves are not equally deep and the feature is unsure, it is
    preferred to one that is likelier. That is the method, not a fault of this head.

    Args:
        in_features: Width of the features.
        num_classes: Number of classes K.
        frame: `"subspaces"` with `hierarchy`, or its rows as a tensor.
        neck: As in `FrameClassifier`. A named one is as wide as the tree has nodes, unless `neck_features` says more;
            the paper's is `"residual"`.
        feature_norm: `"none"`, as lengths count.
        **kwargs: As for `FrameClassifier`.

    Raises:
        EtfZooError: As `FrameClassifier`; on another norm, or a reserve of classes.

    Example:
        >>> tree = etf_zoo.frames.Hierarchy({"cat": "pet", "dog": "pet", "pet": "root", "bus": "root"})
        >>> head = SubspaceClassifier(8, 3, hierarchy=tree.distances(["cat", "dog", "bus"]), neck="residual")
        >>> head(torch.randn(2, 8)).shape, head.dim
        (torch.Size([2, 3]), 4)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        frame: str | Tensor = SUBSPACES,
        neck=None,
        neck_features: int | None = None,
        feature_norm: str = "none",
        hierarchy: Tensor | None = None,
        reserve: int = 0,
        **kwargs,
    ):
        if feature_norm != "none":
            raise EtfZooError(
                f"Subspaces of a tree compare lengths of raw features, not of feature_norm={feature_norm!r}: pass "
                f"feature_norm='none'."
            )
        if kwargs.get("lengths") is not None or (isinstance(frame, str) and frame not in (SUBSPACES, CUSTOM)):
            raise EtfZooError("A class is the axes of a tree here, without lengths or another frame: leave both out.")
        if reserve:
            raise EtfZooError("The axes of a tree have no room for classes to come: leave reserve out.")
        if isinstance(neck, str) and neck_features is None and hierarchy is not None:
            neck_features = subspace_axes(hierarchy)
        super().__init__(
            in_features,
            num_classes,
            frame=frame,
            neck=neck,
            neck_features=neck_features,
            feature_norm=feature_norm,
            hierarchy=hierarchy,
            **kwargs,
        )

    def project(self, x: Tensor) -> Tensor:
        """Scores of what `embed` gives: `(..., dim)` to `(..., num_classes)`."""
        return subspace_scores(x, self.weight, self.scale())

    @torch.jit.unused
    @torch.no_grad()
    def top_k(self, x: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
        """See `FrameClassifier.top_k`."""
        if not 1 <= k <= self.num_classes:
            raise EtfZooError(f"k lies between 1 and {self.num_classes}, the number of classes, got {k}.")
        best = self.project(self.embed(x)).topk(k)
        return best.values, best.indices
