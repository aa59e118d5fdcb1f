"""Changes of color, for batches: what Pillow does to one image, by a level or factor per image.

Images are `(B, 3, H, W)` float with values 0..255, before and after. Pillow rounds to whole numbers after each step,
this does not; where a rule counts or compares whole numbers, values are rounded for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPS", "brightness", "contrast", "saturation", "sharpness", "turn_hue"]


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """`other` at factor 0, the image at 1, beyond it above."""
    return (other + _each(factor) * (images - other)).clamp_(0, 255)


def gray(images: Tensor) -> Tensor:
    """Luma `(B, 1, H, W)`."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Black at factor 0."""
    return _blend(images, 0.0, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """The mean gray at factor 0."""
    return _blend(images, gray(images).mean((2, 3), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Gray at factor 0."""
    return _blend(images, gray(images), factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Smoothed by [1 1 1; 1 5 1; 1 1 1] / 13 at factor 0, but for the outermost pixels."""
    kernel = images.new_ones(3, 1, 3, 3)
    kernel[..., 1, 1] = 5
    kernel /= 13
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel, groups=3)
    return _blend(images, smooth, factor)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Hue by a share of the color circle, at the same lightest channel and range of channels (HSV)."""
    red, green, blue = images.unbind(1)
    top, span = images.amax(1), images.amax(1) - images.amin(1)
    safe = span.clamp_min(1e-6)
    hue = torch.where(  # in sixths of the circle
        top == red,
        (green - blue) / safe,
        torch.where(top == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = hue + 6 * turns[:, None, None]
    toward = [(hue + n) % 6 for n in (5, 3, 1)]
    return torch.stack([top - span * torch.minimum(k, 4 - k).clamp(0, 1) for k in toward], dim=1)


def invert(images: Tensor) -> Tensor:
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Only the highest bits."""
    step = _each(2.0 ** (8 - bits))
    return images.round().div(step).floor() * step


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Values from the threshold on are inverted."""
    return torch.where(images.round() < _each(threshold), images, 255 - images)


def solarize_add(images: Tensor, add: Tensor) -> Tensor:
    """Values below 128 are raised."""
    return torch.where(images.round() < 128, (images + _each(add)).clamp_max(255), images)


def autocontrast(images: Tensor) -> Tensor:
    """Each channel stretched to 0..255."""
    low, high = images.amin((2, 3), keepdim=True).round(), images.amax((2, 3), keepdim=True).round()
    stretched = ((images - low) * (255 / (high - low).clamp_min(1))).clamp(0, 255)
    return torch.where(high > low, stretched, images)  # not the noise of sampling an even image


def equalize(images: Tensor) -> Tensor:
    """Each channel mapped so that its values are about equally frequent, by Pillow's rule."""
    values = images.round().clamp(0, 255).long().flatten(2)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    step = (values.shape[2] - counts.gather(2, values.amax(2, keepdim=True))) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp_min(1)).clamp_max(255)
    equal = table.gather(2, values).view(images.shape).to(images.dtype)
    return torch.where((step > 0)[..., None], equal, images)


def _factor(level: Tensor) -> Tensor:
    return (1 + 0.9 * level).clamp_min(0.1)


# RandAugment's operations by a level in -1..1, as timm's set with increasing severity reads it; without a direction
# only its size counts. At level 0 posterize still keeps but four bits, and the first three take no level. At level 1
# posterize keeps one bit, not none: a black image, which newer versions of Pillow refuse.
OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": lambda images, level: autocontrast(images),
    "Equalize": lambda images, level: equalize(images),
    "Invert": lambda images, level: invert(images),
    "PosterizeIncreasing": lambda images, level: posterize(images, (4 - (4 * level.abs()).floor()).clamp_min(1)),
    "SolarizeIncreasing": lambda images, level: solarize(images, 256 - (256 * level.abs()).floor()),
    "SolarizeAdd": lambda images, level: solarize_add(images, (110 * level.abs()).floor()),
    "ColorIncreasing": lambda images, level: saturation(images, _factor(level)),
    "ContrastIncreasing": lambda images, level: contrast(images, _factor(level)),
    "BrightnessIncreasing": lambda images, level: brightness(images, _factor(level)),
    "SharpnessIncreasing": lambda images, level: sharpness(images, _factor(level)),
}
