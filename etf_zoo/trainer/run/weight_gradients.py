"""Convolutions whose weight gradient is computed in another way than the library's, for training on a CPU.

oneDNN's forward pass and its gradient by the input run near the processor's peak, the gradient by the weight of some
layers at a fraction of it: dense ones over maps of 5 x 5 to 8 x 8 pixels, where one product of matrices does the same,
and depthwise ones of 5 x 5 taps, where it is a forward convolution whose taps are the gradient's pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from etf_zoo.metrics.products import product

__all__ = ["convolve", "dense_weight_gradient", "depthwise_weight_gradient"]

Pair = tuple[int, int]


def convolve(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """`F.conv2d` of a dense or depthwise layer without bias; differentiable once.

    Args:
        x: `(B, C, H, W)`; fastest with channels last, as the weight.
        weight: `(O, C, kh, kw)`, or of a depthwise convolution `(C, 1, kh, kw)`, of the input's precision.
        stride: Of rows and columns.
        padding: Zeros before and behind rows and columns.

    Returns:
        `(B, O, h, w)`.
    """
    return _Convolution.apply(x, weight, stride, padding)  # type: ignore[return-value]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.steps = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, x.shape[1] // weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (stride, padding), gradient = ctx.saved_tensors, ctx.steps, gradients[0]
        groups, of_input, of_weight = x.shape[1] // weight.shape[1], None, None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                of_input = torch.ops.aten.convolution_backward(
                    gradient, x, weight, None, stride, padding, (1, 1), False, (0, 0), groups, (True, False, False)
                )[0]
            if ctx.needs_input_grad[1]:
                way = dense_weight_gradient if groups == 1 else depthwise_weight_gradient
                of_weight = way(x, gradient, tuple(weight.shape[2:]), stride, padding)
        return of_input, of_weight, None, None


def dense_weight_gradient(x: Tensor, gradient: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Gradient by the weight of a dense convolution: a product over images and pixels.

    Args:
        x: The layer's input `(B, C, H, W)`.
        gradient: By its output, `(B, O, h, w)`.
        kernel: Taps of rows and columns.
        stride: As of the layer.
        padding: Likewise.

    Returns:
        `(O, C, kh, kw)`, channels last.
    """
    images, outputs, height, width = gradient.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    (image, row, column, _), channels = padded.stride(), x.shape[1]
    seen = padded.as_strided(  # taps of a row and their channels lie in one piece
        (images, height, width, kernel[0], kernel[1] * channels),
        (image, row * stride[0], column * stride[1], row, 1),
    ).reshape(images * height * width, -1)
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, outputs)
    found = product(rows.mT, seen.mT) if rows.dtype == torch.float32 else rows.mT @ seen
    return found.unflatten(1, (*kernel, channels)).permute(0, 3, 1, 2)


def depthwise_weight_gradient(x: Tensor, gradient: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Gradient by the weight of a depthwise convolution: a forward one, with the gradient's pixels as its taps.

    Each channel of each image is a channel of that convolution, and a step of the layer's its dilation.

    Args:
        x: The layer's input `(B, C, H, W)`.
        gradient: By its output, `(B, C, h, w)`.
        kernel: Taps of rows and columns.
        stride: As of the layer.
        padding: Likewise.

    Returns:
        `(C, 1, kh, kw)`.
    """
    images, channels = x.shape[:2]
    maps = _images_as_channels(x).permute(2, 0, 1)[None]
    taps = _images_as_channels(gradient).permute(2, 0, 1)[:, None]
    found = F.conv2d(maps, taps, None, 1, padding, stride, images * channels)
    found = found[0, :, : kernel[0], : kernel[1]]  # what comes behind belongs to pixels that no window reached
    return found.unflatten(0, (images, channels)).sum(0)[:, None]


def _images_as_channels(x: Tensor) -> Tensor:
    """`(H, W, B * C)`, contiguous."""
    return x.permute(2, 3, 0, 1).reshape(*x.shape[2:], -1)
