"""Images that are not resident, from rows and from streams: order, randomness, resuming, and what cannot be read."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from etf_zoo.trainer.data import loader
from etf_zoo.trainer.data.augment import IMAGENET
from etf_zoo.trainer.data.batches import eval_batches, load_split, train_batches
from etf_zoo.trainer.recipe.config import Augment, Data
from tests.made_data import numbers, write_folder, write_parquet

STILL = Augment(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip=False)
STRONG = Augment(randaug_ops=2, randaug_magnitude=9, erase=0.3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    # newer versions wait so long each time that a stream is closed
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def which(batches):
    """Numbers of the pictures, batch by batch."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET)
    return [numbers((x * std + mean) * 255) for x, _ in batches]


def flat(batches):
    return [number for batch in batches for number in batch]


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "made", {"train": {"a": range(10), "b": range(10, 23)}, "val": {"a": [0, 2], "b": [1]}})
    return tmp_path / "made"


@pytest.fixture
def rows(folder):
    return load_split(Data(str(folder), resident=False, workers=0), "train")


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_come_as_resident_images_do(folder, workers, monkeypatch, tmp_path):
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache"))
    splits = [load_split(Data(str(folder), resident=r, size=16, workers=workers), "train") for r in (False, True)]
    for arguments in (
        {"epoch": 1},
        {"epoch": 1, "start": 2},
        {"epoch": 1, "rank": 1, "world": 2},
        {"epoch": 0, "limit": 9},
    ):
        got, expected = (
            which(train_batches(split, STILL, size=16, batch_size=4, seed=3, **arguments)) for split in splits
        )
        assert got == expected
        assert len(got) in (5, 3, 2)
    for world in (1, 2):
        got, expected = (
            [which(eval_batches(split, size=16, batch_size=4, rank=r, world=world)) for r in range(world)]
            for split in splits
        )
        assert got == expected
    x, y = next(eval_batches(splits[0], size=16, batch_size=30))
    assert (x.shape, x.dtype, y.tolist()) == ((23, 3, 16, 16), torch.float32, splits[0].labels.tolist())


def test_randomness_is_of_the_epoch_and_the_row(rows):
    def batches(**arguments):
        return [x for x, _ in train_batches(rows, STRONG, size=16, batch_size=6, seed=3, **arguments)]

    torch.manual_seed(0)
    random.seed(0)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    whole = batches(epoch=0)
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert state[2] == np.random.get_state()[1].tolist()  # noqa: NPY002
    torch.manual_seed(5)
    random.seed(5)
    assert all(torch.equal(a, b) for a, b in zip(batches(epoch=0, start=1), whole[1:], strict=True))
    halves = [batches(epoch=0, rank=rank, world=2) for rank in range(2)]
    for x, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), x)
    assert not torch.equal(batches(epoch=1)[0], whole[0])


def test_augmentation_is_what_the_recipe_says():
    names = [type(step).__name__ for step in loader.train_transform(Augment(), 16).transforms]
    assert names[:-1] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]
    crop = loader.train_transform(Augment(crop_scale=[0.2, 0.9], crop_ratio=[0.5, 2.0]), 16).transforms[0]
    assert (crop.scale, crop.ratio) == ((0.2, 0.9), (0.5, 2.0))
    names = [type(step).__name__ for step in loader.train_transform(Augment(flip=False, randaug_ops=3), 16).transforms]
    assert names[:-1] == ["RandomResizedCropAndInterpolation", "RandAugment"]
    jitter = loader.train_transform(Augment(color_jitter=[0.4, 0.3, 0.2, 0.1]), 16).transforms[2]
    torch.testing.assert_close(jitter.contrast, (0.7, 1.3))
    torch.testing.assert_close(jitter.hue, (-0.1, 0.1))


def test_highest_magnitude_is_survived(rows):
    """At it timm's posterize asks for no bits, which newer versions of Pillow refuse."""
    settings = Augment(randaug_ops=4, randaug_magnitude=10, randaug_std=0.0)
    for epoch in range(12):
        for x, _ in train_batches(rows, settings, size=8, batch_size=23, seed=0, epoch=epoch):
            assert torch.isfinite(x).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_rows_are_left_out(folder, workers):
    for number in (3, 11):
        name = "a" if number < 10 else "b"
        (folder / "train" / name / f"{number:03d}.png").write_bytes(b"no image")
    split = load_split(Data(str(folder), resident=False, workers=workers, max_corrupt=0.1), "train")
    with pytest.warns(UserWarning, match=r"2 of 23 images .*003.png \(.*\), .*011.png"):
        got = flat(which(eval_batches(split, size=16, batch_size=4)))
    assert got == [n for n in range(23) if n not in (3, 11)]
    assert split.readable().tolist() == got
    assert len(flat(which(train_batches(split, STILL, size=16, batch_size=23, seed=0, epoch=0)))) == 21  # said before
    split = load_split(Data(str(folder), resident=False, workers=workers, max_corrupt=0.05), "train")
    with pytest.raises(ValueError, match=r"2 of 23 .*max_corrupt"):
        list(eval_batches(split, size=16, batch_size=4))


def test_a_batch_that_is_empty(folder):
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(b"no image")
    split = load_split(Data(str(folder), resident=False, workers=0, max_corrupt=1.0), "train")
    with pytest.raises(ValueError, match="None of a batch's images"):
        list(train_batches(split, STILL, size=16, batch_size=4, seed=0, epoch=0))


def test_which_are_resident(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache"))
    kinds = {(size, r): type(load_split(Data(str(folder), size=size, resident=r), "val")).__name__
             for size in (128, 129) for r in ("auto", True, False)}  # fmt: skip
    assert kinds == {(128, "auto"): "Split", (129, "auto"): "Photos", (128, True): "Split", (129, True): "Split",
                     (128, False): "Rows", (129, False): "Rows"}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- streams


@pytest.fixture
def parquet(tmp_path):
    labels = [i % 3 for i in range(50)]
    return write_parquet(tmp_path / "many", {"train": labels, "validation": labels[:11]}, list("abc"), shards=5)


def stream(source, split="train", workers=0, **settings):
    settings = {"train_images": 50, "shuffle_buffer": 8, **settings}
    return load_split(Data(str(source), streaming=True, workers=workers, **settings), split)


def epoch_of(split, epoch=0, settings=STILL, **arguments):
    return list(train_batches(split, settings, size=16, seed=1, epoch=epoch, **{"batch_size": 10, **arguments}))


def test_stream_is_shuffled_by_epoch(parquet):
    split = stream(parquet)
    assert (len(split), split.label_names, split.name) == (50, ["a", "b", "c"], "train")
    first, second = (which(epoch_of(split, epoch)) for epoch in (0, 1))
    assert [len(batch) for batch in first] == [10] * 5
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(50))
    assert first != second
    assert flat(first) != list(range(50))
    assert first == which(epoch_of(stream(parquet), 0))
    for x, y in epoch_of(split):
        assert y.tolist() == [number % 3 for number in which([(x, y)])[0]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_processes_share_a_stream(parquet, workers, world):
    """Five shards: two processes take turns within them, five have one each."""
    split = stream(parquet, workers=workers)
    parts = [which(epoch_of(split, rank=rank, world=world)) for rank in range(world)]
    assert all([len(batch) for batch in part] == [10 // world] * 5 for part in parts)
    if not workers or world == 5:  # else a worker's last, short batch is left out, and the stream begun anew
        assert sorted(flat(flat(parts))) == list(range(50))
    validation = stream(parquet, "validation", workers=workers)
    shown = [flat(which(eval_batches(validation, size=16, batch_size=3, rank=r, world=world))) for r in range(world)]
    assert sorted(flat(shown)) == list(range(11))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_stream_resumes(parquet, workers):
    """Three workers have two, two and one shard: one runs dry before the others."""
    split = stream(parquet, workers=workers, train_images=90)  # more than there are: begun anew
    whole = epoch_of(split, settings=STRONG, batch_size=6)
    assert len(whole) == 15
    for start in (1, 4, 8, 13):
        rest = epoch_of(split, settings=STRONG, batch_size=6, start=start)
        assert len(rest) == 15 - start
        for (x, y), (xx, yy) in zip(rest, whole[start:], strict=True):
            assert torch.equal(x, xx)
            assert torch.equal(y, yy)


def test_skipped_batches_are_not_decoded(parquet, monkeypatch):
    seen = []
    decode = loader.read_image
    monkeypatch.setattr("etf_zoo.trainer.data.loader.read_image", lambda data: seen.append(1) or decode(data))
    epoch_of(stream(parquet), start=3)
    assert len(seen) == 20


def test_a_folder_as_a_stream(folder):
    split = load_split(Data(str(folder), streaming=True, workers=0), "val")
    assert sorted(flat(which(eval_batches(split, size=16, batch_size=2)))) == [0, 1, 2]
    with pytest.raises(ValueError, match="max_corrupt"):  # its rows name files, which lie elsewhere
        list(eval_batches(dataclasses.replace(split, below=("/nowhere",)), size=16, batch_size=2))


def test_unreadable_in_a_stream(tmp_path):
    source = write_parquet(tmp_path / "many", {"train": [0, 1] * 12}, list("ab"), shards=2, broken=(5, 13))
    split = stream(source, train_images=24, max_corrupt=0.1)
    with pytest.warns(UserWarning, match="2 of 24 images .*sha256"):
        got = flat(which(eval_batches(split, size=16, batch_size=6)))
    assert sorted(got) == [n for n in range(24) if n not in (5, 13)]
    with pytest.raises(ValueError, match="max_corrupt"):
        list(eval_batches(stream(source, train_images=24, max_corrupt=0.01), size=16, batch_size=6))


def test_labels_of_a_stream(tmp_path):
    source = write_parquet(tmp_path / "plain", {"train": [0, 1, 4]})
    with pytest.raises(ValueError, match=r"set --data.num_classes"):
        stream(source)
    assert stream(source, num_classes=5).label_names == list("01234")
    assert [y.tolist() for _, y in eval_batches(stream(source, num_classes=5), size=8, batch_size=3)] == [[0, 1, 4]]
    with pytest.raises(ValueError, match="label 4 is none of 0 to 2"):
        list(eval_batches(stream(source, num_classes=3), size=8, batch_size=3))


def test_what_a_stream_cannot(parquet):
    split = stream(parquet)
    for use in (lambda: split.labels, lambda: split.subset(np.arange(3)), lambda: split.picture(0), split.readable):
        with pytest.raises(ValueError, match=r"data.streaming false"):
            use()
    with pytest.raises(ValueError, match="less than a batch"):
        epoch_of(stream(parquet, train_images=200), batch_size=100)
    split.count = 0
    with pytest.raises(ValueError, match=r"set --data.train_images"):
        epoch_of(split)
    with pytest.raises(ValueError, match=r"Cannot load split 'holdout' .*it has train, validation"):
        stream(parquet, "holdout")
