"""Augmentation of whole batches on the device: every image its own, randomness drawn on the CPU."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import photometric
from .config import Augment

__all__ = ["MEAN", "STD", "augment", "erase", "mix", "normalise"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # timm's ImageNet defaults, written into the model's cfg
# timm's RandAugment with increasing severity: these bend the sampling grid, the rest is in photometric.py
AFFINE_OPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
OPS = AFFINE_OPS + tuple(photometric.OPS)


def normalise(images: Tensor) -> Tensor:
    """Pixels from 0..255 to timm's ImageNet mean and standard deviation."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    return (images - mean) / std


def augment(images: Tensor, settings: Augment, size: int, generator: torch.Generator) -> Tensor:
    """Random resized crop, flip and RandAugment's affine part in one bilinear sampling, then changes of colour.

    Unlike timm's, affine operations come before those of colour, turn and shear about the centre, and show what lies
    beyond the crop, or a reflection beyond the image, instead of grey.

    Args:
        images: `(B, 3, H, W)` uint8.
        settings: The augmentation; erasing and mixing are `erase` and `mix`.
        size: Pixels of a side of the result.
        generator: Source of randomness, on the CPU so that every device draws the same.

    Returns:
        `(B, 3, size, size)` float32, values 0..255.
    """
    batch, device = len(images), images.device
    theta = crop_matrix(batch, settings, generator)
    drawn = draw_ops(batch, settings, generator) if settings.randaug_ops else None
    if drawn:
        theta = theta @ affine_matrix(*drawn)
    grid = F.affine_grid(theta[:, :2].to(device), [batch, 3, size, size], align_corners=False)
    out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    if drawn:
        out = colour_ops(out, *drawn)
    elif settings.color_jitter:
        out = jitter(out, settings.color_jitter, generator)
    return out


def crop_matrix(batch: int, settings: Augment, generator: torch.Generator) -> Tensor:
    """Random resized crop and flip as maps `(B, 3, 3)` from places in the result to places in the image, in -1..1."""
    low, high = settings.crop_scale
    area = torch.empty(batch).uniform_(low, high, generator=generator)
    log_ratio = torch.tensor(settings.crop_ratio).log()
    ratio = torch.empty(batch).uniform_(log_ratio[0].item(), log_ratio[1].item(), generator=generator).exp()
    width, height = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    shift = torch.rand(batch, 2, generator=generator) * 2 - 1
    mirror = (
        torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0) if settings.flip else torch.ones(batch)
    )
    theta = torch.zeros(batch, 3, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, 2, 2] = width * mirror, height, 1
    theta[:, 0, 2], theta[:, 1, 2] = shift[:, 0] * (1 - width), shift[:, 1] * (1 - height)
    return theta


# ----------------------------------------------------------------------------------------------------- RandAugment


def draw_ops(batch: int, settings: Augment, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What RandAugment does to each image.

    Returns:
        Numbers in `OPS`, -1 for nothing, and signed levels in -1..1, both `(B, randaug_ops)`.
    """
    shape = (batch, settings.randaug_ops)
    ops = torch.randint(len(OPS), shape, generator=generator)
    ops[torch.rand(shape, generator=generator) < 0.5] = -1
    level = settings.randaug_magnitude + settings.randaug_std * torch.randn(shape, generator=generator)
    sign = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
    return ops, level.clamp(0, 10) / 10 * sign


def affine_matrix(ops: Tensor, level: Tensor) -> Tensor:
    """The affine ones of drawn operations, one after the other, as maps `(B, 3, 3)` like those of a crop."""
    whole = torch.eye(3).expand(len(ops), 3, 3)
    for i in range(ops.shape[1]):
        one = torch.eye(3).repeat(len(ops), 1, 1)
        op, by = ops[:, i], level[:, i]
        angle = torch.where(op == OPS.index("Rotate"), by * math.radians(30), 0)
        one[:, 0, 0] = one[:, 1, 1] = angle.cos()
        one[:, 0, 1] = torch.where(op == OPS.index("ShearX"), by * 0.3, -angle.sin())
        one[:, 1, 0] = torch.where(op == OPS.index("ShearY"), by * 0.3, angle.sin())
        one[:, 0, 2] = torch.where(op == OPS.index("TranslateXRel"), by * 0.9, 0)  # 0.45 of a width of 2
        one[:, 1, 2] = torch.where(op == OPS.index("TranslateYRel"), by * 0.9, 0)
        whole = whole @ one
    return whole


def colour_ops(images: Tensor, ops: Tensor, level: Tensor) -> Tensor:
    """The other ones of drawn operations, each on the images that drew it; changes `images`."""
    for i in range(ops.shape[1]):
        for number, function in enumerate(photometric.OPS.values(), len(AFFINE_OPS)):
            rows = (ops[:, i] == number).nonzero().squeeze(1)
            if len(rows):
                by, rows = level[rows, i].to(images.device), rows.to(images.device)
                images[rows] = function(images[rows], by)
    return images


def jitter(images: Tensor, strengths: list[float], generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order, by random factors as torchvision's ColorJitter draws."""
    drawn = torch.rand(4, len(images), generator=generator)
    for strength, share, function in zip(
        strengths[:3], drawn[:3], (photometric.brightness, photometric.contrast, photometric.saturation), strict=True
    ):
        if strength:
            low, high = max(0.0, 1 - strength), 1 + strength
            images = function(images, (low + (high - low) * share).to(images.device))
    if strengths[3]:
        images = photometric.turn_hue(images, (strengths[3] * (2 * drawn[3] - 1)).to(images.device))
    return images


# ------------------------------------------------------------------------------------------- after normalisation


def erase(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Random erasing (1708.04896): a rectangle of some images set to zero, the mean colour after `normalise`.

    It covers 2 to 33 % of the area with a ratio of sides of 0.3 to 3.3, cut where longer than the image, and less by
    rounding to pixels.

    Args:
        images: `(B, C, H, W)`.
        probability: That an image loses one.
        generator: On the CPU.
    """
    batch, _, height, width = images.shape
    drawn = torch.rand(5, batch, generator=generator)
    area = (0.02 + (1 / 3 - 0.02) * drawn[1]) * height * width
    ratio = (math.log(0.3) + (math.log(3.3) - math.log(0.3)) * drawn[2]).exp()
    tall = (area * ratio).sqrt().round().clamp(1, height) * (drawn[0] < probability)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top, left = (drawn[3] * (height - tall + 1)).floor(), (drawn[4] * (width - wide + 1)).floor()
    return images.masked_fill(boxes(top, top + tall, left, left + wide, images), 0)


def boxes(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, images: Tensor) -> Tensor:
    """Masks `(B, 1, H, W)` on the images' device that are true in `top <= y < bottom`, `left <= x < right`."""
    edges = torch.stack([top, bottom, left, right]).to(images.device)[:, :, None]
    y, x = (torch.arange(side, device=images.device) for side in images.shape[2:])
    inside = ((y >= edges[0]) & (y < edges[1]))[:, :, None] & ((x >= edges[2]) & (x < edges[3]))[:, None, :]
    return inside[:, None]


def mix(
    images: Tensor, labels: Tensor, num_classes: int, settings: Augment, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mixup (1710.09412) and CutMix (1905.04899): each image with the one before it in the batch, by its own share.

    Args:
        images: `(B, C, H, W)` float.
        labels: `(B,)` class numbers.
        num_classes: K.
        settings: `mixup`, `cutmix` and `mix_prob` of it.
        generator: On the CPU.

    Returns:
        Images, and the shares of the classes `(B, K)` float32.
    """
    targets = F.one_hot(labels, num_classes).float()
    batch, _, height, width = images.shape
    # torch draws no beta distribution from a generator
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    cut = rng.random(batch) < (0.5 if settings.mixup and settings.cutmix else float(settings.cutmix > 0))
    share = np.ones(batch)
    for alpha, those in ((settings.mixup, ~cut), (settings.cutmix, cut)):
        if alpha:
            share = np.where(those, rng.beta(alpha, alpha, batch), share)
    share = np.where(rng.random(batch) < settings.mix_prob, share, 1)

    if settings.cutmix:
        half = np.sqrt(1 - share) / 2
        middle_y, middle_x = rng.integers(height, size=batch), rng.integers(width, size=batch)
        half_y, half_x = (half * height).astype(int), (half * width).astype(int)
        top, bottom = (middle_y - half_y).clip(0), (middle_y + half_y).clip(max=height)
        left, right = (middle_x - half_x).clip(0), (middle_x + half_x).clip(max=width)
        share = np.where(cut, 1 - (bottom - top) * (right - left) / (height * width), share)  # what is left of it
    own = torch.from_numpy(share).float().to(images.device)
    weight = own[:, None, None, None]
    if settings.cutmix:
        box = boxes(*map(torch.from_numpy, (top, bottom, left, right)), images)  # type: ignore
        weight = torch.where(torch.from_numpy(cut).to(images.device)[:, None, None, None], (~box).float(), weight)
    images = torch.lerp(images.roll(1, 0), images, weight.to(images.dtype))
    return images, torch.lerp(targets.roll(1, 0), targets, own[:, None])
