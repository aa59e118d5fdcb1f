"""Products of float32 matrices by the faster of a CPU's libraries."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["product"]


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B^T, not differentiable; by oneDNN on a CPU, for MKL knows no AVX-512 of AMD's processors.

    Args:
        a: `(m, d)` float32.
        b: `(n, d)` float32.

    Returns:
        `(m, n)`.

    Example:
        >>> product(torch.eye(2), torch.ones(1, 2))
        tensor([[1.],
                [1.]])
    """
    if a.device.type == "cpu" and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(a.contiguous(), b.contiguous(), None, "none", [], "")
    return F.linear(a, b)
