"""Augmentation of whole batches on the device: every image its own, randomness drawn on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import photometric
from ..recipe.config import Augment

__all__ = ["IMAGENET", "Colors", "augment", "colors_of", "erase", "mix", "normalize", "views"]


class Colors(NamedTuple):
    """Mean and standard deviation of the three colors, in 0..1, that a model has its pixels centered and scaled by."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Colors((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # timm's default
# timm's RandAugment with increasing severity: these bend the sampling grid, the rest is in photometric.py
AFFINE_OPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
OPS = AFFINE_OPS + tuple(photometric.OPS)
FEW_PIXELS = 8  # an output pixel that sees no more along an axis is summed on a CPU, without the zeros of a product


class Draws:
    """Random numbers for one process's share of a batch.

    They are drawn for the whole batch: several processes then see together what one would.

    Args:
        generator: On the CPU, so that every device draws the same.
        count: Images of the share.
        rank: The share is each `world`-th image of the batch from here on.
        world: Number of processes.
    """

    def __init__(self, generator: torch.Generator, count: int, rank: int = 0, world: int = 1):
        self.generator, self.count, self.rank, self.world = generator, count, rank, world

    def uniform(self, low: float = 0.0, high: float = 1.0, *shape: int) -> Tensor:
        return self._share(self._empty(shape).uniform_(low, high, generator=self.generator))

    def normal(self, *shape: int) -> Tensor:
        return self._share(self._empty(shape).normal_(generator=self.generator))

    def integers(self, below: int, *shape: int) -> Tensor:
        return self._share(self._empty(shape, torch.long).random_(below, generator=self.generator))

    def coin(self, probability: float, *shape: int) -> Tensor:
        """True with a probability."""
        return self.uniform(0, 1, *shape) < probability

    def beta(self, alpha: float) -> Tensor:
        """Beta(alpha, alpha), which torch draws from no generator."""
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=self.generator)))
        return self._share(torch.from_numpy(rng.beta(alpha, alpha, self.count * self.world)))

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(self.count * self.world, *shape, dtype=dtype)

    def _share(self, drawn: Tensor) -> Tensor:
        return drawn[self.rank :: self.world]


def colors_of(model: nn.Module) -> Colors:
    """What a model's `pretrained_cfg` says of its input's colors; ImageNet's where it has none."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    return Colors(*(tuple(cfg.get(name) or default) for name, default in IMAGENET._asdict().items()))


@functools.cache
def _constants(colors: Colors, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in colors)
    return mean, std


def _beside(drawn: Tensor, images: Tensor) -> Tensor:
    """Numbers drawn on the CPU, on the images' device, without waiting for what that does."""
    return drawn.to(images.device, non_blocking=True)


def normalize(images: Tensor, colors: Colors = IMAGENET) -> Tensor:
    """Pixels from 0..255, `(B, 3, H, W)`, centered and scaled."""
    mean, std = _constants(colors, images.device)
    last = images.permute(0, 2, 3, 1)
    if last.is_contiguous():  # the colors of a row lie in one piece: its length is worth more than three
        width = images.shape[3]
        rows = (last.flatten(2) - mean.flatten().repeat(width)).div_(std.flatten().repeat(width))
        return rows.unflatten(2, (width, -1)).permute(0, 3, 1, 2)
    return (images - mean).div_(std)


def augment(
    images: Tensor, settings: Augment, size: int, generator: torch.Generator, *, rank: int = 0, world: int = 1
) -> Tensor:
    """Random resized crop and flip, RandAugment, changes of color.

    The crop is resampled as evaluation resamples: bilinear and, where it is made smaller, antialiased. Unlike timm's,
    affine operations come before those of color, turn and shear about the crop's center, and show what lies beyond the
    crop, or a reflection beyond the image, instead of gray.

    Args:
        images: `(B, 3, H, W)` uint8; fastest with channels last.
        settings: The augmentation; erasing and mixing are `erase` and `mix`.
        size: Pixels of a side of the result.
        generator: Source of randomness, see `Draws`, as are the next two.
        rank: Of this process.
        world: Number of processes.

    Returns:
        `(B, 3, size, size)` float32, values 0..255.
    """
    draws = Draws(generator, len(images), rank, world)
    crop = crop_matrix(settings, draws)
    drawn = draw_ops(settings, draws) if settings.randaug_ops else None
    pixels = images.float()
    if drawn:
        pixels = warp(pixels, crop, *drawn)
    out = resample(pixels, crop, size)
    if drawn:
        out = color_ops(out, *drawn)
    elif settings.color_jitter:
        out = jitter(out, settings.color_jitter, draws)
    return out


def views(
    images: Tensor, settings: Augment, size: int, generator: torch.Generator, *, rank: int = 0, world: int = 1
) -> list[Tensor]:
    """Several crops of each image, see `augment`: large ones `(B, V, 3, size, size)`, and small ones of half the side.

    Returns:
        The large ones and, where there are any, the small ones.
    """
    small = dataclasses.replace(settings, crop_scale=settings.small_scale)
    wanted = ((settings, settings.large_views, size), (small, settings.small_views, max(1, size // 2)))
    return [
        torch.stack([augment(images, s, side, generator, rank=rank, world=world) for _ in range(count)], 1)
        for s, count, side in wanted
        if count
    ]


def resample(images: Tensor, crop: Tensor, size: int) -> Tensor:
    """Crops resized as `F.interpolate(mode="bilinear", antialias=True)` and Pillow's `resize(box=...)` do it.

    Each is two products of matrices, over rows and over columns, or on a CPU the sums without their zeros: an output
    pixel is the mean of the pixels about its place by a triangle that is one pixel wide to each side, or as wide as
    output pixels are apart.

    Args:
        images: `(B, C, H, W)` float.
        crop: Maps `(B, 3, 3)` from places in the result to places in the image, without turning or shearing.
        size: Pixels of a side of the result.

    Returns:
        `(B, C, size, size)`.
    """
    (channels, height, width), crop = images.shape[1:], _beside(crop, images)
    axes = (crop[:, 1, 1], crop[:, 1, 2], height, size), (crop[:, 0, 0], crop[:, 0, 2], width, size)
    if images.device.type == "cpu" and max(_reach(*axis).max() for axis in axes) <= FEW_PIXELS / 2:
        out = _gather(images.permute(0, 2, 3, 1).flatten(2), *axes[0])  # (B, size, W * C)
        out = out.unflatten(2, (width, channels)).transpose(1, 2).flatten(2)  # (B, W, size * C)
        return _gather(out, *axes[1]).unflatten(2, (size, channels)).permute(0, 3, 2, 1)
    rows, columns = (_triangles(*axis) for axis in axes)
    out = torch.bmm(rows, images.permute(0, 2, 3, 1).flatten(2))  # (B, size, W * C)
    out = out.unflatten(2, (width, channels)).permute(0, 3, 1, 2).flatten(1, 2)
    return torch.bmm(out, columns.mT).unflatten(1, (channels, size))


def _reach(scale: Tensor, shift: Tensor, side: int, size: int) -> Tensor:
    """How many pixels to each side of its place an output pixel sees, `(B,)`."""
    return (scale.abs() * (side / size)).clamp_min(1)


def _gather(lines: Tensor, scale: Tensor, shift: Tensor, side: int, size: int) -> Tensor:
    """What a product of `_triangles` and lines `(B, side, n)` gives, `(B, size, n)`, from the few that are not zero."""
    reach = _reach(scale, shift, side, size)[:, None, None]
    centers = _centers(scale, shift, side, size)[:, :, None]
    places = (centers - reach - 0.5).ceil() + torch.arange(math.ceil(2 * reach.max()))
    inside = (places >= 0) & (places < side)
    weights = (1 - (places + 0.5 - centers).abs() / reach).clamp_min(0) * inside
    weights = weights / weights.sum(dim=2, keepdim=True)
    index = places.long().clamp(0, side - 1) + side * torch.arange(len(lines))[:, None, None]
    out = F.embedding_bag(
        index.flatten(0, 1), lines.flatten(0, 1), mode="sum", per_sample_weights=weights.flatten(0, 1).to(lines.dtype)
    )
    return out.unflatten(0, (len(lines), size))


def _centers(scale: Tensor, shift: Tensor, side: int, size: int) -> Tensor:
    """Places of the output pixels among those of an axis, `(B, size)`."""
    places = (torch.arange(size, device=scale.device) * 2 + 1) / size - 1
    return (scale[:, None] * places + shift[:, None] + 1) * (side / 2)


def _triangles(scale: Tensor, shift: Tensor, side: int, size: int) -> Tensor:
    """Weights `(B, size, side)` of an axis's pixels in each output pixel; places are `scale * x + shift` in -1..1."""
    centers, reach = _centers(scale, shift, side, size), _reach(scale, shift, side, size)[:, None, None]
    pixels = torch.arange(side, device=scale.device) + 0.5
    weights = (1 - (pixels - centers[:, :, None]).abs() / reach).clamp_min(0)
    return weights / weights.sum(dim=2, keepdim=True)


def crop_matrix(settings: Augment, draws: Draws) -> Tensor:
    """Random resized crop and flip as maps `(B, 3, 3)` from places in the result to places in the image, in -1..1."""
    area = draws.uniform(settings.crop_scale[0], settings.crop_scale[1])
    log_ratio = torch.tensor(settings.crop_ratio).log()
    ratio = draws.uniform(log_ratio[0].item(), log_ratio[1].item()).exp()
    width, height = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    shift = draws.uniform(0, 1, 2) * 2 - 1
    mirror = torch.where(draws.coin(0.5), -1.0, 1.0) if settings.flip else torch.ones(draws.count)
    theta = torch.zeros(draws.count, 3, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, 2, 2] = width * mirror, height, 1
    theta[:, 0, 2], theta[:, 1, 2] = shift[:, 0] * (1 - width), shift[:, 1] * (1 - height)
    return theta


# ----------------------------------------------------------------------------------------------------- RandAugment


def draw_ops(settings: Augment, draws: Draws) -> tuple[Tensor, Tensor]:
    """What RandAugment does to each image.

    Returns:
        Numbers in `OPS`, -1 for nothing, and signed levels in -1..1, both `(B, randaug_ops)`.
    """
    count = settings.randaug_ops
    ops = draws.integers(len(OPS), count).masked_fill(draws.coin(0.5, count), -1)
    level = settings.randaug_magnitude + settings.randaug_std * draws.normal(count)
    return ops, level.clamp(0, 10) / 10 * torch.where(draws.coin(0.5, count), -1.0, 1.0)


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


def warp(images: Tensor, crop: Tensor, ops: Tensor, level: Tensor) -> Tensor:
    """The affine ones of drawn operations about the crop's center, on the images that drew any; changes `images`."""
    rows = ((ops >= 0) & (ops < len(AFFINE_OPS))).any(dim=1).nonzero().squeeze(1)
    if len(rows):
        crop = crop[rows]
        theta = crop @ affine_matrix(ops[rows], level[rows]) @ torch.linalg.inv(crop)
        rows = _beside(rows, images)
        some = images[rows]
        grid = F.affine_grid(_beside(theta[:, :2], images), list(some.shape), align_corners=False)
        images[rows] = F.grid_sample(some, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return images


def color_ops(images: Tensor, ops: Tensor, level: Tensor) -> Tensor:
    """The other ones of drawn operations, each on the images that drew it; changes `images`."""
    for i in range(ops.shape[1]):
        for number, function in enumerate(photometric.OPS.values(), len(AFFINE_OPS)):
            rows = (ops[:, i] == number).nonzero().squeeze(1)
            if len(rows):
                by, rows = _beside(level[rows, i], images), _beside(rows, images)
                images[rows] = function(images[rows], by)
    return images


def jitter(images: Tensor, strengths: list[float], draws: Draws) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order, by random factors as torchvision's ColorJitter draws."""
    functions = (photometric.brightness, photometric.contrast, photometric.saturation)
    for strength, function in zip(strengths[:3], functions, strict=True):
        if strength:
            images = function(images, _beside(draws.uniform(max(0.0, 1 - strength), 1 + strength), images))
    if strengths[3]:
        images = photometric.turn_hue(images, _beside(draws.uniform(-strengths[3], strengths[3]), images))
    return images


# ------------------------------------------------------------------------------------------- after normalization


def erase(images: Tensor, probability: float, generator: torch.Generator, *, rank: int = 0, world: int = 1) -> Tensor:
    """Random erasing (1708.04896): a rectangle of some images set to zero, the mean color after `normalize`.

    It covers 2 to 33 % of the area with a ratio of sides of 0.3 to 3.3, cut where longer than the image, and more or
    less by rounding to pixels.

    Args:
        images: `(B, C, H, W)`.
        probability: That an image loses one.
        generator: See `Draws`, as are the next two.
        rank: Of this process.
        world: Number of processes.
    """
    height, width = images.shape[2:]
    draws = Draws(generator, len(images), rank, world)
    area = draws.uniform(0.02, 1 / 3) * height * width
    ratio = draws.uniform(math.log(0.3), math.log(3.3)).exp()
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top, left = (draws.uniform() * (height - tall + 1)).floor(), (draws.uniform() * (width - wide + 1)).floor()
    tall = tall * draws.coin(probability)
    return images.masked_fill(boxes(top, top + tall, left, left + wide, images), 0)


def boxes(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, images: Tensor) -> Tensor:
    """Masks `(B, 1, H, W)` on the images' device that are true in `top <= y < bottom`, `left <= x < right`."""
    edges = _beside(torch.stack([top, bottom, left, right]), images)[:, :, None]
    y, x = (torch.arange(side, device=images.device) for side in images.shape[2:])
    inside = ((y >= edges[0]) & (y < edges[1]))[:, :, None] & ((x >= edges[2]) & (x < edges[3]))[:, None, :]
    return inside[:, None]


def mix(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: Augment,
    generator: torch.Generator,
    *,
    rank: int = 0,
    world: int = 1,
) -> tuple[Tensor, Tensor]:
    """Mixup (1710.09412) and CutMix (1905.04899): each image with the one before it, by a share of its own.

    Images are paired within a process, so several processes do not see what one would.

    Args:
        images: `(B, C, H, W)` float.
        labels: `(B,)` class numbers, or shares of the classes `(B, K)`.
        num_classes: K.
        settings: `mixup`, `cutmix` and `mix_prob` of it.
        generator: See `Draws`, as are the next two.
        rank: Of this process.
        world: Number of processes.

    Returns:
        Images, and the shares of the classes `(B, K)` float32.
    """
    draws = Draws(generator, len(images), rank, world)
    height, width = images.shape[2:]
    both = settings.mixup > 0 and settings.cutmix > 0
    cut = draws.coin(0.5) if both else torch.full((len(images),), settings.cutmix > 0)
    own = torch.ones(len(images), dtype=torch.float64)  # the share that each image keeps of itself
    for alpha, those in ((settings.mixup, ~cut), (settings.cutmix, cut)):
        if alpha:
            own = torch.where(those, draws.beta(alpha), own)
    own = torch.where(draws.coin(settings.mix_prob), own, 1)
    weight = _beside(own.to(images.dtype), images)[:, None, None, None]
    if settings.cutmix:
        half = (1 - own).sqrt() / 2
        half_y, half_x = (half * height).floor(), (half * width).floor()
        middle_y, middle_x = draws.integers(height), draws.integers(width)
        top, bottom = (middle_y - half_y).clamp(min=0), (middle_y + half_y).clamp(max=height)
        left, right = (middle_x - half_x).clamp(min=0), (middle_x + half_x).clamp(max=width)
        own = torch.where(cut, 1 - (bottom - top) * (right - left) / (height * width), own)
        outside = ~boxes(top, bottom, left, right, images)
        weight = torch.where(_beside(cut, images)[:, None, None, None], outside.to(images.dtype), weight)
    targets = labels.float() if labels.ndim == 2 else F.one_hot(labels, num_classes).float()
    own = _beside(own.float(), images)[:, None]
    return torch.lerp(images.roll(1, 0), images, weight), torch.lerp(targets.roll(1, 0), targets, own)
