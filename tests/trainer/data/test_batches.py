"""Resident images and batch augmentation."""

import numpy as np
import pytest
import torch
from PIL import Image

from etf_zoo.trainer.data.augment import IMAGENET
from etf_zoo.trainer.data.batches import Split, augment, eval_batches, load_split, normalize, train_batches
from etf_zoo.trainer.recipe.config import Augment, Data

STILL = Augment(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip=False)


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def split():
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8), np.arange(50) % 7, list("abcdefg"), "made up")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_whole_crop_without_flip_is_the_image(images):
    torch.testing.assert_close(augment(images, STILL, 16, generator()), images.float(), atol=1e-3, rtol=0)


def test_flip_mirrors_about_half(images):
    settings = Augment(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip=True)
    many = images.repeat(50, 1, 1, 1)
    out = augment(many, settings, 16, generator())
    same = (out - many.float()).abs().amax(dim=(1, 2, 3)) < 1e-2
    mirrored = (out - many.flip(-1).float()).abs().amax(dim=(1, 2, 3)) < 1e-2
    assert bool((same ^ mirrored).all())
    assert 100 < int(mirrored.sum()) < 200


def test_crop_is_a_part_of_the_image():
    # a ramp keeps its order under cropping, and a crop of a quarter of the area spans half of the ramp's range
    ramp = torch.arange(64, dtype=torch.float32).mul(4).to(torch.uint8).expand(8, 3, 64, 64)
    settings = Augment(crop_scale=[0.25, 0.25], crop_ratio=[1.0, 1.0], flip=False)
    out = augment(ramp, settings, 32, generator())
    assert bool((out.diff(dim=-1) > 0).all())
    spans = out[:, 0, 0, -1] - out[:, 0, 0, 0]
    torch.testing.assert_close(spans, torch.full((8,), 4 * 31.0), atol=1, rtol=0)
    assert len(out[:, 0, 0, 0].unique()) > 1


def test_epoch_sees_every_image_once_and_ranks_share_the_batches(split):
    def labels(**kwargs):
        batches = train_batches(split, STILL, size=8, batch_size=10, seed=1, epoch=2, **kwargs)
        return [b for _, b in batches]

    whole = labels()
    assert len(whole) == 5
    assert sorted(torch.cat(whole).tolist()) == sorted(split.labels.tolist())
    for step, parts in enumerate(zip(labels(rank=0, world=2), labels(rank=1, world=2), strict=True)):
        assert torch.equal(torch.stack(parts, dim=1).flatten(), whole[step])
    assert torch.equal(torch.cat(labels(start=3)), torch.cat(whole[3:]))  # a resumed epoch goes on where it stopped
    assert len(labels(limit=25)) == 2


def test_same_step_same_augmentation(split):
    settings = Augment()
    first = [x for x, _ in train_batches(split, settings, size=12, batch_size=10, seed=1, epoch=0)]
    again = [x for x, _ in train_batches(split, settings, size=12, batch_size=10, seed=1, epoch=0, start=2)]
    other = [x for x, _ in train_batches(split, settings, size=12, batch_size=10, seed=1, epoch=1)]
    assert torch.equal(first[2], again[0])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (10, 3, 12, 12)


def test_processes_see_together_what_one_sees(split):
    whole, *shares = (
        [x for x, _ in train_batches(split, Augment(), size=12, batch_size=10, seed=1, epoch=0, rank=r, world=w)]
        for r, w in ((0, 1), (0, 2), (1, 2))
    )
    for images, *parts in zip(whole, *shares, strict=True):
        torch.testing.assert_close(torch.stack(parts, dim=1).flatten(0, 1), images)


def test_evaluation_drops_and_doubles_nothing(split):
    got = [torch.cat([y for _, y in eval_batches(split, size=8, batch_size=9, rank=r, world=3)]) for r in range(3)]
    assert [len(g) for g in got] == [17, 17, 16]
    assert sorted(torch.cat(got).tolist()) == sorted(split.labels.tolist())
    x, _ = next(eval_batches(split, size=8, batch_size=50))
    expected = normalize(torch.from_numpy(split.images).permute(0, 3, 1, 2).float())
    torch.testing.assert_close(x, expected)
    assert next(eval_batches(split, size=16, batch_size=4))[0].shape == (4, 3, 16, 16)


def test_colors_are_the_same_in_any_layout():
    images = torch.rand(2, 3, 5, 7) * 255
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    wanted = (images / 255 - mean) / std
    for given in (images, images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT):
        found = normalize(given)
        torch.testing.assert_close(found, wanted)
        assert torch.equal(found, normalize(images))
        assert found.stride() == given.stride()


def test_digits():
    train, test = (load_split(Data("digits", size=8), name) for name in ("train", "test"))
    assert (len(train), len(test)) == (1347, 450)
    assert train.images.shape == (1347, 8, 8, 3)
    with pytest.raises(ValueError, match="train and test"):
        load_split(Data("digits"), "validation")


# ------------------------------------------------------------------------------------------------- through datasets


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A parquet data set in $ETF_ZOO_DATA, images of different shapes."""
    import datasets

    monkeypatch.setenv("ETF_ZOO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    rows = {
        "image": [Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)) for i in range(5)],
        "label": [0, 1, 2, 1, 0],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    (tmp_path / "data" / "made").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "made" / "train.parquet")
    return rows


def test_parquet_by_name_is_decoded_once(source, monkeypatch):
    split = load_split(Data("made", size=16), "train")
    assert split.images.shape == (5, 16, 16, 3)
    assert split.labels.tolist() == [0, 1, 2, 1, 0]
    assert split.label_names == ["x", "y", "z"]
    full = np.asarray(source["image"][0].resize((24, 16), Image.Resampling.BICUBIC))  # 30 x 20, short side to 16
    assert np.array_equal(split.images[0], full[:, 4:20])
    monkeypatch.setattr("etf_zoo.trainer.data.resident.write_prepared", lambda *a: pytest.fail("decoded again"))
    assert np.array_equal(load_split(Data("made", size=16), "train").images, split.images)


@pytest.mark.parametrize(
    ("data", "split", "message"),
    [
        (Data("made", image_column="picture"), "train", "no column 'picture' but image, label"),
        (Data("made", label_column="class"), "train", "no column 'class'"),
        (Data("made"), "validation", "Cannot load split 'validation'"),
        (Data("nowhere/to-be-found"), "train", "Cannot load split 'train' of 'nowhere/to-be-found'"),
        (Data(), "train", "No data"),
    ],
)
def test_wrong_sources(source, data, split, message):
    with pytest.raises(ValueError, match=message):
        load_split(data, split)
