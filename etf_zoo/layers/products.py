"""Scaled products of features with a frame, in float32 at least, autocast or not."""

import torch  # no `from __future__ import annotations` here: TorchScript cannot read the functions' as strings
from torch import Tensor
from torch.nn import functional as F

from .implicit import into_core, kerdock_product

__all__ = ["kerdock_logits", "scaled_product"]


def scaled_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """scale * x W^T for a frame that is stored.

    Args:
        x: Embeddings `(..., dim)`.
        weight: The frame `(K, dim)`.
        scale: A number.

    Example:
        >>> scaled_product(torch.ones(1, 2), torch.eye(2), torch.tensor(3.0))
        tensor([[3., 3.]])
    """
    # a test of its own, as TorchScript skips the block only then
    if not torch.jit.is_scripting():  # noqa: SIM102
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # which raises for "meta"
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x * scale, weight.to(x.dtype))
    return F.linear(x * scale, weight.to(x.dtype))


def kerdock_logits(x: Tensor, rotation: Tensor, signs: Tensor, scale: Tensor, num_classes: int) -> Tensor:
    """scale * x W^T for a Kerdock frame of which only sign bits are stored.

    Args:
        x: Embeddings `(..., dim)`.
        rotation: See `into_core`.
        signs: Of `kerdock_signs`.
        scale: A number.
        num_classes: K.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return kerdock_product(into_core(x * scale, rotation), signs, num_classes)
    return kerdock_product(into_core(x * scale, rotation), signs, num_classes)
