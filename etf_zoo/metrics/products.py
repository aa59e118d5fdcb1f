"""Products of float32 matrices by the faster of a CPU's libraries."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["product", "room"]


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


def room(*shape: int, like: Tensor) -> Tensor:
    """Numbers of any content in the precision and on the device of a tensor.

    On a CPU they are numpy's, which asks Linux for large pages: to be given small ones, one by one, takes longer than
    what is computed on them.
    """
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(shape, np.float32 if like.dtype == torch.float32 else np.float64))
