"""Training of segmentation on made scenes: data, augmentation, loss, a run that is resumed, its folder."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from etf_zoo.errors import EtfZooError
from etf_zoo.losses import CenterCollapseLoss
from etf_zoo.segmentation import Segmenter, load_segmenter, with_legend
from etf_zoo.trainer.recipe.config import Augment, Data, Loss
from etf_zoo.trainer.segment.data import augment_pairs, eval_pairs, load_masks, train_pairs
from etf_zoo.trainer.segment.objective import PixelObjective, masks_at, pixel_cross_entropy
from etf_zoo.trainer.segment.recipe import Segmentation
from etf_zoo.trainer.segment.run import SegmentationRun, export, measure_masks

NAMES = ["ground", "box", "dot"]
COLORS = np.array([[30, 60, 30], [200, 40, 40], [40, 40, 220]], np.uint8)


def scene(seed, height=40, width=56):
    """A box and a small dot on the ground, and a strip that nobody labelled."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    y, x = rng.integers(2, height - 18), rng.integers(2, width - 22)
    mask[y : y + 14, x : x + 18] = 1
    y, x = rng.integers(0, height - 5), rng.integers(0, width - 5)
    mask[y : y + 4, x : x + 4] = 2
    image = np.clip(COLORS[mask] + rng.integers(-9, 9, (height, width, 3)), 0, 255).astype(np.uint8)
    mask[:2] = 255
    return image, mask


def encoded(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def write(folder, **splits):
    import datasets

    for name, pairs in splits.items():
        images, masks = zip(*pairs, strict=True)
        columns = {"image": [encoded(i) for i in images], "mask": [encoded(m) for m in masks]}
        features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return write(folder, train=[scene(i) for i in range(12)], validation=[scene(i) for i in range(100, 105)])


@pytest.fixture
def recipe(data, tmp_path):
    return Segmentation(
        output=str(tmp_path / "run"),
        model="test_efficientnet",
        pretrained=False,
        decoder="linknet",
        image_size=[40, 56],
        class_names=NAMES,
        data=Data(str(data), label_column="mask"),
        batch_size=4,
        epochs=2,
        tensorboard=False,
        pictures=2,
    )


# -------------------- data


def test_a_split_is_decoded_as_it_is(recipe):
    split = load_masks(recipe, "train")
    image, mask = scene(3)
    assert np.array_equal(split.images[3], image)
    assert np.array_equal(split.masks[3], mask)
    counted = [sum(int((scene(i)[1] == k).sum()) for i in range(12)) for k in range(3)]
    assert split.class_counts() == counted
    assert split.subset(np.array([3])).digest != split.digest


def test_masks_are_resized_without_new_numbers(recipe):
    split = load_masks(dataclasses.replace(recipe, image_size=[20, 28]), "train")
    assert split.images.shape == (12, 20, 28, 3)
    assert set(np.unique(split.masks)) == {0, 1, 2, 255}


def test_image_and_mask_move_together():
    pairs = [scene(i) for i in range(8)]
    masks = torch.from_numpy(np.stack([m for _, m in pairs]))
    images = masks[:, None].expand(-1, 3, -1, -1)  # an image that is its own mask
    settings = Augment(crop_scale=[0.3, 1.0])
    out, moved = augment_pairs(images, masks, settings, torch.Generator().manual_seed(1))
    assert out.shape == images.shape
    assert set(moved.unique().tolist()) <= {0, 1, 2, 255}
    assert not torch.equal(moved, masks.long())
    low, high = (sign * F.max_pool2d(sign * moved[:, None].float(), 7, 1, 3)[:, 0] for sign in (-1, 1))
    inside = low == high  # away from edges of classes, and of the crop, beyond which interpolation sees
    inside[:, :3], inside[:, -3:], inside[..., :3], inside[..., -3:] = False, False, False, False
    assert inside.float().mean() > 0.3
    assert torch.allclose(out[:, 0][inside], moved[inside].float(), atol=1e-3)


def test_augmentation_can_be_nothing_and_shares_of_processes_make_the_batch():
    images, masks = (torch.from_numpy(np.stack(part)) for part in zip(*[scene(i) for i in range(4)], strict=True))
    images = images.permute(0, 3, 1, 2)
    off = Augment(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip=False)
    out, same = augment_pairs(images, masks, off, torch.Generator().manual_seed(1))
    assert torch.allclose(out, images.float(), atol=1e-2)
    assert torch.equal(same, masks.long())
    on = Augment(color_jitter=[0.3, 0.3, 0.3, 0.1])
    whole = augment_pairs(images, masks, on, torch.Generator().manual_seed(2))
    for rank in (0, 1):
        part = augment_pairs(images[rank::2], masks[rank::2], on, torch.Generator().manual_seed(2), rank=rank, world=2)
        assert torch.allclose(part[0], whole[0][rank::2], atol=1e-3)
        assert torch.equal(part[1], whole[1][rank::2])


def test_batches_of_an_epoch_and_of_an_evaluation(recipe):
    split = load_masks(recipe, "train")
    first = [masks for _, masks in train_pairs(split, recipe, 0)]
    assert [len(masks) for masks in first] == [4, 4, 4]
    assert torch.equal(next(train_pairs(split, recipe, 0, start=2))[1], first[2])
    assert not torch.equal(next(train_pairs(split, recipe, 1))[1], first[0])
    shares = [sum(len(m) for _, m in eval_pairs(split, 3, rank=rank, world=5)) for rank in range(5)]
    assert shares == [3, 3, 2, 2, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_names": ["a", "b"]}, "number 2, which is neither"),
        ({"data": {"image_column": "photo"}}, "no column 'photo', but image, mask"),
        ({"data": {"train_split": "tests"}}, "Cannot read the split 'tests'"),
    ],
)
def test_data_that_do_not_fit(recipe, change, words):
    if "data" in change:
        change = {"data": dataclasses.replace(recipe.data, **change["data"])}
    other = dataclasses.replace(recipe, **change)
    with pytest.raises(EtfZooError, match=words):
        load_masks(other, other.data.train_split)


def test_image_and_mask_of_two_sizes(recipe, tmp_path):
    (tmp_path / "odd").mkdir()
    folder = write(tmp_path / "odd", train=[(scene(0)[0], scene(0, height=30)[1])])
    other = dataclasses.replace(recipe, data=Data(str(folder), label_column="mask"))
    with pytest.raises(EtfZooError, match=r"Row 0 of train: the image has .* pixels and its mask"):
        load_masks(other, "train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_names": []}, "class_names"),
        ({"class_names": ["a", "a"]}, "differ"),
        ({"loss": Loss("squared")}, "cross_entropy"),
        ({"augment": Augment(mixup=0.2)}, "whole images"),
        ({"augment": Augment(erase=0.2)}, "no masks"),
        ({"compile": True}, "classifiers"),
        ({"head": "random"}, "head"),
        ({"image_size": [3]}, "height, width"),
    ],
)
def test_recipes_that_do_not_fit(recipe, change, words):
    with pytest.raises(EtfZooError, match=words):
        dataclasses.replace(recipe, **change)


# -------------------- loss


def test_cross_entropy_of_pixels_beside_a_loop():
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    masks = torch.randint(3, (2, 4, 5))
    masks[0, 0] = 255
    weights = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    total, count = 0.0, 0
    for b in range(2):
        for y in range(4):
            for x in range(5):
                if (label := int(masks[b, y, x])) != 255:
                    row = logits[b, :, y, x]
                    total += (weights[label] * (row.exp().sum().log() - row[label])).item()
                    count += 1
    value = pixel_cross_entropy(logits, masks, weights, ignore_index=255)
    assert value.item() == pytest.approx(total / count)
    assert pixel_cross_entropy(logits, torch.full_like(masks, 255), None, ignore_index=255).item() == 0
    loss = torch.autograd.gradcheck(lambda z: pixel_cross_entropy(z, masks, weights, ignore_index=255), (logits,))
    assert loss


def test_masks_at_the_features_pixels():
    masks = torch.arange(40 * 56).view(1, 40, 56)
    small = masks_at(torch.randn(1, 8, 16, 16), masks, 254)  # padded to 64 x 64, stride 4
    assert small.shape == (1, 16, 16)
    assert torch.equal(small[:, :10, :14], masks[:, 2::4, 2::4])
    assert bool((small[:, 10:] == 254).all())
    assert bool((small[..., 14:] == 254).all())


def test_the_objective_adds_center_collapse_with_its_weight(recipe):
    model = Segmenter("test_efficientnet", 3, head="learned", decoder="linknet").eval()
    pixels, masks = next(eval_pairs(load_masks(recipe, "train"), 4))
    images, counts = model.normalize(pixels), [900, 90, 10]
    plain = PixelObjective(recipe, model, counts)
    collapsing = PixelObjective(dataclasses.replace(recipe, center_collapse=0.3), model, counts)
    right, loss = plain(model, images, masks)
    features = model.decode(images)
    s = 64 // features.shape[-1]
    small = masks[:, s // 2 :: s, s // 2 :: s]
    cut = features[..., : small.shape[1], : small.shape[2]]  # without what was padded
    expected = CenterCollapseLoss()(cut, small, collapsing.frame)
    assert collapsing(model, images, masks)[1].item() == pytest.approx((loss + 0.3 * expected).item(), rel=1e-5)
    hits = (model(images).argmax(1) == masks) & (masks != 255)
    share = [float(h.sum()) / float((m != 255).sum()) for h, m in zip(hits, masks, strict=True)]
    assert right.tolist() == pytest.approx(share)
    assert not any("frame" in name for name in model.state_dict())  # of training alone


def test_weights_and_logit_adjustment_go_by_pixels(recipe):
    model = Segmenter("test_efficientnet", 3, head="learned", decoder="linknet").eval()
    pixels, masks = next(eval_pairs(load_masks(recipe, "train"), 2))
    images, counts = model.normalize(pixels), [900, 90, 10]
    logits = model(images)
    weighted = PixelObjective(dataclasses.replace(recipe, loss=Loss(class_weights=True)), model, counts)
    weights = torch.tensor([1000 / (3 * n) for n in counts])
    wanted = pixel_cross_entropy(logits, masks, weights, ignore_index=255)
    assert weighted(model, images, masks)[1].item() == pytest.approx(wanted.item(), rel=1e-5)
    adjusted = PixelObjective(dataclasses.replace(recipe, loss=Loss(logit_adjustment=1.0)), model, counts)
    shifted = logits + torch.tensor([math.log(n / 1000) for n in counts])[:, None, None]
    wanted = pixel_cross_entropy(shifted, masks, None, ignore_index=255)
    assert adjusted(model, images, masks)[1].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_arguments_that_a_loss_does_not_take(recipe):
    model = Segmenter("test_efficientnet", 3, decoder="linknet")
    for change in ({"center_collapse": 1.0, "center_collapse_args": {"x": 1}}, {"center_collapse_args": {"x": 1}}):
        with pytest.raises(EtfZooError, match="center_collapse"):
            PixelObjective(dataclasses.replace(recipe, **change), model, [1, 1, 1])


# -------------------- run


def weights_of(run):
    return {name: value.clone() for name, value in run.trained_model().state_dict().items()}


def test_a_run_learns_and_its_folder_gives_the_measured_model(recipe, tmp_path):
    long = dataclasses.replace(recipe, epochs=8, head="frame", optim=dataclasses.replace(recipe.optim, lr=5e-3))
    run = SegmentationRun(long)
    before = run.evaluate()
    assert run.fit()
    metrics = export(run)
    figures = metrics["results"]
    assert figures["loss"] < before["loss"]
    assert figures["accuracy"] > 70
    assert set(figures) >= {"miou", "iou_dot", "rare_iou", "images"}
    stored, config = load_segmenter(run.folder / "model")
    again = measure_masks(stored, load_masks(long, "validation"), run.accelerator, batch_size=2)
    assert again["miou"] == pytest.approx(figures["miou"])
    assert config["label_names"] == NAMES
    assert json.loads((run.folder / "model" / "metrics.json").read_text())["training"]["steps"] == 24
    with Image.open(run.folder / "predictions.png") as shown:
        bare = Image.new("RGB", (3 * 56, 2 * 40))
        assert shown.size == with_legend(bare, [(name, (0, 0, 0)) for name in NAMES]).size


def test_a_stopped_run_goes_on_bit_for_bit(recipe, tmp_path):
    whole = SegmentationRun(dataclasses.replace(recipe, center_collapse=0.1))
    assert whole.fit()
    stopped = dataclasses.replace(recipe, center_collapse=0.1, output=str(tmp_path / "b"), time_budget="0s")
    assert not SegmentationRun(stopped).fit()
    resumed = SegmentationRun(dataclasses.replace(stopped, time_budget="", resume=True))
    assert 0 < resumed.step < 6
    assert resumed.fit()
    theirs = weights_of(resumed)
    assert all(torch.equal(value, theirs[name]) for name, value in weights_of(whole).items())
