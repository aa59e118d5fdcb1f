"""Convolutions over maps of a few pixels as matrix products, for training on a CPU.

The last maps of a network are four pixels or one where its images have 64 or 32. oneDNN's gradients of a convolution
are slow there, many times its forward pass, and those of a depthwise convolution most of all. Products of matrices over
the taps that meet a pixel give the same numbers but for rounding. What that saves is in
`training/benchmarks/small_maps_cpu.json`.
"""

from __future__ import annotations

import functools
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["MAX_INPUTS", "MAX_OUTPUTS", "dense_product", "depthwise_product"]

# Beyond these the library is as fast or faster, as seen on an AVX2 machine; `faster_layers` measures where it may.
MAX_OUTPUTS = 9  # pixels that a dense convolution gives
MAX_INPUTS = 16  # pixels that a depthwise convolution takes

Pair = tuple[int, int]


def _outputs(length: int, taps: int, step: int, pad: int) -> int:
    """Pixels that a convolution gives along an axis; none where it is not positive."""
    return (length + 2 * pad - taps) // step + 1


def _spans(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> list[list[tuple[int, int, int]]]:
    """For both axes, for each output pixel: first and end of the input pixels it sees, first tap that meets one."""
    spans = []
    for length, taps, step, pad in zip(size, kernel, stride, padding, strict=True):
        starts = [i * step - pad for i in range(_outputs(length, taps, step, pad))]
        firsts = [min(max(s, 0), length) for s in starts]
        spans.append([(f, max(min(s + taps, length), f), max(-s, 0)) for s, f in zip(starts, firsts, strict=True)])
    return spans


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
    """Convolution by one product for each output pixel, over those taps that meet an input.

    Args:
        x: `(B, C, H, W)`; fastest with channels last, as the weight.
        weight: `(O, C, kh, kw)`.
        bias: `(O,)` or None.
        stride: Of rows and columns.
        padding: Zeros before and behind rows and columns.

    Returns:
        `(B, O, h, w)`, channels last.
    """
    x, weight = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
    size, kernel = x.shape[1:3], weight.shape[1:3]
    if kernel == (1, 1) and padding == (0, 0):  # every pixel meets the one tap: one product for all
        return F.linear(x[:, :: stride[0], :: stride[1]], weight.flatten(1), bias).permute(0, 3, 1, 2)
    rows, columns = _spans(size, kernel, stride, padding)  # type: ignore[arg-type]
    pixels = []
    for (top, bottom, i), (left, right, j) in product(rows, columns):
        taps = weight[:, i : i + bottom - top, j : j + right - left].flatten(1)
        pixels.append(F.linear(x[:, top:bottom, left:right].flatten(1), taps, bias))
    return torch.stack(pixels, dim=1).unflatten(1, (len(rows), len(columns))).permute(0, 3, 1, 2)


def depthwise_product(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
    """Depthwise convolution by one product for each channel, of its pixels and a matrix of its taps.

    Args:
        x: `(B, C, H, W)`.
        weight: `(C, 1, kh, kw)`.
        bias: `(C,)` or None.
        stride: Of rows and columns.
        padding: Zeros before and behind rows and columns.

    Returns:
        `(B, C, h, w)`, channels last.
    """
    size, kernel = x.shape[2:], weight.shape[2:]
    index, (height, width) = _tap_of_pair(*map(tuple, (size, kernel, stride, padding)))
    taps = F.pad(weight.flatten(1), (0, 1))[:, index]  # (C, pixels in, pixels out); 0 where they do not meet
    y = torch.bmm(x.transpose(0, 1).flatten(2), taps)
    if bias is not None:
        y = y + bias[:, None, None]
    return y.permute(1, 2, 0).contiguous().unflatten(1, (height, width)).permute(0, 3, 1, 2)


@functools.cache
def _tap_of_pair(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> tuple[Tensor, Pair]:
    """For each pixel in and pixel out the number of the tap between them, kh kw for none; and the output's size."""
    rows, columns = _spans(size, kernel, stride, padding)
    index = torch.full((*size, len(rows), len(columns)), kernel[0] * kernel[1])
    taps = torch.arange(kernel[0] * kernel[1]).unflatten(0, kernel)
    for (h, (top, bottom, i)), (w, (left, right, j)) in product(enumerate(rows), enumerate(columns)):
        index[top:bottom, left:right, h, w] = taps[i : i + bottom - top, j : j + right - left]
    return index.flatten(2).flatten(0, 1), (len(rows), len(columns))
