"""Arrays on disk: what they hold, when they are written anew, and what a full disk leaves."""

import dataclasses
import json
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from etf_zoo.trainer.data.batches import load_split
from etf_zoo.trainer.data.resident import Split, cache_root, write_prepared
from etf_zoo.trainer.data.sources import open_rows
from etf_zoo.trainer.prepare import Preparation, prepare
from etf_zoo.trainer.recipe.config import Data, parse
from tests.made_data import numbers, png, write_folder, write_parquet


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("ETF_ZOO_DATA", str(tmp_path))
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def entries(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").iterdir())


def test_key_is_content_and_size(tmp_path):
    source = write_folder(tmp_path / "made", {"train": {"a": [1, 2], "b": [3]}})
    first = load_split(Data("made", size=8), "train")
    assert (numbers(first.images), first.labels.tolist(), first.label_names) == ([1, 2, 3], [0, 0, 1], ["a", "b"])
    assert isinstance(first.images, np.memmap)
    for file in source.rglob("*.png"):
        file.touch()
    load_split(Data("made", size=8), "train")
    assert len(entries(tmp_path)) == 1  # the same content
    load_split(Data("made", size=9), "train")
    assert len(entries(tmp_path)) == 2
    (source / "train" / "b" / "003.png").write_bytes(png(7))
    assert numbers(load_split(Data("made", size=8), "train").images) == [1, 2, 7]
    (source / "train" / "b").rename(source / "train" / "c")
    assert load_split(Data("made", size=8), "train").label_names == ["a", "c"]
    assert len(entries(tmp_path)) == 4


def test_damage_on_disk_is_noticed(tmp_path):
    write_folder(tmp_path / "made", {"train": {"a": [1, 2], "b": [3]}})
    load_split(Data("made", size=8), "train").take(np.arange(3), torch.device("cpu"))
    (folder,) = (tmp_path / "cache").iterdir()
    for file, at in (("images.npy", -5), ("labels.npy", -8)):
        whole = (folder / file).read_bytes()
        flipped = bytearray(whole)
        flipped[at] ^= 1
        (folder / file).write_bytes(flipped)
        with pytest.raises(ValueError, match="damaged at image 2" if file == "images.npy" else "no complete"):
            load_split(Data("made", size=8), "train").take(np.array([2, 0]), torch.device("cpu"))
        (folder / file).write_bytes(whole)
    load_split(Data("made", size=8), "train").take(np.array([2, 0]), torch.device("cpu"))


def test_an_empty_variable_is_not_the_present_folder(monkeypatch):
    monkeypatch.setenv("ETF_ZOO_CACHE", "")
    assert cache_root() == Path.home() / ".cache" / "etf_zoo"


@pytest.mark.parametrize("size", [8, 200])  # resident, and not
def test_a_digest_tells_data_apart(tmp_path, size):
    def digest(split="train"):
        return load_split(Data("made", size=size), split).digest

    source = write_folder(tmp_path / "made", {"train": {"a": [1, 2], "b": [3]}, "val": {"a": [1, 2], "b": [3]}})
    first = digest()
    for file in source.rglob("*.png"):
        file.touch()
    assert digest() == first
    assert digest("val") == first  # the same images and labels
    part = load_split(Data("made", size=size), "train")
    subsets = [part.subset(np.array(rows)).digest for rows in ([0, 1], [0, 2], [1, 0])]
    assert len({first, *subsets}) == 4
    (source / "train" / "b").rename(source / "train" / "c")
    renamed = digest()
    (source / "train" / "c").rename(source / "train" / "b")
    image = source / "train" / "b" / "003.png"
    before = image.read_bytes()
    image.write_bytes(png(7))
    other = digest()
    image.write_bytes(before)
    assert digest() == first
    assert len({first, renamed, other}) == 3


def test_what_a_kill_left_is_cleared_after_a_day(tmp_path):
    write_folder(tmp_path / "made", {"train": {"a": [1], "b": [2]}})
    (tmp_path / "cache" / ".writing-old").mkdir(parents=True)
    (tmp_path / "cache" / ".writing-new").mkdir()
    os.utime(tmp_path / "cache" / ".writing-old", (0, 0))
    load_split(Data("made", size=8), "train")
    assert [name for name in entries(tmp_path) if name.startswith(".writing")] == [".writing-new"]


@pytest.mark.parametrize("piece", [512, 2])  # in this process, and by workers
def test_broken_images_are_left_out_and_said(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("etf_zoo.trainer.data.resident.PIECE", piece)
    write_parquet(tmp_path / "made", {"train": [0, 1, 0, 1, 2]}, names=["x", "y", "z"], broken=(1, 4))
    said = r"2 of 5 images of .*made cannot be read: row 1 of train \(.*\), row 4 of train"
    for _ in range(2):  # decoded, and found decoded
        with pytest.warns(UserWarning, match=said):
            split = load_split(Data("made", size=8, max_corrupt=0.4), "train")
        assert (numbers(split.images), split.labels.tolist(), len(split)) == ([0, 2, 3], [0, 0, 1], 3)
        assert list(split.corrupt) == ["row 1 of train", "row 4 of train"]
        assert split.images.base is None or split.images.flags["C_CONTIGUOUS"]
    with pytest.raises(ValueError, match=r"2 of 5 .* mend or remove them"):
        load_split(Data("made", size=8, max_corrupt=0.3), "train")


def test_too_many_broken_images_leave_nothing(tmp_path):
    write_parquet(tmp_path / "made", {"train": [0, 1, 0]}, broken=(1,))
    with pytest.raises(ValueError, match=r"1 of 3 .*more than --data.max_corrupt 0.001 allows"):
        load_split(Data("made", size=8), "train")
    assert entries(tmp_path) == []


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    write_parquet(tmp_path / "made", {"train": [0, 1, 0]})
    message = r"No room in .*cache for .* GB of images.*ETF_ZOO_CACHE"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # the disk fills up while writing
        with pytest.raises(OSError, match=message):
            load_split(Data("made", size=32), "train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(tmp_path) == []
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("etf_zoo.trainer.data.resident.shutil.disk_usage", lambda path: usage)  # and is full before
    with pytest.raises(OSError, match=message):
        load_split(Data("made", size=32), "train")
    monkeypatch.undo()


def test_another_process_was_first(tmp_path, monkeypatch):
    write_folder(tmp_path / "made", {"train": {"a": [1], "b": [3]}})
    rows = open_rows(Data("made", size=8), "train", resident=True)
    write_prepared(rows, 8, tmp_path / "out")
    before = (tmp_path / "out" / "images.npy").stat().st_ino
    write_prepared(rows, 8, tmp_path / "out")
    assert (tmp_path / "out" / "images.npy").stat().st_ino == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "out"]


def test_subset():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    split = Split(images, np.arange(6) % 3, list("abc"), "made up")
    part = split.subset(np.array([5, 0, 4, 2])).subset(np.array([True, True, False, True]))
    assert (part.labels.tolist(), len(part), part.class_counts()) == ([2, 0, 2], 3, [1, 0, 2])
    got, labels = part.take(np.array([2, 0]), torch.device("cpu"))
    assert (got[:, 0, 0, 0].tolist(), labels.tolist()) == ([2, 5], [2, 2])
    assert part.picture(1).tolist() == images[0].tolist()
    assert part.images is images


# ----------------------------------------------------------------------------------------------------------- prepared


@pytest.fixture
def prepared(tmp_path):
    write_parquet(tmp_path / "made", {"train": [1, 0, 1], "validation": [0, 1]}, names=["x", "y"])
    (tmp_path / "made" / "hierarchy.json").write_text('{"x": "root", "y": "root"}')
    settings = parse(Preparation, ["--data.source", "made", "--data.size", "8", "--out", str(tmp_path / "out")])
    prepare(settings)
    return settings


def test_prepared_folder_needs_numpy_alone(tmp_path, prepared, monkeypatch):
    expected = load_split(Data("made", size=8), "train")
    for library in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, library, None)
    train, val = (load_split(Data(str(tmp_path / "out"), size=8), name) for name in ("train", "validation"))
    assert np.array_equal(train.images, expected.images)
    assert (train.labels.tolist(), val.labels.tolist()) == ([1, 0, 1], [0, 1])
    assert (train.label_names, train.source, train.name, val.name) == (["x", "y"], "made", "train", "validation")
    assert (tmp_path / "out" / "hierarchy.json").read_text() == '{"x": "root", "y": "root"}'


def test_preparing_class_folders_alone(tmp_path, capsys):
    write_folder(tmp_path / "classes", {".": {"a": range(10), "b": range(10, 20)}})
    prepare(parse(Preparation, ["--data.source", "classes", "--data.size", "8", "--out", str(tmp_path / "made")]))
    assert "16 images of 8 pixels, 2 classes" in capsys.readouterr().out
    data = Data(str(tmp_path / "made"))
    train, test = (load_split(dataclasses.replace(data, size=8), name) for name in ("train", "validation"))
    assert sorted(numbers(train.images) + numbers(test.images)) == list(range(20))
    assert (len(test), test.name) == (4, "held out")


def test_preparing_goes_on_where_it_stopped(tmp_path, prepared):
    kept = (tmp_path / "out" / "train" / "images.npy").stat().st_ino
    (tmp_path / "out" / "validation" / "meta.json").unlink()
    with pytest.raises(ValueError, match="delete it and prepare it again"):
        prepare(prepared)
    for file in (tmp_path / "out" / "validation").iterdir():
        file.unlink()
    (tmp_path / "out" / "validation").rmdir()
    prepare(prepared)
    assert load_split(Data(str(tmp_path / "out"), size=8), "validation").labels.tolist() == [0, 1]
    assert (tmp_path / "out" / "train" / "images.npy").stat().st_ino == kept


@pytest.mark.parametrize(
    ("settings", "split", "message"),
    [
        ({"size": 16}, "train", "prepared with data.size 8, not 16: give --data.size 8"),
        ({"size": 8, "label_column": "coarse"}, "train", "data.label_column 'label', not 'coarse'"),
        ({"size": 8}, "holdout", "it has train, validation"),
    ],
)
def test_prepared_otherwise(tmp_path, prepared, settings, split, message):
    with pytest.raises(ValueError, match=message):
        load_split(Data(str(tmp_path / "out"), **settings), split)


def test_damaged_folder(tmp_path, prepared):
    folder = tmp_path / "out" / "train"
    whole = (folder / "images.npy").read_bytes()
    (folder / "images.npy").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="delete it and prepare it again"):
        load_split(Data(str(tmp_path / "out"), size=8), "train")
    (folder / "images.npy").write_bytes(whole)
    np.save(folder / "labels.npy", np.arange(2))
    with pytest.raises(ValueError, match="holds no complete images"):
        load_split(Data(str(tmp_path / "out"), size=8), "train")
    meta = json.loads((folder / "meta.json").read_text())
    del meta["names"]
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="names"):
        load_split(Data(str(tmp_path / "out"), size=8), "train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Preparation(Data("made")), "--out"),
        (Preparation(Data("digits"), "x"), "digits needs none"),
        (Preparation(Data("made", streaming=True), "x"), "at hand as a whole"),
    ],
)
def test_nothing_to_prepare(settings, message):
    with pytest.raises(ValueError, match=message):
        prepare(settings)
