"""How a frame lies in the space of features: turned at random, or with coordinates of its own for every class."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import EtfZooError
from .numerics import check_finite_matrix

__all__ = ["ORIENTATIONS", "block_indicators", "resolve_orientation", "turn_to_blocks"]

ORIENTATIONS = ("auto", "random", "blocks")


def resolve_orientation(orientation: str, num_classes: int, dim: int) -> str:
    """`"random"` or `"blocks"`; `"auto"` is blocks where every class can have a coordinate of its own.

    Raises:
        ValueError: On an unknown orientation, or on blocks where there are more classes than coordinates.
    """
    if orientation not in ORIENTATIONS:
        raise EtfZooError(f"Unknown orientation {orientation!r}. Choose one of {', '.join(ORIENTATIONS)}.")
    if orientation == "blocks" and dim < num_classes:
        raise EtfZooError(
            f"orientation='blocks' gives every class coordinates of its own and needs dim >= num_classes, "
            f"got dim={dim} for {num_classes} classes. Use orientation='auto'."
        )
    if orientation == "auto":
        return "blocks" if dim >= num_classes else "random"
    return orientation


def block_indicators(num_classes: int, dim: int) -> Tensor:
    """Each class its own dim / K coordinates (dim mod K classes one more, none is left over), as unit vectors.

    Returns:
        Float64 `(num_classes, dim)`, nonnegative, orthonormal rows.

    Raises:
        ValueError: If there are more classes than coordinates.
    """
    resolve_orientation("blocks", num_classes, dim)
    sizes = torch.full((num_classes,), dim // num_classes, device="cpu")
    sizes[: dim % num_classes] += 1
    owner = torch.repeat_interleave(torch.arange(num_classes, device="cpu"), sizes)
    blocks = torch.zeros(num_classes, dim, dtype=torch.float64, device="cpu")
    blocks[owner, torch.arange(dim, device="cpu")] = 1 / torch.sqrt(sizes[owner].double())
    return blocks


def turn_to_blocks(frame: Tensor) -> Tensor:
    r"""The same frame, turned as near to the block indicators P as a rotation can (orthogonal Procrustes).

    With Gram matrix :math:`S = W W^\top` it is :math:`S^{1/2} P`: all cosines are kept.

    Args:
        frame: W `(K, dim)` with K <= dim.

    Returns:
        Float32 `(K, dim)`.

    Raises:
        ValueError: If K > dim, as not every class can have coordinates of its own.
    """
    check_finite_matrix(frame, "The frame")
    blocks = block_indicators(*frame.shape)
    w = frame.detach().cpu().double()
    values, vectors = torch.linalg.eigh(w @ w.T)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return (root @ blocks).float()
