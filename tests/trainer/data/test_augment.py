"""Batch augmentation beside Pillow's and timm's operations on one image, and properties."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from torchvision.transforms import functional as tv

from etf_zoo.trainer.data import photometric
from etf_zoo.trainer.data.augment import (
    AFFINE_OPS,
    OPS,
    Draws,
    affine_matrix,
    augment,
    boxes,
    crop_matrix,
    draw_ops,
    erase,
    jitter,
    mix,
    resample,
    warp,
)
from etf_zoo.trainer.recipe.config import Augment

STILL = Augment(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip=False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    """Twelve smooth images with noise, as whole numbers in 0..255, the last two of one and of two colors."""
    rough = torch.rand(12, 3, 4, 4, generator=generator()) * 255
    smooth = torch.nn.functional.interpolate(rough, size=(24, 24), mode="bilinear")
    out = (smooth + 8 * torch.randn(smooth.shape, generator=generator(1))).clamp(10, 230).round()
    out[-2:] = 77
    out[-1, :, :5] = 200
    return out


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).byte().numpy())


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


# ------------------------------------------------------------------------------------------------- single operations


@pytest.mark.parametrize("name", photometric.OPS)
@pytest.mark.parametrize("level", [0.0, 0.35, 0.9, -0.9, 1.0])
def test_color_operations_are_timms(images, name, level):
    got = photometric.OPS[name](images.clone(), torch.full((len(images),), level))
    arguments = ()
    if to_argument := timm_ops.LEVEL_TO_ARG[name]:
        arguments = to_argument(min(10 * abs(level), 9.99) if "Posterize" in name else 10 * abs(level), {})
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        if name.endswith("Increasing") and name[0] in "CBS" and "Solarize" not in name:  # timm tosses a coin for these
            arguments = (max(0.1, 1 + 0.9 * level),)
    expected = torch.stack([tensor(timm_ops.NAME_TO_OP[name](pil(image), *arguments)) for image in images])
    # Pillow cuts the result to whole numbers, having rounded what it blends with; elsewhere nothing is to round
    tolerances = {"AutoContrast": 1.0, "BrightnessIncreasing": 1.0, "ColorIncreasing": 1.5, "ContrastIncreasing": 1.5}
    tolerance = tolerances.get(name, 1.5 if name == "SharpnessIncreasing" else 0.0)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def test_levels_are_of_each_image(images):
    levels = torch.linspace(-1, 1, len(images))
    for function in photometric.OPS.values():
        together = function(images.clone(), levels)
        alone = torch.cat([function(images[i : i + 1].clone(), levels[i : i + 1]) for i in range(len(images))])
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.0, 0.1, 0.4])
def test_hue_is_torchvisions(images, turn):
    got = photometric.turn_hue(images, torch.full((len(images),), turn))
    torch.testing.assert_close(got, tv.adjust_hue(images / 255, turn) * 255, atol=0.05, rtol=0)
    if turn == 0:
        torch.testing.assert_close(got, images, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", AFFINE_OPS)
@pytest.mark.parametrize("level", [-0.8, 0.6])
def test_affine_operations_are_timms(images, name, level):
    """Inside the image, where the fill does not matter; timm shears about a corner, which is a shift here."""
    theta = affine_matrix(torch.full((len(images), 1), OPS.index(name)), torch.full((len(images), 1), level))
    grid = torch.nn.functional.affine_grid(theta[:, :2], list(images.shape), align_corners=False)
    got = torch.nn.functional.grid_sample(images, grid, align_corners=False, padding_mode="reflection")
    size = images.shape[-1]
    amount = {"Rotate": 30 * level, "ShearX": 0.3 * level, "ShearY": 0.3 * level}.get(name, 0.45 * level)
    for image, result in zip(images[:4], got[:4], strict=True):
        if "Shear" in name:
            shift = -amount * size / 2
            matrix = (1, amount, shift, 0, 1, 0) if name == "ShearX" else (1, 0, 0, amount, 1, shift)
            expected = pil(image).transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
            inside = pil(image * 0 + 255).transform((size, size), Image.Transform.AFFINE, matrix)
        else:
            function = timm_ops.NAME_TO_OP[name]
            expected = function(pil(image), amount, resample=Image.Resampling.BILINEAR, fillcolor=(0, 0, 0))
            inside = function(pil(image * 0 + 255), amount, resample=Image.Resampling.NEAREST, fillcolor=(0, 0, 0))
        kept = torch.nn.functional.avg_pool2d(tensor(inside)[None], 3, 1, 1)[0] == 255  # not at an edge
        assert kept.float().mean() > 0.3
        torch.testing.assert_close(result[kept], tensor(expected)[kept], atol=1.01, rtol=0)


def test_affine_operations_follow_each_other():
    ops = torch.tensor([[OPS.index("Rotate"), OPS.index("TranslateXRel")], [-1, OPS.index("Invert")]])
    level = torch.tensor([[0.5, 0.5], [1.0, 1.0]])
    theta = affine_matrix(ops, level)
    # the image is turned first, then shifted to the left: a place in the result is shifted, then turned
    x, y = 0.45 + 0.3, 0.2
    angle = math.radians(15)
    expected = [math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y, 1.0]
    torch.testing.assert_close(theta[0] @ torch.tensor([0.3, y, 1.0]), torch.tensor(expected))
    assert torch.equal(theta[1], torch.eye(3))


@pytest.mark.parametrize("size", [12, 24, 40])
def test_crops_are_resized_as_pillow_does(images, size):
    """Also as torch's antialiased interpolation, which evaluation uses, where the crop is the whole image."""
    whole = torch.eye(3).repeat(len(images), 1, 1)
    expected = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(resample(images, whole, size), expected, atol=1e-3, rtol=0)
    crops = crop_matrix(Augment(crop_scale=[0.2, 1.0], flip=False), Draws(generator(), len(images)))
    out = resample(images, crops, size)
    for image, crop, result in zip(images, crops, out, strict=True):
        left, right = ((crop[0, 2] + s * crop[0, 0] + 1) * 12 for s in (-1, 1))
        top, bottom = ((crop[1, 2] + s * crop[1, 1] + 1) * 12 for s in (-1, 1))
        box = [float(x.clamp(0, 24)) for x in (left, top, right, bottom)]
        expected = tensor(pil(image).resize((size, size), Image.Resampling.BILINEAR, box=tuple(box)))
        torch.testing.assert_close(result, expected, atol=1.5, rtol=0)  # Pillow rounds after rows and after columns
    mirrored = crops.clone()
    mirrored[:, 0, 0] *= -1
    torch.testing.assert_close(resample(images, mirrored, size), out.flip(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("height", "width", "size"), [(20, 26, 16), (9, 7, 24), (40, 31, 12), (64, 64, 64), (5, 4, 2)])
def test_sums_of_few_pixels_are_the_products(height, width, size, monkeypatch):
    images = torch.rand(6, 3, height, width, generator=generator())
    crops = crop_matrix(Augment(crop_scale=[0.1, 1.0]), Draws(generator(1), 6))
    few = resample(images, crops, size)
    monkeypatch.setattr("etf_zoo.trainer.data.augment.FEW_PIXELS", 0)
    torch.testing.assert_close(few, resample(images, crops, size), rtol=0, atol=1e-5)
    assert few.shape == (6, 3, size, size)


def test_a_crop_made_smaller_has_no_stripes():
    """Stripes of one pixel are gray at half the size, whatever the crop; without antialiasing they would beat."""
    stripes = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 255
    out = augment(stripes, Augment(crop_scale=[0.9, 1.0], crop_ratio=[1.0, 1.0]), 8, generator())
    assert (out - 127.5).abs().max() < 12


def test_warped_crops_are_those_of_one_sampling():
    """Where nothing is made smaller or larger and the image is smooth, two samplings are as good as one."""
    smooth = torch.nn.functional.interpolate(
        torch.rand(30, 3, 3, 3, generator=generator()) * 255, size=(48, 48), mode="bicubic"
    )
    crop = crop_matrix(Augment(crop_scale=[0.4, 0.5], flip=True), Draws(generator(), 30))
    ops, level = torch.arange(30)[:, None] % len(AFFINE_OPS), torch.full((30, 1), 0.4)
    ops[::6] = -1
    out = resample(warp(smooth.clone(), crop, ops, level), crop, 32)
    theta = (crop @ affine_matrix(ops, level))[:, :2]
    grid = torch.nn.functional.affine_grid(theta, [30, 3, 32, 32], align_corners=False)
    once = torch.nn.functional.grid_sample(smooth, grid, padding_mode="reflection", align_corners=False)
    inside = (grid.abs() < 0.9).all(3)[:, None].expand_as(out)
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(out[inside], once[inside], atol=3.0, rtol=0)


def test_drawn_operations():
    ops, level = draw_ops(Augment(randaug_ops=2, randaug_magnitude=7), Draws(generator(), 30_000))
    assert ops.shape == level.shape == (30_000, 2)
    shares = torch.bincount(ops.flatten() + 1) / ops.numel()
    assert shares[0] == pytest.approx(0.5, abs=0.01)  # nothing
    torch.testing.assert_close(shares[1:], torch.full((15,), 0.5 / 15), atol=0.004, rtol=0)
    assert level.abs().mean().item() == pytest.approx(0.7, abs=0.002)
    assert level.abs().std().item() == pytest.approx(0.05, abs=0.002)
    assert (level > 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert set(OPS) == set(timm_ops._RAND_INCREASING_TRANSFORMS)


def test_randaug_does_to_each_image_what_it_drew(images):
    settings = Augment(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip=False, randaug_ops=2)
    many = images.byte().repeat(10, 1, 1, 1)
    out = augment(many, settings, 24, generator())
    draws = Draws(generator(), len(many))  # the same draws once more
    for shape in ((), (), (2,)):
        draws.uniform(0, 1, *shape)
    ops, level = draw_ops(settings, draws)
    for row in range(len(many)):
        expected = many[row : row + 1].float()
        affine = [i for i in range(2) if 0 <= ops[row, i] < len(AFFINE_OPS)]
        if affine:
            continue  # these are compared above
        for i in range(2):
            if ops[row, i] >= 0:
                expected = photometric.OPS[OPS[ops[row, i]]](expected, level[row, i : i + 1])
        torch.testing.assert_close(out[row : row + 1], expected, atol=0.05, rtol=0)
    assert bool(((out >= 0) & (out <= 255)).all())


# ------------------------------------------------------------------------------------------------------------ jitter


def test_jitter_is_torchvisions_in_its_order(images):
    strengths = [0.4, 0.3, 0.2, 0.1]
    got = jitter(images.clone(), strengths, Draws(generator(), len(images)))
    draws = Draws(generator(), len(images))
    factors = [draws.uniform(1 - s, 1 + s) for s in strengths[:3]] + [draws.uniform(-0.1, 0.1)]
    for i, image in enumerate(images):
        expected = image / 255
        for function, values in zip(
            (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue), factors, strict=True
        ):
            expected = function(expected, values[i].item())
        torch.testing.assert_close(got[i], expected * 255, atol=0.2, rtol=0)
    assert float((got - images).abs().mean()) > 5


def test_no_strength_no_change(images):
    out = augment(images.byte(), Augment(**{**vars(STILL), "color_jitter": [0.0, 0.0, 0.0, 0.0]}), 24, generator())
    torch.testing.assert_close(out, images, atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------------------- erasing and mixing


def test_erased_rectangles():
    images = torch.ones(4000, 2, 32, 32)
    out = erase(images, 0.25, generator())
    assert bool((images == 1).all())
    gone = out[:, 0] == 0
    assert torch.equal(gone, out[:, 1] == 0)
    area = gone.flatten(1).float().mean(1)
    hit = area > 0
    assert hit.float().mean().item() == pytest.approx(0.25, abs=0.03)
    rows, columns = gone.any(2).sum(1), gone.any(1).sum(1)
    assert torch.equal(rows * columns, gone.flatten(1).sum(1))  # rectangles
    assert area[hit].min() >= 0.01
    assert area[hit].max() <= 0.37  # by rounding of sides
    assert area[hit].mean().item() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    ratio = rows[hit] / columns[hit]
    assert 0.15 < ratio.min() < 0.5 < 2 < ratio.max() < 7
    assert gone.float().mean(0)[16, 16] > gone.float().mean(0)[0, 0] > 0  # everywhere
    assert torch.equal(erase(images, 0.0, generator()), images)
    assert bool((erase(images, 1.0, generator()) == 0).flatten(1).any(1).all())


def test_boxes_count_from_the_top_left():
    box = boxes(*(torch.tensor([i]) for i in (1, 3, 0, 2)), torch.zeros(1, 3, 4, 5))
    assert box.shape == (1, 1, 4, 5)
    assert box[0, 0].nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]


@pytest.mark.parametrize("settings", [Augment(mixup=0.4), Augment(cutmix=1.0), Augment(mixup=0.4, cutmix=1.0)])
def test_targets_are_the_shares_of_the_pixels(settings):
    """An image of class k is filled with k: its mean says how much of which it holds."""
    batch = 64
    labels = torch.arange(batch)
    images = torch.nn.functional.one_hot(labels, batch).float()[:, :, None, None].expand(batch, batch, 16, 16)
    mixed, targets = mix(images, labels, batch, settings, generator())
    torch.testing.assert_close(mixed.mean((2, 3)), targets, atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(batch))
    assert bool((targets[labels, labels] + targets[labels, labels.roll(1)] > 1 - 1e-5).all())  # itself and the previous
    assert len(targets.max(1).values.unique()) > batch / 3  # each its own share
    blended = ((mixed > 1e-3) & (mixed < 1 - 1e-3)).flatten(1).any(1)
    if not settings.mixup:
        assert not blended.any()
    elif settings.cutmix:
        assert 0.2 < blended.float().mean() < 0.7
    else:
        assert blended.float().mean() > 0.5


def test_mixing_knows_its_limits():
    images, labels = torch.randn(8, 3, 6, 6), torch.arange(8) % 3
    for settings in (Augment(), Augment(mixup=1.0, cutmix=1.0, mix_prob=0.0)):
        assert not settings.mixes
        mixed, targets = mix(images, labels, 3, settings, generator())
        assert torch.equal(mixed, images)
        assert torch.equal(targets, torch.nn.functional.one_hot(labels, 3).float())
    # a huge alpha halves, a tiny one takes the one or the other
    _, targets = mix(images, torch.arange(8), 8, Augment(mixup=1e6), generator())
    torch.testing.assert_close(targets.max(1).values, torch.full((8,), 0.5), atol=0.01, rtol=0)
    mixed, targets = mix(images, torch.arange(8), 8, Augment(mixup=1e-6), generator())
    assert bool(((targets < 1e-6) | (targets > 1 - 1e-6)).all())
    torch.testing.assert_close(mixed, images[targets.argmax(1)], atol=1e-4, rtol=0)


def test_half_are_mixed():
    _, targets = mix(
        torch.zeros(2000, 1, 4, 4), torch.arange(2000), 2000, Augment(mixup=1.0, mix_prob=0.5), generator()
    )
    assert (targets.max(1).values < 1).float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_a_share_of_the_batch_gets_what_the_batch_would(images):
    settings = Augment(randaug_ops=2)
    whole = erase(augment(images.byte(), settings, 16, generator()), 0.5, generator(1))
    for rank in range(2):
        half = augment(images.byte()[rank::2], settings, 16, generator(), rank=rank, world=2)
        half = erase(half, 0.5, generator(1), rank=rank, world=2)
        torch.testing.assert_close(half, whole[rank::2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_scale": [0.5]}, r"crop_scale takes \[smallest, largest\], 0 < smallest <= largest <= 1, got \[0.5\]"),
        ({"crop_scale": [0.5, 1.5]}, "crop_scale"),
        ({"crop_ratio": [2.0, 0.5]}, "crop_ratio"),
        ({"color_jitter": [0.4]}, r"\[brightness, contrast, saturation, hue\]"),
        ({"color_jitter": [0.4, 0.4, 0.4, 0.6]}, "at most 0.5"),
        ({"color_jitter": [0.4, 0.4, 0.4, 0.1], "randaug_ops": 2}, "Set one"),
        ({"randaug_magnitude": 11}, r"randaug_magnitude .* in \[0, 10\], got 11"),
        ({"erase": 1.5}, r"augment.erase .* in \[0, 1\], got 1.5"),
        ({"mixup": -1.0}, "0 for none"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(ValueError, match=message):
        Augment(**values)
