"""Layers that compute the same in the way that is the fastest on this CPU, while gradients are on.

Which way that is depends on the processor, the sizes and the precision, so it is measured at a layer's first step and
kept, see `fastest`. The ways differ by rounding alone:

- a convolution: as the library has it; by products of matrices, see `small_maps`; with its weight gradient by another
  way, see `weight_gradients`; under bf16 in float32, as oneDNN's gradients of depthwise convolutions in bf16 take
  several times as long;
- a linear layer over tokens: as the library has it (MKL, which knows no AVX-512 of AMD's processors); or as a
  convolution of 1 x 1 (oneDNN, which does);
- attention: fused, or by two products, which under bf16 is several times as fast for the few hundred tokens of a ViT.

Memory that tensors free is kept for the next ones: giving it back to the system and getting it anew, page by page,
takes part of every step. `training/benchmarks/pretrain_speed.py` measures what all that saves.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from .fastest import fastest, may_measure
from .small_maps import MAX_INPUTS, MAX_OUTPUTS, dense_product, depthwise_product
from .weight_gradients import convolve

__all__ = ["FasterConv2d", "FasterLinear", "keep_freed_memory", "use_faster_layers"]

# Products are tried up to so many pixels; without a measurement they are taken up to `small_maps`' own bounds.
TRIED_OUTPUTS = 16
TRIED_INPUTS = 64
DENSE_MAP = 64  # pixels that a dense convolution may give for its weight gradient to be tried as a product
DEPTHWISE_TAPS = 25  # that a depthwise one has at least, for its to be tried as a forward convolution
MEASURED_BATCH = 32  # images that a measurement takes at most
SMALL_MAP_BATCH = 128  # the same where products are tried: part of what they cost does not grow with the batch
WORTH_MEASURING = 4_000_000  # multiplications of a forward pass


def use_faster_layers(model: nn.Module) -> nn.Module:
    """Let a model's layers choose how to compute while gradients are on, in place; for training on a CPU.

    Args:
        model: Any module. Of its layers, plain `nn.Linear` and `nn.Conv2d` ones change, the latter if they are dense or
            depthwise, pad with zeros and have no dilation, as do timm's that pad as TensorFlow does; and timm's
            attention. Weights and their names stay.

    Returns:
        The same model.

    Example:
        >>> model = use_faster_layers(timm.create_model("resnet18"))  # doctest: +SKIP
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FasterLinear
        elif type(module) is nn.Conv2d and _is_plain(module):
            module.__class__ = FasterConv2d
        elif type(module) is Conv2dSame and _is_plain(module):
            module.__class__ = FasterConv2dSame
        elif getattr(module, "fused_attn", False) and hasattr(module, "num_heads"):
            module.register_forward_pre_hook(_settle_attention)
    return model


def keep_freed_memory() -> bool:
    """Have glibc keep what this process frees for its next tensors, instead of giving it back to the system.

    Returns:
        Whether it will; elsewhere than on Linux with glibc it will not.
    """
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # names of malloc.h
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


def _is_plain(layer: Any) -> bool:
    return (
        (layer.groups == 1 or layer.groups == layer.in_channels == layer.out_channels)
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


class FasterConv2d(nn.Conv2d):
    """`nn.Conv2d` that chooses how to compute while gradients are on."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv2d`."""
        way = "library"
        if torch.is_grad_enabled() and input.ndim == 4 and input.device.type == "cpu":
            way = self._way(input)
        return self._compute(way, input, self.weight, self.bias)

    def _way(self, x: Tensor) -> str:
        outputs = 1
        for length, taps, step, pad in zip(x.shape[2:], self.kernel_size, self.stride, self.padding, strict=True):
            outputs *= max((length + 2 * pad - taps) // step + 1, 0)  # type: ignore[operator]
        pixels, tried, taken = outputs, TRIED_OUTPUTS, MAX_OUTPUTS
        if self.groups > 1:
            pixels, tried, taken = x.shape[2:].numel(), TRIED_INPUTS, MAX_INPUTS
        if not outputs:
            return "library"  # and its error
        rule = "products" if pixels <= taken else "library"
        work = len(x) * outputs * self.weight.numel()
        if work < WORTH_MEASURING or not _may_measure():
            return rule
        taps = math.prod(self.kernel_size)
        other = taps > 1 and outputs <= DENSE_MAP if self.groups == 1 else taps >= DEPTHWISE_TAPS
        ways = ["library"]
        ways += ["products"] if pixels <= tried else []
        ways += ["weights"] if other and self.bias is None else []
        if torch.is_autocast_enabled("cpu"):
            ways += ["float32", *(["float32 weights"] if "weights" in ways and self.groups > 1 else [])]
        if len(ways) == 1:
            return "library"
        layout = "last" if x.is_contiguous(memory_format=torch.channels_last) else "first"
        shape = (min(len(x), SMALL_MAP_BATCH if "products" in ways else MEASURED_BATCH), *x.shape[1:])
        key = f"conv {shape} {tuple(self.weight.shape)} {self.stride} {self.padding} {layout} {_precision(x)}"
        return fastest(key, {way: partial(self._try, way, x, shape) for way in ways})

    def _try(self, way: str, like: Tensor, shape: tuple[int, ...]) -> None:
        """One forward and backward pass of that way."""
        x = _made(shape, like)
        if like.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        weight = self.weight.detach().clone().requires_grad_()
        y = self._compute(way, x.requires_grad_(), weight, None)
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    def _compute(self, way: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if way == "products":
            product = dense_product if self.groups == 1 else depthwise_product
            return product(x, weight, bias, self.stride, self.padding)  # type: ignore[arg-type]
        if torch.is_autocast_enabled("cpu") and way != "library":
            low = torch.get_autocast_dtype("cpu")
            dtype = torch.float32 if "float32" in way else low
            with torch.autocast("cpu", enabled=False):
                bias = None if bias is None else bias.to(dtype)
                return self._in_one_precision(way, x.to(dtype), weight.to(dtype), bias).to(low)
        return self._in_one_precision(way, x, weight, bias)

    def _in_one_precision(self, way: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if "weights" in way:
            return convolve(x, weight, self.stride, self.padding)  # type: ignore[arg-type]
        return self._conv_forward(x, weight, bias)


class FasterConv2dSame(FasterConv2d, Conv2dSame):
    """`Conv2dSame` of timm, which pads as TensorFlow does, that chooses how to compute what follows."""

    def forward(self, x: Tensor) -> Tensor:
        """As `Conv2dSame`."""
        return super().forward(pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation)))


class FasterLinear(nn.Linear):
    """`nn.Linear` that chooses how to compute over tokens `(B, N, d)`, `(B, H, W, d)` while gradients are on."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if torch.is_grad_enabled() and input.ndim > 2 and input.device.type == "cpu" and self._way(input) != "library":
            return linear_by_convolution(input, self.weight, self.bias)
        return super().forward(input)

    def _way(self, x: Tensor) -> str:
        if x.numel() * self.out_features < WORTH_MEASURING or not _may_measure():
            return "library"
        shape = (min(len(x), MEASURED_BATCH), *x.shape[1:])
        ways = {"library": F.linear, "convolution": linear_by_convolution}
        key = f"linear {shape} {self.out_features} {_precision(x)}"
        return fastest(key, {name: partial(self._try, way, x, shape) for name, way in ways.items()})

    def _try(self, way: Callable[..., Tensor], like: Tensor, shape: tuple[int, ...]) -> None:
        x, weight = _made(shape, like).requires_grad_(), self.weight.detach().clone().requires_grad_()
        y = way(x, weight, None)
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))


def linear_by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` as a convolution of 1 x 1 over a column of tokens.

    Args:
        x: `(B, ..., d)`.
        weight: `(o, d)`.
        bias: `(o,)` or None.

    Returns:
        `(B, ..., o)`.
    """
    column = x.reshape(len(x), -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (B, d, N, 1), channels last
    y = F.conv2d(column, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def _settle_attention(module: Any, args: tuple[Any, ...]) -> None:
    """Before a step of one of timm's attention layers: choose whether its two products fuse."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or x.ndim != 3 or x.device.type != "cpu" or not torch.is_grad_enabled():
        return
    heads, (images, tokens, width) = module.num_heads, x.shape
    if images * tokens * tokens * width < WORTH_MEASURING or not _may_measure():
        return
    shape = (min(images, MEASURED_BATCH), heads, tokens, int(getattr(module, "head_dim", width // heads)))
    ways = {"fused": F.scaled_dot_product_attention, "products": _attend}
    key = f"attention {shape} {_precision(x)}"
    module.fused_attn = fastest(key, {n: partial(_try_attention, w, shape) for n, w in ways.items()}) == "fused"


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query / math.sqrt(query.shape[-1]) @ key.mT).softmax(-1) @ value


def _try_attention(way: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    three = [_made(shape, torch.empty(0, dtype=dtype)).requires_grad_() for _ in range(3)]
    y = way(*three)
    torch.autograd.grad(y, three, torch.ones_like(y))


def _may_measure() -> bool:
    return not torch.compiler.is_compiling() and may_measure()


def _precision(x: Tensor) -> str:
    return f"{x.dtype} {torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else ''}".strip()


def _made(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers to measure with, drawn from a generator of their own: the run's random numbers stay what they are."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.dtype)
