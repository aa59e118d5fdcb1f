"""Photographs in memory: timm's pixels in evaluation, crops of larger images, and when they stay encoded."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from etf_zoo.trainer.data import photos
from etf_zoo.trainer.data.batches import (
    Rows,
    Split,
    eval_batches,
    limited_rows,
    load_split,
    train_batches,
    view_batches,
)
from etf_zoo.trainer.data.photos import Photos
from etf_zoo.trainer.recipe.config import Augment, Data, Optim, Recipe
from etf_zoo.trainer.run.run import Run
from tests.made_data import write_parquet

SIZE = 132  # `auto` stores up to 128 as they are seen
SHAPES = [(150, 201), (199, 140), (97, 131), (160, 160), (300, 141), (143, 300), (138, 151)]  # as photographs come
STILL = Augment(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip=False)
AS_IS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def photo(number):
    """Waves with an edge and some noise, of a shape that depends on the number."""
    (width, height), rng = SHAPES[number % len(SHAPES)], np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 80 * np.sin(x / rng.uniform(5, 20) + number) * np.cos(y / rng.uniform(5, 20)) for _ in range(3)]
    pixels = np.stack(waves, 2) + 30 * (x > y)[..., None] + rng.normal(0, 2, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(autouse=True)
def source(tmp_path, monkeypatch):
    """Seven photographs to train on, seven to validate on."""
    monkeypatch.setenv("ETF_ZOO_DATA", str(tmp_path))
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache"))
    for split, start in (("train", 0), ("val", 7)):
        for number in range(start, start + 7):
            file = tmp_path / "made" / split / "ab"[number % 2] / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            photo(number).save(file)
    return tmp_path / "made"


def load(split="train", **settings):
    return load_split(Data("made", **{"size": SIZE, "crop_pct": 0.9, **settings}), split)


def opened(split):
    """The photographs of a split, in its order."""
    return [Image.open(io.BytesIO(split.encoded(row))) for row in range(len(split))]


def pixels(batches):
    return torch.cat([images for images, _ in batches])


def entries(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").glob("made-*"))


@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
@pytest.mark.parametrize("name", ["train", "val"])
def test_evaluation_has_the_pixels_of_timms_transform(name, crop_pct):
    split = load(name, crop_pct=crop_pct)
    assert isinstance(split, Photos)
    for size in (SIZE, 96):
        transform = create_transform(size, is_training=False, crop_pct=crop_pct, interpolation="bicubic", **AS_IS)
        wanted = torch.stack([transform(image) for image in opened(split)])
        colors = photos_colors()
        found = pixels(eval_batches(split, size=size, batch_size=3, colors=colors))
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)  # both count in 255ths
        shares = [pixels(eval_batches(split, size=size, batch_size=3, rank=r, world=2, colors=colors)) for r in (0, 1)]
        assert torch.equal(shares[0], found[::2])
        assert torch.equal(shares[1], found[1::2])
        part = split.subset(np.array([5, 2]))
        assert torch.equal(pixels(eval_batches(part, size=size, batch_size=3, colors=colors)), found[[5, 2]])
        (view,) = view_batches(split, Augment(), size=size, batch_size=7, seed=0, view=0, colors=colors)
        assert torch.equal(view, found)


def photos_colors():
    from etf_zoo.trainer.data.augment import Colors

    return Colors(AS_IS["mean"], AS_IS["std"])


def test_parquet_files_do_as_folders_do(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    write_parquet(tmp_path / "rows", {"train": [0, 1, 0, 1, 1]}, names=["x", "y"], shards=2, size=(150, 140))
    own, encoded = (load_split(Data("rows", size=SIZE, resident=r), "train") for r in ("auto", False))
    assert isinstance(own, Photos)
    for rows in (np.arange(5), np.array([4, 1, 3]), np.array([3]), np.arange(0)):
        look = {"size": SIZE, "batch_size": 2}
        batches = [list(eval_batches(split.subset(rows), **look)) for split in (own, encoded)]
        for (x, y), (wanted, labels) in zip(*batches, strict=True):
            assert torch.equal(x, wanted)
            assert torch.equal(y, labels)


def test_training_crops_are_drawn_from_the_center_square_at_its_larger_size():
    split = load()
    transform = create_transform(152, is_training=False, crop_pct=1.0, interpolation="bicubic", **AS_IS)
    wanted = torch.stack([transform(image) for image in opened(split)])  # 1.15 times 132
    batches = list(train_batches(split, STILL, size=152, batch_size=7, seed=1, epoch=0, colors=photos_colors()))
    ((images, labels),) = batches
    order = limited_rows(7, 0, 1)[np.random.default_rng([1, 1, 0]).permutation(7)]
    torch.testing.assert_close(images, wanted[order], atol=1e-5, rtol=0)
    assert torch.equal(labels, torch.from_numpy(split.labels[order]))
    smaller = next(train_batches(split, STILL, size=SIZE, batch_size=7, seed=1, epoch=0, colors=photos_colors()))[0]
    other = create_transform(SIZE, is_training=False, crop_pct=1.0, interpolation="bicubic", **AS_IS)
    exact = torch.stack([other(image) for image in opened(split)])[order]
    assert (smaller - exact).abs().mean() < 0.01  # resampled twice, and linearly
    (view,) = view_batches(split, STILL, size=152, batch_size=7, seed=0, view=1, colors=photos_colors())
    torch.testing.assert_close(view, wanted, atol=1e-5, rtol=0)


def test_augmentation_is_that_of_arrays_in_memory():
    """A crop depends on seed, epoch and step alone; processes see together what one sees."""
    split, settings = load(), Augment(color_jitter=[0.4, 0.4, 0.4, 0.1])
    array = Split(np.asarray(split._stored(152, 1.0)[0].images), split.labels, split.label_names, "made")

    def batches(images, **share):
        return list(train_batches(images, settings, size=SIZE, batch_size=2, seed=0, epoch=1, **share))

    for (x, y), (other, labels) in zip(batches(split), batches(array), strict=True):
        assert torch.equal(x, other)
        assert torch.equal(y, labels)
    assert torch.equal(batches(split, start=2)[0][0], batches(split)[2][0])
    halves = zip(batches(split, rank=0, world=2), batches(split, rank=1, world=2), strict=True)
    for (whole, _), parts in zip(batches(split), halves, strict=True):
        torch.testing.assert_close(torch.cat([x for x, _ in parts]), whole)
    several = Augment(large_views=2)
    (groups, _) = next(train_batches(split, several, size=SIZE, batch_size=2, seed=0, epoch=0))
    assert groups[0].shape == (2, 2, 3, SIZE, SIZE)


def test_they_are_decoded_once(tmp_path, monkeypatch):
    def look(split):
        list(train_batches(split, STILL, size=SIZE, batch_size=2, seed=0, epoch=0))
        list(eval_batches(split, size=SIZE, batch_size=4))

    split = load()
    assert entries(tmp_path) == []  # not before they are needed
    look(split)
    assert len(entries(tmp_path)) == 2
    look(split.subset(np.arange(4)))
    assert len(entries(tmp_path)) == 2  # half of a split shares what the whole has
    look(split.subset(np.array([1, 6])))
    assert len(entries(tmp_path)) == 4  # two images are no reason to decode a large split
    monkeypatch.setattr("etf_zoo.trainer.data.resident.write_prepared", lambda *a: pytest.fail("decoded again"))
    look(load())
    look(load().subset(np.array([1, 6])))


def test_those_that_take_too_much_memory_or_disk_stay_encoded(tmp_path, monkeypatch, capsys):
    for name, side, limit, fits in (("train", 152, 0, 7), ("train", 152, 3, 3), ("val", SIZE, 0, 7)):
        needed = fits * 3 * side * side
        monkeypatch.setattr(photos, "memory", lambda needed=needed: 4 * needed)
        assert isinstance(load(name, limit=limit), Photos)
        said = capsys.readouterr().err
        assert f"{fits} images decoded at {side} pixels take {needed / 1e6:.0f} MB (allowed: " in said
        monkeypatch.setattr(photos, "memory", lambda needed=needed: 4 * needed - 1)
        assert type(load(name, limit=limit)) is Rows
        assert "Worker processes decode them in each epoch." in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("ETF_ZOO_DATA", str(tmp_path))
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache" / "deeper"))
    assert isinstance(load(), Photos)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 100})())
    assert type(load()) is Rows
    assert "disk with room for 0" in capsys.readouterr().err
    assert type(load(resident=False)) is Rows
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "1")
    load()
    assert capsys.readouterr().err == ""  # one process of several speaks


def test_memory_of_a_container(monkeypatch):
    machine = photos.memory()
    for text, found in (("1000000", 1_000_000), ("max", machine)):
        monkeypatch.setattr("pathlib.Path.read_text", lambda _, text=text: text)
        assert photos.memory() == found


@pytest.mark.filterwarnings("ignore:.*They are left out")
def test_unreadable_images_are_left_out(source):
    (source / "train" / "a" / "02.png").write_bytes(b"no image")
    whole = load(max_corrupt=0.3)
    order = whole.labels.tolist(), [i for i in range(7) if whole.where(i).endswith("02.png")]
    for split in (whole, whole.subset(np.arange(7)[::-1]), whole.subset(np.array([*order[1], 3]))):
        found = torch.cat([y for _, y in eval_batches(split, size=SIZE, batch_size=3)])
        kept = split.readable()
        assert len(kept) == len(split) - 1
        assert found.tolist() == split.labels[kept].tolist()
        seen = [len(y) for _, y in train_batches(split, STILL, size=SIZE, batch_size=len(split), seed=0, epoch=0)]
        assert seen == [len(split) - 1]
    with pytest.raises(ValueError, match=r"None of a batch's images"):
        list(train_batches(whole, STILL, size=SIZE, batch_size=1, seed=0, epoch=0))
    with pytest.raises(ValueError, match=r"1 of 7 images .* mend or remove them"):
        list(eval_batches(load(max_corrupt=0.1), size=SIZE, batch_size=3))


def test_a_run_measures_what_it_would_with_workers(tmp_path):
    def losses(resident):
        data = Data("made", val_split="val", size=SIZE, resident=resident, crop_pct=0.9)
        recipe = Recipe(
            output=str(tmp_path / str(resident)),
            model="test_resnet_etf",
            data=data,
            optim=Optim(name="sgd", lr=0.01, warmup_epochs=0),
            epochs=1,
            batch_size=4,
            sizes=[[0, SIZE]],
            tensorboard=False,
        )
        run = Run(recipe)
        before = run.evaluate()
        assert run.fit()
        return [{k: v for k, v in found.items() if k != "images_per_second"} for found in (before, run.evaluate())]

    (before, after), (wanted, _) = losses("auto"), losses(False)
    assert before == pytest.approx(wanted)
    assert after["loss"] != before["loss"]
